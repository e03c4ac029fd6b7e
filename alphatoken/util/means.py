"""Means of numbers that need not be finite."""

from __future__ import annotations

import math
from collections.abc import Sequence


def mean(values: Sequence[float]) -> float:
    """The mean; nan where one of them is, or where infinities of both signs meet, as in a run that
    diverged. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values have a mean")
    try:
        return math.fsum(values) / len(values)
    except ValueError:  # which fsum raises for inf - inf
        return math.nan
