"""Sizes and numbers in the sentences that people read."""

from __future__ import annotations

import json


def size(count: float) -> str:
    """Bytes in the unit that reads best."""
    for unit, factor in (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= factor:
            return f"{count / factor:.4g} {unit}"
    return f"{count:.0f} bytes"


def as_json(value: object) -> str:
    """A value as JSON writes it; what JSON does not know, such as a date, as text."""
    return json.dumps(value, default=str)


def plural(count: int, what: str) -> str:
    """`1 row`, `2 rows`, `3 passes`."""
    ending = "" if count == 1 else "es" if what.endswith(("s", "ch")) else "s"
    return f"{count} {what}{ending}"
