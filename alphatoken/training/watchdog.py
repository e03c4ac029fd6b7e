"""Names the rank that holds up the others, and what they wait in.

Every rank has a thread that writes what the rank is doing into a file of the run folder, and reads
those of the others when its own rank has not moved for long. Files, because a rank that is stopped
may be the one that serves messages.

On GPUs a call returns before its message is through, so where a rank stands does not say which
message it waits for: torch's flight recorder does, and every rank writes its own beside.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
import torch.distributed as dist

COLLECTIVES_FILE = str(Path("torch", "distributed", "distributed_c10d.py"))

# Who only passes a call on: libraries, and our own collectives.
PASSERS = (
    *(
        f"{os.sep}{Path('site-packages', name)}{os.sep}"
        for name in ("torch", "deepspeed", "transformers")
    ),
    str(Path("alphatoken", "distributed", "collectives.py")),
)


class Watchdog(AbstractContextManager["Watchdog"]):
    """Says once per standstill, on stderr, which rank has not moved for `seconds`, and where the
    others are.

    `has_spoken` says whether it did. folder: shared by all ranks; the messages that torch's flight
    recorder knows of go to the folder `flight-recorder` beside it. Of the ranks that still answer,
    the first speaks. Without `seconds` it does nothing.
    """

    def __init__(self, folder: Path, rank: int, ranks: int, seconds: float | None) -> None:
        self._folder = folder
        self._records = folder.with_name("flight-recorder")
        self._rank, self._ranks = rank, ranks
        self._watches = seconds is not None
        self._limit = seconds or 0.0
        self._interval = min(5.0, self._limit / 4)
        self._moves, self._doing = 0, "starting"
        self.has_spoken = False
        self._beat = 0
        self._seen: dict[int, dict[str, Any]] = {}
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        if self._watches:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watches:
            self._done.set()
            self._thread.join()
            with suppress(OSError):  # the last rank removes the folder
                self._file(self._rank).unlink(missing_ok=True)
                self._folder.rmdir()

    def moved(self, doing: str) -> None:
        """To be called whenever the rank begins something else."""
        self._moves, self._doing = self._moves + 1, doing

    def _watch(self) -> None:
        seen, since, told, recorded = -1, time.monotonic(), False, False
        while not self._done.wait(self._interval):
            if self._moves != seen:
                seen, since, told, recorded = self._moves, time.monotonic(), False, False
                self._seen.clear()
            stood = time.monotonic() - since
            with suppress(OSError):  # a full disk must not end the watch
                self._publish()
            if stood >= self._limit / 2 and not told:
                states = self._states()
            if stood >= self._limit and not recorded:
                recorded = True
                with suppress(OSError):
                    self._record_messages()
            if stood >= self._limit and not told:
                speaker = min(
                    (rank for rank, state in states.items() if self._answers(state)),
                    default=self._rank,
                )
                if speaker == self._rank:
                    told = self.has_spoken = True
                    print(self._describe(states), file=sys.stderr, flush=True)

    def _publish(self) -> None:
        self._beat += 1
        state = {
            "beat": self._beat,
            "doing": self._doing,
            "where": self._where(),
            "pid": os.getpid(),
        }
        partial = self._file(self._rank).with_suffix(".partial")
        partial.write_text(json.dumps(state), encoding="utf-8")
        partial.replace(self._file(self._rank))

    def _record_messages(self) -> None:
        record = flight_record()
        if record is not None:
            self._records.mkdir(exist_ok=True)
            (self._records / f"rank_{self._rank}").write_bytes(record)

    def _states(self) -> dict[int, dict[str, Any]]:
        """What each rank says of itself, and whether that has changed since this one stands still
        (no clocks)."""
        for rank in range(self._ranks):
            try:
                found = json.loads(self._file(rank).read_text(encoding="utf-8"))
            except (OSError, ValueError):
                found = {"beat": 0, "doing": "nothing that is known", "where": None}
            known = self._seen.get(rank)
            if known is None or known["beat"] != found["beat"]:
                self._seen[rank] = {**found, "news": known is not None}
        return self._seen

    def _answers(self, state: dict[str, Any]) -> bool:
        return bool(state["news"])

    def _describe(self, states: dict[int, dict[str, Any]]) -> str:
        lines = []
        for rank, state in states.items():
            if not self._answers(state):
                what = f"does not answer (stopped, gone or cut off); last seen in {state['doing']}"
            elif state["where"] is None:
                what = f"is busy in {state['doing']}"
            else:
                what = f"waits in {state['where']}, in {state['doing']}"
            lines.append(f"  rank {rank} {what}")
        waiting = {
            rank
            for rank, state in states.items()
            if self._answers(state) and state["where"] is not None
        }
        culprits = (
            ", ".join(f"rank {rank}" for rank in states if rank not in waiting)
            or "no rank in particular"
        )
        if self._records.is_dir():
            lines.append(f"  the last messages of each rank, by torch's recorder: {self._records}")
        return (
            f"warning: no step has moved for {self._limit:.0f} s; held up by {culprits}:\n"
            + "\n".join(lines)
        )

    def _where(self) -> str | None:
        """The collective that a thread of this process is in, and who called it; None outside of
        any."""
        own = threading.get_ident()
        for thread, frame in sys._current_frames().items():
            found = _collective(frame) if thread != own else None
            if found is not None:
                return found
        return None

    def _file(self, rank: int) -> Path:
        return self._folder / f"rank-{rank:05}.json"


def flight_record() -> bytes | None:
    """The last messages of this rank as torch's flight recorder knows them, a pickled dict; None
    without a process group, or from a torch that has no recorder."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    by_backend = {"nccl": "_dump_nccl_trace"}
    name = by_backend.get(dist.get_backend(), "_dump_fr_trace")
    dump = getattr(torch._C._distributed_c10d, name, None)
    return None if dump is None else bytes(dump())


def _collective(innermost: FrameType) -> str | None:
    """Name and caller of the collective among the frames of a thread."""
    frame: FrameType | None = innermost
    name = None
    while frame is not None:
        file = frame.f_code.co_filename
        if file.endswith(COLLECTIVES_FILE) and frame.f_code.co_name != "wrapper":
            name = frame.f_code.co_name
        elif (
            name is None and frame.f_code.co_name == "wait" and f"{os.sep}deepspeed{os.sep}" in file
        ):
            name = frame.f_code.co_qualname  # of a message that was sent before
        elif name is not None and not any(passer in file for passer in PASSERS):
            return (
                f"{name} (called by {frame.f_code.co_name} in {Path(file).name}:{frame.f_lineno})"
            )
        frame = frame.f_back
    return name
