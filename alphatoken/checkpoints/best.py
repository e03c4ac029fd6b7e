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
    questions: str | None = None
    """A hash of what was asked; None where that is rows of the run itself, or is not known."""

    @classmethod
    def from_json(cls, values: dict[str, Any] | None) -> Best | None:
        """What `as_json` gave; None of nothing, as in older checkpoints."""
        return None if values is None else cls(**values)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def updated(
    best: Best | None,
    metric: str,
    better: Better,
    value: float,
    step: int,
    questions: str | None = None,
) -> Best:
    """The best after another evaluation: that one, or the one before with one more that was not
    better. An equal value is not better, nor is NaN."""
    now = Best(metric, value, step, questions=questions)
    if best is None or math.isnan(best.value):
        return now
    if (value > best.value) if better == "higher" else (value < best.value):
        return now
    return replace(best, stale=best.stale + 1, questions=questions)


def why_void(best: Best, metric: str, questions: str | None) -> str | None:
    """Why later values of a metric cannot be compared with the best so far; None where they can.
    Checkpoints of earlier versions do not tell what was asked, and count."""
    if best.metric != metric:
        return f"the best so far was by {best.metric}: {metric} starts anew"
    if best.questions is not None and best.questions != questions:
        return (
            f"{metric} is of other questions than so far (rows or settings of the task changed): "
            "the best starts anew"
        )
    return None
