"""Which rows make up an optimizer step, and how they become micro-batches; both are pure functions.

The rows of step s depend on (seed, s) alone. They are sorted by length and cut into micro-batches
*before* those are dealt to ranks, so values, masks and losses do not depend on the number of ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from alphatoken.batch import IGNORE_INDEX, Batch, boundaries, loss_positions, make_batch
from alphatoken.config.choices import is_flash
from alphatoken.config.run import RunConfig
from alphatoken.data.cache import Document
from alphatoken.data.noise import uniform_noise

Indices = np.ndarray[Any, np.dtype[np.int64]]


class ByRow(Protocol):
    """Numbers for every row of a dataset."""

    def __getitem__(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]: ...


class Tokenised(Protocol):
    """Rows of one or two documents, by a running index."""

    @property
    def lengths(self) -> np.ndarray[Any, Any]:
        """Tokens of each row, (rows,) int64."""
        ...

    def __getitem__(self, index: int) -> list[Document]: ...


class Order:
    """The endless sequence of training rows: one shuffled epoch after another.

    sizes: rows of each source. weights: relative shares of the sources, or None for every row once
    per epoch. With weights an epoch has as many rows as all sources together, source i giving the
    share w_i / sum w of them; each source runs through all its rows, reshuffled, before any comes
    again.
    """

    def __init__(
        self, sizes: Sequence[int], weights: Sequence[float] | None, seed: tuple[int, ...]
    ) -> None:
        self.epoch_rows = sum(sizes)
        self._sizes = list(sizes)
        self._quotas = list(sizes) if weights is None else _quotas(self.epoch_rows, weights)
        self._seed = seed
        self._epoch = lru_cache(maxsize=2)(self._shuffled_epoch)

    def step(self, step: int, rows: int) -> Indices:
        """The `rows` rows of optimizer step `step` (from 0), as indices into the dataset."""
        positions = np.arange(step * rows, (step + 1) * rows)
        epochs, places = np.divmod(positions, self.epoch_rows)
        return np.array(
            [self._epoch(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)]
        )

    def following(self, position: int, count: int, without: Collection[int]) -> Indices:
        """The first `count` different rows from a position of the sequence on that are not in
        `without`; fewer where two epochs have no more."""
        found: dict[int, None] = {}
        for place in range(position, position + 2 * self.epoch_rows):
            row = int(self.step(place, 1)[0])
            if row not in without:
                found[row] = None
            if len(found) == count:
                break
        return np.array(list(found), dtype=np.int64)

    def _shuffled_epoch(self, epoch: int) -> Indices:
        starts = np.cumsum([0, *self._sizes])
        drawn = [
            start + self._source_rows(source, epoch * quota, quota)
            for source, (start, quota) in enumerate(zip(starts, self._quotas, strict=False))
        ]
        return self._permutation(np.concatenate(drawn), epoch, len(self._sizes))

    def _source_rows(self, source: int, first: int, count: int) -> Indices:
        """`count` rows of a source from position `first` of its endless run of reshuffled
        passes."""
        size = self._sizes[source]
        passes = range(first // size, (first + count - 1) // size + 1) if count else range(0)
        run = [self._permutation(np.arange(size), number, source) for number in passes]
        offset = first % size
        return np.concatenate(run)[offset : offset + count] if run else np.empty(0, dtype=np.int64)

    def _permutation(self, rows: Indices, round_number: int, stream: int) -> Indices:
        return np.random.default_rng([*self._seed, round_number, stream]).permutation(rows)


def _quotas(total: int, weights: Sequence[float]) -> list[int]:
    """`total` divided in proportion to the weights, by largest remainder."""
    shares = np.asarray(weights, dtype=np.float64) / sum(weights) * total
    quotas = np.floor(shares).astype(np.int64)
    for source in np.argsort(quotas - shares, kind="stable")[: total - quotas.sum()]:
        quotas[source] += 1
    return [int(quota) for quota in quotas]


ONE_ROW = sys.maxsize
"""`Layout.row_tokens` that packs a micro-batch into a single row."""


@dataclass(frozen=True)
class Layout:
    """How rows become tensors.

    size: dataset rows per micro-batch. row_tokens: None puts each dataset row (document) into a row
    of its own, padded to the longest; a number packs documents into as few rows of at most so many
    tokens as first-fit finds; ONE_ROW packs all of them into one, and adds the boundaries that
    flash attention takes. noise_key: (seed, step) adds noise, for policies that need it.
    halves: adds which half of the draw each position's row is in, with its first row of number
    first_number. by_row: by the name of the column
    that they become, and by dataset row, numbers of its response tokens, (R,) float32. first_only:
    lay out the chosen document of a pair alone; without `by_row` only. parts: pad rows to a
    multiple of so many tokens, so that they can be cut into as many parts.
    """

    size: int
    pad_token: int
    row_tokens: int | None = None
    noise_key: tuple[int, int] | None = None
    halves: bool = False
    first_number: int = 0
    by_row: Mapping[str, ByRow] = field(default_factory=dict)
    first_only: bool = False
    parts: int = 1


def row_tokens(config: RunConfig) -> int | None:
    """`Layout.row_tokens` of a run, whose attention kernel has a name (`auto` is none)."""
    if not config.data.packing:
        return None
    # Flash attention pays nothing for long rows, and a single one has no padding.
    return ONE_ROW if is_flash(config.model.attn_implementation) else config.data.max_length


def micro_batches(
    dataset: Tokenised, rows: Indices, layout: Layout, rank: int, world_size: int
) -> list[Batch]:
    """Makes this rank's micro-batches of the given rows: of all micro-batches, numbers rank, rank +
    world_size, ...

    Rows are padded on the right, so no attention mask is needed. Documents are numbered row by row,
    so that those of pair i are 2 i and 2 i + 1. `position_ids` are there where documents are
    packed, `cu_seq_lens` and `max_length` where into one row, `noise`, `half_sign` and the columns
    of `by_row` where the layout asks for them. Every rank gets equally many micro-batches: where
    they run out, a placeholder with one padding token and no label.
    """
    by_length = np.argsort(-dataset.lengths[rows], kind="stable")
    groups = [
        by_length[start : start + layout.size] for start in range(0, len(by_length), layout.size)
    ]
    groups += [np.empty(0, dtype=np.int64)] * (-len(groups) % world_size)
    numbers = layout.first_number + _distinct_numbers(rows)
    return [
        collate(dataset, rows[group], layout, numbers[group]) for group in groups[rank::world_size]
    ]


def _distinct_numbers(rows: Indices) -> Indices:
    """0, 1, 2, ... for rows in the order of their first place in a draw; a row that comes twice, as
    where an epoch ends, has the same number both times, so that it is in one half of the draw."""
    number = {row: place for place, row in enumerate(dict.fromkeys(rows.tolist()))}
    return np.array([number[row] for row in rows.tolist()], dtype=np.int64)


FILL = {"labels": IGNORE_INDEX, "document_ids": -1}
"""What padding holds, where it is not zero (or the padding token)."""


def collate(dataset: Tokenised, rows: Indices, layout: Layout, numbers: Indices) -> Batch:
    """Lays the documents of the given dataset rows into one micro-batch; `numbers` are those of the
    distinct rows of their draw, which tell its halves."""
    of_rows = [_documents(dataset, int(row), layout) for row in rows]
    if layout.halves:
        for number, of_row in zip(numbers, of_rows, strict=True):
            for document in of_row:
                sign = -1.0 if number % 2 else 1.0
                document["half_sign"] = torch.full((len(document["labels"]),), sign)
    documents = [document for of_row in of_rows for document in of_row]
    for number, document in enumerate(documents):
        document["document_ids"] = torch.full_like(document["labels"], number)
    lengths = [len(document["input_ids"]) for document in documents]
    if layout.row_tokens is None:
        places = [[number] for number in range(len(documents))]
    else:
        places = _first_fit(lengths, layout.row_tokens)
    # A placeholder has one row of one token.
    height = max(len(places), 1)
    width = max((sum(lengths[number] for number in place) for place in places), default=1)
    width += -width % layout.parts

    columns: dict[str, Tensor | int] = {}
    for name, dtype in _columns(layout).items():
        fill = layout.pad_token if name == "input_ids" else FILL.get(name, 0)
        column_BT = torch.full((height, width), fill, dtype=dtype)
        for row, place in enumerate(places):
            parts = [documents[number][name] for number in place]
            column_BT[row, : sum(map(len, parts))] = torch.cat(parts)
        columns[name] = column_BT
    if layout.row_tokens is not None:
        columns["position_ids"] = _position_ids(height, width, lengths, places)
    if layout.row_tokens == ONE_ROW:
        padding = [width - sum(lengths)] if sum(lengths) < width else []
        columns["cu_seq_lens"], columns["max_length"] = boundaries([*lengths, *padding])
    counts = torch.tensor([len(of_row) for of_row in of_rows], dtype=torch.int64)
    columns["rows"] = torch.from_numpy(rows).repeat_interleave(counts)
    return make_batch(columns)


def _columns(layout: Layout) -> dict[str, torch.dtype]:
    """Names and types of the columns that documents bring along."""
    columns = dict.fromkeys(("input_ids", "labels", "document_ids"), torch.int64)
    if layout.noise_key is not None:
        columns["noise"] = torch.float32
    if layout.halves:
        columns["half_sign"] = torch.float32
    return columns | dict.fromkeys(layout.by_row, torch.float32)


def _position_ids(
    height: int, width: int, lengths: Sequence[int], places: Sequence[Sequence[int]]
) -> Tensor:
    """Positions of packed documents, from 0 in each, (B, T) int64; padding is a document of its
    own."""
    position_BT = torch.arange(width).repeat(height, 1)
    for row, place in enumerate(places):
        start = 0
        for number in place:
            start += lengths[number]
            position_BT[row, start:] = torch.arange(width - start)
    return position_BT


def _documents(dataset: Tokenised, row: int, layout: Layout) -> list[dict[str, Tensor]]:
    """The columns of each document of a dataset row, (T,) each."""
    documents = []
    for ids, mask in dataset[row][: 1 if layout.first_only else None]:
        tokens = torch.from_numpy(np.array(ids))
        labels = torch.where(torch.from_numpy(np.array(mask)), tokens.long(), IGNORE_INDEX)
        labels[0] = IGNORE_INDEX  # nothing predicts the first token of a document
        documents.append({"input_ids": tokens, "labels": labels})
    lengths = [len(document["labels"]) for document in documents]
    if layout.noise_key is not None:
        noise = uniform_noise(*layout.noise_key, row, sum(lengths)).split(lengths)
        for document, noise_T in zip(documents, noise, strict=True):
            document["noise"] = noise_T
    if layout.by_row:
        responses = [loss_positions(document["labels"][None])[0][0] for document in documents]
        counts = [int(response_T.sum()) for response_T in responses]
    for name, numbers in layout.by_row.items():
        parts = torch.from_numpy(numbers[row]).split(counts)
        for document, response_T, part_R in zip(documents, responses, parts, strict=True):
            document[name] = torch.zeros(len(response_T)).masked_scatter(response_T, part_R)
    return documents


def _first_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Documents per row: each goes into the first row with room, in the given (longest first)
    order."""
    rows: list[list[int]] = []
    free: list[int] = []
    for number, length in enumerate(lengths):
        row = next((row for row, room in enumerate(free) if room >= length), len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
        rows[row].append(number)
        free[row] -= length
    return rows
