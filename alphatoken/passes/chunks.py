"""What passes over the scored layers share: chunks of whole sequences, and the top of a backward
pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch, RowIndex
from alphatoken.models.head import head_loss
from alphatoken.passes.capture import Entry


@dataclass(frozen=True)
class Chunk:
    """Some sequences of a batch, whole."""

    rows: slice
    """Which rows of the batch they are."""
    entry: Entry
    index: RowIndex
    """Their response positions."""
    span: slice
    """Which of the batch's response positions these are."""
    halves: tuple[Tensor, Tensor] | None
    """Which of its own response positions are in one half of their draw, and in the other, int64
    each; where halves are told apart."""
    targets_BT: Tensor
    """The token that each of their positions predicts."""
    has_response: bool
    """Whether any position has a loss, of this rank's or, where rows are divided, another's."""


def chunks_of(entry: Entry, batch: Batch, chunk_tokens: int) -> list[Chunk]:
    """Cuts a batch into whole sequences, of at most `chunk_tokens` tokens together, padding
    included, but at least one each."""
    count, length = batch["targets"].shape
    size = max(1, chunk_tokens // length)
    pieces = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    index, both = batch["response_index"], batch.get("half_index")
    counts = batch.get("row_counts", index.counts)

    def halves_of(rows: slice) -> tuple[Tensor, Tensor] | None:
        if both is None:
            return None
        return both[0].of_rows(rows).index_R, both[1].of_rows(rows).index_R

    return [
        Chunk(
            rows=rows,
            entry=entry.rows(rows),
            index=index.of_rows(rows),
            span=index.span(rows),
            halves=halves_of(rows),
            targets_BT=batch["targets"][rows],
            has_response=any(counts[rows]),
        )
        for rows in pieces
    ]


def top_backward(
    norm: nn.Module,
    head: nn.Linear,
    hidden_BTH: Tensor,
    chunk: Chunk,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Runs norm and head on the response positions of the last layer's output (B, T, H).

    Returns the token losses (B, T), zero off the response, and the gradient of their sum at
    `hidden_BTH` (B, T, H).
    """
    index = chunk.index
    with torch.enable_grad():
        hidden_RH = index.take(hidden_BTH).requires_grad_()
        normed_RH = norm(hidden_RH)
    nll_R, outgrad_RH = head_loss(normed_RH.detach(), head, index.take(chunk.targets_BT), softcap)
    (ingrad_RH,) = torch.autograd.grad(normed_RH, hidden_RH, outgrad_RH)
    return index.put(nll_R), index.put(ingrad_RH)
