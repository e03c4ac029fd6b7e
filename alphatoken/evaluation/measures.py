"""Numbers over items, with 95 % intervals by resampling the items.

Shape legend: N items, S resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alphatoken.config.evaluation import TASKS, Better
from alphatoken.util.resampling import Estimate, Floats, estimate, resampled_sums

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

    def value(self, items: Sequence[Item]) -> float:
        """The measure of these items."""
        return float(self.quotient(self.columns(items).sum(0, keepdims=True))[0])

    def columns(self, items: Sequence[Item]) -> Floats:
        """What is summed, and by whose sum that is divided, (N, 2)."""
        return np.array(
            [(item[self.total], 1.0 if self.per is None else item[self.per]) for item in items],
            dtype=np.float64,
        )

    def quotient(self, sums_S2: Floats) -> Floats:
        """The measure of each of some sums of its columns, (S,)."""
        found_S: Floats = sums_S2[:, 0] / sums_S2[:, 1]
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


def resampled(
    measures: Sequence[Measure], items: Sequence[Item], resamples: int, seed: int
) -> list[Floats]:
    """Each measure of each resample of the items, (S,). The resamples are those of any measures of
    as many items with this seed."""
    columns = np.concatenate([each.columns(items) for each in measures], axis=1)
    sums = resampled_sums(columns, resamples, seed)
    return [each.quotient(sums[:, 2 * n : 2 * n + 2]) for n, each in enumerate(measures)]


def measured(task: str, items: Sequence[Item], resamples: int, seed: int) -> dict[str, Estimate]:
    """Every measure of a task by name, with its interval."""
    measures = MEASURES[task]
    found = zip(measures, resampled(measures, items, resamples, seed), strict=True)
    return {each.name: estimate(each.value(items), value_S) for each, value_S in found}
