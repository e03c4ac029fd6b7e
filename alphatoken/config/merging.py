"""Values of sections laid over others, as plain dictionaries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from alphatoken.config.selection import replaced_by, replaced_by_veto

REPLACED: dict[Any, Callable[[Mapping[str, Any], Mapping[str, Any]], set[str]]] = {
    **dict.fromkeys(("selection", "chosen", "rejected"), replaced_by),
    "veto": replaced_by_veto,
}
"""Of sections by name, which keys of what lies below the keys above make meaningless."""


def merged(values: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """`values` with the keys of `over` in their place, section by section; lists are replaced, and
    of a selection what means nothing beside `over`."""
    both = values | over
    for key in values.keys() & over.keys():
        before, after = values[key], over[key]
        if isinstance(before, dict) and isinstance(after, dict):
            overrides = {name: value for name, value in after.items() if value is not None}
            replaced = REPLACED[key](overrides, before) if key in REPLACED else set()
            left = {name: value for name, value in before.items() if name not in replaced}
            both[key] = merged(left, after)
    return both
