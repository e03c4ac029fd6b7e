"""A folder with numbers of every response token of a dataset.

It holds Parquet files, one for some consecutive rows each, and `settings.json`, which says what
they are of. It is complete when the files cover the dataset; whoever finds an unfinished one goes
on with it.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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

ROWS_FILE = re.compile(r"rows-(\d+)-(\d+)\.parquet")
SETTINGS = "settings.json"

# First row, one after the last, file.
Span = tuple[int, int, Path]
Column = Sequence[np.ndarray[Any, Any]]
"""Numbers of the response tokens of each of some rows, (R,)."""

# What is read from disk for one row: so many.
ROW_GROUP = 64


@dataclass(frozen=True)
class Contents:
    """What a folder holds, for messages."""

    what: str
    """`losses`, say."""
    of: str
    """`the losses of the reference`."""
    key: str
    """The configuration key that names the folder."""


class StoredColumn:
    """One column of a complete folder: of every row the numbers of its response tokens. Files are
    memory-mapped, row groups decoded. Several threads may read it."""

    def __init__(self, spans: Sequence[Span], column: str, contents: Contents) -> None:
        self._starts = np.array([start for start, _, _ in spans])
        self._paths = [path for _, _, path in spans]
        self._column = column
        self._contents = contents
        self._file = lru_cache(maxsize=16)(self._open)
        self._group = lru_cache(maxsize=4)(self._read_group)
        # Two threads in one open Parquet file abort the process, or wait for ever.
        self._reading = threading.Lock()
        for number in range(len(spans)):
            self._file(number)

    def __getitem__(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Numbers of the response tokens of a row, (R,): those of its first document, then of its
        second."""
        file = int(np.searchsorted(self._starts, row, side="right")) - 1
        group, place = divmod(row - int(self._starts[file]), ROW_GROUP)
        with self._reading:
            numbers = self._group(file, group)[place].values
        return np.array(numbers.to_numpy(zero_copy_only=False), dtype=np.float32)

    def _open(self, number: int) -> Any:
        path, contents = self._paths[number], self._contents
        try:
            return pq.ParquetFile(path, memory_map=True, page_checksum_verification=True)
        except FileNotFoundError:
            raise UserError(
                f"{path} is not there for rank {collectives.rank()}, which did not write it: set "
                f"{contents.key} to a folder that all nodes see"
            ) from None
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(number, error) from None

    def _read_group(self, number: int, group: int) -> Any:
        try:
            table = self._file(number).read_row_group(group, columns=[self._column])
        except (OSError, pa.ArrowException) as error:
            raise self._damaged(number, error) from None
        return table.column(self._column).combine_chunks()

    def _damaged(self, number: int, error: Exception) -> UserError:
        return UserError(
            f"{self._paths[number]} is damaged ({error}); remove it, and its "
            f"{self._contents.what} are computed again"
        )


class RowsFolder:
    """Where the numbers of one dataset are gathered, by all ranks together; rank 0 writes.

    Raises UserError where the folder holds those of something else, naming what differs.
    """

    def __init__(self, path: Path, rows: int, settings: dict[str, Any], contents: Contents) -> None:
        self.path = path
        self.rows = rows
        self._contents = contents
        collectives.on_rank_0(lambda: self._claim(settings))

    def done(self) -> int:
        """How many rows it has, from the first on."""
        return max((end for _, end, _ in self._spans()), default=0)

    def column(self, name: str) -> StoredColumn:
        """A column, when the folder is complete. Raises UserError on every rank if any cannot read
        it."""
        spans = self._spans()
        return collectives.agree(lambda: StoredColumn(spans, name, self._contents))

    def add(self, start: int, columns: Mapping[str, Column]) -> None:
        """Writes the columns of some consecutive rows from `start`; a crash leaves them all or
        none."""

        def write() -> None:
            count = len(next(iter(columns.values())))
            numbers = pa.array(np.arange(start, start + count))
            table = pa.table({"row": numbers, **{n: _lists(c) for n, c in columns.items()}})
            final = self.path / f"rows-{start:09}-{start + count:09}.parquet"
            publish(
                final,
                lambda partial: pq.write_table(
                    table, partial, row_group_size=ROW_GROUP, write_page_checksum=True
                ),
            )

        try:
            collectives.on_rank_0(write)
        except OSError as error:
            raise UserError(f"cannot write {self._contents.of} to {self.path}: {error}") from None

    def _spans(self) -> list[Span]:
        return collectives.on_rank_0(lambda: longest_chain(self.path, self.rows))

    def _claim(self, settings: dict[str, Any]) -> None:
        file, contents = self.path / SETTINGS, self._contents
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if file.exists():
                changed = differences(read_settings(self.path), settings)
                if changed:
                    raise UserError(
                        f"{self.path} holds {contents.what} of something else; remove it, or set "
                        f"{contents.key} to another folder:\n  " + "\n  ".join(changed)
                    )
                return
            if any(path.suffix != PARTIAL for path in self.path.iterdir()):
                raise UserError(
                    f"{contents.key}: {self.path} holds other files; choose an empty or a new "
                    "folder"
                )
            publish_text(file, json.dumps(settings, indent=1))
        except OSError as error:
            raise UserError(f"cannot write {contents.of} to {self.path}: {error}") from None


def read_settings(folder: Path) -> dict[str, Any]:
    """What a folder says it is of. Raises UserError where that cannot be read."""
    file = folder / SETTINGS
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(settings, dict):
            raise ValueError("it holds no settings")
    except ValueError as error:
        raise UserError(f"{file} cannot be read: {error}; remove the folder") from None
    return settings


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


def _lists(column: Column) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, column)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(column)))
