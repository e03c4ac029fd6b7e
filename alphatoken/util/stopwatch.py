"""How long the phases of an optimizer step take, on the device's own clock."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums seconds per phase between calls of `read`.

    Phases may nest: the time of an inner phase is not counted in the outer one. On CUDA phases are
    bracketed by events, so measuring does not make the host wait before `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._open: list[str] = []
        self._since: float | torch.cuda.Event = 0.0

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Counts what runs inside as `name`, unless an exception leaves it."""
        self._close_interval()
        self._open.append(name)
        self._since = self._now()
        try:
            yield
            self._close_interval()
        finally:
            self._open.pop()
            self._since = self._now()

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last call."""
        if self._cuda:
            torch.cuda.synchronize()
        for name, start, end in self._events:
            self._seconds[name] += start.elapsed_time(end) / 1000
        seconds = dict(self._seconds)
        self._seconds.clear()
        self._events.clear()
        return seconds

    def _now(self) -> float | torch.cuda.Event:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close_interval(self) -> None:
        """Counts the time since the last change of phase for the phase that is open."""
        if not self._open:
            return
        now = self._now()
        if isinstance(now, float):
            assert isinstance(self._since, float)
            self._seconds[self._open[-1]] += now - self._since
        else:
            assert not isinstance(self._since, float)
            self._events.append((self._open[-1], self._since, now))
