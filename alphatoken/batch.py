"""What a micro-batch is: its keys, and the loss positions that follow from its labels.

Shape legend: B rows, T positions, D documents (a row holds one, or several where they are packed).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NotRequired, TypedDict, cast

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


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
    attention_mask: NotRequired[Tensor]
    """(B, T) int64; absent where all padding is on the right."""
    position_ids: NotRequired[Tensor]
    """(B, T) int64, from 0 in each document; absent where a row is one document."""
    cu_seq_lens: NotRequired[Tensor]
    """(D + 1,) int32, where the documents of a single packed row begin, and its length: what flash
    attention would otherwise find on the device, in every layer."""
    max_length: NotRequired[int]
    """The longest of those documents."""
    document_ids: NotRequired[Tensor]
    """(B, T) int64 in 0..D-1, row by row; -1 on padding."""
    rows: NotRequired[Tensor]
    """(D,) int64, the dataset row of each document."""
    half_sign: NotRequired[Tensor]
    """(B, T) float32, which half of a draw a position's row is in: 1 for rows with an even number
    among the distinct ones of the draw, -1 for odd ones, 0 on padding. Where values under halves
    are asked for."""
    noise: NotRequired[Tensor]
    """(B, T) float32, uniform in [0, 1), where a policy needs it."""
    reference_nll: NotRequired[Tensor]
    """(B, T) float32, another model's losses of the response tokens, zero elsewhere."""


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


def make_batch(columns: Mapping[str, Tensor | int]) -> Batch:
    """Completes `input_ids`, `labels` and whatever else a batch has by its loss positions."""
    labels_BT = columns["labels"]
    assert isinstance(labels_BT, Tensor)
    response_BT, targets_BT = loss_positions(labels_BT)
    return cast(Batch, {**columns, "targets": targets_BT, "response": response_BT})


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copies a batch to a device."""
    return cast(
        Batch,
        {
            key: value.to(device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        },
    )
