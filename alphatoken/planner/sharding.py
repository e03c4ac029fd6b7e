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
        sub_group=int(zero.sub_group_size),
        hpz_ranks=int(zero.zero_hpz_partition_size),
    )


Use = tuple[tuple[str, int], ...]
"""A module with parameters of its own runs: their names and elements."""


@dataclass(frozen=True)
class Gathers:
    """What ZeRO-3 gathers in one optimizer step: elements of each parameter, each time. And the
    most held at a time."""

    held_out: tuple[int, ...]
    """For the forward passes of held-out rows."""
    training: tuple[int, ...]
    """For the micro-batches."""
    persistent: tuple[int, ...]
    """After the optimizer's step: small parameters, which stay until something else than a
    micro-batch runs."""
    most_held: int


def gathers_of(
    decoder: Decoder,
    sharding: Sharding,
    *,
    held_out_batches: int,
    micro_batches: int,
    checkpointing: bool,
) -> Gathers:
    """Replays a step of ZeRO-3's coordinator.

    DeepSpeed learns the order of modules from the first micro-batch after something else has run
    the model, and until it knows that order it releases every module after its use, small
    parameters too. Then it prefetches, and keeps what comes again within `max_reuse_distance`
    elements.
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
    held = dict(persistent)
    held_out = [each for _ in range(held_out_batches) for each in _unknown(forward, held)]
    training: list[int] = []
    most_held = 0
    for number in range(micro_batches):
        if number == 0 and held_out_batches:
            training += _unknown(order, held)
            # Nothing flows back through what comes first, so it ends like a known pass: small
            # parameters stay.
            held |= {name: numel for use in embeddings for name, numel in use if name in persistent}
        else:
            gathered, most = _known(order, held, persistent, sharding.max_reuse_distance)
            training += gathered
            most_held = max(most_held, most)
    return Gathers(tuple(held_out), tuple(training), tuple(persistent.values()), most_held)


def _unknown(order: Sequence[Use], held: dict[str, int]) -> list[int]:
    """Gathers of an order that is not known yet. `held` is what is there before, and after."""
    gathered = []
    for use in order:
        gathered += [numel for name, numel in use if name not in held]
        for name, _ in use:
            held.pop(name, None)
    return gathered


def _known(
    order: Sequence[Use], held: dict[str, int], persistent: Container[str], reach: int
) -> tuple[list[int], int]:
    """Gathers of a known order, and the most elements held. `held` is what is there before, and
    after."""
    gathered, most = [], 0
    elements = sum(held.values())
    for place, use in enumerate(order):
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
