"""Estimator `ghost`: refreshes G and V once per step, and values batches by the tower's signals.

Shape legend: B sequences, T positions, R response positions of one chunk, I and O the features of a
linear.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.sections import ValuationConfig
from alphatoken.models.decoder import Decoder
from alphatoken.models.scored import ScoredLinear, scored_depth
from alphatoken.passes.capture import Entry, EntryCapture
from alphatoken.stability.drift import Drift
from alphatoken.values.algebra import FromMatrix
from alphatoken.values.estimator import Scorer, Scores, SliceScale
from alphatoken.values.ghost.contract import Products, TermSums
from alphatoken.values.ghost.held_out import HeldOutSignals
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
        features = {name: self._features(linear) for name, linear in linears.items()}
        self._held_out = HeldOutSignals(features, config.contraction, self._dtype, device)
        self._kept_products: dict[int, dict[str, Products]] = {}
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

    @torch.no_grad()
    def refresh(self, batches: Sequence[Batch] | None, scored_tokens: int = 0) -> list[Tensor]:
        self.tower.refresh()
        losses = [] if batches is None else self._take_in(batches, scored_tokens)
        if self._resident:
            self._kept_products = {}  # the old ones go before the new are gathered
            for layer in self.tower.layers:
                self._kept_products[layer] = self._gather_products(layer)
        return losses

    @torch.no_grad()
    def score(self, entry: Entry, batch: Batch) -> Scores:
        sums = TermSums(batch["response"], split=self.config.split_terms)

        @contextmanager
        def contracting(layer: int) -> Iterator[SignalConsumer]:
            products = (
                self._kept_products[layer] if self._resident else self._gather_products(layer)
            )

            def add(signals: LinearSignals) -> None:
                name = signals.linear.name
                finite = sums.add(signals, products[name], self.config.stability_weight)
                self._nonfinite[self._places[name]] |= ~finite

            yield add

        nll_BT = self.tower.run(entry, batch, contracting, window=self.config.window)
        return Scores(sums.values(self.part_weights), nll_BT)

    def _take_in(self, batches: Sequence[Batch], scored_tokens: int) -> list[Tensor]:
        """Collects the held-out signals of this rank's batches; returns their token losses."""

        @contextmanager
        def collecting(layer: int) -> Iterator[SignalConsumer]:
            def add(signals: LinearSignals) -> None:
                response_BT = signals.chunk.response_BT
                self._held_out.add(
                    signals.linear.name,
                    signals.outgrad_BTO[response_BT],
                    signals.act_BTI[response_BT],
                )

            yield add
            if not self._resident:  # so that one layer's matrices are whole at a time
                self._held_out.reduce(self._names(layer))

        own_val_count = sum(int(batch["response"].sum()) for batch in batches)
        self._held_out.begin(own_val_count, scored_tokens)
        losses = []
        for batch in batches:
            with self.capture() as capture:
                self.decoder.hidden_states(batch)
            # G holds the direct signals only (Eq. 8): no causal path is followed through
            # held-out rows.
            losses.append(self.tower.run(capture.entry, batch, collecting, window=0))
        if self._resident:
            for layer in self.tower.layers:
                self._held_out.reduce(self._names(layer))
        return losses

    def _names(self, layer: int) -> list[str]:
        return [name for name, linear in self.tower.linears.items() if linear.layer == layer]

    def _gather_products(self, layer: int) -> dict[str, Products]:
        """What a layer's signals are contracted with, by linear, from all ranks' slices; one
        message for G, one for V."""
        names, weight = self._names(layer), self.config.stability_weight
        targets = self._held_out.contractions(names)
        if self._drift is None:
            return {name: Products(targets[name], proxy=None) for name in names}
        products = {}
        for name, drift in zip(names, self._drift.matrices(names), strict=True):
            drift_OI = drift.T if self.tower.linears[name].transposed else drift
            target = targets[name]
            if isinstance(target, FromMatrix) and not self.config.split_terms:
                # lambda itself, not the part weights: `split_terms: false` is refused with
                # `balance: std`.
                fused_OI = target.matrix_OI.float() + weight * drift_OI
                products[name] = Products(FromMatrix(fused_OI.to(self._dtype)), proxy=None)
            else:
                products[name] = Products(target, FromMatrix(drift_OI.to(self._dtype)))
        return products

    def _features(self, linear: ScoredLinear) -> tuple[int, int]:
        """(out, in) features of a linear, however its weight is stored."""
        rows, columns = self.tower.weight(linear.layer, linear.path).shape
        return (columns, rows) if linear.transposed else (rows, columns)
