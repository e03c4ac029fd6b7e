"""Numbers over items, with 95 % intervals by resampling the items.

Shape legend: N items, S resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphatoken.config.evaluation import TASKS, Better
from alphatoken.util.resampling import Estimate, Floats, estimate, everything, resampled

Item = Mapping[str, Any]
"""What is known of one item, by name; the numbers that are measured among it."""


@dataclass(frozen=True)
class Measure:
    """A number over items: the sum of one column over that of another."""

    name: str
    better: Better
    total: str
    per: str | None = None
    """By whose sum the total is divided; None is the number of items."""
    exp: bool = False
    """Whether the quotient is an exponent."""

    @property
    def is_share(self) -> bool:
        """Whether it is between 0 and 1."""
        return self.per is None

    def of(self, items: Sequence[Item], counts_SN: Floats) -> Floats:
        """The measure of each resample, (S,); `counts_SN` tell how often each item is in it."""
        total_N = np.array([item[self.total] for item in items], dtype=np.float64)
        per_N = np.array(
            [1.0 if self.per is None else item[self.per] for item in items], dtype=np.float64
        )
        found_S: Floats = (counts_SN @ total_N) / (counts_SN @ per_N)
        return np.exp(found_S) if self.exp else found_S


def _measures(task: str) -> tuple[Measure, ...]:
    quotients = {
        "loss": ("nll", "tokens", False),
        "perplexity": ("nll", "tokens", True),
        "byte_perplexity": ("nll", "bytes", True),
    }
    found = []
    for name, better in TASKS[task].measures.items():
        total, per, exp = quotients.get(name, (name, None, False))
        found.append(Measure(name, better, total, per, exp))
    return tuple(found)


MEASURES: dict[str, tuple[Measure, ...]] = {task: _measures(task) for task in TASKS}
"""What each task measures; the first is the one that comparisons are made by."""


def measured(task: str, items: Sequence[Item], resamples: int, seed: int) -> dict[str, Estimate]:
    """Every measure of a task by name, with its interval."""
    counts_SN = resampled(len(items), resamples, seed)
    return {
        each.name: estimate(
            float(each.of(items, everything(len(items)))[0]), each.of(items, counts_SN)
        )
        for each in MEASURES[task]
    }
