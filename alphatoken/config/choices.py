"""Names that a field may have, where others can add to them while the program runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic_core import CoreSchema, PydanticKnownError, core_schema


def is_flash(attention: str) -> bool:
    """Whether an attention kernel, by its name in `transformers`, is one of flash attention's, from
    a package or from the hub."""
    return "flash" in attention


class OneOf:
    """Annotates a string field whose values are the keys of a table.

    It is to `Literal` what a registry is to a fixed list: errors and `--help` read the same, but
    names that are registered later are accepted as well.
    """

    def __init__(self, table: Mapping[str, object]) -> None:
        self._table = table

    @property
    def names(self) -> tuple[str, ...]:
        """The names that are registered now, in the order of their registration."""
        return tuple(self._table)

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validated)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.names)}

    def _validated(self, value: Any) -> str:
        if isinstance(value, str) and value in self._table:
            return value
        *others, last = (repr(name) for name in self._table)
        expected = f"{', '.join(others)} or {last}" if others else last
        raise PydanticKnownError("literal_error", {"expected": expected})


def register(table: dict[str, Any], name: str, entry: Any, notion: str) -> None:
    """Adds an entry to a table of names. Raises ValueError where the name is taken.

    `notion` is what the table holds, for the message.
    """
    if name in table:
        raise ValueError(f"there is a {notion} {name!r} already; choose another name")
    table[name] = entry
