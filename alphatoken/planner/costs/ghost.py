"""Costs of estimator `ghost`: a second run of the scored layers, and the contractions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from alphatoken.passes.attention import AttentionCall, attention_band, mix_band
from alphatoken.passes.capture import SignalCapture
from alphatoken.planner.blueprint import Blueprint
from alphatoken.planner.costs.base import ScoringCost
from alphatoken.planner.counting import CountedPass, FlopCounter
from alphatoken.planner.messages import Message, gather, merged
from alphatoken.planner.parts import FLOAT32, Part, chunk_share, logits, scored_layer
from alphatoken.planner.tracing import TracedLayer
from alphatoken.values.algebra import CONTRACTIONS, ContractionName, cheaper_contraction


@dataclass(frozen=True)
class LayerScoring:
    """One layer of the tower on one micro-batch: floating-point operations, and bytes."""

    forward: int
    backward: int
    """With respect to the input only."""
    kept_bytes: int
    """With weights frozen, and the inputs of linears held until their signals come."""
    band: int
    """Attention probabilities of the causal window."""
    mixing: int
    """The causal path's mixture of output gradients."""


@dataclass(frozen=True)
class Contracted:
    """One scored linear, and how its signals are contracted."""

    layer: int
    out_features: int
    in_features: int
    is_value: bool
    contraction: ContractionName

    @property
    def numel(self) -> int:
        return self.out_features * self.in_features

    @property
    def is_formed(self) -> bool:
        """Whether G is formed, so that signals are contracted with a matrix."""
        return self.contraction == "matrix"


def trace_layer(layer: TracedLayer, window: int) -> LayerScoring:
    """Runs one layer as the tower does, with a causal window of so many positions; softmax
    denominators are counted as they are computed where the kernel gives none."""
    module = layer.streamer.module(layer.index)
    scored = [
        each for each in layer.decoder.scored_linears(layer.depth) if each.layer == layer.index
    ]
    linears = {each.path: module.get_submodule(each.path) for each in scored}
    calls: list[AttentionCall] = []
    outgrads: dict[str, Tensor] = {}

    def consume(path: str, _: Tensor, outgrad: Tensor) -> None:
        outgrads[path] = outgrad

    hidden_BTH = layer.state_BTH.detach().requires_grad_(not layer.is_first)
    shared = [*module.parameters(), *tree_leaves((layer.inputs.args, layer.inputs.kwargs))]
    with CountedPass(shared, linears.values()) as tower, SignalCapture(linears, consume):
        output_BTH = layer.streamer.forward(
            module, hidden_BTH, layer.inputs, lambda _, call: calls.append(call)
        )
        forward = tower.flops
        output_BTH.backward(torch.empty_like(output_BTH))
    band = mixing = 0
    if window and calls:
        with torch.no_grad(), FlopCounter() as counter:
            band_BTW = attention_band(calls[0], window)[:, : layer.state_BTH.shape[1]]
            band = counter.total
            for each in scored:
                if each.is_value and each.feeds is None:
                    rows = slice(None) if each.value_rows is None else slice(len(each.value_rows))
                    mix_band(band_BTW, outgrads[each.path][..., rows])
        mixing = counter.total - band
    return LayerScoring(
        forward=forward,
        backward=tower.flops - forward,
        kept_bytes=tower.kept_bytes,
        band=band,
        mixing=mixing,
    )


def _tower(blueprint: Blueprint, *, rows: int) -> list[LayerScoring]:
    """Every scored layer, run as the tower does on a micro-batch of so many rows."""
    window = blueprint.config.valuation.window
    return blueprint.scoring(trace_layer, window, rows=rows, first_differs=True)


def _contracted(blueprint: Blueprint) -> list[Contracted]:
    """Every scored linear, in order of the forward pass."""
    valuation, decoder = blueprint.config.valuation, blueprint.decoder
    step = blueprint.workload.responses * blueprint.workload.micro_batches
    found = []
    for linear in decoder.scored_linears(blueprint.depth):
        rows, columns = decoder.model.get_parameter(linear.name).shape
        out_features, in_features = (columns, rows) if linear.transposed else (rows, columns)
        if valuation.contraction == "auto":
            contraction = cheaper_contraction(
                blueprint.held_out_count,
                step * valuation.refresh_every,
                in_features,
                out_features,
                blueprint.sharding.ranks,
            )
        else:
            contraction = CONTRACTIONS[valuation.contraction]
        found.append(
            Contracted(
                layer=linear.layer,
                out_features=out_features,
                in_features=in_features,
                is_value=linear.is_value,
                contraction=contraction,
            )
        )
    return found


def _by_layer(blueprint: Blueprint) -> Iterator[tuple[int, list[Contracted]]]:
    linears = _contracted(blueprint)
    for layer in blueprint.scored_layers:
        yield layer, [linear for linear in linears if linear.layer == layer]


def _states(entered: int) -> int:
    """States of a micro-batch that a pass of the tower needs: those that `entered` layers, the one
    that left the last, and one gradient."""
    return entered + 2


class GhostCost(ScoringCost):
    """The paper's estimator: signals of the last layers, contracted with the held-out ones."""

    def score_flops(self, blueprint: Blueprint) -> int:
        work = blueprint.workload
        tower = sum(
            each.forward + each.band + each.backward + each.mixing
            for each in _tower(blueprint, rows=work.rows)
        )
        products = sum(self._products(blueprint, linear) for linear in _contracted(blueprint))
        return tower + 2 * work.responses * (products + blueprint.head_flops)

    def _products(self, blueprint: Blueprint, linear: Contracted) -> int:
        """Multiplications that one scored position takes in a linear: contractions, and what it
        adds to B. A matrix is multiplied once for both paths, signals are for each."""
        valuation, matrix = blueprint.config.valuation, linear.numel
        paths = 2 if linear.is_value and valuation.window and valuation.split_terms else 1
        by_rows = blueprint.held_out_count * (linear.out_features + linear.in_features)
        spread = matrix if linear.is_formed else by_rows
        target = matrix if linear.is_formed else paths * by_rows
        scores = valuation.contrast_source == "scored"
        contrast = 0
        if valuation.contrast:
            contrast = matrix if scores else target
            if not linear.is_formed:
                spread += matrix if scores else by_rows
        drift = matrix if blueprint.has_drift else 0
        if not valuation.split_terms and linear.is_formed:  # one matrix for all
            contrast = drift = 0
        added = matrix if scores else 0
        return target + contrast + drift + valuation.reliability * spread + added

    def refresh_flops(self, blueprint: Blueprint) -> int:
        layers = _tower(blueprint, rows=blueprint.workload.held_out_rows)
        tower = sum(each.forward + each.backward for each in layers)
        formed = sum(linear.numel for linear in _contracted(blueprint) if linear.is_formed)
        tokens = blueprint.workload.held_out_responses
        one_draw = blueprint.held_out.forward + tower
        one_draw += 2 * tokens * (formed + blueprint.head_flops)
        return blueprint.steering_documents * one_draw

    def steady_parts(self, blueprint: Blueprint) -> list[Part]:
        linears = _contracted(blueprint)
        formed = [linear.numel for linear in linears if linear.is_formed]
        # Below stage 3 too, G is kept in slices.
        passes, documents = blueprint.steering_passes, blueprint.steering_documents
        halves = blueprint.halves
        slices = sum(map(blueprint.sharding.slice_of, formed)) * FLOAT32
        parts = [
            Part("slices of G", slices * passes * halves),
            Part("held-out signals", documents * self._signal_bytes(blueprint, linears)),
        ]
        every = [linear.numel for linear in linears]
        if blueprint.config.valuation.contrast_source == "scored":
            # Of the steps before, and of the step under way.
            own = sum(map(blueprint.sharding.slice_of, every))
            parts.append(Part("slices of B", 2 * own * halves * FLOAT32))
            if blueprint.resident:
                parts.append(Part("B of the step, whole", sum(every) * halves * FLOAT32))
        if blueprint.resident:
            whole = self._matrix_bytes(blueprint, formed=sum(formed), scored=sum(every))
            parts.append(Part("G and V, whole", whole))
        return parts

    def saved_bytes(self, blueprint: Blueprint) -> int:
        if blueprint.config.valuation.contrast_source != "scored":
            return 0
        scored = sum(linear.numel for linear in _contracted(blueprint))
        return scored * blueprint.halves * FLOAT32

    def _signal_bytes(self, blueprint: Blueprint, linears: list[Contracted]) -> int:
        """Held-out signals of this rank, and where they stay of all ranks."""
        features = sum(
            linear.out_features + linear.in_features for linear in linears if not linear.is_formed
        )
        work = blueprint.workload
        own = work.held_out_batches * work.held_out_responses
        everywhere = blueprint.held_out_count if blueprint.resident else 0
        return (own + everywhere) * features * blueprint.sharding.weight_bytes

    def _matrix_bytes(self, blueprint: Blueprint, *, formed: int, scored: int) -> int:
        """Whole matrices that signals are contracted with: G where it is formed, and V; or their
        sum. Both arguments are elements."""
        drift = (
            (scored - formed if self._fuses(blueprint) else scored) if blueprint.has_drift else 0
        )
        gathered = self._gathered(blueprint, formed=formed, scored=scored)
        return (gathered + drift) * blueprint.sharding.weight_bytes

    def _fuses(self, blueprint: Blueprint) -> bool:
        return not blueprint.config.valuation.split_terms

    def _gathered(self, blueprint: Blueprint, *, formed: int, scored: int) -> int:
        """Elements of the matrices that are added in slices and then made whole: of G, B and D, or
        of their sum and D."""
        valuation = blueprint.config.valuation
        contrast = 0
        if valuation.contrast:
            contrast = scored if valuation.contrast_source == "scored" else formed
        either = max(formed, contrast)  # where one of G and B is a matrix
        terms = either if self._fuses(blueprint) else formed + contrast
        return terms + valuation.reliability * either

    def score_parts(self, blueprint: Blueprint) -> tuple[Part, ...]:
        work, share = blueprint.workload, chunk_share(blueprint)
        layer = max(each.kept_bytes for each in _tower(blueprint, rows=work.rows))
        # Checkpointing keeps what enters a layer anyhow, unless it keeps that on the host.
        keeps = blueprint.config.train.gradient_checkpointing and not blueprint.offloads
        entered = 0 if keeps else blueprint.depth
        states = _states(entered) * blueprint.body.state_bytes
        parts = (
            Part("activations of scoring", int(share * layer) + states),
            logits(blueprint, int(share * work.responses)),
        )
        if blueprint.resident:
            return parts
        valuation = blueprint.config.valuation
        matrices = 1 + blueprint.has_drift + (valuation.contrast > 0) + valuation.reliability
        streamed = scored_layer(blueprint, matrices=matrices, working=0)
        if valuation.contrast_source != "scored":
            return (*parts, *streamed)
        scored = max(sum(each.numel for each in linears) for _, linears in _by_layer(blueprint))
        whole = Part("B of one layer, whole", 2 * scored * blueprint.halves * FLOAT32)
        return (*parts, *streamed, whole)

    def refresh_parts(self, blueprint: Blueprint) -> tuple[Part, ...]:
        traced = _tower(blueprint, rows=blueprint.workload.held_out_rows)
        formed_by_layer = [
            sum(linear.numel for linear in linears if linear.is_formed)
            for _, linears in _by_layer(blueprint)
        ]
        pending = sum(formed_by_layer) if blueprint.resident else max(formed_by_layer)
        states = _states(blueprint.depth) * blueprint.held_out.state_bytes
        activations = max(each.kept_bytes for each in traced) + states
        return (
            Part("activations of scoring", activations),
            Part(
                "G before it is divided",
                (pending + max(formed_by_layer)) * blueprint.halves * FLOAT32,
            ),
            logits(blueprint, blueprint.workload.held_out_responses),
        )

    def messages(self, blueprint: Blueprint) -> list[Message]:
        work, sharding = blueprint.workload, blueprint.sharding
        valuation, passes = blueprint.config.valuation, blueprint.steering_passes
        weight, refreshes = sharding.weight_bytes, 1 / valuation.refresh_every
        runs = refreshes * work.held_out_batches * passes + work.micro_batches
        # How often scored weights are gathered, and what they are contracted with.
        fills = 1.0 if blueprint.resident else runs
        uses = 1.0 if blueprint.resident else work.micro_batches
        top = [*blueprint.segment_numels("norm"), *blueprint.segment_numels("head")]
        messages = [gather(blueprint, "scored weights", top, weight, fills)]
        for layer, linears in _by_layer(blueprint):
            formed = [linear.numel for linear in linears if linear.is_formed]
            rows = [linear for linear in linears if not linear.is_formed]
            numels = blueprint.segment_numels(layer)
            messages.append(gather(blueprint, "scored weights", numels, weight, fills))
            # Gathered from slices at every stage; below 3 they were cut all the same.
            own = sum(map(sharding.slice_of, formed))
            every = sum(sharding.slice_of(linear.numel) for linear in linears)
            if formed:
                sums = passes * refreshes * (1 if blueprint.resident else work.held_out_batches)
                whole = sums * own * blueprint.halves * sharding.ranks * FLOAT32
                messages.append(Message("held-out gradient G", "reduce_scatter", sums, whole))
            if valuation.contrast_source == "scored":
                sums = 1 if blueprint.resident else work.micro_batches
                whole = sums * every * blueprint.halves * sharding.ranks * FLOAT32
                messages.append(Message("contrast B", "reduce_scatter", sums, whole))
            gathered = self._gathered(blueprint, formed=own, scored=every)
            if gathered:
                size = uses * gathered * weight
                messages.append(Message("held-out gradient G", "all_gather", uses, size))
            features = sum(linear.out_features + linear.in_features for linear in rows)
            documents = blueprint.steering_documents
            own_rows = documents * work.held_out_batches * work.held_out_responses
            signs = valuation.reliability * len(rows) * FLOAT32
            signals = uses * own_rows * (features * weight + signs)
            count = uses * passes * (2 + valuation.reliability) * len(rows)
            messages.append(Message("held-out signals", "all_gather", count, signals))
            if blueprint.has_drift:
                scored = [linear.numel for linear in linears]
                messages.append(gather(blueprint, "drift V", scored, weight, uses))
        return merged(messages)

    def attended(self, blueprint: Blueprint) -> tuple[float, float]:
        work, valuation = blueprint.workload, blueprint.config.valuation
        held_out = work.held_out_batches * blueprint.steering_passes / valuation.refresh_every
        return 2 * work.micro_batches, 2 * held_out

    def drift_uses(self, blueprint: Blueprint) -> int:
        return 1 if blueprint.resident else blueprint.workload.micro_batches


COST = GhostCost()
