"""Estimator `exact`: the true first-order effect of every token, <grad l_t, u> with u = G - c B +
lambda V, in forward mode.

All tokens at once are one directional derivative, d/d_eps l_t(theta + eps u): a forward pass
through the scored layers in dual numbers, one layer at a time, without a backward pass, and with
attention in query blocks. Every path counts.

Shape legend: N directions, B sequences, T positions, R response positions, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch
from alphatoken.config.sections import ModelConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder
from alphatoken.models.head import head_jvp
from alphatoken.models.scored import ScoredParameter, Segment, scored_depth
from alphatoken.passes.capture import Entry, EntryCapture
from alphatoken.passes.chunks import Chunk, chunks_of
from alphatoken.passes.forward_mode import check_forward_mode
from alphatoken.passes.streamer import NO_INPUT, LayerStreamer
from alphatoken.stability.drift import Drift
from alphatoken.values.algebra import TokenValues
from alphatoken.values.estimator import Coefficients, Scorer, Scores, SliceScale
from alphatoken.values.exact.directions import Directions, DirectionSlices
from alphatoken.values.exact.gradient import MeanGradient


@dataclass(frozen=True)
class _Dual:
    """A chunk on its way up: the hidden state and its derivative in each direction."""

    chunk: Chunk
    hidden_BTH: Tensor
    tangents_NBTH: Tensor


class ExactScorer(Scorer):
    """Values response tokens on the chosen parameters of the last K layers.

    With `split_terms` G, B and V are directions of their own, and a layer is differentiated in each
    that there is; otherwise in one, the weighted sum. D, for the spread, is one more. `balance` and
    `stability_weight` then work as in `ghost`.
    """

    def __init__(
        self,
        decoder: Decoder,
        config: ValuationConfig,
        device: torch.device,
        drift: Drift | None,
        adam_scale: SliceScale | None,
    ) -> None:
        super().__init__(decoder, config)
        if config.preconditioner == "adam" and adam_scale is None:
            raise UserError(
                "valuation.preconditioner=adam needs the optimizer of a training run; here it must "
                "be none"
            )
        self._scale = adam_scale if config.preconditioner == "adam" else None
        self._drift = drift
        depth = scored_depth(config.layers, len(decoder.layers))
        scored = decoder.scored_parameters(depth, config.parameters)
        first = len(decoder.layers) - depth
        self._streamer = LayerStreamer(
            decoder, first, device, resident=config.is_resident, forward_mode=True
        )
        signed = config.reliability
        self._gradient = MeanGradient(decoder, scored, self._streamer, device, signed=signed)
        self._contrast = MeanGradient(decoder, scored, self._streamer, device, signed=signed)
        self._directions = self._names_of_directions()
        self._device = device
        self._dtype = next(decoder.model.parameters()).dtype
        self._embeds = any(each.segment == "embeddings" for each in scored)
        self._segments: list[Segment] = [*self._streamer.indices, "norm", "head"]
        if self._embeds:
            self._segments.insert(0, "embeddings")
        self._scored: dict[Segment, list[ScoredParameter]] = {
            segment: [each for each in scored if each.segment == segment]
            for segment in self._segments
        }
        self._slices: dict[Segment, DirectionSlices] = {}
        self._kept: dict[Segment, Directions] = {}
        """Whole, where everything is resident."""
        self._nonfinite = torch.zeros(len(self._segments), dtype=torch.bool, device=device)

    @classmethod
    def build(
        cls,
        decoder: Decoder,
        config: ValuationConfig,
        device: torch.device,
        *,
        drift: Drift | None,
        adam_scale: SliceScale | None,
    ) -> ExactScorer:
        return cls(decoder, config, device, drift, adam_scale)

    @classmethod
    def check(cls, model: ModelConfig, valuation: ValuationConfig, device: torch.device) -> None:
        check_forward_mode(model, device)

    def capture(self) -> EntryCapture:
        return EntryCapture(self.decoder, self._streamer.indices.start, keep="first")

    def nonfinite_parts(self) -> list[str]:
        flags = self._nonfinite.tolist()
        self._nonfinite.zero_()
        names = [
            f"layer {segment}" if isinstance(segment, int) else str(segment)
            for segment in self._segments
        ]
        return [name for name, flag in zip(names, flags, strict=True) if flag]

    @torch.no_grad()
    def refresh(
        self,
        batches: Sequence[Batch] | None,
        scored_tokens: int = 0,
        contrast: Sequence[Batch] | None = None,
        coefficients: Coefficients | None = None,
    ) -> list[Tensor]:
        self._slices, self._kept = {}, {}  # the old ones go before the new are formed
        self._streamer.refresh()
        losses = []
        if batches is not None:
            losses = self._gradient.refresh(batches, self.run_body, coefficients)
        if contrast is not None:
            losses += self._contrast.refresh(contrast, self.run_body, coefficients, self.eligible)
        self._slices = {segment: self._form(segment) for segment in self._segments}
        if self.config.refresh_every == 1:  # the next directions are of new gradients
            self._gradient.free()
            self._contrast.free()
        if self.config.is_resident:
            self._kept = {segment: self._slices[segment].gather() for segment in self._segments}
        return losses

    @torch.no_grad()
    def score(self, entry: Entry, batch: Batch) -> Scores:
        duals = self._enter(entry, batch)
        for place, index in enumerate(self._streamer.indices):
            duals = self._through(duals, place, index)
        nll_BT, effects = self._top(duals, batch)
        return Scores(self._values(effects, batch["response"]), nll_BT)

    def _enter(self, entry: Entry, batch: Batch) -> list[_Dual]:
        """What enters the first scored layer: with embeddings among the scored it moves, else it
        stands still."""
        chunks = chunks_of(entry, batch, self.config.chunk_tokens)
        count = len(self._directions)
        moves = self._whole("embeddings") if self._embeds else {}
        duals = []
        for chunk in chunks:
            hidden_BTH = chunk.entry.first_BTH
            if self._embeds:
                inputs = {"input_ids": batch["input_ids"][chunk.rows]}
                if "position_ids" in batch:
                    inputs["position_ids"] = batch["position_ids"][chunk.rows]
                tangents_NBTH = torch.stack(
                    [
                        self._streamer.embed({path: moves[path][number] for path in moves}, inputs)
                        for number in range(count)
                    ]
                )
            else:
                tangents_NBTH = torch.zeros_like(hidden_BTH).expand(count, *hidden_BTH.shape)
            duals.append(_Dual(chunk, hidden_BTH, tangents_NBTH))
        return duals

    def _through(self, duals: Sequence[_Dual], place: int, index: int) -> list[_Dual]:
        """All chunks at the output of one layer. Weights and directions are dropped before the next
        are gathered."""
        directions = self._whole(index)
        with self._streamer.segment(index) as module:
            return [
                self._layer(module, dual, place, directions) if dual.chunk.has_response else dual
                for dual in duals
            ]

    def _layer(self, module: nn.Module, dual: _Dual, place: int, directions: Directions) -> _Dual:
        """One chunk at the output of one layer."""
        inputs = dual.chunk.entry.layer_inputs[place]
        hidden_BTH, tangents_NBTH = self._streamer.jvp(
            module, dual.hidden_BTH, dual.tangents_NBTH, inputs, directions
        )
        self._watch(self._streamer.indices[place], tangents_NBTH)
        return replace(dual, hidden_BTH=hidden_BTH, tangents_NBTH=tangents_NBTH)

    def _top(self, duals: Sequence[_Dual], batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Token losses and, per direction, their derivatives: (B, T) float32 each, zero off the
        response."""
        responses = batch["response_index"]
        nll_R = torch.zeros(responses.count, device=self._device)
        effects_NR = nll_R.new_zeros(len(self._directions), responses.count)
        norms, heads = self._whole("norm"), self._whole("head")
        with self._streamer.top() as (norm, head):
            for dual in duals:
                index, span = dual.chunk.index, dual.chunk.span
                hidden_RH, tangents_NRH = self._streamer.jvp(
                    norm,
                    index.take(dual.hidden_BTH),
                    torch.stack([index.take(tangent_BTH) for tangent_BTH in dual.tangents_NBTH]),
                    NO_INPUT,
                    norms,
                )
                targets_R, softcap = index.take(dual.chunk.targets_BT), self.decoder.logit_softcap
                nll_R[span], effects_NR[:, span] = head_jvp(
                    hidden_RH, tangents_NRH, head, heads, targets_R, softcap
                )
        self._watch("head", effects_NR)
        return responses.put(nll_R), [responses.put(effect_R) for effect_R in effects_NR]

    def _values(self, effects: Sequence[Tensor], response_BT: Tensor) -> TokenValues:
        found = dict(zip(self._directions, effects, strict=True))
        spread_BT = found.pop("spread", None)
        if not self.config.split_terms:
            return TokenValues.from_composite(found["direction"], response_BT, spread_BT)
        return TokenValues.from_terms(
            {f"direct_{name}": effect_BT for name, effect_BT in found.items()},
            self.part_weights,
            contrast=self.config.contrast,
            spread=spread_BT,
        )

    def _names_of_directions(self) -> tuple[str, ...]:
        """What layers are run for, in order: the terms' directions or their sum, and the
        spread's."""
        names = ["direction"]
        if self.config.split_terms:
            names = ["target"]
            names += ["contrast"] if self.config.contrast else []
            names += [] if self._drift is None else ["proxy"]
        return (*names, "spread") if self.config.reliability else tuple(names)

    def _whole(self, segment: Segment) -> Directions:
        """A segment's directions, whole; gathered now unless everything is resident."""
        return self._kept[segment] if self.config.is_resident else self._slices[segment].gather()

    def _form(self, segment: Segment) -> DirectionSlices:
        """Forms a segment's directions, in the model's dtype, for all that is scored until the next
        step.

        No communication at ZeRO stage 3; below it masters and moments are gathered from the ranks
        that hold them.
        """
        in_segment = self.decoder.segment_parameters(segment)
        parameters = {scored.path: in_segment[scored.path] for scored in self._scored[segment]}
        slices: dict[str, Tensor] = {}
        for scored in self._scored[segment]:
            path = scored.path
            scale = 1.0 if self._scale is None else self._scale(parameters[path])
            own = self._own_directions(scored.name, parameters[path])
            slices[path] = torch.stack(
                [(scale * own[name]).to(self._dtype) for name in self._directions]
            )
        return DirectionSlices(parameters=parameters, slices=slices)

    @property
    def needs_contrast_rows(self) -> bool:
        return super().needs_contrast_rows or (
            self.first_moment is not None and self.first_moment.is_empty
        )

    def _own_directions(self, name: str, parameter: nn.Parameter) -> dict[str, Tensor]:
        """This rank's slice of a parameter's directions, by what they are for."""
        contrast, weight = self.config.contrast, self.config.stability_weight
        moment = self.first_moment
        if moment is not None and moment.is_empty:
            moment = None  # before the optimizer's first step rows stand in for it
        own = {"target": self._gradient.own(name)}
        if contrast:
            own["contrast"] = self._contrast.own(name) if moment is None else moment(parameter)
        if self._drift is not None:
            own["proxy"] = torch.zeros_like(own["target"])
            if name in self._drift:
                own["proxy"] = self._drift.own(name)
        if self.config.reliability:
            own["spread"] = self._gradient.own(name, signed=True)
            if contrast and moment is None:  # a moment has no halves
                own["spread"] = own["spread"] - contrast * self._contrast.own(name, signed=True)
        if not self.config.split_terms:
            own["direction"] = own["target"]
            if contrast:
                own["direction"] = own["direction"] - contrast * own["contrast"]
            if "proxy" in own:
                own["direction"] = own["direction"] + weight * own["proxy"]
        return own

    def _watch(self, segment: Segment, derivative: Tensor) -> None:
        self._nonfinite[self._segments.index(segment)] |= ~torch.isfinite(derivative).all()
