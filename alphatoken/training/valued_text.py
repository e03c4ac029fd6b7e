"""A response with its tokens marked by value."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alphatoken.batch import Batch
from alphatoken.selection.facts import Assessment


@dataclass(frozen=True)
class ValuedText:
    """One response, decoded token by token, with the value of each token."""

    tokens: list[str]
    values: list[float]


def valued_text(
    tokenizer: PreTrainedTokenizerBase, batch: Batch, assessment: Assessment
) -> ValuedText | None:
    """The first response of a batch, token by token, with its values; None where there is none."""
    first_BT = assessment["response_BT"] & (batch["document_ids"] == 0)
    if "composite" not in assessment["values"] or not bool(first_BT.any()):
        return None
    (row, *_), positions = (index.tolist() for index in first_BT.nonzero(as_tuple=True))
    ids = batch["input_ids"][row].tolist()
    return ValuedText(
        [tokenizer.decode([ids[t + 1]]) for t in positions],
        assessment["values"]["composite"][first_BT].tolist(),
    )
