"""Tokenised rows on disk: written once, memory-mapped by every rank and run that uses the same data
and tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from filelock import FileLock

from alphatoken.config.sections import Source
from alphatoken.data.chat import Encoded, RowEncoder, Skipped
from alphatoken.data.sources import Row, location, open_source
from alphatoken.errors import UserError
from alphatoken.util.files import publish, publish_text

# Part of the cache key: raise it when the same row would be tokenised or stored differently.
FORMAT_VERSION = 7

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


# Token ids (int32) and response mask (bool), (T,) each.
Document = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


class TokenDataset:
    """The tokenised rows of one or several sources, by a running index."""

    def __init__(self, sources: Sequence[Source], files: Sequence[Path]) -> None:
        self._sources = sources
        self._files = files
        self._parts = [datasets.Dataset.from_file(str(file)).with_format("numpy") for file in files]
        self.reports = [_read_report(file) for file in files]
        self.sizes = [len(part) for part in self._parts]
        self.lengths: np.ndarray[Any, Any] = np.concatenate(
            [np.asarray(part["length"]) for part in self._parts]
        )
        self._starts = np.cumsum([0, *self.sizes])

    @property
    def weights(self) -> list[float] | None:
        """Relative shares of the sources in an epoch, or None: every row once."""
        weights = [source.weight for source in self._sources]
        return None if None in weights else [weight for weight in weights if weight is not None]

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
        return [file.stem for file in self._files]

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


def tokenise(sources: Sequence[Source], encoder: RowEncoder, cache_dir: Path) -> TokenDataset:
    """The tokenised rows of all sources, from the cache where it has them.

    Raises UserError for unreadable or malformed data and for a source without a usable row.
    """
    weighted = [source.weight is not None for source in sources]
    if any(weighted) and not all(weighted):
        lacking = next(source.path for source in sources if source.weight is None)
        raise UserError(
            f"either all data sources of a mixture have a weight or none; {lacking} has none"
        )
    return TokenDataset(
        sources, [_tokenise_source(source, encoder, cache_dir.expanduser()) for source in sources]
    )


def _tokenise_source(source: Source, encoder: RowEncoder, cache_dir: Path) -> Path:
    fingerprint, rows = open_source(source)
    key = hashlib.sha256(
        json.dumps([FORMAT_VERSION, fingerprint, encoder.identity]).encode()
    ).hexdigest()
    file = cache_dir / f"{key[:32]}.arrow"
    cache_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(
        file.with_suffix(".lock")
    ):  # one writer per shared cache folder; the others find the file
        if not file.exists():

            def write(partial: Path) -> None:
                written = _write(source, rows, encoder, partial)
                publish_text(file.with_suffix(".json"), json.dumps(asdict(written)))

            publish(file, write)  # whole even where several write it, as not every disk has locks
    report = _read_report(file)
    if report.rows == 0:
        reasons = (
            ", ".join(f"{count} skipped: {reason}" for reason, count in report.skipped.items())
            or "it is empty"
        )
        raise UserError(f"{source.path} has no usable row ({reasons})")
    return file


def _read_report(file: Path) -> SourceReport:
    return SourceReport(**json.loads(file.with_suffix(".json").read_text(encoding="utf-8")))


def _write(source: Source, rows: Iterator[Row], encoder: RowEncoder, file: Path) -> SourceReport:
    """Encodes all rows of a source into an Arrow stream, ROWS_PER_BATCH at a time."""
    skipped: Counter[str] = Counter()
    cut: Counter[str] = Counter()
    notes: Counter[str] = Counter()
    unread = set[str]()
    kept = tokens = response_tokens = 0
    batch: list[dict[str, Any]] = []
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, SCHEMA) as writer:
        for row in rows:
            unread |= row.unread
            encoded = encoder.encode(row.fields, location(source, row.number))
            if isinstance(encoded, Skipped):
                skipped[encoded.reason] += 1
                continue
            for each in encoded:
                record = _record(each, row.number)
                kept += 1
                cut.update(each.cut)
                notes.update(each.notes)
                tokens += record["length"]
                response_tokens += sum(record["response_mask"][1:])  # the first is not predicted
                batch.append(record)
            if len(batch) >= ROWS_PER_BATCH:
                writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
                batch.clear()
        writer.write_batch(pa.RecordBatch.from_pylist(batch, SCHEMA))
    return SourceReport(
        path=source.path,
        rows=kept,
        cut=dict(cut),
        notes=dict(notes),
        skipped=dict(skipped),
        tokens=tokens,
        response_tokens=response_tokens,
        unread=sorted(unread),
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
