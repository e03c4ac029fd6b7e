"""The equation of a token's value: the signals of one linear contracted with G, B and V, and the
sum over linears (Eqs. 8 to 12 of arXiv 2606.01635, which know no B: there c is 0).

    value(t) =   d_t^T G h_t  +  sum_{t<k<=t+w} A[k,t] d_k^T G h_t              adaptation
               - c      ( d_t^T B h_t  +  sum_{t<k<=t+w} A[k,t] d_k^T B h_t )
               + lambda ( d_t^T V h_t  +  sum_{t<k<=t+w} A[k,t] d_k^T V h_t )   stability

summed over the scored linears; the second summand of each line exists at value projections only.
The spread is the same with D, half the difference of G - c B under two halves of the rows, in place
of G - c B + lambda V. `split_terms` decides where c and lambda enter; the package says where.

Shape legend: B sequences and T positions of a batch, R response positions of one chunk, I and O the
features of a linear.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken.batch import RowIndex
from alphatoken.values.algebra import (
    TERMS,
    Contraction,
    FromMatrix,
    TokenValues,
    bilinear_products,
)
from alphatoken.values.ghost.signals import LinearSignals


@dataclass(frozen=True)
class Contractions:
    """What the signals of one linear are contracted with."""

    target: Contraction
    """With G, the held-out gradient per token: (d, h) -> d^T G h; or with G - c B, or
    G - c B + lambda V, where only the composite is wanted."""
    proxy: Contraction | None
    """With V = F * (W - W_ref), the Fisher-weighted drift: (d, h) -> d^T V h. None without drift,
    and where `target` is with G + lambda V already."""
    contrast: Contraction | None = None
    """With B, the same of other training rows. None without contrast, and where `target` is with
    G - c B already."""
    spread: Contraction | None = None
    """With D = (G_a - G_b) / 2 - c (B_a - B_b) / 2, where a and b are halves of the rows. None
    unless it is asked for."""

    def by_direction(self) -> dict[str, Contraction]:
        """Those that values are summed of, by name."""
        every = {"target": self.target, "contrast": self.contrast, "proxy": self.proxy}
        return {name: each for name, each in every.items() if each is not None}


def contract(signals: LinearSignals, contractions: Contractions) -> dict[str, Tensor]:
    """Contracts one linear's signals: its share of the terms, by name, (R,) float32 each.

    Absent terms, which are left out, are zero: the causal ones of a linear that no causal path is
    followed through, the contrast ones without contrast, the proxy ones without drift.
    """
    paths = {"direct": signals.outgrad_RO}
    if signals.mixed_RO is not None:
        paths["causal"] = signals.mixed_RO  # sum_k A[k,t] d_k
    contracted = contract_all([*paths.values()], contractions.by_direction(), signals.act_RI)
    return {
        f"{path}_{direction}": share_R
        for direction, shares in contracted.items()
        for path, share_R in zip(paths, shares, strict=True)
    }


def contract_at_once(
    signals: LinearSignals, contractions: Contractions, stability_weight: float
) -> Tensor:
    """Contracts one linear's signals to its share of the value, (R,) float32, without the terms.

    Every term is linear in d, so direct and causal paths may be added before the contraction:
    value = (d + mixed)^T (G - c B + lambda V) h. That halves the work on value projections, and
    more where `contractions.target` is with lambda V, too. It is with -c B, if there is contrast.
    """
    contracted = contract_all([_of_all_paths(signals)], contractions.by_direction(), signals.act_RI)
    (value_R,) = contracted["target"]
    if "proxy" not in contracted:
        return value_R
    (proxy_R,) = contracted["proxy"]
    return value_R + stability_weight * proxy_R


def contract_all(
    outgrads: Sequence[Tensor], contractions: Mapping[str, Contraction], act_RI: Tensor
) -> dict[str, list[Tensor]]:
    """Every contraction with every d, (R,) float32 by name and in order of `outgrads`; those with a
    matrix together."""
    matrices = {
        name: each.matrix_OI for name, each in contractions.items() if isinstance(each, FromMatrix)
    }
    products = bilinear_products(outgrads, [*matrices.values()], act_RI)
    found = dict(zip(matrices, products, strict=True))
    return {
        name: found[name] if name in found else [each(d_RO, act_RI) for d_RO in outgrads]
        for name, each in contractions.items()
    }


def contract_spread(signals: LinearSignals, spread: Contraction) -> Tensor:
    """Contracts one linear's signals to its share of the spread, (R,) float32, over all paths."""
    return spread(_of_all_paths(signals), signals.act_RI)


def _of_all_paths(signals: LinearSignals) -> Tensor:
    """d_t with what comes by the causal path, of response positions, (R, O)."""
    if signals.mixed_RO is None:
        return signals.outgrad_RO
    return signals.outgrad_RO + signals.mixed_RO


class TermSums:
    """Sums over linears, float32 per term and response position of a batch.

    index: the batch's response positions. split: whether the terms are kept apart, or only their
    weighted sum is computed. contrast: what the contrast terms are multiplied by (c). spread:
    whether that is computed as well.
    """

    def __init__(
        self, index: RowIndex, *, split: bool, contrast: float = 0.0, spread: bool = False
    ) -> None:
        self._index = index
        self._split = split
        self._contrast = contrast
        names = [*(TERMS if split else ("composite",)), *(["spread"] if spread else [])]
        device = index.index_R.device
        self._sums = {name: torch.zeros(index.count, device=device) for name in names}

    def add(
        self, signals: LinearSignals, contractions: Contractions, stability_weight: float
    ) -> Tensor:
        """Contracts one linear's signals and adds the result. Returns whether it was finite, a bool
        scalar on the device. `stability_weight` counts where the terms are not kept apart."""
        if self._split:
            shares = contract(signals, contractions)
        else:
            shares = {"composite": contract_at_once(signals, contractions, stability_weight)}
        if contractions.spread is not None:
            shares["spread"] = contract_spread(signals, contractions.spread)
        for name, share_R in shares.items():
            self._sums[name][signals.chunk.span] += share_R
        return torch.stack(list(shares.values())).isfinite().all()

    def values(self, part_weights: tuple[float, float]) -> TokenValues:
        """The sums as values, (B, T) each. `part_weights` multiply adaptation and stability where
        the terms were kept apart; otherwise the terms are NaN on the response."""
        sums = {name: self._index.put(sum_R) for name, sum_R in self._sums.items()}
        spread_BT = sums.pop("spread", None)
        if not self._split:
            response_BT = self._index.put(torch.ones_like(self._index.index_R, dtype=torch.bool))
            return TokenValues.from_composite(sums["composite"], response_BT, spread_BT)
        return TokenValues.from_terms(sums, part_weights, contrast=self._contrast, spread=spread_BT)
