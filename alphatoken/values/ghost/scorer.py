"""Estimator `ghost`, the paper's: signals of the last K layers' linears, contracted with the
held-out ones and drift.

Shape legend: B sequences, T positions, R response positions of one chunk, N validation positions
over all ranks, I and O the features of a linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken.batch import Batch, loss_positions
from alphatoken.config.sections import ValuationConfig
from alphatoken.models.decoder import Decoder
from alphatoken.models.scored import ScoredLinear, scored_depth
from alphatoken.passes.attention import AttentionCall, attention_band, mix_band
from alphatoken.passes.capture import Entry, EntryCapture
from alphatoken.stability.drift import Drift
from alphatoken.values.algebra import TERMS, Contraction, Materialised, TokenValues
from alphatoken.values.estimator import Scorer, Scores
from alphatoken.values.ghost.held_out import HeldOutSignals
from alphatoken.values.ghost.tower import Tower


@dataclass(frozen=True)
class Products:
    """What the signals of one linear are contracted with. `target` may hold G + lambda V; then
    there is no `proxy`."""

    target: Contraction
    proxy: Contraction | None


class GhostScorer(Scorer):
    """Values response tokens on the linears of the last K layers of a decoder (Eqs. 8-12)."""

    def __init__(
        self, decoder: Decoder, config: ValuationConfig, device: torch.device, drift: Drift | None
    ) -> None:
        super().__init__(decoder, config)
        self._drift = drift
        self._resident = config.is_resident
        depth = scored_depth(config.layers, len(decoder.layers))
        self._layers = list(decoder.layers)[len(decoder.layers) - depth :]
        self.tower = Tower(
            decoder, depth, device, resident=self._resident, chunk_tokens=config.chunk_tokens
        )
        self.linears: dict[str, ScoredLinear] = {
            linear.name: linear for linear in self.tower.scored
        }
        self._dtype = next(decoder.model.parameters()).dtype
        features = {linear.name: self._features(linear) for linear in self.tower.scored}
        self._held_out = HeldOutSignals(features, config.contraction, self._dtype, device)
        self._products: dict[str, Products] = {}
        self._nonfinite = torch.zeros(len(self.linears), dtype=torch.bool, device=device)

    def capture(self) -> EntryCapture:
        return EntryCapture(self._layers, None if self._resident else self.decoder.norm)

    def nonfinite_parts(self) -> list[str]:
        flags = self._nonfinite.tolist()
        self._nonfinite.zero_()
        return [name for name, flag in zip(self.linears, flags, strict=True) if flag]

    @torch.no_grad()
    def refresh(self, batches: Sequence[Batch] | None, scored_tokens: int = 0) -> list[Tensor]:
        self.tower.streamer.refresh()
        losses = []
        if batches is not None:
            responses = [loss_positions(batch["labels"])[0] for batch in batches]
            self._held_out.begin(sum(int(response.sum()) for response in responses), scored_tokens)
            for batch, response_BT in zip(batches, responses, strict=True):
                with self.capture() as capture:
                    self.decoder.hidden_states(batch)
                sink = _Collector(self._held_out, self._names, response_BT)
                losses.append(self.tower.run(capture.entry, batch["labels"], sink))
            if self._resident:
                for layer in self.tower.layers:
                    self._held_out.reduce(self._names(layer))
        if self._resident:
            self._products = {}
            for layer in self.tower.layers:
                self._products |= self._gather_products(layer)
        return losses

    @torch.no_grad()
    def score(self, entry: Entry, batch: Batch) -> Scores:
        response_BT, _ = loss_positions(batch["labels"])
        sink = _Accumulator(self, response_BT)
        nll_BT = self.tower.run(entry, batch["labels"], sink)
        self._nonfinite |= sink.nonfinite
        return Scores(sink.values(), nll_BT)

    @contextmanager
    def layer_products(self, layer: int) -> Iterator[None]:
        """Has a streamed layer's products at hand: gathered on entry, dropped on exit."""
        self._products = self._gather_products(layer)
        yield
        self._products = {}

    def products(self, name: str) -> Products:
        return self._products[name]

    def _names(self, layer: int) -> list[str]:
        return [name for name, linear in self.linears.items() if linear.layer == layer]

    def _gather_products(self, layer: int) -> dict[str, Products]:
        """What a layer's signals are contracted with, from all ranks' slices; one message for G,
        one for V."""
        names, weight = self._names(layer), self.config.stability_weight
        targets = self._held_out.contractions(names)
        if self._drift is None:
            return {name: Products(targets[name], None) for name in names}
        products = {}
        for name, drift in zip(names, self._drift.matrices(names), strict=True):
            drift_OI = drift.T if self.linears[name].transposed else drift
            target = targets[name]
            if isinstance(target, Materialised) and not self.config.split_terms:
                fused_OI = target.matrix_OI.float() + weight * drift_OI
                products[name] = Products(Materialised(fused_OI.to(self._dtype)), None)
            else:
                products[name] = Products(target, Materialised(drift_OI.to(self._dtype)))
        return products

    def _features(self, linear: ScoredLinear) -> tuple[int, int]:
        rows, columns = self.tower.weight(linear.layer, linear.path).shape
        return (columns, rows) if linear.transposed else (rows, columns)


class _Collector:
    """Sink of held-out signals: at response positions, into `HeldOutSignals`."""

    def __init__(
        self, held_out: HeldOutSignals, names: Callable[[int], list[str]], response_BT: Tensor
    ) -> None:
        self._held_out = held_out
        self._names = names
        self._response_BT = response_BT

    @contextmanager
    def layer(self, layer: int) -> Iterator[None]:
        yield
        self._held_out.reduce(self._names(layer))

    def attention(self, rows: slice, layer: int, call: AttentionCall) -> None:
        pass

    def signal(self, rows: slice, name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
        response_BT = self._response_BT[rows]
        self._held_out.add(name, outgrad_BTO[response_BT], act_BTI[response_BT])


class _Accumulator:
    """Sink of a batch's signals: contracts them as they come and sums the terms over linears."""

    def __init__(self, scorer: GhostScorer, response_BT: Tensor) -> None:
        self._scorer = scorer
        self._config = scorer.config
        self._response_BT = response_BT
        self._order = {name: place for place, name in enumerate(scorer.linears)}
        self._sums = {
            name: torch.zeros(response_BT.shape, device=response_BT.device)
            for name in (*TERMS, "composite")
        }
        self._bands: dict[int, Tensor] = {}
        self._mixed: dict[int, Tensor] = {}
        self.nonfinite = torch.zeros(len(self._order), dtype=torch.bool, device=response_BT.device)

    def values(self) -> TokenValues:
        if self._config.split_terms:
            terms = [self._sums[term] for term in TERMS]
            return TokenValues.from_terms(terms, self._scorer.part_weights)
        for term in TERMS:
            self._sums[term][self._response_BT] = torch.nan
        return TokenValues(**self._sums)

    def layer(self, layer: int) -> AbstractContextManager[None]:
        return self._scorer.layer_products(layer)

    def attention(self, rows: slice, layer: int, call: AttentionCall) -> None:
        if self._config.window:
            self._bands[layer] = attention_band(call, self._config.window)

    def signal(self, rows: slice, name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
        linear = self._scorer.linears[name]
        response_BT = self._response_BT[rows]
        act_RI = act_BTI[response_BT]
        outgrads = {"direct": outgrad_BTO[response_BT]}
        if linear.is_value and self._config.window:
            outgrads["causal"] = self._causal(linear, outgrad_BTO)[response_BT]
        if not self._config.split_terms:
            outgrads = {"direct": sum(outgrads.values(), torch.zeros_like(outgrads["direct"]))}
        products = self._scorer.products(name)
        composite_R = torch.zeros(act_RI.shape[0], device=act_RI.device)
        for path, outgrad_RO in outgrads.items():
            target_R = products.target(outgrad_RO, act_RI)
            composite_R += target_R
            self._add(f"{path}_target", rows, target_R)
            if products.proxy is not None:
                proxy_R = products.proxy(outgrad_RO, act_RI)
                composite_R += self._config.stability_weight * proxy_R
                self._add(f"{path}_proxy", rows, proxy_R)
        if not self._config.split_terms:  # otherwise it follows from the terms
            self._add("composite", rows, composite_R)
        self.nonfinite[self._order[name]] |= ~torch.isfinite(composite_R).all()

    def _add(self, term: str, rows: slice, value_R: Tensor) -> None:
        chunk_BT = self._sums[term][rows]
        chunk_BT[self._response_BT[rows]] += value_R

    def _causal(self, linear: ScoredLinear, outgrad_BTO: Tensor) -> Tensor:
        """sum_k A[k, t] d_k for every position, (B, T, O); zero in output rows that are no
        values."""
        if linear.feeds is not None:
            # What flows back into an adapter's A came through its B, and of that only the value
            # rows count.
            return self._mixed[linear.layer] @ self._scorer.tower.weight(linear.layer, linear.feeds)
        band_BTW, value_rows = self._bands[linear.layer], linear.value_rows
        if value_rows is None:
            mixed_BTO = mix_band(band_BTW, outgrad_BTO)
        else:
            mixed_BTO = torch.zeros_like(outgrad_BTO)
            mixed_BTO[..., value_rows] = mix_band(band_BTW, outgrad_BTO[..., value_rows])
        self._mixed[linear.layer] = mixed_BTO
        return mixed_BTO
