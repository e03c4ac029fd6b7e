"""A counter of work done, with the time left."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager
from datetime import timedelta
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Countdown(AbstractContextManager["Countdown"]):
    """Progress of something before training: a bar with the time left, or ten lines where there is
    no terminal. `stderr`: for commands whose output may be read by a program."""

    def __init__(
        self,
        title: str,
        unit: str,
        done: int,
        total: int,
        *,
        active: bool = True,
        stderr: bool = False,
    ) -> None:
        self._title, self._unit, self._first, self._total = title, unit, done, total
        self._console = Console(quiet=not active, stderr=stderr, highlight=False)
        self._started = time.monotonic()
        self._told = 0
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TimeRemainingColumn())
        self._progress = (
            Progress(*columns, console=self._console) if self._console.is_terminal else None
        )
        if self._progress is not None:
            self._progress.start()
            self._task = self._progress.add_task(self._text(done), total=total, completed=done)
        elif done:
            self._console.print(f"{self._text(done)} were done before", markup=False)

    def advance(self, done: int) -> None:
        if self._progress is not None:
            self._progress.update(self._task, description=self._text(done), completed=done)
        elif 10 * done // self._total > self._told:
            self._told = 10 * done // self._total
            rate = (time.monotonic() - self._started) / (done - self._first)
            left = timedelta(seconds=round(rate * (self._total - done)))
            self._console.print(f"{self._text(done)}  ETA {left}", markup=False, soft_wrap=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.stop()

    def _text(self, done: int) -> str:
        return f"{self._title}: {done}/{self._total} {self._unit}"
