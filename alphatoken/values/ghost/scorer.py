"""Estimator `ghost`: refreshes G and V once per step, and values batches by the tower's signals.

Shape legend: B sequences, T positions, R response positions of one chunk, I and O the features of a
linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.valuation import ValuationConfig
from alphatoken.distributed.shard_files import EqualSlices, TensorFile
from alphatoken.models.decoder import Decoder
from alphatoken.models.scored import ScoredLinear, scored_depth
from alphatoken.passes.capture import Entry, EntryCapture
from alphatoken.stability.drift import Drift
from alphatoken.values.algebra import FromMatrix
from alphatoken.values.estimator import (
    Coefficients,
    Scorer,
    Scores,
    SliceScale,
    count_eligible,
    of_eligible,
)
from alphatoken.values.ghost.contract import Contractions, TermSums
from alphatoken.values.ghost.directions import MeanMatrices, Weighted, contractions_with
from alphatoken.values.ghost.held_out import HeldOutSignals
from alphatoken.values.ghost.scored_mean import ScoredMean
from alphatoken.values.ghost.signals import LinearSignals, SignalConsumer
from alphatoken.values.ghost.tower import Tower


class GhostScorer(Scorer):
    """Values response tokens on the linears of the last K layers of a decoder (Eqs. 8-12)."""

    def __init__(
        self, decoder: Decoder, config: ValuationConfig, device: torch.device, drift: Drift | None
    ) -> None:
        super().__init__(decoder, config)
        self._drift = drift
        self._resident = config.is_resident
        self.tower = Tower(
            decoder,
            scored_depth(config.layers, len(decoder.layers)),
            device,
            resident=self._resident,
            chunk_tokens=config.chunk_tokens,
        )
        self._dtype = next(decoder.model.parameters()).dtype
        linears = self.tower.linears
        self._features = {name: self._features_of(linear) for name, linear in linears.items()}
        self._held_out = self._no_signals(device)
        self._contrast_rows = self._no_signals(device)
        self._scored: ScoredMean | None = None
        if config.contrast_source == "scored":
            self._scored = ScoredMean(
                self._features, config.contrast_memory, device, signed=config.reliability
            )
        self._kept_contractions: dict[int, dict[str, Contractions]] = {}
        """By layer and linear, where everything is resident; a streamed layer's are gathered while
        it is in memory."""
        self._places = {name: place for place, name in enumerate(linears)}
        self._nonfinite = torch.zeros(len(linears), dtype=torch.bool, device=device)

    @classmethod
    def build(
        cls,
        decoder: Decoder,
        config: ValuationConfig,
        device: torch.device,
        *,
        drift: Drift | None,
        adam_scale: SliceScale | None,
    ) -> GhostScorer:
        return cls(decoder, config, device, drift)

    @classmethod
    def notes(cls, decoder: Decoder, config: ValuationConfig) -> list[str]:
        depth = scored_depth(config.layers, len(decoder.layers))
        without = [
            index
            for index in range(len(decoder.layers) - depth, len(decoder.layers))
            if decoder.architecture.value_projection
            not in dict(decoder.layers[index].named_modules())
        ]
        if not without:
            return []
        layers = ", ".join(map(str, without))
        return [f"no causal term from layers without an attention matrix: {layers}"]

    def capture(self) -> EntryCapture:
        return self.tower.capture()

    def nonfinite_parts(self) -> list[str]:
        flags = self._nonfinite.tolist()
        self._nonfinite.zero_()
        return [name for name, flag in zip(self.tower.linears, flags, strict=True) if flag]

    @property
    def needs_contrast_rows(self) -> bool:
        return super().needs_contrast_rows or (self._scored is not None and self._scored.is_empty)

    @torch.no_grad()
    def after_step(self) -> None:
        if self._scored is not None:
            whole = self.tower.layers if self._resident else ()
            self._scored.fold([self._names(layer) for layer in whole])
            if not self._scored.is_empty:
                self._contrast_rows.clear()

    def state(self) -> EqualSlices | None:
        return None if self._scored is None else self._scored.state()

    @property
    def saved_bytes(self) -> int:
        return 0 if self._scored is None else self._scored.saved_bytes

    def restore(self, saved: TensorFile) -> None:
        if self._scored is not None:
            self._scored.restore(saved)

    @torch.no_grad()
    def refresh(
        self,
        batches: Sequence[Batch] | None,
        scored_tokens: int = 0,
        contrast: Sequence[Batch] | None = None,
        coefficients: Coefficients | None = None,
    ) -> list[Tensor]:
        self.tower.refresh()
        losses = []
        if batches is not None:
            losses = self._take_in(batches, self._held_out, scored_tokens, coefficients)
        if contrast is not None:
            losses += self._take_in_contrast(contrast, scored_tokens, coefficients)
        if self._resident:
            self._kept_contractions = {}  # the old ones go before the new are gathered
            for layer in self.tower.layers:
                self._kept_contractions[layer] = self._gather_contractions(layer)
        return losses

    @torch.no_grad()
    def score(self, entry: Entry, batch: Batch) -> Scores:
        # The tower hands each layer's signals to `add`, the last layer first; nothing of a layer is
        # left when the next one runs.
        sums = TermSums(
            batch["response_index"],
            split=self.config.split_terms,
            contrast=self.config.contrast,
            spread=self.config.reliability,
        )
        scored = self._scored if self.is_followed else None

        @contextmanager
        def contracting(layer: int) -> Iterator[SignalConsumer]:
            contractions = (
                self._kept_contractions[layer]
                if self._resident
                else self._gather_contractions(layer)
            )

            def add(signals: LinearSignals) -> None:
                name = signals.linear.name
                finite = sums.add(signals, contractions[name], self.config.stability_weight)
                self._nonfinite[self._places[name]] |= ~finite
                if scored is not None:
                    _add_response(scored, signals)

            yield add
            if scored is not None and not self._resident:
                scored.reduce(self._names(layer))

        if scored is not None:
            scored.count(batch["response_index"].count)

        nll_BT = self.tower.run(entry, batch, contracting, window=self.config.window)
        # (1, lambda), unless `balance: std` has measured other ones.
        return Scores(sums.values(self.part_weights), nll_BT)

    def _take_in(
        self,
        batches: Sequence[Batch],
        into: HeldOutSignals,
        scored_tokens: int,
        coefficients: Coefficients | None,
    ) -> list[Tensor]:
        """Collects the signals of this rank's batches, in place of those that were there; returns
        their token losses."""
        own_count = sum(batch["response_index"].count for batch in batches)
        into.begin(own_count, scored_tokens)
        losses = [self._collect(batch, into, coefficients) for batch in batches]
        if self._resident:
            for layer in self.tower.layers:
                into.reduce(self._names(layer))
        return losses

    def _take_in_contrast(
        self, batches: Sequence[Batch], scored_tokens: int, coefficients: Coefficients | None
    ) -> list[Tensor]:
        """Collects the signals of the rows that B is of, from the losses of their eligible tokens
        alone; returns all their token losses."""
        rows, eligible = self._contrast_rows, self.eligible
        if eligible is None:
            return self._take_in(batches, rows, scored_tokens, coefficients)
        counted = of_eligible(eligible, coefficients)
        losses = self._take_in(batches, rows, scored_tokens, counted)
        rows.divide_by(count_eligible(eligible, batches, losses))
        return losses

    def _collect(
        self, batch: Batch, into: HeldOutSignals, coefficients: Coefficients | None
    ) -> Tensor:
        """Adds the signals of a batch; returns its token losses."""

        @contextmanager
        def collecting(layer: int) -> Iterator[SignalConsumer]:
            yield lambda signals: _add_response(into, signals)
            if not self._resident:  # so that one layer's matrices are whole at a time
                into.reduce(self._names(layer))

        with self.tower.capture() as capture:
            self.run_body(batch)
        # G holds the direct signals only (Eq. 8): no causal path is followed through held-out
        # rows.
        return self.tower.run(capture.entry, batch, collecting, coefficients=coefficients)

    def _names(self, layer: int) -> list[str]:
        return [name for name, linear in self.tower.linears.items() if linear.layer == layer]

    def _gather_contractions(self, layer: int) -> dict[str, Contractions]:
        """What a layer's signals are contracted with, by linear, from all ranks' slices: one
        message for the matrices of G, B and D, one for V; those of signals come besides."""
        names, weight = self._names(layer), self.config.stability_weight
        found = contractions_with(self._directions(), names, self._features, self._dtype)
        contractions = {
            name: Contractions(
                target=found["target"][name],
                proxy=None,
                contrast=found["contrast"][name] if "contrast" in found else None,
                spread=found["spread"][name] if "spread" in found else None,
            )
            for name in names
        }
        if self._drift is None:
            return contractions
        for name, drift in zip(names, self._drift.matrices(names, self._dtype), strict=True):
            drift_OI = drift.T if self.tower.linears[name].transposed else drift
            target = contractions[name].target
            if isinstance(target, FromMatrix) and not self.config.split_terms:
                # lambda itself, not the part weights: `split_terms: false` is refused with
                # `balance: std`.
                fused_OI = target.matrix_OI.float().add(drift_OI, alpha=weight)
                changed = {"target": FromMatrix(fused_OI.to(self._dtype))}
            else:
                changed = {"proxy": FromMatrix(drift_OI)}
            contractions[name] = replace(contractions[name], **changed)
        return contractions

    def _directions(self) -> dict[str, list[Weighted]]:
        """What the directions besides V are made of, each a weighted sum of means: by default G
        alone; with contrast B, too, or G - c B where only the composite is wanted; with halves D.
        """
        held_out, minus_c = self._held_out, -self.config.contrast
        directions = {"target": [Weighted(1.0, held_out)]}
        if self.config.reliability:
            directions["spread"] = [Weighted(1.0, held_out, signed=True)]
        if not minus_c:
            return directions
        if self.config.split_terms:
            directions["contrast"] = [Weighted(1.0, self._contrast_mean)]
        else:
            directions["target"].append(Weighted(minus_c, self._contrast_mean))
        if self.config.reliability:
            directions["spread"].append(Weighted(minus_c, self._contrast_mean, signed=True))
        return directions

    @property
    def _contrast_mean(self) -> MeanMatrices:
        """Where B comes from: what was scored, once there is any; or rows."""
        if self._scored is None or self._scored.is_empty:
            return self._contrast_rows
        return self._scored

    def _no_signals(self, device: torch.device) -> HeldOutSignals:
        return HeldOutSignals(
            self._features,
            self.config.contraction,
            self._dtype,
            device,
            signed=self.config.reliability,
        )

    def _features_of(self, linear: ScoredLinear) -> tuple[int, int]:
        """(out, in) features of a linear, however its weight is stored."""
        rows, columns = self.tower.weight(linear.layer, linear.path).shape
        return (columns, rows) if linear.transposed else (rows, columns)


def _add_response(into: HeldOutSignals | ScoredMean, signals: LinearSignals) -> None:
    """Adds the signals of a chunk's response positions."""
    into.add(signals.linear.name, signals.outgrad_RO, signals.act_RI, signals.chunk.halves)
