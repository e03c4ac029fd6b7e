"""Squared parameter gradients by position, for the diagonal Fisher (Eq. 5): plain tensors and
modules, no ranks.

Shape legend: B sequences, T positions, I and O the features of a linear, F those of a norm, H
hidden size, V vocabulary. `square` is `token`, as published: the sum over positions of each one's
squared gradient; or `sequence`, the true diagonal: for each sequence the square of the sum.
Positions without gradient, such as padding, add nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

Square = Literal["token", "sequence"]

# Rows of a sequence's gradient that are formed at once when it is squared.
SQUARE_BLOCK_ELEMENTS = 2**22


def add_linear_square(
    total_OI: Tensor, outgrad_BTO: Tensor, act_BTI: Tensor, square: Square
) -> None:
    """Adds the squares of a linear's gradients d_t h_t^T to `total_OI` (float32), in place.

    token: sum over all positions of d_t[i]^2 h_t[j]^2. sequence: for each sequence (sum_t d_t[i]
    h_t[j])^2, a block of rows at a time.
    """
    if square == "token":
        total_OI.addmm_(
            outgrad_BTO.flatten(0, 1).float().square().T, act_BTI.flatten(0, 1).float().square()
        )
        return
    rows = max(1, SQUARE_BLOCK_ELEMENTS // total_OI.shape[1])
    for outgrad_TO, act_TI in zip(outgrad_BTO, act_BTI.float(), strict=True):
        for start in range(0, total_OI.shape[0], rows):
            block = slice(start, start + rows)
            total_OI[block] += (outgrad_TO[:, block].float().T @ act_TI).square_()


def vector_square(gradient_BTF: Tensor, square: Square) -> Tensor:
    """Squares of a bias's or norm parameter's gradients by position, summed as those of a linear:
    (F,) float32."""
    gradient_BTF = gradient_BTF.float()
    if square == "token":
        return gradient_BTF.square().sum((0, 1))
    return gradient_BTF.sum(1).square().sum(0)


def add_embedding_square(
    total_VH: Tensor, ids_BT: Tensor, outgrad_BTH: Tensor, square: Square
) -> None:
    """Adds the squares of an embedding's gradients, which at a position touch its token's row only,
    in place."""
    if square == "token":
        total_VH.index_add_(0, ids_BT.flatten(), outgrad_BTH.flatten(0, 1).float().square())
        return
    for ids_T, outgrad_TH in zip(ids_BT, outgrad_BTH, strict=True):
        rows_U, place_T = ids_T.unique(return_inverse=True)
        sums_UH = torch.zeros(len(rows_U), outgrad_TH.shape[1], device=outgrad_TH.device)
        total_VH[rows_U] += sums_UH.index_add_(0, place_T, outgrad_TH.float()).square_()


@dataclass(frozen=True)
class TiedUse:
    """The other use of a head that is tied to the embeddings, for one sequence."""

    position_R: Tensor
    """Response positions, int64."""
    ids_T: Tensor
    """Tokens of the sequence, int64."""
    entered_TH: Tensor
    """Output gradients of the embeddings."""


def add_head_square(
    total_VH: Tensor,
    outgrad_RV: Tensor,
    act_RH: Tensor,
    tied: TiedUse | None,
    square: Square,
) -> None:
    """Adds the squares of one sequence's gradients of the head to `total_VH` (float32), in place.

    `outgrad_RV` and `act_RH` are of its R response positions. Where the head is tied to the
    embeddings, a position's gradient is the sum of both uses.
    """
    if tied is None:
        add_linear_square(total_VH, outgrad_RV[None], act_RH[None], square)
        return
    ids_T, entered_TH = tied.ids_T, tied.entered_TH.float()
    if square == "token":
        add_linear_square(total_VH, outgrad_RV[None], act_RH[None], square)
        add_embedding_square(total_VH, ids_T[None], entered_TH[None], square)
        ids_R, entered_RH = ids_T[tied.position_R], entered_TH[tied.position_R]
        at_own_token_R1 = outgrad_RV.gather(1, ids_R[:, None]).float()
        total_VH.index_add_(0, ids_R, 2 * at_own_token_R1 * act_RH.float() * entered_RH)
        return
    rows = max(1, SQUARE_BLOCK_ELEMENTS // total_VH.shape[1])
    for start in range(0, total_VH.shape[0], rows):
        block = slice(start, start + rows)
        sum_VH = outgrad_RV[:, block].float().T @ act_RH.float()
        inside_T = (ids_T >= start) & (ids_T < start + rows)
        sum_VH.index_add_(0, ids_T[inside_T] - start, entered_TH[inside_T])
        total_VH[block] += sum_VH.square_()


@torch.enable_grad()
def norm_gradients(norm: nn.Module, act: Tensor, outgrad: Tensor) -> dict[str, Tensor]:
    """Gradients of a norm's parameters at every position, by name: (B, T, F) each.

    `act` and `outgrad` (B, T, F) are its input and output gradient; of a norm of heads (B, T,
    heads, F), which are summed. Every position gets a copy of the parameters, and autograd tells
    them apart; torch's own LayerNorm takes no such copies, but its gradients are those of an affine
    map.
    """
    features = act.shape[-1]
    if isinstance(norm, nn.LayerNorm):
        centred = nn.functional.layer_norm(act, (features,), eps=norm.eps)
        gradients = {
            "weight": outgrad * centred,
            **({} if norm.bias is None else {"bias": outgrad}),
        }
    else:
        copies = {
            name: parameter.detach().expand_as(act).clone().requires_grad_()
            for name, parameter in norm.named_parameters()
        }
        output = functional_call(norm, copies, (act.detach(),))
        gradients = dict(
            zip(copies, torch.autograd.grad(output, list(copies.values()), outgrad), strict=True)
        )
    return {
        name: gradient.reshape(*act.shape[:2], -1, features).sum(2)
        for name, gradient in gradients.items()
    }
