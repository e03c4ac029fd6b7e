"""Responses with what is known of each of their tokens, as a run keeps them in
`valued_tokens.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from alphatoken.errors import UserError

LOSS, VALUE = "loss", "composite"


class ValuedResponse(BaseModel):
    """One response of an optimizer step, token by token."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    step: int
    where: str
    """`file:line` of its row."""
    branch: str = ""
    """Which response of a pair it is."""
    length: int
    """Its tokens; the first of them are here."""
    given: tuple[tuple[int, str], ...]
    """What the model was given: the end of a text, and the number of the token that follows it."""
    tokens: tuple[str, ...]
    ends_turn: tuple[bool, ...]
    """Whether a token ends the turn."""
    weights: tuple[float, ...]
    """What each counts in the objective; 0 where it was dropped."""
    columns: dict[str, tuple[float, ...]]
    """`loss`, and the value and its terms where tokens were valued."""

    @model_validator(mode="after")
    def _is_even(self) -> Self:
        lengths = {len(each) for each in (self.ends_turn, self.weights, *self.columns.values())}
        if lengths != {len(self.tokens)} or LOSS not in self.columns:
            raise ValueError("every token needs a number of each column, and a loss")
        return self

    @property
    def key(self) -> tuple[int, str, str]:
        """What is the same of a response in two runs: step, row, and which of a pair it is."""
        return self.step, self.where, self.branch

    @property
    def is_valued(self) -> bool:
        return VALUE in self.columns


def append_responses(file: Path, responses: Iterable[ValuedResponse]) -> None:
    """Adds a line for each. Raises OSError when the disk refuses."""
    with file.open("a", encoding="utf-8") as lines:
        lines.writelines(response.model_dump_json() + "\n" for response in responses)


def read_responses(file: Path) -> list[ValuedResponse]:
    """All that a run has kept; none where there is no file. Raises UserError, with file and line,
    for what is none of them."""
    found: list[ValuedResponse] = []
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    if not text:
        return found
    # Not splitlines: a token may hold any other line separator of Unicode.
    for number, line in enumerate(text.removesuffix("\n").split("\n"), start=1):
        try:
            found.append(ValuedResponse.model_validate_json(line))
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False, include_input=False)
            place = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{file}:{number} is no response of a run ({place or 'line'}: {first['msg']}); "
                "delete the line, or the file: the report is then made without tokens"
            ) from None
    return found
