"""What one rank says to the others in one optimizer step: the messages of DeepSpeed and of
valuation.

Only ZeRO-3 gathers weights while it runs. Messages of a few numbers (counts, norms, means) are left
out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alphatoken.planner.blueprint import Blueprint

Op = Literal["all_gather", "reduce_scatter", "all_reduce"]


@dataclass(frozen=True)
class Message:
    """Messages of one kind. `bytes` is what a rank hands in, as DeepSpeed's communications log
    counts them."""

    about: str
    op: Op
    count: float
    bytes: float
    """Of all of them together."""

    def received(self, ranks: int) -> float:
        """Bytes that reach a rank in a ring."""
        factor = {
            "all_gather": ranks - 1,
            "reduce_scatter": (ranks - 1) / ranks,
            "all_reduce": 2 * (ranks - 1) / ranks,
        }
        return self.bytes * factor[self.op]


def traffic_of(blueprint: Blueprint) -> list[Message]:
    """All messages of a step that is like most others; averaged where held-out signals are not
    refreshed in each."""
    if blueprint.sharding.ranks == 1:
        return []
    messages = _engine(blueprint)
    if blueprint.depth:
        messages += _exact(blueprint) if blueprint.exact else _ghost(blueprint)
        messages += [*_masters(blueprint), *_statistics(blueprint)]
    if blueprint.config.needs_reference and blueprint.config.reference.mode == "online":
        messages += _online_reference(blueprint)
    return [each for each in messages if each.bytes]


def _engine(blueprint: Blueprint) -> list[Message]:
    sharding, work = blueprint.sharding, blueprint.workload
    trained = [numel for numel, trains in blueprint.numels if trains]
    slices = sum(map(sharding.slice_of, trained))
    weight = sharding.weight_bytes
    if blueprint.gathers is None:
        gradients = sum(trained) * sharding.gradient_bytes
        if sharding.stage < 2:  # summed once, when the accumulation window is over
            summed = [Message("gradients", "all_reduce", 1, gradients)]
        else:
            summed = [
                Message(
                    "gradients", "all_reduce", work.micro_batches, work.micro_batches * gradients
                )
            ]
        updated = (
            [Message("updated weights", "all_gather", 1, slices * weight)] if sharding.stage else []
        )
        return [*summed, *updated]

    def gathered(about: str, numels: tuple[int, ...], share: float = 1.0) -> Message:
        return Message(
            about,
            "all_gather",
            share * len(numels),
            share * sum(map(sharding.slice_of, numels)) * weight,
        )

    gathers = blueprint.gathers
    refreshes = 1 / blueprint.config.valuation.refresh_every
    return [
        gathered("weights, for held-out rows", gathers.held_out, refreshes),
        gathered("weights, for training", gathers.training),
        gathered("small weights, after the step", gathers.persistent),
        Message(
            "gradients",
            "reduce_scatter",
            work.micro_batches,
            work.micro_batches * slices * sharding.ranks * sharding.gradient_bytes,
        ),
    ]


def _gather(
    blueprint: Blueprint, about: str, numels: list[int], width: int, times: float
) -> Message:
    """Slices of tensors with so many elements, of `width` bytes each, in one message."""
    own = sum(map(blueprint.sharding.slice_of, numels)) if blueprint.sharding.stage == 3 else 0
    return Message(about, "all_gather", times, times * own * width)


def _reduce(blueprint: Blueprint, about: str, numels: list[int], times: float) -> Message:
    """float32 sums over ranks, cut into slices where the weights are."""
    sharding = blueprint.sharding
    if sharding.stage < 3:
        return Message(about, "all_reduce", times * len(numels), times * sum(numels) * 4)
    return Message(
        about,
        "reduce_scatter",
        times,
        times * sum(map(sharding.slice_of, numels)) * sharding.ranks * 4,
    )


def _ghost(blueprint: Blueprint) -> list[Message]:
    work, sharding, valuation = blueprint.workload, blueprint.sharding, blueprint.config.valuation
    weight, refreshes = sharding.weight_bytes, 1 / valuation.refresh_every
    runs = refreshes * work.held_out_batches + work.micro_batches
    fills = 1.0 if blueprint.resident else runs  # how often scored weights are gathered
    uses = 1.0 if blueprint.resident else work.micro_batches  # and what they contract with
    top = [*blueprint.segment_numels("norm"), *blueprint.segment_numels("head")]
    messages = [_gather(blueprint, "scored weights", top, weight, fills)]
    for layer in blueprint.scored_layers:
        linears = [linear for linear in blueprint.scored if linear.layer == layer]
        formed = [linear.numel for linear in linears if linear.contraction == "matrix"]
        rows = [linear for linear in linears if linear.contraction == "signals"]
        messages.append(
            _gather(blueprint, "scored weights", blueprint.segment_numels(layer), weight, fills)
        )
        if formed:
            # Gathered from slices at every stage; below 3 they were cut all the same.
            own = sum(map(sharding.slice_of, formed))
            sums = refreshes * (1 if blueprint.resident else work.held_out_batches)
            messages += [
                Message(
                    "held-out gradient G", "reduce_scatter", sums, sums * own * sharding.ranks * 4
                ),
                Message("held-out gradient G", "all_gather", uses, uses * own * weight),
            ]
        features = sum(linear.out_features + linear.in_features for linear in rows)
        signals = uses * work.held_out_batches * work.held_out_responses * features * weight
        messages.append(Message("held-out signals", "all_gather", uses * 2 * len(rows), signals))
        if blueprint.has_drift:
            messages.append(
                _gather(blueprint, "drift V", [linear.numel for linear in linears], 4, uses)
            )
    return _merged(messages)


def _exact(blueprint: Blueprint) -> list[Message]:
    work, sharding, valuation = blueprint.workload, blueprint.sharding, blueprint.config.valuation
    weight, refreshes = sharding.weight_bytes, 1 / valuation.refresh_every
    passes = work.micro_batches
    fills = 1.0 if blueprint.resident else refreshes + passes
    uses = 1.0 if blueprint.resident else passes
    messages = []
    for segment in [*blueprint.scored_layers, "norm", "head"]:
        messages.append(
            _gather(blueprint, "scored weights", blueprint.segment_numels(segment), weight, fills)
        )
    for numels in blueprint.scored_numels.values():
        messages.append(_reduce(blueprint, "held-out gradient G", numels, refreshes))
        directions = numels * blueprint.directions
        messages.append(_gather(blueprint, "directions G and V", directions, weight, uses))
    return _merged(messages)


def _masters(blueprint: Blueprint) -> list[Message]:
    """At stages 1 and 2 drift reads fp32 masters from the ranks that hold their parts: for V, and
    for its size."""
    if blueprint.sharding.stage not in (1, 2) or not blueprint.has_drift:
        return []
    numels = [numel for segment in blueprint.scored_numels.values() for numel in segment]
    often = blueprint.exact or blueprint.resident
    times = 1 + (1 if often else blueprint.workload.micro_batches)
    return [
        Message(
            "fp32 masters, for drift", "all_reduce", times * len(numels), times * sum(numels) * 4
        )
    ]


def _statistics(blueprint: Blueprint) -> list[Message]:
    """Adaptation and stability of every response token, for their rank correlation: two float64."""
    if not (blueprint.has_drift and blueprint.config.valuation.split_terms):
        return []
    size = 16 * blueprint.workload.responses * blueprint.workload.micro_batches
    return [Message("values, for their correlation", "all_gather", 1, size)]


def _online_reference(blueprint: Blueprint) -> list[Message]:
    """The reference holds no weight longer than it must."""
    if blueprint.sharding.stage < 3:
        return []
    numels = [numel for numel, _ in blueprint.numels]
    return [
        _gather(
            blueprint,
            "reference weights",
            numels,
            blueprint.sharding.weight_bytes,
            blueprint.workload.micro_batches,
        )
    ]


def _merged(messages: list[Message]) -> list[Message]:
    """One entry for each kind."""
    sums: dict[tuple[str, Op], list[float]] = {}
    for each in messages:
        total = sums.setdefault((each.about, each.op), [0.0, 0.0])
        total[0] += each.count
        total[1] += each.bytes
    return [Message(about, op, count, size) for (about, op), (count, size) in sums.items()]
