"""What a run trains on, as a person reads it: tokenised rows as text, with what is trained told
apart."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from alphatoken.data.cache import TokenDataset

TRAINED = "bold green"
GIVEN = "dim"


def previews(
    dataset: TokenDataset, tokenizer: PreTrainedTokenizerBase, rows: int
) -> Iterator[tuple[str, list[Text]]]:
    """The first rows of a data set: where each comes from, and its documents with `[[ ]]` around
    what is trained, in colour besides."""
    for row in range(min(rows, len(dataset))):
        documents = [marked(ids.tolist(), mask.tolist(), tokenizer) for ids, mask in dataset[row]]
        yield dataset.location(row), documents


def marked(ids: Sequence[int], mask: Sequence[bool], tokenizer: PreTrainedTokenizerBase) -> Text:
    """Tokens as text, with `[[ ]]` around what is trained, in colour besides."""
    text = Text()
    for trained, group in itertools.groupby(zip(ids, mask, strict=True), key=lambda each: each[1]):
        part = tokenizer.decode([token for token, _ in group])
        text.append(f"[[{part}]]" if trained else part, style=TRAINED if trained else GIVEN)
    return text
