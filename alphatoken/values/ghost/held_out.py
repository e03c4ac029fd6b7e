"""The held-out signals of the scored linears, divided over the ranks, in the form each linear's
contraction needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alphatoken.distributed import collectives
from alphatoken.values import algebra
from alphatoken.values.algebra import (
    CONTRACTIONS,
    Contraction,
    ContractionName,
    FromMatrix,
    FromSignals,
)


@dataclass
class _Signals:
    """One linear's signals. matrix: this rank's slice of the sum of d_v h_v^T. signals: this rank's
    own rows."""

    contraction: ContractionName
    slice: Tensor
    pending_OI: Tensor | None = None
    acts: list[Tensor] = field(default_factory=list)
    outgrads: list[Tensor] = field(default_factory=list)


class HeldOutSignals:
    """Collects (h_v, d_v) per linear and hands out contractions with them.

    `features` maps names to (out, in). `choice` is `valuation.contraction`. Contractions are in
    `dtype`. Every rank must call `begin`, `reduce` and `contractions` in the same order.
    """

    def __init__(
        self,
        features: Mapping[str, tuple[int, int]],
        choice: str,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._features = features
        self._choice = choice
        self._dtype = dtype
        self._device = device
        self._signals: dict[str, _Signals] = {}
        self._val_count = 0

    def begin(self, own_val_count: int, own_scored_tokens: int) -> None:
        """Forgets the old signals. The counts are this rank's validation positions, and the tokens
        it will score."""
        counts = torch.tensor([own_val_count, own_scored_tokens], device=self._device)
        self._val_count, scored_tokens = (
            int(count) for count in collectives.sum_over_ranks(counts).tolist()
        )
        ranks = collectives.world_size()
        self._signals = {}
        for name, (out_features, in_features) in self._features.items():
            contraction: ContractionName = algebra.cheaper_contraction(
                self._val_count, scored_tokens // ranks, in_features, out_features, ranks
            )
            if self._choice != "auto":
                contraction = CONTRACTIONS[self._choice]
            length = -(-out_features * in_features // ranks) if contraction == "matrix" else 0
            self._signals[name] = _Signals(contraction, torch.zeros(length, device=self._device))

    def add(self, name: str, outgrad_NO: Tensor, act_NI: Tensor) -> None:
        """Signals of some validation positions of this rank."""
        signals = self._signals[name]
        if signals.contraction == "signals":
            signals.acts.append(act_NI)
            signals.outgrads.append(outgrad_NO)
        else:
            matrix_OI = algebra.target_matrix(outgrad_NO, act_NI)
            signals.pending_OI = (
                matrix_OI if signals.pending_OI is None else signals.pending_OI + matrix_OI
            )

    def reduce(self, names: Sequence[str]) -> None:
        """Moves what was added for `names` into the ranks' slices: one reduce-scatter for all of
        them."""
        formed = [name for name in names if self._signals[name].contraction == "matrix"]
        if not formed:
            return
        nothing = {name: torch.zeros(self._features[name], device=self._device) for name in formed}
        pending = [self._signals[name].pending_OI for name in formed]
        whole = [
            nothing[name] if part is None else part
            for name, part in zip(formed, pending, strict=True)
        ]
        for name, own in zip(formed, collectives.sum_to_slices(whole), strict=True):
            self._signals[name].slice += own
            self._signals[name].pending_OI = None

    def contractions(self, names: Sequence[str]) -> dict[str, Contraction]:
        """The target contraction of each named linear; gathers matrices (one message) or rows (two
        per linear)."""
        formed = [name for name in names if self._signals[name].contraction == "matrix"]
        slices = [
            (self._signals[name].slice / max(self._val_count, 1)).to(self._dtype) for name in formed
        ]
        shapes = [torch.Size(self._features[name]) for name in formed]
        contractions: dict[str, Contraction] = {
            name: FromMatrix(matrix_OI)
            for name, matrix_OI in zip(
                formed, collectives.gather_slices(slices, shapes), strict=True
            )
        }
        for name in names:
            if name not in contractions:
                signals, (out_features, in_features) = self._signals[name], self._features[name]
                outgrad_NO = self._all_rows(signals.outgrads, out_features)
                contractions[name] = FromSignals(
                    outgrad_NO, self._all_rows(signals.acts, in_features), self._val_count
                )
        return contractions

    def _all_rows(self, parts: list[Tensor], features: int) -> Tensor:
        own = torch.cat([torch.zeros(0, features, dtype=self._dtype, device=self._device), *parts])
        return collectives.gather_rows(own)
