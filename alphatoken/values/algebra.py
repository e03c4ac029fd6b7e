"""The algebra of token values: plain tensors, no modules, no ranks.

Shape legend: B sequences, T loss positions, R scored positions (flattened over B and T), N
validation positions and H a block of them, I and O the input and output features of one linear map
with weight W (O, I), F features of either side.

`act` is the input h of a linear, `outgrad` the gradient d = dL/d(W h) of the *summed* loss. Both
contractions of the target term are exact; they differ in cost only (see `cheaper_contraction`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Literal, Protocol

import torch
from torch import Tensor

from alphatoken.util.products import float32_product

ContractionName = Literal["signals", "matrix"]
"""What a target term is contracted with: the held-out signals themselves, or their mean outer
product G."""
CONTRACTIONS: dict[str, ContractionName] = {"ghost": "signals", "materialised": "matrix"}
"""What `valuation.contraction` names, besides `auto`. Its `ghost`, after the products of Opacus'
ghost clipping, is not the estimator, which may use either."""
TERMS = (
    "direct_target",
    "causal_target",
    "direct_contrast",
    "causal_contrast",
    "direct_proxy",
    "causal_proxy",
)


@dataclass(frozen=True)
class TokenValues:
    """Values of every loss position, (B, T) float32 each, zero off the response; positive is good.

    The terms are products with G, the held-out gradient per token (target), with B, that of other
    training rows (contrast; zero without), and with V, the weighted drift (proxy; zero
    without). `composite` = target - c contrast + lambda proxy, which is Eq. 12 where c is 0. When
    only the composite was computed (`split_terms: false`) the terms are NaN on the response.
    Estimator `exact` does not tell causal from direct paths: the direct terms hold both.
    """

    direct_target: Tensor
    causal_target: Tensor
    direct_contrast: Tensor
    causal_contrast: Tensor
    direct_proxy: Tensor
    causal_proxy: Tensor
    composite: Tensor
    spread: Tensor | None = None
    """How much of the value depends on which rows are held out: under either half of them (and of
    the rows of B) alone it is `composite` plus, or minus, this. None unless it was asked for
    (`reliability`)."""

    @classmethod
    def from_terms(
        cls,
        terms: Mapping[str, Tensor],
        weights: tuple[float, float],
        *,
        contrast: float = 0.0,
        spread: Tensor | None = None,
    ) -> TokenValues:
        """`terms` by the names of TERMS; those left out are zero, and one at least must be there.

        `weights` multiply adaptation (target - `contrast` times contrast, and `spread`) and
        stability (proxy): (1, lambda) in Eq. 12.
        """
        zero_BT = torch.zeros_like(next(iter(terms.values())))
        every = {name: terms.get(name, zero_BT) for name in TERMS}
        adaptation = every["direct_target"] + every["causal_target"]
        if contrast:
            adaptation = adaptation - contrast * (
                every["direct_contrast"] + every["causal_contrast"]
            )
        stability = every["direct_proxy"] + every["causal_proxy"]
        return cls(
            **every,
            composite=weights[0] * adaptation + weights[1] * stability,
            spread=None if spread is None else weights[0] * spread,
        )

    @classmethod
    def from_composite(
        cls, composite: Tensor, response_BT: Tensor, spread: Tensor | None = None
    ) -> TokenValues:
        """Values of which no term is known: those are NaN on the response."""
        unknown_BT = torch.zeros_like(composite).masked_fill(response_BT, torch.nan)
        return cls(**dict.fromkeys(TERMS, unknown_BT), composite=composite, spread=spread)

    def items(self) -> list[tuple[str, Tensor]]:
        """Name and tensor of all that was computed."""
        every = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value_BT) for name, value_BT in every if value_BT is not None]


def target_matrix(val_outgrad_NO: Tensor, val_act_NI: Tensor) -> Tensor:
    """sum_v d_v h_v^T, the unnormalised G of one linear. Returns (O, I) float32.

    Divide by the number of validation positions over all ranks to obtain G.
    """
    return float32_product(val_outgrad_NO.T, val_act_NI)


def signals_product(
    outgrad_RO: Tensor,
    act_RI: Tensor,
    val_outgrad_NO: Tensor,
    val_act_NI: Tensor,
    val_count: int,
    block: int = 8192,
    *,
    sign_N: Tensor | None = None,
) -> Tensor:
    """1/N sum_v s_v <d_t, d_v> <h_t, h_v> for every scored position t, without forming G: Eq. 8,
    where every sign s_v is 1. Returns (R,) float32.

    `val_count` is N over all ranks. Held-out positions are taken `block` at a time, and scored ones
    as many as keep their products within BLOCK_ELEMENTS.
    """
    total_R = torch.zeros(act_RI.shape[0], device=act_RI.device)
    for start in range(0, val_act_NI.shape[0], block):
        held = slice(start, start + block)
        outgrad_HO, act_HI = val_outgrad_NO[held], val_act_NI[held]
        for rows in _row_blocks(len(act_RI), len(act_HI)):
            dots_RH = (outgrad_RO[rows] @ outgrad_HO.T).float().mul_(act_RI[rows] @ act_HI.T)
            total_R[rows] += dots_RH.sum(-1) if sign_N is None else dots_RH @ sign_N[held]
    return total_R / max(val_count, 1)


def bilinear_products(
    outgrads: Sequence[Tensor], matrices: Sequence[Tensor], act_RI: Tensor
) -> list[list[Tensor]]:
    """d_t^T M h_t of every scored position t, for each d, (R, O), and each M, (O, I): Eq. 8 with
    M = G, Eq. 11 with M = V. Returns (R,) float32 by M, then by d.

    M is multiplied once, with h for all d; or with d, if there is one and that leaves fewer numbers
    per position. What is then multiplied with the other side is held in float32 for as many
    positions as BLOCK_ELEMENTS allow, and summed there.
    """
    rows, out_features, in_features = len(act_RI), outgrads[0].shape[1], act_RI.shape[1]
    from_left = len(outgrads) == 1 and in_features < out_features
    products = [[torch.empty(rows, device=act_RI.device) for _ in outgrads] for _ in matrices]
    for block in _row_blocks(rows, in_features if from_left else out_features):
        for matrix_OI, by_outgrad in zip(matrices, products, strict=True):
            if from_left:
                wide_RF, others = outgrads[0][block] @ matrix_OI, [act_RI]
            else:
                wide_RF, others = act_RI[block] @ matrix_OI.T, [*outgrads]
            wide_RF = wide_RF.float()
            for place, (other_RF, product_R) in enumerate(zip(others, by_outgrad, strict=True)):
                is_last = place == len(others) - 1
                multiply = wide_RF.mul_ if is_last else wide_RF.mul
                product_R[block] = multiply(other_RF[block]).sum(-1)
    return products


def bilinear_product(outgrad_RO: Tensor, matrix_OI: Tensor, act_RI: Tensor) -> Tensor:
    """`bilinear_products` of one d and one M: (R,) float32."""
    return bilinear_products([outgrad_RO], [matrix_OI], act_RI)[0][0]


BLOCK_ELEMENTS = 2**24
"""How many products of scored positions are held at once: 64 MiB in float32."""


def _row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Parts of `rows` rows of so many columns, of at most BLOCK_ELEMENTS elements, and one row."""
    size = max(1, BLOCK_ELEMENTS // max(columns, 1))
    for start in range(0, rows, size):
        yield slice(start, start + size)


class Contraction(Protocol):
    """<d_t h_t^T, M> of every scored position, with M one of G, B, D, V or a sum of them: (R,)
    float32."""

    def __call__(self, outgrad_RO: Tensor, act_RI: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class FromMatrix:
    """Contraction with a matrix: G, B, D, V, or a sum of them."""

    matrix_OI: Tensor

    def __call__(self, outgrad_RO: Tensor, act_RI: Tensor) -> Tensor:
        return bilinear_product(outgrad_RO, self.matrix_OI, act_RI)


@dataclass(frozen=True)
class FromSignals:
    """Contraction with signals themselves; `val_count` is N over all ranks, and `sign_N` counts
    some of them negatively."""

    outgrad_NO: Tensor
    act_NI: Tensor
    val_count: int
    sign_N: Tensor | None = None

    def __call__(self, outgrad_RO: Tensor, act_RI: Tensor) -> Tensor:
        return signals_product(
            outgrad_RO,
            act_RI,
            self.outgrad_NO,
            self.act_NI,
            self.val_count,
            sign_N=self.sign_N,
        )


@dataclass(frozen=True)
class WeightedSum:
    """A weighted sum of contractions, for what cannot be added before it is contracted."""

    parts: Sequence[tuple[float, Contraction]]

    def __call__(self, outgrad_RO: Tensor, act_RI: Tensor) -> Tensor:
        total_R = torch.zeros(act_RI.shape[0], device=act_RI.device)
        for weight, contraction in self.parts:
            total_R += weight * contraction(outgrad_RO, act_RI)
        return total_R


# What moving a byte between ranks costs, in floating-point operations: about an accelerator's
# rate over a network's.
FLOPS_PER_BYTE = 1000.0


def cheaper_contraction(
    val_count: int, scored_tokens: int, in_features: int, out_features: int, ranks: int
) -> ContractionName:
    """The contraction that costs less until the next refresh, in computation and communication of
    one rank.

    `signals` multiplies 2 N (I + O) per scored token and gathers N (I + O) numbers of 2 bytes;
    `matrix` multiplies 2 I O per scored token, 2 I O N / ranks once to form G, and reduces I O
    numbers of 4 bytes and gathers as many, of 4 at most. Without the one-off parts they break even
    at N = I O / (I + O). `scored_tokens` is one rank's, between two refreshes.
    """
    features, product = in_features + out_features, in_features * out_features
    remote = (ranks - 1) / ranks
    signals = (
        2.0 * scored_tokens * val_count * features
        + FLOPS_PER_BYTE * remote * 2 * val_count * features
    )
    matrix = 2.0 * product * val_count / ranks + FLOPS_PER_BYTE * remote * 2 * 4 * product
    return "signals" if signals < 2.0 * scored_tokens * product + matrix else "matrix"
