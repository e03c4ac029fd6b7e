"""Asked to stop by SIGTERM or SIGUSR1: all ranks agree when, and whether there is time for the step
or the evaluation they are in."""

from __future__ import annotations

import signal
import time
from contextlib import AbstractContextManager
from types import FrameType, TracebackType
from typing import Any

import torch

from alphatoken.distributed import collectives

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class WindowDroppedError(Exception):
    """The optimizer step under way is given up; weights and optimizer are as after the step
    before."""


class EvaluationDroppedError(Exception):
    """The evaluation under way is given up; it has changed nothing that is trained."""


class StopRequest(AbstractContextManager["StopRequest"]):
    """Inside, SIGTERM and SIGUSR1 do not end the process but are remembered. Signals to one rank
    count for all.

    grace: seconds from the signal to the end by force; None if a step and an evaluation always have
    time to finish.
    """

    def __init__(self, device: torch.device, grace: float | None) -> None:
        self._device = device
        self._grace = grace
        self._asked_at: float | None = None
        self._known: dict[str, float] = {}
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def is_agreed(self) -> bool:
        """Whether any rank was asked. Every rank must call it, between steps: an all-reduce of one
        number."""
        return self._any(on_this_rank=self._asked_at is not None)

    def took(self, what: str, seconds: float) -> None:
        """Learns how long a `micro-batch`, an `evaluation` or a `save` takes."""
        self._known[what] = seconds

    def drop_if_short(self, micro_batches: int, *, evaluates: bool) -> None:
        """Raises WindowDroppedError on every rank if some rank has too little time for what is left
        of the step.

        That is so many micro-batches, an evaluation if `evaluates`, and a save, as long as they
        took the last time; an evaluation or a save that was not seen yet counts half of the grace
        period. Every rank must call it, between micro-batches; without a grace period it does
        nothing.
        """
        left = micro_batches * self._known.get("micro-batch", 0.0)
        if self._is_short(left + (self._expected("evaluation") if evaluates else 0.0)):
            raise WindowDroppedError

    def drop_evaluation_if_short(self, seconds: float, longest_batch: float) -> None:
        """Raises EvaluationDroppedError on every rank if some rank has too little time for what is
        left of an evaluation that has taken so many seconds, and for a save.

        An evaluation is expected to take as long as the last one, and at least one more batch like
        the longest so far; one that was not seen yet half of the grace period, as a save. Every
        rank must call it, between micro-batches; without a grace period it does nothing.
        """
        left = max(self._expected("evaluation") - seconds, longest_batch)
        if self._is_short(left):
            raise EvaluationDroppedError

    def _expected(self, what: str) -> float:
        """Seconds that an evaluation or a save is expected to take."""
        return self._known.get(what, 0.5 * (self._grace or 0.0))

    def _is_short(self, left: float) -> bool:
        """Whether some rank was asked to stop and has less time than so many seconds and a save.
        Every rank must call it; never without a grace period."""
        if self._grace is None:
            return False
        needed, asked_at = left + self._expected("save"), self._asked_at
        is_late = asked_at is not None and time.monotonic() + needed > asked_at + self._grace
        return self._any(on_this_rank=is_late)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self._asked_at is None:
            self._asked_at = time.monotonic()

    def _any(self, *, on_this_rank: bool) -> bool:
        """Whether something is so on any rank. Every rank must call it."""
        flag = torch.tensor(int(on_this_rank), device=self._device)
        return bool(collectives.sum_over_ranks(flag) > 0)


class EvaluationUnderWay:
    """An evaluation that has just begun: how long it takes, and whether there is time for it."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop
        self._began = time.monotonic()
        self._looked: float | None = None
        """When there was a look at the time last."""
        self._longest = 0.0

    def drop_if_short(self) -> None:
        """Raises EvaluationDroppedError on every rank if there is too little time for what is left.
        Every rank must call it before each micro-batch: an all-reduce of one number."""
        now = time.monotonic()
        if self._looked is not None:
            self._longest = max(self._longest, now - self._looked)
        self._looked = now
        self._stop.drop_evaluation_if_short(now - self._began, self._longest)

    def finished(self) -> None:
        """Remembers how long it took."""
        self._stop.took("evaluation", time.monotonic() - self._began)
