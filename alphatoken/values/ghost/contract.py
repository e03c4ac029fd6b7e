"""The value of a token, in one place: the signals of one linear contracted with G and V, and the
sum over linears (Eqs. 8 to 12 of arXiv 2606.01635).

    value(t) =   d_t^T G h_t  +  sum_{t<k<=t+w} A[k,t] d_k^T G h_t              adaptation
               + lambda ( d_t^T V h_t  +  sum_{t<k<=t+w} A[k,t] d_k^T V h_t )   stability

summed over the scored linears; the sums over k over value projections only.

Shape legend: B sequences and T positions of a batch, R response positions of one chunk, I and O the
features of a linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken.values.algebra import TERMS, Contraction, TokenValues
from alphatoken.values.ghost.signals import LinearSignals


@dataclass(frozen=True)
class Products:
    """What the signals of one linear are contracted with."""

    target: Contraction
    """With G, the mean gradient of the held-out losses: (d, h) -> d^T G h."""
    proxy: Contraction | None
    """With V = F * (W - W_ref), the Fisher-weighted drift: (d, h) -> d^T V h. None without drift,
    and where `target` is with G + lambda V already."""


def contract(signals: LinearSignals, products: Products) -> dict[str, Tensor]:
    """Contracts one linear's signals: its share of the four terms, by name, (R,) float32 each.

    Absent terms are zero: the causal ones of a linear that no causal path is followed through, the
    proxy ones without drift.
    """
    response_BT = signals.chunk.response_BT
    h_RI, d_RO = signals.act_BTI[response_BT], signals.outgrad_BTO[response_BT]
    terms = {"direct_target": products.target(d_RO, h_RI)}
    if products.proxy is not None:
        terms["direct_proxy"] = products.proxy(d_RO, h_RI)
    if signals.mixed_BTO is not None:
        mixed_RO = signals.mixed_BTO[response_BT]  # sum_k A[k,t] d_k
        terms["causal_target"] = products.target(mixed_RO, h_RI)
        if products.proxy is not None:
            terms["causal_proxy"] = products.proxy(mixed_RO, h_RI)
    return terms


def contract_at_once(signals: LinearSignals, products: Products, stability_weight: float) -> Tensor:
    """Contracts one linear's signals to its share of the value, (R,) float32, without the terms.

    Every term is linear in d, so direct and causal paths may be added before the contraction:
    value = (d + mixed)^T (G + lambda V) h. That halves the work on value projections, and more
    where `products.target` is with G + lambda V.
    """
    response_BT = signals.chunk.response_BT
    h_RI, d_RO = signals.act_BTI[response_BT], signals.outgrad_BTO[response_BT]
    if signals.mixed_BTO is not None:
        d_RO = d_RO + signals.mixed_BTO[response_BT]
    value_R = products.target(d_RO, h_RI)
    if products.proxy is not None:
        value_R = value_R + stability_weight * products.proxy(d_RO, h_RI)
    return value_R


class TermSums:
    """Sums over linears, (B, T) float32 per term, zero off the response.

    split: whether the four terms are kept apart, or only their weighted sum is computed.
    """

    def __init__(self, response_BT: Tensor, *, split: bool) -> None:
        self._response_BT = response_BT
        self._split = split
        self._sums = {
            name: torch.zeros(response_BT.shape, device=response_BT.device)
            for name in (TERMS if split else ("composite",))
        }

    def add(self, signals: LinearSignals, products: Products, stability_weight: float) -> Tensor:
        """Contracts one linear's signals and adds the result. Returns whether it was finite, a bool
        scalar on the device."""
        if self._split:
            shares = contract(signals, products)
        else:
            shares = {"composite": contract_at_once(signals, products, stability_weight)}
        for name, share_R in shares.items():
            chunk_BT = self._sums[name][signals.chunk.rows]
            chunk_BT[signals.chunk.response_BT] += share_R
        return torch.stack(list(shares.values())).isfinite().all()

    def values(self, part_weights: tuple[float, float]) -> TokenValues:
        """The sums as values. `part_weights` multiply adaptation and stability where the terms were
        kept apart; otherwise the terms are NaN on the response."""
        if self._split:
            return TokenValues.from_terms([self._sums[term] for term in TERMS], part_weights)
        composite_BT = self._sums["composite"]
        unknown_BT = torch.zeros_like(composite_BT).masked_fill(self._response_BT, torch.nan)
        return TokenValues(**dict.fromkeys(TERMS, unknown_BT), composite=composite_BT)
