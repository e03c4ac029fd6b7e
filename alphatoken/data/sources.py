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
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from alphatoken.config.sections import Source
from alphatoken.data.formats import converted
from alphatoken.errors import UserError
from alphatoken.util.files import file_sha256

LINES = (".jsonl", ".jsonl.gz", ".ndjson")
SUFFIXES = (*LINES, ".parquet")
"""Files that are read here, row by row, with the line in errors."""
LOADERS: dict[str, tuple[str, dict[str, str]]] = {
    ".json": ("json", {}),
    ".json.gz": ("json", {}),
    ".jsonl": ("json", {}),
    ".jsonl.gz": ("json", {}),
    ".jsonl.zst": ("json", {}),
    ".ndjson": ("json", {}),
    ".csv": ("csv", {}),
    ".csv.gz": ("csv", {}),
    ".tsv": ("csv", {"sep": "\t"}),
    ".parquet": ("parquet", {}),
    ".arrow": ("arrow", {}),
}
"""By which loader of `datasets`, and with which options, it reads other files, patterns of files
and addresses, by the end of their names."""
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


def open_source(source: Source) -> tuple[str, Iterator[Row]]:
    """A fingerprint of the source's content, and its rows in one of our forms (`formats`). Raises
    UserError when it cannot be found or read."""
    fingerprint, rows = _opened(source)
    end = None if source.first is None else source.skip + source.first
    renamed = f" {json.dumps(source.columns, sort_keys=True)}" if source.columns else ""
    return (
        f"{fingerprint()}[{source.skip}:{end}]{renamed} {source.format}",
        _in_our_forms(source, rows),
    )


def read_rows(source: Source) -> Iterator[Row]:
    """A source's rows in one of our forms, without reading all of it for a fingerprint. Raises
    UserError when it cannot be found or read."""
    return _in_our_forms(source, _opened(source)[1])


def _opened(source: Source) -> tuple[Callable[[], str], Iterator[Row]]:
    """What computes a fingerprint of the source's content, and its rows as they are."""
    path = _filled_in(source.path)
    file = Path(path)
    if path.endswith(SUFFIXES) and not _is_several(path):
        if not file.is_file():
            raise UserError(f"data file {file} does not exist")
        rows = _parquet_rows(file) if file.suffix == ".parquet" else _json_rows(source, file)
        return partial(file_sha256, file), rows
    dataset = _open_dataset(source, path)
    return lambda: str(dataset._fingerprint), (
        Row(number, without_nulls(fields)) for number, fields in enumerate(dataset, start=1)
    )


def _in_our_forms(source: Source, rows: Iterator[Row]) -> Iterator[Row]:
    end = None if source.first is None else source.skip + source.first
    chosen = itertools.islice(rows, source.skip, end)
    return _converted(source, _renamed(source, chosen) if source.columns else chosen)


def without_nulls(value: Any) -> Any:
    """A row without what is null in it: files with fixed columns fill in what a row does not
    have, also within tool calls."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _converted(source: Source, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        fields, unread = converted(row.fields, source.format, location(source, row.number))
        yield Row(row.number, fields, unread)


def _renamed(source: Source, rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        missing = [name for name in source.columns.values() if name not in row.fields]
        if missing:
            raise UserError(
                f"{location(source, row.number)}: no field {missing[0]!r}, which data "
                f"columns={source.columns} name; it has {', '.join(row.fields)}"
            )
        others = {
            name: value for name, value in row.fields.items() if name not in source.columns.values()
        }
        yield Row(
            row.number,
            {**others, **{ours: row.fields[theirs] for ours, theirs in source.columns.items()}},
        )


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


def _json_rows(source: Source, file: Path) -> Iterator[Row]:
    opener: Any = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opener(file, "rt", encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                if not line.strip():
                    continue
                try:
                    fields = json.loads(line)
                except json.JSONDecodeError as error:
                    raise UserError(
                        f"{location(source, number)}: not valid JSON: {error}"
                    ) from None
                if not isinstance(fields, dict):
                    raise UserError(
                        f"{location(source, number)}: each line must be a JSON object, not a "
                        f"{type(fields).__name__}"
                    )
                yield Row(number, fields)
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise UserError(
            f"{location(source, number + 1)}: cannot read the file further: {error}"
        ) from None


def _parquet_rows(file: Path) -> Iterator[Row]:
    try:
        number = 0
        with pq.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(number, without_nulls(fields))
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read {file} as Parquet: {error}") from None


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
            return datasets.load_dataset(loader, data_files=path, split="train", **options)
        return datasets.load_dataset(path, source.subset, split=source.split)
    except Exception as error:
        reason = error.__cause__ or error  # what `datasets` could not do, not that it could not
        raise UserError(
            f"data source {source.path!r} is neither a file that can be read "
            f"({', '.join(LOADERS)}) nor a dataset that `datasets` can load with "
            f"split={source.split!r}, subset={source.subset!r}: {str(reason) or repr(reason)}"
        ) from None
