"""What passes over the scored layers share: chunks of whole sequences, and the top of a backward
pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch
from alphatoken.models.head import head_loss
from alphatoken.passes.capture import Entry


@dataclass(frozen=True)
class Chunk:
    """Some sequences of a batch, whole."""

    rows: slice
    """Which rows of the batch they are."""
    entry: Entry
    response_BT: Tensor
    """Their response mask, bool."""
    targets_BT: Tensor
    """The token that each of their positions predicts."""

    @cached_property
    def has_response(self) -> bool:
        """Whether any position has a loss."""
        return bool(self.response_BT.any())


def chunks_of(entry: Entry, batch: Batch, chunk_tokens: int) -> list[Chunk]:
    """Cuts a batch into whole sequences, of at most `chunk_tokens` tokens together, padding
    included, but at least one each."""
    count, length = batch["targets"].shape
    size = max(1, chunk_tokens // length)
    pieces = [slice(start, min(start + size, count)) for start in range(0, count, size)]
    return [
        Chunk(
            rows=rows,
            entry=entry.rows(rows),
            response_BT=batch["response"][rows],
            targets_BT=batch["targets"][rows],
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
    response_BT, targets_BT = chunk.response_BT, chunk.targets_BT
    with torch.enable_grad():
        hidden_RH = hidden_BTH[response_BT].requires_grad_()
        normed_RH = norm(hidden_RH)
    nll_R, outgrad_RH = head_loss(normed_RH.detach(), head, targets_BT[response_BT], softcap)
    nll_BT = torch.zeros(response_BT.shape, device=nll_R.device)
    nll_BT[response_BT] = nll_R
    outgrad_BTH = torch.zeros_like(hidden_BTH)
    (outgrad_BTH[response_BT],) = torch.autograd.grad(normed_RH, hidden_RH, outgrad_RH)
    return nll_BT, outgrad_BTH
