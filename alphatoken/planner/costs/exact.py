"""Costs of estimator `exact`: the scored layers in dual numbers, in all directions at once."""

from __future__ import annotations

from dataclasses import dataclass

from torch.utils._pytree import tree_leaves

from alphatoken.errors import UserError
from alphatoken.models.head import block_rows
from alphatoken.models.scored import ParameterSet
from alphatoken.planner.blueprint import Blueprint
from alphatoken.planner.costs.base import ScoringCost
from alphatoken.planner.counting import FlopCounter, PeakBytes
from alphatoken.planner.messages import Message, gather, merged, reduce
from alphatoken.planner.parts import FLOAT32, Part, chunk_share, logits, scored_layer
from alphatoken.planner.tracing import TracedLayer


@dataclass(frozen=True)
class LayerScoring:
    """One layer in dual numbers on one micro-batch, in all directions."""

    flops: int
    peak_bytes: int
    """The most that it makes at a time, its output and the derivatives included."""


def trace_layer(layer: TracedLayer, setting: tuple[ParameterSet, int]) -> LayerScoring:
    """Runs one layer as scoring does, with parameters that move in so many directions."""
    parameters, count = setting
    module, state_BTH = layer.streamer.module(layer.index), layer.state_BTH
    scored = layer.decoder.scored_parameters(layer.depth, parameters)
    weights = {
        each.path: module.get_parameter(each.path) for each in scored if each.segment == layer.index
    }
    directions = {path: weight.new_empty(count, *weight.shape) for path, weight in weights.items()}
    tangents_NBTH = state_BTH.new_empty(count, *state_BTH.shape)
    inputs = tree_leaves((layer.inputs.args, layer.inputs.kwargs))
    given = [state_BTH, tangents_NBTH, *inputs, *module.parameters(), *directions.values()]
    try:
        with FlopCounter() as counter, PeakBytes(given) as peak:
            layer.streamer.jvp(module, state_BTH, tangents_NBTH, layer.inputs, directions)
    except (RuntimeError, UserError):
        # Experts and layer norms have no forward derivative without values. Counted are every
        # product, and its derivatives by either factor; and the three largest activations, with
        # theirs.
        return LayerScoring(
            (1 + 2 * count) * layer.training.forward,
            3 * (1 + count) * layer.training.largest_bytes,
        )
    return LayerScoring(counter.total, peak.total)


def _traced(blueprint: Blueprint) -> list[LayerScoring]:
    """Every scored layer on a micro-batch."""
    setting = (blueprint.config.valuation.parameters, _directions(blueprint))
    return blueprint.scoring(trace_layer, setting, rows=blueprint.workload.rows)


def _directions(blueprint: Blueprint) -> int:
    """How many directions are differentiated in."""
    valuation = blueprint.config.valuation
    terms = 1 + (valuation.contrast > 0) + blueprint.has_drift
    return (terms if valuation.split_terms else 1) + valuation.reliability


def _scored(blueprint: Blueprint) -> list[int]:
    """Elements of every scored parameter."""
    return [numel for numels in blueprint.scored_numels.values() for numel in numels]


def _sums(blueprint: Blueprint) -> int:
    """How many sums of gradients a refresh forms, each by a pass back of its own: of G, of B where
    its rows are drawn, and the signed ones where halves are told apart."""
    return blueprint.steering_passes * blueprint.halves


def _slices_of_g(blueprint: Blueprint) -> Part:
    own = blueprint.sliced(_scored(blueprint))
    return Part("slices of G", own * FLOAT32 * _sums(blueprint))


def _reads_moment(blueprint: Blueprint) -> bool:
    """Whether B is gathered from the ranks that hold Adam's moments; at stage 3 every rank has its
    own slices."""
    from_moment = blueprint.config.valuation.contrast_source == "moment"
    return from_moment and blueprint.sharding.stage in (1, 2)


class ExactCost(ScoringCost):
    """The true first-order effect, by forward-mode differentiation."""

    loaded_later_bytes = 8 * 2**20

    def score_flops(self, blueprint: Blueprint) -> int:
        tower = sum(each.flops for each in _traced(blueprint))
        products = 1 + _directions(blueprint) * (2 if "head" in blueprint.scored_numels else 1)
        return tower + products * blueprint.workload.responses * blueprint.head_flops

    def refresh_flops(self, blueprint: Blueprint) -> int:
        layers = [blueprint.held_out.layers[index] for index in blueprint.scored_layers]
        tokens, head = blueprint.workload.held_out_responses, blueprint.decoder.head
        # Logits of several blocks are made again.
        again = tokens > block_rows(head.weight.shape[0])
        products = 2 + ("head" in blueprint.scored_numels) + again
        tower = sum(each.forward + each.backward for each in layers)
        back = tower + products * tokens * blueprint.head_flops
        one_draw = blueprint.held_out.forward + blueprint.halves * back
        return blueprint.steering_documents * one_draw

    def steady_parts(self, blueprint: Blueprint) -> list[Part]:
        kept = blueprint.config.valuation.refresh_every > 1
        return [_slices_of_g(blueprint)] if kept else []

    def renewed_parts(self, blueprint: Blueprint) -> list[Part]:
        weight, directions = blueprint.sharding.weight_bytes, _directions(blueprint)
        scored = _scored(blueprint)
        own = blueprint.sliced(scored)
        parts = [Part("slices of the directions", own * weight * directions)]
        if blueprint.resident:
            parts.append(Part("directions, whole", sum(scored) * weight * directions))
        return parts

    def score_parts(self, blueprint: Blueprint) -> tuple[Part, ...]:
        body, directions = blueprint.body, _directions(blueprint)
        largest = max(each.peak_bytes for each in _traced(blueprint))
        working = int(chunk_share(blueprint) * largest)
        # The state that entered the first scored layer is there anyhow, unless it is on the host.
        states = 1 + 2 * directions + blueprint.offloads
        return (
            Part("states and derivatives", states * body.state_bytes),
            *scored_layer(blueprint, matrices=directions, working=working),
        )

    def refresh_parts(self, blueprint: Blueprint) -> tuple[Part, ...]:
        work, body = blueprint.workload, blueprint.held_out
        states = (blueprint.depth + 2) * body.state_bytes * work.held_out_batches
        largest = max(sum(numels) for numels in blueprint.scored_numels.values())
        kept = max(body.layers[index].kept_bytes for index in blueprint.scored_layers)
        # Where they are not kept from one step to the next.
        passing = (
            (_slices_of_g(blueprint),) if blueprint.config.valuation.refresh_every == 1 else ()
        )
        return (
            *passing,
            Part("states", states),
            Part("activations of one layer", kept),
            Part("gradients of one layer", 2 * largest * FLOAT32),
            logits(blueprint, work.held_out_responses),
        )

    def attended(self, blueprint: Blueprint) -> tuple[float, float]:
        work, every = blueprint.workload, blueprint.config.valuation.refresh_every
        held_out = 2 * work.held_out_batches * _sums(blueprint) / every
        return (1 + _directions(blueprint)) * work.micro_batches, held_out

    def messages(self, blueprint: Blueprint) -> list[Message]:
        weight, passes = blueprint.sharding.weight_bytes, blueprint.workload.micro_batches
        refreshes = 1 / blueprint.config.valuation.refresh_every
        sums = refreshes * _sums(blueprint)
        fills = 1.0 if blueprint.resident else sums + passes
        uses = 1.0 if blueprint.resident else passes
        messages = [
            gather(blueprint, "scored weights", blueprint.segment_numels(segment), weight, fills)
            for segment in (*blueprint.scored_layers, "norm", "head")
        ]
        for numels in blueprint.scored_numels.values():
            moved = numels * _directions(blueprint)
            messages += [
                reduce(blueprint, "held-out gradient G", numels, sums),
                gather(blueprint, "directions G and V", moved, weight, uses),
            ]
            if _reads_moment(blueprint):
                size = sum(numels) * FLOAT32
                messages.append(Message("first moment B", "all_reduce", len(numels), size))
        return merged(messages)


COST = ExactCost()
