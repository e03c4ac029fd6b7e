"""The algebra of token values: plain tensors, no modules, no ranks.

Shape legend: B sequences, T loss positions, R scored positions (flattened over B and T), N
validation positions, I and O the input and output features of one linear map with weight W (O, I).

`act` is the input h of a linear, `outgrad` the gradient d = dL/d(W h) of the *summed* loss. Both
contractions of the target term are exact; they differ in cost only (see `cheaper_contraction`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

ContractionName = Literal["signals", "matrix"]
"""What a target term is contracted with: the held-out signals themselves, or their mean outer
product G."""
CONTRACTIONS: dict[str, ContractionName] = {"ghost": "signals", "materialised": "matrix"}
"""What `valuation.contraction` names, besides `auto`."""
TERMS = ("direct_target", "causal_target", "direct_proxy", "causal_proxy")


@dataclass(frozen=True)
class TokenValues:
    """Values of every loss position, (B, T) float32 each, zero off the response; positive is worth
    training on.

    `composite` is Eq. 12. When only the composite was computed (`split_terms: false`) the four
    terms are NaN on the response. Estimator `exact` does not tell causal from direct paths: the
    direct terms hold both.
    """

    direct_target: Tensor
    causal_target: Tensor
    direct_proxy: Tensor
    causal_proxy: Tensor
    composite: Tensor

    @classmethod
    def from_terms(cls, terms: Sequence[Tensor], weights: tuple[float, float]) -> TokenValues:
        """`terms` in the order of TERMS. `weights` multiply adaptation and stability: (1, lambda)
        in Eq. 12."""
        direct_target, causal_target, direct_proxy, causal_proxy = terms
        composite = weights[0] * (direct_target + causal_target) + weights[1] * (
            direct_proxy + causal_proxy
        )
        return cls(direct_target, causal_target, direct_proxy, causal_proxy, composite)

    def items(self) -> list[tuple[str, Tensor]]:
        return [(field.name, getattr(self, field.name)) for field in fields(self)]


def target_matrix(val_outgrad_NO: Tensor, val_act_NI: Tensor) -> Tensor:
    """sum_v d_v h_v^T, the unnormalised G of one linear. Returns (O, I) float32.

    Divide by the number of validation positions over all ranks to obtain G.
    """
    return val_outgrad_NO.float().T @ val_act_NI.float()


def ghost_product(
    outgrad_RO: Tensor,
    act_RI: Tensor,
    val_outgrad_NO: Tensor,
    val_act_NI: Tensor,
    val_count: int,
    block: int = 8192,
) -> Tensor:
    """1/N sum_v <d_t, d_v> <h_t, h_v> for every scored position t (Eq. 8), without forming G.
    Returns (R,) float32.

    `val_count` is N over all ranks. Never more than (R, `block`) products are held at once.
    """
    total_R = torch.zeros(act_RI.shape[0], device=act_RI.device)
    for start in range(0, val_act_NI.shape[0], block):
        grad_dots_RN = outgrad_RO @ val_outgrad_NO[start : start + block].T
        act_dots_RN = act_RI @ val_act_NI[start : start + block].T
        total_R += (grad_dots_RN.float() * act_dots_RN.float()).sum(-1)
    return total_R / max(val_count, 1)


def bilinear_product(outgrad_RO: Tensor, matrix_OI: Tensor, act_RI: Tensor) -> Tensor:
    """d_t^T M h_t for every scored position t: Eq. 8 with M = G, Eq. 11 with M = V.
    (R,) float32."""
    return ((act_RI @ matrix_OI.T).float() * outgrad_RO.float()).sum(-1)


class Contraction(Protocol):
    """1/N sum_v <d_t, d_v> <h_t, h_v>, or d_t^T V h_t, of every scored position: (R,) float32."""

    def __call__(self, outgrad_RO: Tensor, act_RI: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FromMatrix:
    """Contraction with a matrix: G, V, or a sum of both."""

    matrix_OI: Tensor

    def __call__(self, outgrad_RO: Tensor, act_RI: Tensor) -> Tensor:
        return bilinear_product(outgrad_RO, self.matrix_OI, act_RI)


@dataclass(frozen=True)
class FromSignals:
    """Contraction with the held-out signals themselves; `val_count` is N over all ranks."""

    outgrad_NO: Tensor
    act_NI: Tensor
    val_count: int

    def __call__(self, outgrad_RO: Tensor, act_RI: Tensor) -> Tensor:
        return ghost_product(outgrad_RO, act_RI, self.outgrad_NO, self.act_NI, self.val_count)


# What moving a byte between ranks costs, in floating-point operations: about an accelerator's
# rate over a network's.
FLOPS_PER_BYTE = 1000.0


def cheaper_contraction(
    val_count: int, scored_tokens: int, in_features: int, out_features: int, ranks: int
) -> ContractionName:
    """The contraction that costs less until the next refresh, in computation and communication of
    one rank.

    `signals` multiplies 2 N (I + O) per scored token and gathers N (I + O) numbers of 2 bytes;
    `matrix` multiplies 2 I O per scored token, 2 I O N / R once to form G, and reduces and gathers
    I O numbers of 4 bytes. Without the one-off parts they break even at N = I O / (I + O).
    `scored_tokens` is one rank's, between two refreshes.
    """
    features, product = in_features + out_features, in_features * out_features
    remote = (ranks - 1) / ranks
    signals = (
        2.0 * scored_tokens * val_count * features
        + FLOPS_PER_BYTE * remote * 2 * val_count * features
    )
    matrix = 2.0 * product * val_count / ranks + FLOPS_PER_BYTE * remote * 2 * 4 * product
    return "signals" if signals < 2.0 * scored_tokens * product + matrix else "matrix"
