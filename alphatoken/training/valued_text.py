"""A response with its tokens marked by value."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from alphatoken.selection.facts import TokenFacts


@dataclass(frozen=True)
class ValuedText:
    """One response, decoded token by token, with the value of each token."""

    tokens: list[str]
    values: list[float]


def valued_text(tokenizer: PreTrainedTokenizerBase, facts: TokenFacts) -> ValuedText | None:
    """The first response of a micro-batch, token by token, with its values; None where there is
    none."""
    first_BT = facts.response_BT & (facts.batch["document_ids"] == 0)
    if "composite" not in facts.values or not bool(first_BT.any()):
        return None
    (row, *_), positions = (index.tolist() for index in first_BT.nonzero(as_tuple=True))
    ids = facts.batch["input_ids"][row].tolist()
    return ValuedText(
        [tokenizer.decode([ids[t + 1]]) for t in positions],
        facts.composite_BT[first_BT].tolist(),
    )
