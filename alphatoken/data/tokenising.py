"""Tokenises the rows of a source into one Arrow file: in shards, by several processes where there
are many rows, and from where it was stopped.

A shard is a number of successive raw rows, so what is written does not depend on how many processes
write it. Shards that are done are kept until all are, beside the file that they become.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from functools import reduce
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from alphatoken.data.chat import Encoded, RowEncoder, Skipped
from alphatoken.data.rows import named
from alphatoken.data.sources import OpenSource, location
from alphatoken.errors import UserError
from alphatoken.util.files import publish, publish_text
from alphatoken.util.progress import Countdown

SCHEMA = pa.schema(
    {
        "input_ids": pa.list_(pa.int32()),
        "response_mask": pa.list_(pa.bool_()),
        "second": pa.int32(),  # where a pair's second document begins; 0: there is none
        "length": pa.int32(),
        "number": pa.int64(),
        "digests": pa.list_(pa.int64()),
        "asked": pa.list_(pa.int64()),
    }
)
ROWS_PER_BATCH = 1000
TOKENS_PER_BATCH = 1 << 20
"""A batch of tokenised rows, which is held in lists before it is written, ends at either."""
SHARD_ROWS = 5000
"""Raw rows of a shard: some seconds of work, which is what a stopped process loses."""
MOST_WORKERS = 16
"""Processes, unless the user says another number."""


@dataclass(frozen=True)
class SourceReport:
    """What became of the rows of one source."""

    path: str
    rows: int
    cut: dict[str, int]
    notes: dict[str, int]
    """What else is to be said of how many rows."""
    skipped: dict[str, int]
    tokens: int
    response_tokens: int
    unread: list[str]
    """Columns that were not read."""

    def __str__(self) -> str:
        notes = [f"{count} {what}" for what, count in {**self.cut, **self.notes}.items()]
        notes += [f"{count} skipped: {reason}" for reason, count in self.skipped.items()]
        detail = f" ({', '.join(notes)})" if notes else ""
        responses = f", {self.response_tokens} of responses" if self.response_tokens else ""
        unread = f"; columns not read: {', '.join(self.unread)}" if self.unread else ""
        return f"{self.path}: {self.rows} rows, {self.tokens} tokens{responses}{detail}{unread}"


@dataclass(frozen=True)
class Shard:
    """Successive raw rows of a source, from place `first`, from 0, to `end`."""

    first: int
    end: int

    def file(self, folder: Path) -> Path:
        """Where its tokenised rows are kept."""
        return folder / f"{self.first:012}-{self.end:012}.arrow"


@dataclass(frozen=True)
class Made:
    """What one call did of a source's rows."""

    rows: int
    """Raw rows that were tokenised; 0 where the cache had them all."""
    seconds: float


def write_source(
    rows: OpenSource, encoder: RowEncoder, file: Path, workers: int | None = None
) -> int:
    """Tokenises a source into `file`, with its report beside it, in up to so many processes, by
    default one per core. Returns how many raw rows were left to do.

    Raises UserError for the first bad row, and where a process was ended from outside.
    """
    total = left = len(rows)
    if total <= SHARD_ROWS:
        _publish(rows, encoder, Shard(0, total), file)
        return total
    folder = file.with_suffix(".shards")
    try:
        left = _write_shards(rows, encoder, folder, total, workers or min(MOST_WORKERS, _cores()))
        _join(_shards(total), folder, file)
    except FileNotFoundError:
        if not file.exists():  # else another process has made it, and removed the shards
            raise
    shutil.rmtree(folder, ignore_errors=True)
    return left


def _shards(total: int) -> list[Shard]:
    """All shards of so many rows."""
    starts = range(0, total, SHARD_ROWS)
    return [Shard(first, min(first + SHARD_ROWS, total)) for first in starts]


def _write_shards(
    rows: OpenSource, encoder: RowEncoder, folder: Path, total: int, workers: int
) -> int:
    """Writes the shards that are not there. Returns how many raw rows they have."""
    folder.mkdir(exist_ok=True)
    missing = [shard for shard in _shards(total) if not is_whole(shard.file(folder))]
    left = sum(shard.end - shard.first for shard in missing)
    done = total - left
    title = f"tokenising {rows.source.path}"
    with Countdown(title, "rows", done, total, stderr=True) as progress:
        for shard in _written(rows, encoder, missing, folder, workers):
            done += shard.end - shard.first
            progress.advance(done)
    return left


def _cores() -> int:
    """How many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def read_report(file: Path) -> SourceReport:
    """What became of the rows in a tokenised file."""
    return SourceReport(**json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))


def is_whole(file: Path) -> bool:
    """Whether a tokenised file is there with all rows that its report tells of: a disk that was
    full, or a copy that was stopped, may have cut it between two batches, where it reads as a
    shorter one."""
    try:
        told = read_report(file).rows
        with pa.memory_map(str(file)) as content, pa.ipc.open_stream(content) as batches:
            return sum(len(batch) for batch in batches) == told
    except (OSError, ValueError, TypeError, pa.ArrowException):
        return False


def _written(
    rows: OpenSource, encoder: RowEncoder, shards: Sequence[Shard], folder: Path, workers: int
) -> Iterator[Shard]:
    """Writes shards; gives each when it and all before it are there, so that of several bad rows
    the first is named."""
    if min(workers, len(shards)) <= 1:
        for shard in shards:
            _publish(rows, encoder, shard, shard.file(folder))
            yield shard
        return
    # Forked from a process of their own, as this one may have threads and a device.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    count = min(workers, len(shards))
    pool = ProcessPoolExecutor(count, context, _begin_worker, (rows, encoder, folder))
    try:
        futures = [pool.submit(_work, shard) for shard in shards]
        for shard, future in zip(shards, futures, strict=True):
            future.result()
            yield shard
    except BrokenProcessPool:
        raise UserError(
            f"a process that tokenised {rows.source.path} ended without a word, for want of memory "
            "perhaps: lower data.workers; shards that are done are kept, start again"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker: tuple[OpenSource, RowEncoder, Path]
"""What this process works on. Its shards ascend, so it reads its source once."""


def _begin_worker(rows: OpenSource, encoder: RowEncoder, folder: Path) -> None:
    global _worker
    _worker = rows, encoder, folder
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for us
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _work(shard: Shard) -> None:
    rows, encoder, folder = _worker
    _publish(rows, encoder, shard, shard.file(folder))


def _publish(rows: OpenSource, encoder: RowEncoder, shard: Shard, file: Path) -> None:
    """Makes a file of tokenised rows appear with its report, whole also where several write it, as
    not every disk has locks."""

    def write(partial: Path) -> None:
        report = _write(rows, encoder, shard, partial)
        publish_text(file.with_suffix(".json"), json.dumps(asdict(report)))

    publish(file, write)


def _write(rows: OpenSource, encoder: RowEncoder, shard: Shard, file: Path) -> SourceReport:
    """Encodes rows into an Arrow stream, batch by batch."""
    skipped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    unread = set[str]()
    kept = tokens = response_tokens = in_batch = 0
    batch: list[dict[str, Any]] = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for row in rows.read(shard.first, shard.end):
            unread |= row.unread
            where = location(rows.source, row.number)
            with named(where):
                encoded = encoder.encode(row.fields, where)
            if isinstance(encoded, Skipped):
                skipped[encoded.reason] += 1
                continue
            for each in encoded:
                record = _record(each, row.number)
                kept += 1
                cut.update(each.cut)
                notes.update(each.notes)
                tokens += record["length"]
                in_batch += record["length"]
                response_tokens += sum(record["response_mask"][1:])  # the first is not predicted
                batch.append(record)
            if len(batch) >= ROWS_PER_BATCH or in_batch >= TOKENS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
                batch.clear()
                in_batch = 0
        writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
    return SourceReport(
        path=rows.source.path,
        rows=kept,
        cut=dict(cut),
        notes=dict(notes),
        skipped=dict(skipped),
        tokens=tokens,
        response_tokens=response_tokens,
        unread=sorted(unread),
    )


def _join(shards: Sequence[Shard], folder: Path, file: Path) -> None:
    """Makes one file of shards, and one report of theirs, a batch at a time."""
    files = [shard.file(folder) for shard in shards]

    def write(partial: Path) -> None:
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
            for each in files:
                with pa.OSFile(str(each)) as content, pa.ipc.open_stream(content) as batches:
                    for batch in batches:
                        writer.write_batch(batch)
        report = reduce(_together, map(read_report, files))
        publish_text(file.with_suffix(".json"), json.dumps(asdict(report)))

    publish(file, write)


def _together(first: SourceReport, second: SourceReport) -> SourceReport:
    """The report of two shards of a source."""

    def counts(a: dict[str, int], b: dict[str, int]) -> dict[str, int]:
        return dict(Counter(a) + Counter(b))

    return replace(
        first,
        rows=first.rows + second.rows,
        cut=counts(first.cut, second.cut),
        notes=counts(first.notes, second.notes),
        skipped=counts(first.skipped, second.skipped),
        tokens=first.tokens + second.tokens,
        response_tokens=first.response_tokens + second.response_tokens,
        unread=sorted({*first.unread, *second.unread}),
    )


def _record(encoded: Encoded, number: int) -> dict[str, Any]:
    """A row as SCHEMA has it: its documents end to end, and where the second one begins."""
    documents = encoded.documents
    ids = [token for document in documents for token in document.input_ids]
    return {
        "input_ids": ids,
        "response_mask": [mark for document in documents for mark in document.response_mask],
        "second": len(documents[0].input_ids) if len(documents) > 1 else 0,
        "length": len(ids),
        "number": number,
        "digests": [_digest(document.input_ids) for document in documents],
        "asked": encoded.asked,
    }


def _digest(ids: Sequence[int]) -> int:
    hashed = hashlib.blake2b(np.asarray(ids, dtype=np.int32).tobytes(), digest_size=8)
    return int.from_bytes(hashed.digest(), "little", signed=True)
