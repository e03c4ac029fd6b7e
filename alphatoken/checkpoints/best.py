"""The best evaluation of a run so far: which checkpoint is kept for it, and how long ago it was."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from alphatoken.config.evaluation import Better


@dataclass(frozen=True)
class Best:
    """The best evaluation that a run has made of `train.keep_best`."""

    metric: str
    value: float
    step: int
    """Optimizer steps that were taken when it was made."""
    stale: int = 0
    """Evaluations since then, none of which was better."""

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> Best | None:
        """What `as_json` gave; None of nothing, as in older checkpoints."""
        return None if values is None else cls(**values)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def updated(best: Best | None, metric: str, better: Better, value: float, step: int) -> Best:
    """The best after another evaluation: that one, or the one before with one more that was not
    better. An equal value is not better, nor is NaN."""
    if best is None or math.isnan(best.value):
        return Best(metric, value, step)
    if (value > best.value) if better == "higher" else (value < best.value):
        return Best(metric, value, step)
    return replace(best, stale=best.stale + 1)
