"""The signals of rows that steer values, divided over the ranks, in the form each linear's
contraction needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alphatoken.distributed import collectives
from alphatoken.values import algebra
from alphatoken.values.algebra import CONTRACTIONS, ContractionName, FromSignals
from alphatoken.values.ghost.directions import MeanMatrices
from alphatoken.values.ghost.outer_sums import OuterSums


@dataclass
class _Rows:
    """One linear's signals of this rank's own positions, where no matrix is formed of them."""

    acts: list[Tensor] = field(default_factory=list)
    outgrads: list[Tensor] = field(default_factory=list)
    signs: list[Tensor] = field(default_factory=list)


class HeldOutSignals(MeanMatrices):
    """Collects (h_v, d_v) per linear; `directions.contractions_with` makes contractions with their
    mean outer product.

    `features` maps names to (out, in). `choice` is `valuation.contraction`. Contractions are in
    `dtype`. With `signed` the halves of the rows are told apart. Every rank must call `begin` and
    `reduce` in the same order.
    """

    def __init__(
        self,
        features: Mapping[str, tuple[int, int]],
        choice: str,
        dtype: torch.dtype,
        device: torch.device,
        *,
        signed: bool = False,
    ) -> None:
        self._features = features
        self._choice = choice
        self._dtype = dtype
        self._device = device
        self._signed = signed
        self._formed = OuterSums(features, device, signed=signed)  # sum_v d_v h_v^T, in slices
        self._rows: dict[str, _Rows] = {}
        self._val_count = 0

    def begin(self, own_val_count: int, own_scored_tokens: int) -> None:
        """Forgets the old signals. The counts are this rank's validation positions, and the tokens
        it will score."""
        counts = torch.tensor([own_val_count, own_scored_tokens], device=self._device)
        self._val_count, scored_tokens = (
            int(count) for count in collectives.sum_over_ranks(counts).tolist()
        )
        ranks = collectives.world_size()
        chosen: dict[str, ContractionName] = {}
        for name, (out_features, in_features) in self._features.items():
            chosen[name] = algebra.cheaper_contraction(
                self._val_count, scored_tokens // ranks, in_features, out_features, ranks
            )
            if self._choice != "auto":
                chosen[name] = CONTRACTIONS[self._choice]
        self._formed.begin([name for name, form in chosen.items() if form == "matrix"])
        self._rows = {name: _Rows() for name, form in chosen.items() if form == "signals"}

    def divide_by(self, own_val_count: Tensor) -> None:
        """Makes means over fewer positions than `begin` was told of: this rank's, int64."""
        self._val_count = int(collectives.sum_over_ranks(own_val_count))

    def clear(self) -> None:
        """Forgets all signals, which take no memory any more."""
        self._formed.begin(())
        self._rows = {}

    def add(
        self,
        name: str,
        outgrad_NO: Tensor,
        act_NI: Tensor,
        halves: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Signals of some validation positions of this rank; with `signed` also which of them are
        in either half, int64 each."""
        if name in self._formed:
            self._formed.add(name, outgrad_NO, act_NI, halves)
            return
        rows = self._rows[name]
        rows.acts.append(act_NI)
        rows.outgrads.append(outgrad_NO)
        if self._signed:
            assert halves is not None, "signed sums need the half of each position"
            sign_N = torch.zeros(len(act_NI), device=self._device)
            rows.signs.append(sign_N.index_fill_(0, halves[0], 1).index_fill_(0, halves[1], -1))

    def reduce(self, names: Sequence[str]) -> None:
        """Moves what was added for `names` into the ranks' slices: one reduce-scatter for all of
        them."""
        self._formed.reduce(names)

    def own_slice(self, name: str, *, signed: bool = False) -> Tensor | None:
        if name not in self._formed:
            return None
        return self._formed.own(name, signed=signed) / max(self._val_count, 1)

    def all_signals(self, name: str) -> FromSignals:
        rows, (out_features, in_features) = self._rows[name], self._features[name]
        outgrad_NO = self._all_rows(rows.outgrads, out_features)
        act_NI = self._all_rows(rows.acts, in_features)
        sign_N = None
        if self._signed:
            none = torch.zeros(0, device=self._device)
            sign_N = collectives.gather_rows(torch.cat([none, *rows.signs]))
        return FromSignals(outgrad_NO, act_NI, self._val_count, sign_N)

    def _all_rows(self, parts: list[Tensor], features: int) -> Tensor:
        own = torch.cat([torch.zeros(0, features, dtype=self._dtype, device=self._device), *parts])
        return collectives.gather_rows(own)
