"""Rows of JSON Lines files, Parquet files and `datasets` names, each with the place it came
from."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken.config.sections import Source
from alphatoken.data.formats import converted
from alphatoken.data.rows import named
from alphatoken.errors import UserError
from alphatoken.util.files import file_sha256

LINES = (".jsonl", ".jsonl.gz", ".ndjson")
SUFFIXES = (*LINES, ".parquet")
"""Files that are read here, row by row, with the line in errors."""
IN_TEXT: dict[str, Any] = {"keep_default_na": False, "na_values": [""]}
"""How tables in text are read: only an empty field is missing, and None or NA is an answer."""
LOADERS: dict[str, tuple[str, dict[str, Any]]] = {
    ".json": ("json", {}),
    ".json.gz": ("json", {}),
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
    ".jsonl.zst": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", IN_TEXT),
    ".csv.gz": ("csv", IN_TEXT),
    ".tsv": ("csv", {"sep": "\t", **IN_TEXT}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""By which loader of `datasets`, and with which options, it reads other files, patterns of files
and addresses, by the end of their names."""
INDEX = "__index_level_0__"
"""What a column is called in Arrow that pandas takes for the names of rows."""
Unparsed = tuple[int, Callable[[], dict[str, Any]]]
"""A raw row's number, and what reads it."""
ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Row:
    """One raw row. `number` counts from 1 within its source: the line of a text file."""

    number: int
    fields: dict[str, Any]
    unread: frozenset[str] = frozenset()
    """Columns of the source that were not read."""


def location(source: Source, number: int) -> str:
    """`file:line`, or the row of a Parquet file or dataset."""
    path = _filled_in(source.path)
    is_lines = path.endswith(LINES) and not _is_several(path)
    return f"{path}:{number}" if is_lines else f"{path} row {number}"


class Rows(Protocol):
    """Raw rows, each with its number, from 1."""

    def fingerprint(self) -> str:
        """A hash of the content."""
        ...

    def read(self, first: int, end: int | None) -> Iterator[Row]:
        """The rows from a place, from 0, to another. Cheap where it is the next part after the one
        read before."""
        ...

    def count(self, end: int | None) -> int:
        """How many there are, or how many before `end`."""
        ...


class OpenSource:
    """The rows of a source in one of our forms (`formats`). It can be handed to another process.

    Raises UserError when the source cannot be found or read.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        path = _filled_in(source.path)
        self._rows: Rows
        if path.endswith(SUFFIXES) and not _is_several(path):
            file = Path(path)
            if not file.is_file():
                raise UserError(f"data file {file} does not exist")
            opened = _parquet_rows if file.suffix == ".parquet" else partial(_json_rows, source)
            self._rows = _FileRows(source, file, opened)
        else:
            self._rows = _DatasetRows(source, _open_dataset(source, path))
        self._end = None if source.first is None else source.skip + source.first

    @property
    def fingerprint(self) -> str:
        """A hash of the source's content, which of its rows are used, and as what."""
        source = self.source
        renamed = f" {json.dumps(source.columns, sort_keys=True)}" if source.columns else ""
        return f"{self._rows.fingerprint()}[{source.skip}:{self._end}]{renamed} {source.format}"

    def __len__(self) -> int:
        """Raw rows. What is in them is not looked at."""
        return max(0, self._rows.count(self._end) - self.source.skip)

    def read(self, first: int = 0, end: int | None = None) -> Iterator[Row]:
        """The rows from place `first`, from 0, to `end`, by default all, each in one of our
        forms."""
        for row in self.raw(first, end):
            where = location(self.source, row.number)
            with named(where):
                fields, unread = converted(row.fields, self.source.format, where)
            yield Row(row.number, fields, unread)

    def raw(self, first: int = 0, end: int | None = None) -> Iterator[Row]:
        """Those rows as the source has them, with our names for its columns where it gives
        any."""
        source = self.source
        ends = [source.skip + end] if end is not None else []
        ends += [self._end] if self._end is not None else []
        for row in self._rows.read(source.skip + first, min(ends, default=None)):
            where = location(source, row.number)
            named = _renamed(source, row.fields, where) if source.columns else row.fields
            yield Row(row.number, named)


class _FileRows:
    """Rows that can be read in turn only. What is passed over is not parsed, and the file stays
    open between one part and the next."""

    def __init__(
        self, source: Source, file: Path, opened: Callable[[Path], Iterator[Unparsed]]
    ) -> None:
        self._source = source
        self._file = file
        self._opened = opened
        self._rest: Iterator[Unparsed] = iter(())
        self._place: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the file for itself."""
        return {**self.__dict__, "_rest": iter(()), "_place": None}

    def fingerprint(self) -> str:
        return file_sha256(self._file)

    def read(self, first: int, end: int | None) -> Iterator[Row]:
        if self._place is None or self._place > first:
            self._rest, self._place = self._opened(self._file), 0
        count = None if end is None else max(0, end - first)
        for _ in itertools.islice(self._rest, first - self._place):
            self._place += 1
        for number, parse in itertools.islice(self._rest, count):
            self._place += 1
            with named(location(self._source, number)):
                fields = parse()
            yield Row(number, fields)

    def count(self, end: int | None) -> int:
        return sum(1 for _ in itertools.islice(self._opened(self._file), end))


class _DatasetRows:
    """Rows of a `datasets` table, which finds any of them."""

    def __init__(self, source: Source, dataset: Any) -> None:
        self._source = source
        self._dataset = dataset

    def fingerprint(self) -> str:
        return str(self._dataset._fingerprint)

    def read(self, first: int, end: int | None) -> Iterator[Row]:
        end = self.count(end)
        chosen = iter(self._dataset.select(range(first, end)))
        for number in range(first + 1, end + 1):
            with named(location(self._source, number)):
                fields = without_nulls(next(chosen))
            yield Row(number, fields)

    def count(self, end: int | None) -> int:
        rows = len(self._dataset)
        return rows if end is None else min(rows, end)


def without_nulls(value: Any) -> Any:
    """A row without what is null in it: files with fixed columns fill in what a row does not
    have, also within tool calls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _renamed(source: Source, fields: dict[str, Any], where: str) -> dict[str, Any]:
    """A row with our names for its columns."""
    missing = [name for name in source.columns.values() if name not in fields]
    if missing:
        raise UserError(
            f"{where}: no field {missing[0]!r}, which data columns={source.columns} name; it has "
            f"{', '.join(fields)}"
        )
    others = {name: value for name, value in fields.items() if name not in source.columns.values()}
    return {**others, **{ours: fields[theirs] for ours, theirs in source.columns.items()}}


def _filled_in(path: str) -> str:
    """The path or address with `~` and `${VARIABLES}` replaced."""
    filled = os.path.expandvars(path)
    missing = re.search(r"\$\{?(\w+)", filled)
    if missing:
        raise UserError(f"data path {path}: the environment variable {missing[1]} is not set")
    return filled if ADDRESS.match(filled) else str(Path(filled).expanduser())


def _is_several(path: str) -> bool:
    """Whether `datasets` finds the rows: of an address, or of all files of a pattern."""
    return bool(ADDRESS.match(path) or (PATTERN.search(path) and not Path(path).is_file()))


def _json_rows(source: Source, file: Path) -> Iterator[Unparsed]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        # What is not UTF-8 is found line by line: the decoder reads ahead of them.
        with opener(file, "rt", encoding="utf-8-sig", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, partial(_from_json, line, location(source, number))
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(
            f"{location(source, number + 1)}: cannot read the file further: {error}"
        ) from None


def _from_json(line: str, where: str) -> dict[str, Any]:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        byte, before = ord(line[error.start]) - 0xDC00, line[: error.start]
        raise UserError(
            f"{where}: the byte 0x{byte:02x} at {len(before.encode()) + 1}, behind "
            f"{before[-20:]!r}, is not UTF-8: convert the file to UTF-8"
        ) from None
    try:
        fields = json.loads(line, object_pairs_hook=_with_single_keys)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except _RepeatedKeyError as error:
        raise UserError(
            f"{where}: the key {error.args[0]!r} is there twice in an object, and only one of its "
            "values could be read: leave one out"
        ) from None
    if not isinstance(fields, dict):
        raise UserError(f"{where}: each line must be a JSON object, not a {type(fields).__name__}")
    return fields


class _RepeatedKeyError(ValueError):
    """An object of JSON has a key, which is the argument, more than once."""


def _with_single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises _RepeatedKeyError where a key is there more than once."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise _RepeatedKeyError(next(name for name in names if names.count(name) > 1))
    return fields


def _parquet_rows(file: Path) -> Iterator[Unparsed]:
    numbers = itertools.count(1)
    try:
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                rows = lru_cache(maxsize=1)(batch.to_pylist)
                for place in range(len(batch)):
                    yield next(numbers), partial(_from_parquet, batch, rows, place)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file} as Parquet: {error}") from None


def _from_parquet(
    batch: pa.RecordBatch, rows: Callable[[], list[dict[str, Any]]], place: int
) -> dict[str, Any]:
    try:
        fields = rows()[place]
    except UnicodeDecodeError:  # in this row or another one
        fields = {name: _value(batch, name, place) for name in batch.schema.names}
    kept: dict[str, Any] = without_nulls(fields)
    return kept


def _value(batch: pa.RecordBatch, name: str, place: int) -> Any:
    try:
        return batch.column(name)[place].as_py()
    except UnicodeDecodeError as error:
        raise ValueError(f"column {name!r} has text that is not UTF-8: {error}") from None


def _open_dataset(source: Source, path: str) -> Any:
    import datasets

    folder = Path(path)
    suffix = next((end for end in sorted(LOADERS, key=len, reverse=True) if path.endswith(end)), "")
    try:
        if (folder / "dataset_info.json").exists() or (folder / "dataset_dict.json").exists():
            saved = datasets.load_from_disk(path)
            return saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        if suffix:
            loader, options = LOADERS[suffix]
            found = datasets.load_dataset(loader, data_files=path, split="train", **options)
        else:
            return datasets.load_dataset(path, source.subset, split=source.split)
    except Exception as error:
        reason = error.__cause__ or error  # what `datasets` could not do, not that it could not
        raise UserError(
            f"data source {source.path!r} is neither a file that can be read "
            f"({', '.join(LOADERS)}) nor a dataset that `datasets` can load with "
            f"split={source.split!r}, subset={source.subset!r}: {str(reason) or repr(reason)}"
        ) from None
    if loader == "csv" and INDEX in found.column_names:
        _check_header(path, options)
    return found


def _check_header(path: str, options: dict[str, Any]) -> None:
    """Raises UserError for a table in text whose rows have more fields than its header: their first
    ones would be taken for the names of rows, and every other one for that of the column before
    it."""
    import pandas  # type: ignore[import-untyped]
    from datasets.data_files import resolve_pattern

    for file in resolve_pattern(path, base_path=""):
        first = pandas.read_csv(file, nrows=1, **options)
        if isinstance(first.index, pandas.RangeIndex):
            continue  # the header itself names a column so
        named = len(first.columns)
        raise UserError(
            f"{file}: the header has {named} fields ({', '.join(map(str, first.columns))}), but "
            f"the first row has {named + first.index.nlevels}: name every column in the header, or "
            "remove what is too much in the rows (a separator at the end of each, say)"
        )
