"""How DeepSpeed divides a model, and what ZeRO-3 gathers and holds while it runs."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from alphatoken.distributed import zero3
from alphatoken.models.decoder import Decoder


@dataclass(frozen=True)
class Sharding:
    """What matters of a DeepSpeed configuration here. Sizes are in elements, as DeepSpeed has
    them."""

    stage: int
    ranks: int
    weight_bytes: int
    """Of one element: 2 in bf16."""
    gradient_bytes: int
    """Of one element, in messages."""
    optimizer_on_host: bool = False
    parameters_on_host: bool = False
    reduce_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_reuse_distance: int = 1_000_000_000
    max_live: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    hpz_ranks: int = 1
    """Ranks over which ZeRO++ keeps a second copy of the shards; 1 is without."""

    def slice_of(self, numel: int) -> int:
        """Elements of a rank's slice of a parameter."""
        return -(-numel // self.ranks)


def sharding_of(deepspeed_values: dict[str, Any], ranks: int, weight_bytes: int) -> Sharding:
    """Reads a complete DeepSpeed configuration, with DeepSpeed's own defaults for what it leaves
    out."""
    zero = zero3.zero_settings(deepspeed_values)

    communicated = {"fp32": 4, "fp16": 2, "bf16": 2, "bfp16": 2}

    def offloads(part: Any) -> bool:
        return part is not None and part.device != "none"

    return Sharding(
        stage=int(zero.stage),
        ranks=ranks,
        weight_bytes=weight_bytes,
        gradient_bytes=communicated.get(
            deepspeed_values.get("communication_data_type", ""), weight_bytes
        ),
        optimizer_on_host=offloads(zero.offload_optimizer),
        parameters_on_host=offloads(zero.offload_param),
        reduce_bucket=int(zero.reduce_bucket_size),
        prefetch_bucket=int(zero.prefetch_bucket_size),
        persistence_threshold=int(zero.param_persistence_threshold),
        max_reuse_distance=int(zero.max_reuse_distance),
        max_live=int(zero.max_live_parameters),
        sub_group=int(zero.sub_group_size),
        hpz_ranks=int(zero.zero_hpz_partition_size),
    )


Use = tuple[tuple[str, int], ...]
"""A module with parameters of its own runs: their names and elements."""


@dataclass(frozen=True)
class Gathers:
    """What ZeRO-3 gathers in one optimizer step: elements of each parameter, each time. And the
    most held at a time."""

    steering: tuple[int, ...]
    """For the forward passes of rows that steer values, in a step with a refresh."""
    training: tuple[int, ...]
    """For the micro-batches of a step with a refresh."""
    training_alone: tuple[int, ...]
    """For those of a step without."""
    persistent: tuple[int, ...]
    """After the optimizer's step: small parameters, which stay."""
    most_held: int


def gathers_of(
    decoder: Decoder,
    sharding: Sharding,
    *,
    steering_batches: int,
    micro_batches: int,
    checkpointing: bool,
) -> Gathers:
    """Replays a step of ZeRO-3's coordinator.

    DeepSpeed has learned the order of modules from the first micro-batch of the run. It prefetches,
    and keeps what comes again within `max_reuse_distance` elements. A forward pass on rows that
    steer values begins like that order and leaves it after the norm.
    """
    names = {id(parameter): name for name, parameter in decoder.model.named_parameters()}

    def uses(stage: nn.Module) -> list[Use]:
        owned = [list(module.parameters(recurse=False)) for module in stage.modules()]
        return [tuple((names[id(each)], each.numel()) for each in own) for own in owned if own]

    layers = [uses(layer) for layer in decoder.layers]
    embeddings = [
        ((names[id(each)], each.numel()),)
        for each in decoder.segment_parameters("embeddings").values()
    ]
    norm, head = uses(decoder.norm), uses(decoder.head)
    forward = [*embeddings, *(use for layer in layers for use in layer), *norm]
    backward = [*head, *norm]
    for layer in reversed(layers):
        backward += [*(layer if checkpointing else []), *reversed(layer)]
    order = [*forward, *head, *backward, *reversed(embeddings)]

    persistent = {
        name: numel
        for use in order
        for name, numel in use
        if numel <= sharding.persistence_threshold
    }
    reach = sharding.max_reuse_distance

    def train(held: dict[str, int]) -> tuple[list[int], int]:
        gathered: list[int] = []
        most_held = 0
        for _ in range(micro_batches):
            more, most = _pass(order, len(order), held, persistent, reach)
            gathered += more
            most_held = max(most_held, most)
        return gathered, most_held

    held = dict(persistent)
    steering: list[int] = []
    for _ in range(steering_batches):
        steering += _pass(order, len(forward), held, persistent, reach)[0]
        steering += _ahead(order[len(forward) :], held, sharding.max_live)
    training, most_held = train(held)
    alone, _ = train(dict(persistent))
    return Gathers(
        tuple(steering), tuple(training), tuple(alone), tuple(persistent.values()), most_held
    )


def _ahead(rest: Sequence[Use], held: dict[str, int], most: int) -> list[int]:
    """What was fetched ahead when a pass ends before the order does; it is dropped."""
    arriving: dict[str, int] = {}
    elements = sum(held.values())
    for use in rest:
        for name, numel in use:
            if name in held or name in arriving:
                continue
            if elements >= most:
                return list(arriving.values())
            arriving[name] = numel
            elements += numel
    return list(arriving.values())


def _pass(
    order: Sequence[Use],
    end: int,
    held: dict[str, int],
    persistent: Container[str],
    reach: int,
) -> tuple[list[int], int]:
    """Gathers of the first `end` uses of an order, and the most elements held. `held` is what is
    there before, and after."""
    gathered, most = [], 0
    elements = sum(held.values())
    for place, use in enumerate(order[:end]):
        arriving = {name: numel for name, numel in use if name not in held}
        gathered += [numel for name, numel in use if name not in held]
        held |= arriving
        elements += sum(arriving.values())
        most = max(most, elements)
        soon: set[str] = set()
        passed = 0
        for later in order[place + 1 :]:
            if passed >= reach:
                break
            soon |= {name for name, _ in later}
            passed += sum(numel for _, numel in later)
        for name, _ in use:
            if name not in soon and name not in persistent:
                elements -= held.pop(name)
    return gathered, most
