"""What passes over the scored layers share: chunks of whole sequences, and the top of a backward
pass."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from alphatoken.batch import loss_positions
from alphatoken.models.head import head_loss
from alphatoken.passes.capture import Entry


@dataclass(frozen=True)
class Chunk:
    """Some sequences of a batch."""

    rows: slice
    entry: Entry
    labels_BT: Tensor

    @cached_property
    def has_response(self) -> bool:
        return bool(loss_positions(self.labels_BT)[0].any())


def chunks_of(entry: Entry, labels_BT: Tensor, chunk_tokens: int) -> list[Chunk]:
    """Whole sequences, of at most `chunk_tokens` tokens together, padding included, but at least
    one each."""
    batch, length = labels_BT.shape
    size = max(1, chunk_tokens // length)
    pieces = [slice(start, min(start + size, batch)) for start in range(0, batch, size)]
    return [Chunk(rows, entry.rows(rows), labels_BT[rows]) for rows in pieces]


def top_backward(
    norm: nn.Module,
    head: nn.Linear,
    hidden_BTH: Tensor,
    chunk: Chunk,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    """Token losses (B, T) and the gradient of their sum at the last layer's output `hidden_BTH` (B,
    T, H)."""
    response_BT, targets_BT = loss_positions(chunk.labels_BT)
    with torch.enable_grad():
        hidden_RH = hidden_BTH[response_BT].requires_grad_()
        normed_RH = norm(hidden_RH)
    nll_R, outgrad_RH = head_loss(normed_RH.detach(), head, targets_BT[response_BT], softcap)
    nll_BT = torch.zeros(response_BT.shape, device=nll_R.device)
    nll_BT[response_BT] = nll_R
    outgrad_BTH = torch.zeros_like(hidden_BTH)
    (outgrad_BTH[response_BT],) = torch.autograd.grad(normed_RH, hidden_RH, outgrad_RH)
    return nll_BT, outgrad_BTH
