"""Which rows make up an optimizer step, and how they become micro-batches; both are pure functions.

The rows of step s depend on (seed, s) alone. They are sorted by length and cut into micro-batches
*before* those are dealt to ranks, so values, masks and losses do not depend on the number of ranks.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from alphatoken.batch import IGNORE_INDEX, loss_positions
from alphatoken.config.run import RunConfig
from alphatoken.data.cache import TokenDataset
from alphatoken.data.noise import uniform_noise

Indices = np.ndarray[Any, np.dtype[np.int64]]


class ByRow(Protocol):
    """Numbers for every row of a dataset."""

    def __getitem__(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]: ...


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


@dataclass(frozen=True)
class Layout:
    """How rows become tensors.

    size: dataset rows per micro-batch. row_tokens: None puts each dataset row (document) into a row
    of its own, padded to the longest; a number packs documents into as few rows of at most so many
    tokens as first-fit finds. noise_key: (seed, step) adds noise for the random policy. reference:
    by dataset row, another model's losses of its response tokens, (R,) float32.
    """

    size: int
    pad_token: int
    row_tokens: int | None = None
    noise_key: tuple[int, int] | None = None
    reference: ByRow | None = None


def row_tokens(config: RunConfig) -> int | None:
    """`Layout.row_tokens` of a run."""
    if not config.data.packing:
        return None
    # Flash attention tells documents apart in single rows only, and pays nothing for long ones.
    return (
        sys.maxsize
        if config.model.attn_implementation == "flash_attention_2"
        else config.data.max_length
    )


def micro_batches(
    dataset: TokenDataset, rows: Indices, layout: Layout, rank: int, world_size: int
) -> list[dict[str, Tensor]]:
    """This rank's micro-batches of the given rows: of all micro-batches, numbers rank, rank +
    world_size, ...

    Each is a dict of (B, T) tensors, padded on the right (so no attention mask is needed):
    `input_ids`, `labels`, `document_ids` (int64, numbered row by row, so that those of pair i are 2
    i and 2 i + 1; -1 on padding), `position_ids` where documents are packed, `noise` and
    `reference_nll` where asked for; and `rows`, the dataset index of each document. Every rank gets
    equally many micro-batches: where they run out, a placeholder with one padding token and no
    label.
    """
    by_length = rows[np.argsort(-dataset.lengths[rows], kind="stable")]
    groups = [
        by_length[start : start + layout.size] for start in range(0, len(by_length), layout.size)
    ]
    groups += [np.empty(0, dtype=np.int64)] * (-len(groups) % world_size)
    return [_collate(dataset, group, layout) for group in groups[rank::world_size]]


def _collate(dataset: TokenDataset, rows: Indices, layout: Layout) -> dict[str, Tensor]:
    by_row = [_documents(dataset, int(row), layout) for row in rows]
    documents = [document for of_row in by_row for document in of_row]
    lengths = [len(document["input_ids"]) for document in documents]
    places = [[number] for number in range(len(documents))]
    if layout.row_tokens is not None:
        places = _first_fit(lengths, layout.row_tokens)
    shape = (
        max(len(places), 1),
        max((sum(lengths[number] for number in place) for place in places), default=1),
    )
    batch = {
        "input_ids": torch.full(shape, layout.pad_token),
        "labels": torch.full(shape, IGNORE_INDEX),
        "document_ids": torch.full(shape, -1),
        "position_ids": torch.arange(shape[1]).repeat(shape[0], 1),
        "noise": torch.zeros(shape),
        "reference_nll": torch.zeros(shape),
    }
    for row, place in enumerate(places):
        start = 0
        for number in place:
            end = start + lengths[number]
            for key, column in documents[number].items():
                batch[key][row, start:end] = column
            batch["document_ids"][row, start:end] = number
            start = end
        batch["position_ids"][row, start:] -= start  # padding is a document of its own
    if layout.row_tokens is None:
        del batch["position_ids"]
    if layout.noise_key is None:
        del batch["noise"]
    if layout.reference is None:
        del batch["reference_nll"]
    counts = torch.tensor([len(of_row) for of_row in by_row], dtype=torch.int64)
    return {**batch, "rows": torch.from_numpy(rows).repeat_interleave(counts)}


def _documents(dataset: TokenDataset, row: int, layout: Layout) -> list[dict[str, Tensor]]:
    """The columns of each document of a dataset row."""
    documents = []
    for ids, mask in dataset[row]:
        tokens = torch.from_numpy(np.array(ids))
        labels = torch.where(torch.from_numpy(np.array(mask)), tokens.long(), IGNORE_INDEX)
        labels[0] = IGNORE_INDEX  # nothing predicts the first token of a document
        documents.append(
            {"input_ids": tokens, "labels": labels, "position_ids": torch.arange(len(ids))}
        )
    lengths = [len(document["labels"]) for document in documents]
    if layout.noise_key is not None:
        noise = uniform_noise(*layout.noise_key, row, sum(lengths)).split(lengths)
        documents = [
            {**document, "noise": each} for document, each in zip(documents, noise, strict=True)
        ]
    if layout.reference is not None:
        responses = [loss_positions(document["labels"][None])[0][0] for document in documents]
        nll_R = torch.from_numpy(layout.reference[row])
        parts = nll_R.split([int(response_T.sum()) for response_T in responses])
        for document, response_T, part_R in zip(documents, responses, parts, strict=True):
            document["reference_nll"] = torch.zeros(len(response_T)).masked_scatter(
                response_T, part_R
            )
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
