"""Intervals of means by bootstrap."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

RESAMPLES = 2000


def mean_interval(
    values: Sequence[float], share: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """The mean of `values` and the interval that holds `share` of the means of resamples of them
    (percentile bootstrap, RESAMPLES of them; the same numbers for the same seed). Raises ValueError
    for no values."""
    if not values:
        raise ValueError("no values have a mean")
    drawn = random.Random(seed)
    count = len(values)
    means = sorted(math.fsum(drawn.choices(values, k=count)) / count for _ in range(RESAMPLES))
    outside = (1 - share) / 2 * (RESAMPLES - 1)
    return math.fsum(values) / count, means[round(outside)], means[round(RESAMPLES - 1 - outside)]
