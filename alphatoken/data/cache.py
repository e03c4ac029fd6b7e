"""Tokenised rows on disk: written once, memory-mapped by every rank and run that uses the same data
and tokenizer."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from filelock import FileLock

from alphatoken.config.sections import Source, source_names
from alphatoken.data.chat import RowEncoder
from alphatoken.data.sources import OpenSource, location
from alphatoken.data.tokenising import Made, is_whole, read_report, write_source
from alphatoken.errors import UserError

# Part of the cache key: raise it when the same row would be tokenised or stored differently.
FORMAT_VERSION = 7


# Token ids (int32) and response mask (bool), (T,) each.
Document = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


class TokenDataset:
    """The tokenised rows of one or several sources, by a running index.

    Each source has a file; `made` says what it took to make it.
    """

    def __init__(
        self, sources: Sequence[Source], files: Sequence[Path], made: Sequence[Made]
    ) -> None:
        self._sources = sources
        self.files = files
        self.made = made
        self._parts = [datasets.Dataset.from_file(str(file)).with_format("numpy") for file in files]
        # The same rows may have been tokenised from another place.
        self.reports = [
            replace(read_report(file), path=source.path)
            for source, file in zip(sources, files, strict=True)
        ]
        self.sizes = [len(part) for part in self._parts]
        self.lengths: np.ndarray[Any, Any] = np.concatenate(
            [np.asarray(part.data.column("length"), dtype=np.int64) for part in self._parts]
        )
        self._starts = np.cumsum([0, *self.sizes])

    @property
    def weights(self) -> list[float] | None:
        """Relative shares of the sources in an epoch, or None: every row once."""
        weights = [source.weight for source in self._sources]
        return None if None in weights else [weight for weight in weights if weight is not None]

    @property
    def names(self) -> list[str]:
        """What each source is called."""
        return source_names(self._sources)

    @property
    def first_rows(self) -> list[int]:
        """The running index of the first row of each source."""
        return [int(start) for start in self._starts[:-1]]

    def described(self) -> list[dict[str, Any]]:
        """Path, number of rows and identity of each source."""
        named = zip(self.reports, self.identity, strict=True)
        return [
            {"path": report.path, "rows": report.rows, "identity": identity}
            for report, identity in named
        ]

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def identity(self) -> list[str]:
        """A hash for each source of its content, how its rows were tokenised, and to which
        length."""
        return [file.stem for file in self.files]

    def __getitem__(self, index: int) -> list[Document]:
        """The documents of one row: its only one, or the chosen and the rejected one of a pair."""
        part, row = self._find(index)
        fields = self._parts[part][row]
        ids, mask, second = fields["input_ids"], fields["response_mask"], int(fields["second"])
        spans = [slice(0, second), slice(second, None)] if second else [slice(None)]
        return [(ids[span], mask[span]) for span in spans]

    def location(self, index: int) -> str:
        """Where a row came from: `file:line`."""
        part, row = self._find(index)
        return location(self._sources[part], int(self._parts[part][row]["number"]))

    @property
    def longest(self) -> int:
        """Tokens of the longest document; of a pair either is one."""
        found = 0
        for part in self._parts:
            lengths, seconds = (
                np.asarray(part.data.column(name), dtype=np.int64) for name in ("length", "second")
            )
            found = max(found, int(np.maximum(seconds, lengths - seconds).max(initial=0)))
        return found

    def first_beyond(self, tokens: int) -> tuple[int, int] | None:
        """The first row with a token of id `tokens` or above, and its id; None without one."""
        for start, part in zip(self._starts, self._parts, strict=False):
            column = part.data.column("input_ids")
            if pc.max(pc.list_flatten(column)).as_py() < tokens:
                continue
            for row, ids in enumerate(column):
                highest = max(ids.as_py())
                if highest >= tokens:
                    return int(start) + row, highest
        return None

    def digests(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """A 64-bit hash of every document's tokens, int64, and the row it belongs to."""
        digests = [pc.list_flatten(part.data.column("digests")) for part in self._parts]
        counts = [pc.list_value_length(part.data.column("digests")) for part in self._parts]
        rows = np.repeat(
            np.arange(len(self)), np.concatenate([np.asarray(of_part) for of_part in counts])
        )
        return np.concatenate([np.asarray(of_part) for of_part in digests]), rows

    def asked(self) -> np.ndarray[Any, Any]:
        """A 64-bit hash of what precedes each answer of any row, int64."""
        return np.concatenate(
            [np.asarray(pc.list_flatten(part.data.column("asked"))) for part in self._parts]
        )

    def last_asked(self) -> np.ndarray[Any, Any]:
        """A 64-bit hash of what precedes the last answer of each row, (rows,) int64."""
        return np.asarray(
            [row[-1] for part in self._parts for row in part.data.column("asked").to_pylist()]
        )

    def _find(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._starts, index, side="right")) - 1
        return part, int(index - self._starts[part])


def tokenise(
    sources: Sequence[Source], encoder: RowEncoder, cache_dir: Path, workers: int | None = None
) -> TokenDataset:
    """The tokenised rows of all sources, from the cache where it has them; those of many rows are
    tokenised by up to `workers` processes, by default one per core.

    Raises UserError for unreadable or malformed data, for a source without a usable row, and where
    the cache cannot be written.
    """
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        lacking = next(source.path for source in sources if source.weight is None)
        raise UserError(
            f"either all data sources of a mixture have a weight or none; {lacking} has none"
        )
    folder = cache_dir.expanduser()
    done = [_tokenise_source(source, encoder, folder, workers) for source in sources]
    return TokenDataset(sources, [file for file, _ in done], [made for _, made in done])


def _tokenise_source(
    source: Source, encoder: RowEncoder, cache_dir: Path, workers: int | None
) -> tuple[Path, Made]:
    rows = OpenSource(source)
    key = hashlib.sha256(
        json.dumps([FORMAT_VERSION, rows.fingerprint, encoder.identity]).encode()
    ).hexdigest()
    file = cache_dir / f"{key[:32]}.arrow"
    began, left = time.perf_counter(), 0
    try:
        if not is_whole(file):  # nothing is written else: the folder may be read-only
            cache_dir.mkdir(parents=True, exist_ok=True)
            # One writer per shared cache folder; the others find the file.
            with FileLock(file.with_suffix(".lock")):
                if not is_whole(file):
                    left = write_source(rows, encoder, file, workers)
    except OSError as error:
        raise UserError(
            f"cannot write the tokenised rows of {source.path} to data.cache_dir={cache_dir}: "
            f"{error}; make room, or set data.cache_dir to another folder"
        ) from None
    report = read_report(file)
    if report.rows == 0:
        reasons = (
            ", ".join(f"{count} skipped: {reason}" for reason, count in report.skipped.items())
            or "it is empty"
        )
        raise UserError(f"{source.path} has no usable row ({reasons})")
    return file, Made(left, time.perf_counter() - began)
