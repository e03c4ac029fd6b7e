"""Responses of a micro-batch as people read them: tokens as text, with what is known of each.

Shape legend: B rows, T loss positions (position t predicts token t + 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from alphatoken.report.responses import LOSS, VALUE, ValuedResponse
from alphatoken.training.valued_model import StepOutput

MOST_TOKENS = 512
"""Response tokens that are kept of one response."""
GIVEN_TOKENS = 150
"""Tokens that are kept of what stands before a response, or between its turns."""
DIGITS = 6
"""Significant digits of the numbers that are kept."""
REPLACEMENT = "\ufffd"
BYTE_OF = {letter: value for value, letter in bytes_to_unicode().items()}


@dataclass(frozen=True)
class ResponseReader:
    """Reads responses of micro-batches of a run."""

    tokenizer: PreTrainedTokenizerBase
    location: Callable[[int], str]
    """Where a row of the data set came from."""
    branches: Sequence[str] = ()
    """The responses of a pair."""

    def read(self, step: int, output: StepOutput, most: int) -> list[ValuedResponse]:
        """The first `most` responses of the micro-batch of this rank; fewer where it has fewer."""
        facts = output["facts"]
        documents_BT = facts.batch["document_ids"].cpu()
        response_BT = facts.response_BT.cpu()
        columns = {LOSS: facts.nll_BT, **facts.values}
        found: list[ValuedResponse] = []
        for document, row in enumerate(facts.batch["rows"].tolist()):
            own_BT = (documents_BT == document) & response_BT
            if len(found) == most:
                break
            if not bool(own_BT.any()):
                continue
            index, *_ = own_BT.nonzero()[0].tolist()
            own_T = own_BT[index].nonzero()[:, 0]
            first = int((documents_BT[index] == document).nonzero()[0, 0])
            shown = own_T[:MOST_TOKENS]
            ids = facts.batch["input_ids"][index].tolist()
            positions = [t + 1 for t in shown.tolist()]
            found.append(
                ValuedResponse(
                    step=step,
                    where=self.location(row),
                    branch=self.branches[document % len(self.branches)] if self.branches else "",
                    length=len(own_T),
                    given=tuple(self._given(ids, first, positions)),
                    tokens=tuple(texts_of(self.tokenizer, ids, positions)),
                    ends_turn=tuple(facts.protected_BT[index].cpu()[shown].tolist()),
                    weights=_numbers(output["weight_BT"][index], shown),
                    columns=_known(
                        {name: _numbers(each[index], shown) for name, each in columns.items()}
                    ),
                )
            )
        return found

    def _given(
        self, ids: Sequence[int], first: int, positions: Sequence[int]
    ) -> list[tuple[int, str]]:
        """What stands before the response tokens at `positions`, by the number of the one that
        follows it; `first` is where the document begins."""
        found, end = [], first
        for number, position in enumerate(positions):
            if position > end:
                begin = max(end, position - GIVEN_TOKENS)
                text = self.tokenizer.decode(ids[begin:position])
                found.append((number, f"… {text}" if begin > end else text))
            end = position + 1
        return found


def texts_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], positions: Sequence[int]
) -> list[str]:
    """The text of the tokens at `positions`, as it reads behind the token before it: some
    tokenizers drop the space that a lone word begins with. Of a part of a character its bytes, as
    Python writes them."""
    return [_text(tokenizer, ids[max(each - 1, 0) : each], ids[each]) for each in positions]


def _text(tokenizer: PreTrainedTokenizerBase, before: Sequence[int], token: int) -> str:
    def decoded(ids: Sequence[int]) -> str:
        text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        return text

    alone = decoded([token])
    if REPLACEMENT in alone:
        return _bytes_of(str(tokenizer.convert_ids_to_tokens(token))) or alone
    prefix, both = decoded(before), decoded([*before, token])
    continues = before and REPLACEMENT not in both and both.startswith(prefix)
    return both.removeprefix(prefix) if continues else alone


def _bytes_of(piece: str) -> str:
    """What a piece of a byte-level vocabulary, or one like `<0xF0>`, stands for; empty for
    another."""
    if piece.startswith("<0x") and piece.endswith(">"):
        return f"\\x{piece[3:-1].lower()}"
    if not all(letter in BYTE_OF for letter in piece):
        return ""
    return bytes(BYTE_OF[letter] for letter in piece).decode("utf-8", "backslashreplace")


def _numbers(value_T: Tensor, shown: Tensor) -> tuple[float, ...]:
    numbers = value_T.detach().to("cpu", torch.float64)[shown].tolist()
    return tuple(float(f"{number:.{DIGITS}g}") for number in numbers)


def _known(columns: dict[str, tuple[float, ...]]) -> dict[str, tuple[float, ...]]:
    """Without the terms that a run does not compute one by one; the value last."""
    known = {
        name: numbers
        for name, numbers in columns.items()
        if name == LOSS or not all(map(math.isnan, numbers))
    }
    value = {VALUE: known.pop(VALUE)} if VALUE in known else {}
    return known | value
