"""Texts as tokens: contexts with continuations, and texts in parts that a model can read."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from alphatoken.data.cache import Document
from alphatoken.errors import UserError
from alphatoken.evaluation.judge import document


def tokens_of_text(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """A text's tokens, with what the tokenizer puts in front of them but no EOS behind."""
    ids: list[int] = list(tokenizer(text)["input_ids"])
    if ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(str(tokenizer.eos_token)):
        del ids[-1]
    return ids


def continued(
    tokenizer: PreTrainedTokenizerBase, context: str, continuation: str, where: str
) -> tuple[list[int], int]:
    """The tokens of a context with its continuation, and the place at which the continuation
    begins, as lm-eval finds it. Raises UserError where nothing is left of either."""
    context, spaces = context.rstrip(), context[len(context.rstrip()) :]
    before, whole = (
        tokens_of_text(tokenizer, text) for text in (context, context + spaces + continuation)
    )
    if not before or len(before) >= len(whole):
        raise UserError(
            f"{where}: the context or the choice {continuation!r} is no token of its own"
        )
    return whole, len(before)


def windows(ids: Sequence[int], width: int) -> list[Document]:
    """Documents of at most `width` tokens that together predict every token but the first once; the
    last one reads as much before its own tokens as it can."""
    found = []
    for start in range(1, len(ids), width - 1):
        end = min(start + width - 1, len(ids))
        begin = max(0, end - width)
        found.append(document(ids[begin:end], start - begin))
    return found
