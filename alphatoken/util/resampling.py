"""How sure a mean over items is: 95 % intervals by resampling the items (percentile bootstrap).

Shape legend: N items, S resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphatoken.util.means import mean

RESAMPLES = 2000
Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_json(self) -> dict[str, float]:
        return {"value": self.value, "low": self.low, "high": self.high}


def everything(items: int) -> Floats:
    """The one "resample" that has each item once, (1, N)."""
    return np.ones((1, items))


def resampled(items: int, resamples: int, seed: int) -> Floats:
    """How often each item is in each resample of as many items, drawn with replacement, (S, N)."""
    rng = np.random.default_rng(seed)
    drawn_SN = rng.integers(items, size=(resamples, items))
    return np.stack([np.bincount(drawn_N, minlength=items) for drawn_N in drawn_SN]).astype(float)


def estimate(value: float, resamples_S: Floats) -> Estimate:
    """A value with the interval that holds the middle 95 % of its resamples."""
    low, high = np.percentile(resamples_S, (2.5, 97.5))
    return Estimate(value, float(low), float(high))


def mean_interval(values: Sequence[float], seed: int = 0) -> Estimate:
    """The mean of values with its interval, by RESAMPLES resamples; nan for both ends where the
    mean is not finite. Raises ValueError for none."""
    middle = mean(values)
    if not math.isfinite(middle):
        return Estimate(middle, math.nan, math.nan)
    resamples_S = resampled(len(values), RESAMPLES, seed) @ np.array(values) / len(values)
    return estimate(middle, resamples_S)
