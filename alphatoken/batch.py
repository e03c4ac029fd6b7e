"""What a micro-batch is: its keys, and the loss positions that follow from its labels.

Shape legend: B rows, T positions, D documents (a row holds one, or several where they are packed),
R response positions in order of (row, position).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NotRequired, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


@dataclass(frozen=True)
class RowIndex:
    """Which entries of an axis count, and how many of each row, which the host knows: to take them
    by a mask, the host has to wait until the device has counted it.

    The axis is that of all positions, B rows of T each; or that of other entries, unequally many
    per row.
    """

    index_R: Tensor
    """(R,) int64 into the axis, ascending."""
    counts: tuple[int, ...]
    """How many of them are in each row, on the host."""
    starts: tuple[int, ...]
    """Where each row begins on the axis; last, the axis's length."""

    @classmethod
    def of_mask(cls, mask_BT: Tensor) -> RowIndex:
        """The positions that a mask marks. Waits where it is on a device."""
        rows, length = mask_BT.shape
        return cls(
            index_R=mask_BT.flatten().nonzero()[:, 0],
            counts=tuple(mask_BT.sum(1).tolist()),
            starts=tuple(range(0, (rows + 1) * length, length)) if length else (0,) * (rows + 1),
        )

    def among(self, mask_R: Tensor) -> RowIndex:
        """Those of these entries that a mask marks, as entries of the axis that these are. Waits
        where it is on a device."""
        counts = [int(part_R.sum()) for part_R in mask_R.split(list(self.counts))]
        return RowIndex(
            index_R=mask_R.nonzero()[:, 0],
            counts=tuple(counts),
            starts=tuple(sum(self.counts[:row]) for row in range(len(self.counts) + 1)),
        )

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts)

    def span(self, rows: slice) -> slice:
        """Which of these entries are those of some rows."""
        begin, end, _ = rows.indices(len(self.counts))
        return slice(sum(self.counts[:begin]), sum(self.counts[:end]))

    def of_rows(self, rows: slice) -> RowIndex:
        """Those of some rows, of an axis that is cut to these rows."""
        begin, end, _ = rows.indices(len(self.counts))
        first = self.starts[begin]
        return RowIndex(
            index_R=self.index_R[self.span(rows)] - first,
            counts=self.counts[begin:end],
            starts=tuple(start - first for start in self.starts[begin : end + 1]),
        )

    def take(self, values_BT: Tensor) -> Tensor:
        """Picks from values by position, (B, T, ...), those that count: (R, ...)."""
        return values_BT.flatten(0, 1).index_select(0, self.index_R)

    def put(self, values_R: Tensor) -> Tensor:
        """Values in their positions, (B, T, ...), zero elsewhere. The reverse of `take`."""
        rows, rest = len(self.counts), values_R.shape[1:]
        flat = values_R.new_zeros(self.starts[-1] - self.starts[0], *rest)
        return flat.index_copy_(0, self.index_R, values_R).view(rows, -1, *rest)

    def map(self, change: Callable[[Tensor], Tensor]) -> RowIndex:
        """A copy with the tensor changed, such as moved to a device."""
        return replace(self, index_R=change(self.index_R))


@dataclass(frozen=True, eq=False)
class WholeRows:
    """What attention has to know of whole rows of which this rank has a part each."""

    parts: int
    """Into how many equal parts they are cut, one after the other."""
    position_BT: Tensor | None
    """(B, T) int64, from 0 in each document; None where a row is one document."""
    masks: dict[str, Tensor | None] = field(default_factory=dict)
    """Masks of one pass over the rows, by kind: the first layer that needs one makes it."""

    def of_a_pass(self) -> WholeRows:
        """A copy for a pass of its own, after which no mask is held."""
        return replace(self, masks={})

    def rows(self, rows: slice) -> WholeRows:
        """Narrows it to some of the rows."""

        def narrowed(each_BT: Tensor | None) -> Tensor | None:
            if each_BT is None or each_BT.shape[0] == 1:  # shared by all
                return each_BT
            return each_BT[rows]

        masks = {kind: narrowed(mask) for kind, mask in self.masks.items()}
        return replace(self, position_BT=narrowed(self.position_BT), masks=masks)

    def map(self, change: Callable[[Tensor], Tensor]) -> WholeRows:
        """A copy with the tensor changed, such as moved to a device."""
        position_BT = None if self.position_BT is None else change(self.position_BT)
        return replace(self, position_BT=position_BT, masks={})


class Batch(TypedDict):
    """A micro-batch: tensors by name, on one device.

    `data.batches` makes those of a run, `score_tokens` and the Fisher make their own.
    """

    input_ids: Tensor
    """(B, T) int64 tokens."""
    labels: Tensor
    """(B, T) int64, IGNORE_INDEX off the response: position t holds token t itself."""
    targets: Tensor
    """(B, T) int64, the token that position t predicts, t + 1; IGNORE_INDEX off the response."""
    response: Tensor
    """(B, T) bool, the response mask: where `targets` has a token, so where there is a loss."""
    response_index: RowIndex
    """Which positions the response mask marks, as the host knows them."""
    attention_mask: NotRequired[Tensor]
    """(B, T) int64; absent where all padding is on the right."""
    position_ids: NotRequired[Tensor]
    """(B, T) int64, from 0 in each document; absent where a row is one document."""
    cu_seq_lens: NotRequired[Tensor]
    """(D + 1,) int32, where the documents of a single packed row begin, and its length: what flash
    attention would otherwise find on the device, in every layer."""
    max_length: NotRequired[int]
    """The longest of those documents."""
    whole_rows: NotRequired[WholeRows]
    """Where every row is divided over ranks: T is then the length of this rank's part, and only
    what follows and `rows`, `cu_seq_lens` and `max_length` are of whole rows."""
    row_counts: NotRequired[tuple[int, ...]]
    """Response tokens of each row, in all its parts."""
    document_counts: NotRequired[tuple[int, ...]]
    """Those of each document."""
    earlier_counts: NotRequired[tuple[int, ...]]
    """Those of each document that are in the parts before this rank's."""
    document_ids: NotRequired[Tensor]
    """(B, T) int64 in 0..D-1, -1 on padding; row by row, unless documents are packed, which lie
    wherever they fit."""
    rows: NotRequired[Tensor]
    """(D,) int64, the dataset row of each document."""
    half_sign: NotRequired[Tensor]
    """(B, T) float32, which half of a draw a position's row is in: 1 for rows with an even number
    among the distinct ones of the draw, -1 for odd ones, 0 on padding. Where values under halves
    are asked for."""
    half_index: NotRequired[tuple[RowIndex, RowIndex]]
    """Which of the R response positions are in one half and in the other, as `half_sign` says."""
    noise: NotRequired[Tensor]
    """(B, T) float32, uniform in [0, 1), where a policy needs it."""
    reference_nll: NotRequired[Tensor]
    """(B, T) float32, another model's losses of the response tokens, zero elsewhere."""
    stored_value: NotRequired[Tensor]
    """(B, T) float32, values of the response tokens that were made before, zero elsewhere."""


def loss_positions(labels_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Shifts labels into loss positions: position t predicts token t+1.

    labels_BT: (B, T) int64, IGNORE_INDEX off the response. Returns `response_BT` (bool, the
    response mask) and `targets_BT` (int64, the token each position predicts; IGNORE_INDEX
    elsewhere). The last position predicts nothing.
    """
    targets_BT = F.pad(labels_BT[:, 1:], (0, 1), value=IGNORE_INDEX)
    return targets_BT != IGNORE_INDEX, targets_BT


def boundaries(lengths: Sequence[int]) -> tuple[Tensor, int]:
    """`cu_seq_lens` and `max_length` of a row that holds documents of these lengths in turn, on the
    host."""
    ends = torch.tensor(lengths).cumsum(0)
    return F.pad(ends, (1, 0)).int(), max(lengths)


def make_batch(columns: Mapping[str, object]) -> Batch:
    """Completes `input_ids`, `labels` and whatever else a batch has by its loss positions, best
    while it is on the host: for one on a device the host waits."""
    labels_BT = columns["labels"]
    assert isinstance(labels_BT, Tensor)
    response_BT, targets_BT = loss_positions(labels_BT)
    return _indexed({**columns, "targets": targets_BT, "response": response_BT})


def part_of(batch: Batch, part: int, parts: int) -> Batch:
    """One of `parts` equal parts of every row of a micro-batch on the host, from 0: what one rank
    has of rows that are divided over ranks.

    A position keeps the token that it predicts, which may be in the next part, its place in its
    document and the document's number. `parts` must divide the length of the rows.
    """
    rows, length = batch["input_ids"].shape
    assert length % parts == 0, f"rows of {length} tokens have no {parts} equal parts"
    position_BT = batch.get("position_ids")
    columns: dict[str, object] = {
        **batch,
        "position_ids": torch.arange(length).expand(rows, -1)
        if position_BT is None
        else position_BT,
    }
    own = slice(part * length // parts, (part + 1) * length // parts)
    for name, column in columns.items():
        if isinstance(column, Tensor) and column.dim() == 2:
            columns[name] = column[:, own].contiguous()
    return _indexed(
        {
            **columns,
            "whole_rows": WholeRows(parts, position_BT),
            "row_counts": batch["response_index"].counts,
            "document_counts": tuple(response_counts(batch)),
            "earlier_counts": tuple(_counts_before(batch, own.start)),
        }
    )


def response_counts(batch: Batch) -> list[int]:
    """Response tokens of each document of a micro-batch, those that other ranks have among them.
    Waits where it is on a device and its rows are not divided."""
    if "document_counts" in batch:
        return list(batch["document_counts"])
    document_R = batch["document_ids"][batch["response"]]
    counts: list[int] = document_R.bincount(minlength=len(batch["rows"])).tolist()
    return counts


def _counts_before(batch: Batch, position: int) -> list[int]:
    """Response tokens of each document of whole rows before a position."""
    before = slice(position)
    document_R = batch["document_ids"][:, before][batch["response"][:, before]]
    counts: list[int] = document_R.bincount(minlength=len(batch["rows"])).tolist()
    return counts


def _indexed(columns: Mapping[str, object]) -> Batch:
    """Completes a batch by where its response positions are."""
    response_BT, sign_BT = columns["response"], columns.get("half_sign")
    assert isinstance(response_BT, Tensor)
    index = RowIndex.of_mask(response_BT)
    found: dict[str, object] = {"response_index": index}
    if isinstance(sign_BT, Tensor):
        sign_R = index.take(sign_BT)
        found["half_index"] = (index.among(sign_R > 0), index.among(sign_R < 0))
    return cast(Batch, {**columns, **found})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies a batch from the host to a device. The host does not wait for it where its memory is
    pinned."""
    return _each_tensor(batch, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: Batch) -> Batch:
    """A copy in pinned host memory, from which a GPU reads by itself."""
    return _each_tensor(batch, torch.Tensor.pin_memory)


def _each_tensor(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    def changed(value: object) -> object:
        if isinstance(value, tuple):
            return tuple(map(changed, value))
        if isinstance(value, Tensor):
            return change(value)
        return value.map(change) if isinstance(value, RowIndex | WholeRows) else value

    return cast(Batch, {key: changed(value) for key, value in batch.items()})
