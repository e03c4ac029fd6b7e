"""How sure a mean over items is: 95 % intervals by resampling the items (percentile bootstrap).

Shape legend: N items, K numbers of each, S resamples.
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


DRAWS = 2**22
"""How many draws are held at once, but at least those of one resample."""


def resampled_sums(values_NK: Floats, resamples: int, seed: int) -> Floats:
    """The sums over each resample of as many items, drawn with replacement, (S, K)."""
    rng = np.random.default_rng(seed)
    items = len(values_NK)
    at_once = max(1, DRAWS // items)
    found = []
    for start in range(0, resamples, at_once):
        drawn_SN = rng.integers(items, size=(min(at_once, resamples - start), items))
        counts_SN = np.stack([np.bincount(drawn_N, minlength=items) for drawn_N in drawn_SN])
        found.append(counts_SN.astype(float) @ values_NK)
    return np.concatenate(found)


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
    sums_SK = resampled_sums(np.array(values)[:, None], RESAMPLES, seed)
    return estimate(middle, sums_SK[:, 0] / len(values))
