"""Files of another model's token losses."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken.distributed import collectives
from alphatoken.errors import UserError
from alphatoken.util.differences import differences
from alphatoken.util.files import PARTIAL, publish, publish_text

FORMAT_VERSION = 1
ROWS_FILE = re.compile(r"rows-(\d+)-(\d+)\.parquet")
SETTINGS = "settings.json"

# First row, one after the last, file.
Span = tuple[int, int, Path]

# What is read from disk for one row: so many.
ROW_GROUP = 64


class CachedLosses:
    """The losses of every row's response tokens, from a complete cache; files are memory-mapped,
    row groups decoded."""

    def __init__(self, spans: Sequence[Span]) -> None:
        self._starts = np.array([start for start, _, _ in spans])
        self._paths = [path for _, _, path in spans]
        self._file = lru_cache(maxsize=16)(self._open)
        self._group = lru_cache(maxsize=4)(self._read_group)
        for number in range(len(spans)):
            self._file(number)

    def __getitem__(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Losses of the response tokens of a row, (R,): those of its first document, then of its
        second."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        group, place = divmod(row - int(self._starts[file]), ROW_GROUP)
        losses = self._group(file, group)[place].values
        return np.array(losses.to_numpy(zero_copy_only=False), dtype=np.float32)

    def _open(self, number: int) -> Any:
        path = self._paths[number]
        try:
            return pq.ParquetFile(path, memory_map=True)
        except FileNotFoundError:
            raise UserError(
                f"{path} is not there for rank {collectives.rank()}, which did not write it: set "
                "reference.cache to a folder that all nodes see"
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise UserError(
                f"{path} is damaged ({error}); remove it, and its losses are computed again"
            ) from None

    def _read_group(self, number: int, group: int) -> Any:
        return (
            self._file(number).read_row_group(group, columns=["nll"]).column("nll").combine_chunks()
        )


class CacheFolder:
    """Where the losses of one dataset are gathered, by all ranks together; rank 0 writes.

    Raises UserError where the folder holds losses of something else, naming what differs.
    """

    def __init__(self, path: Path, rows: int, settings: dict[str, Any]) -> None:
        self.path = path
        self.rows = rows
        collectives.on_rank_0(lambda: self._claim(settings))

    def done(self) -> int:
        """How many rows it has, from the first on."""
        return max((end for _, end, _ in self._spans()), default=0)

    def open(self) -> CachedLosses:
        """Its losses, when it is complete. Raises UserError on every rank if any cannot read
        them."""
        spans = self._spans()
        return collectives.agree(lambda: CachedLosses(spans))

    def _spans(self) -> list[Span]:
        return collectives.on_rank_0(lambda: longest_chain(self.path, self.rows))

    def add(self, start: int, losses: Sequence[np.ndarray[Any, np.dtype[np.float32]]]) -> None:
        """Writes the losses of some consecutive rows from `start`; a crash leaves them all or
        none."""

        def write() -> None:
            offsets = np.cumsum([0, *map(len, losses)]).astype(np.int32)
            column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(losses)))
            final = self.path / f"rows-{start:09}-{start + len(losses):09}.parquet"
            numbers = pa.array(np.arange(start, start + len(losses)))
            table = pa.table({"row": numbers, "nll": column})
            publish(final, lambda partial: pq.write_table(table, partial, row_group_size=ROW_GROUP))

        try:
            collectives.on_rank_0(write)
        except OSError as error:
            raise UserError(
                f"cannot write the losses of the reference to {self.path}: {error}"
            ) from None

    def _claim(self, settings: dict[str, Any]) -> None:
        file = self.path / SETTINGS
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if file.exists():
                _check_settings(file, settings)
                return
            if any(path.suffix != PARTIAL for path in self.path.iterdir()):
                raise UserError(
                    f"reference.cache: {self.path} holds other files; choose an empty or a new "
                    "folder"
                )
            publish_text(file, json.dumps(settings, indent=1))
        except OSError as error:
            raise UserError(
                f"cannot write the reference's losses to {self.path}: {error}"
            ) from None


def longest_chain(folder: Path, rows: int) -> list[Span]:
    """Files that together cover the rows from 0 on, as far as any do. Two runs may have cut them
    differently."""
    files = sorted(
        (int(match[1]), int(match[2]), path)
        for path in folder.iterdir()
        if (match := ROWS_FILE.fullmatch(path.name))
    )
    chains: dict[int, list[Span]] = {0: []}
    for start, end, path in files:
        if start in chains and end <= rows:
            chains.setdefault(end, [*chains[start], (start, end, path)])
    return chains[max(chains)]


def _check_settings(file: Path, settings: dict[str, Any]) -> None:
    try:
        theirs = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; remove the folder") from None
    changed = differences(theirs, settings)
    if changed:
        raise UserError(
            f"{file.parent} holds losses of something else; remove it, or set "
            "reference.cache to another folder:\n  " + "\n  ".join(changed)
        )
