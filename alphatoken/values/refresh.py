"""Bringing a scorer up to date before each optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.distributed.adam_scale import AdamScale, FirstMoment
from alphatoken.values.estimator import Coefficients, Scorer


@dataclass(frozen=True)
class SteeringLosses:
    """Token losses of one micro-batch that steers values, seen while its signals were taken in."""

    batch: Batch
    nll_BT: Tensor
    """(B, T) float32, zero off the response."""
    is_held_out: bool
    """Whether its rows are held out; else they are training rows that B is of."""


class HeldOutRefresh:
    """Gives a scorer the current weights and drift before every optimizer step from `start` on, and
    new held-out signals before every `every`-th; `start` is a multiple of it.

    `draw` returns this rank's micro-batches of a draw of held-out rows, counted from 0;
    `draw_contrast` those of other training rows than an optimizer step scores. `coefficients` are
    what the losses of these rows count, None for once each. Every rank must make
    the same calls.
    """

    def __init__(
        self,
        *,
        scorer: Scorer,
        draw: Callable[[int], Sequence[Batch]],
        draw_contrast: Callable[[int], Sequence[Batch]],
        every: int,
        start: int,
        adam_scale: AdamScale | None,
        first_moment: FirstMoment | None,
        coefficients: Coefficients | None = None,
    ) -> None:
        self._scorer = scorer
        self._draw = draw
        self._draw_contrast = draw_contrast
        self._every = every
        self._start = start
        self._moments = [each for each in (adam_scale, first_moment) if each is not None]
        self._coefficients = coefficients

    def before(self, step: int, own_tokens: int) -> list[SteeringLosses]:
        """Refreshes the scorer before optimizer step `step` (from 0).

        `own_tokens`: response tokens that this rank will score in the step; it helps to choose the
        cheaper contraction. Returns the losses of held-out rows, and of those of B, where new ones
        were drawn.
        """
        if step < self._start:
            return []
        for moment in self._moments:
            moment.after(step)
        draw, waited = divmod(step, self._every)
        if waited:
            self._scorer.refresh(None)
            return []
        batches = self._draw(draw)
        contrast = self._draw_contrast(step) if self._scorer.needs_contrast_rows else None
        losses = self._scorer.refresh(
            batches, own_tokens * self._every, contrast, self._coefficients
        )
        steering = [*batches, *(contrast or ())]
        return [
            SteeringLosses(batch, nll_BT, is_held_out=number < len(batches))
            for number, (batch, nll_BT) in enumerate(zip(steering, losses, strict=True))
        ]

    def can_be_rebuilt_after(self, done: int) -> bool:
        """Whether a run continued after `done` steps would draw new signals at once: held-out
        signals are no part of a checkpoint."""
        return done < self._start or done % self._every == 0
