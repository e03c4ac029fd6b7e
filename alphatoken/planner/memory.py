"""Bytes on one rank: what stays for the whole run, and what the busiest moments of a step add to
it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alphatoken.checkpoints.saving import checkpoint_bytes
from alphatoken.models.head import block_rows
from alphatoken.planner.blueprint import Blueprint
from alphatoken.planner.costs import cost_of
from alphatoken.planner.parts import FLOAT32, Part, logits

# What a process takes on a CPU besides its imports and tensors, measured with a model of 0.2
# million parameters (benchmarks/plan_accuracy.py): threads, sockets, files that were read, and
# libraries that are loaded when first used.
CPU_PROCESS_BYTES = 80 * 2**20
CPU_LOADED_LATER = {"valuation": 12 * 2**20, "reference": 24 * 2**20}


@dataclass(frozen=True)
class Memory:
    """`steady` stays; `moments` are what is there besides, at the busiest times of a step."""

    steady: tuple[Part, ...]
    moments: dict[str, tuple[Part, ...]]
    elsewhere: tuple[Part, ...]
    """On host and disk."""

    @property
    def peak_moment(self) -> str:
        return max(self.moments, key=lambda name: _total(self.moments[name]))

    @property
    def peak(self) -> int:
        """Bytes on the device of one rank at the busiest moment."""
        return _total(self.steady) + _total(self.moments[self.peak_moment])

    @property
    def host(self) -> int:
        """Bytes in the host's memory for one rank, besides the process itself."""
        return sum(part.bytes for part in self.elsewhere if part.where == "host")


def _total(parts: tuple[Part, ...]) -> int:
    return sum(part.bytes for part in parts)


def memory_of(blueprint: Blueprint, *, on_cpu: bool) -> Memory:
    """Where a bucket is larger than what it will hold, a CPU takes only what is written to, a GPU
    all of it."""
    if on_cpu and blueprint.offloads:  # the host's memory is the device's
        blueprint = blueprint.training(gradient_checkpointing=True)
    steady, host = _states(blueprint, on_cpu=on_cpu)
    if blueprint.depth:
        steady += _valuation(blueprint)
    if on_cpu:
        steady.append(Part("process, after its imports", _process(blueprint)))
        steady += host  # all is host memory
        host = []
    elif blueprint.offloads:
        host.append(Part("states between layers", _pinned(blueprint)))
    elsewhere = [Part(part.name, part.bytes, "host") for part in host]
    return Memory(tuple(steady), _moments(blueprint), (*elsewhere, *_disk(blueprint)))


def _process(blueprint: Blueprint) -> int:
    size = CPU_PROCESS_BYTES
    if blueprint.depth:
        cost = cost_of(blueprint.config.valuation.estimator)
        size += CPU_LOADED_LATER["valuation"] + cost.loaded_later_bytes
    if blueprint.config.needs_reference:
        size += CPU_LOADED_LATER["reference"]
    return size


def _states(blueprint: Blueprint, *, on_cpu: bool) -> tuple[list[Part], list[Part]]:
    """Weights, masters, moments and gradients; those on the device, and those on the host."""
    sharding, weight = blueprint.sharding, blueprint.sharding.weight_bytes
    every = [numel for numel, _ in blueprint.numels]
    trained = [numel for numel, trains in blueprint.numels if trains]

    def divided(numels: list[int], from_stage: int) -> int:
        """Elements on this rank of what is divided from a stage on."""
        return sum(map(sharding.slice_of, numels)) if sharding.stage >= from_stage else sum(numels)

    # ZeRO-3 in float32 updates the shards themselves; so does stage 0.
    masters = 0 if weight == FLOAT32 and sharding.stage in (0, 3) else divided(trained, 1) * FLOAT32
    optimizer = [
        Part("fp32 master weights", masters),
        Part("Adam's moments", 2 * divided(trained, 1) * FLOAT32),
    ]
    weights = Part("weights", divided(every, 3) * weight)
    gradients = Part("gradients", divided(trained, 2) * weight)
    device: list[Part] = []
    host: list[Part] = []
    (host if sharding.parameters_on_host else device).append(weights)
    if sharding.hpz_ranks > 1:
        copy = sum(-(-numel // sharding.hpz_ranks) for numel in every) * weight
        device.append(Part("second copy of the weights, divided within a node", copy))
    reference = blueprint.config.reference
    if blueprint.config.needs_reference and reference.mode == "online":
        (host if reference.offload else device).append(
            Part("weights of the reference", divided(every, 3) * weight)
        )
    if sharding.optimizer_on_host:
        host += [*optimizer, gradients, Part("fp32 gradients", divided(trained, 1) * FLOAT32)]
    else:
        device += [*optimizer, gradients]
    if sharding.stage >= 2:
        bucket = min(sharding.reduce_bucket, sum(trained)) if on_cpu else sharding.reduce_bucket
        device.append(Part("gradient bucket", bucket * weight))
    return device, host


def _valuation(blueprint: Blueprint) -> list[Part]:
    """What scoring keeps between steps."""
    weight = blueprint.sharding.weight_bytes
    scored = [numel for numels in blueprint.scored_numels.values() for numel in numels]
    cost = cost_of(blueprint.config.valuation.estimator)
    copied = [blueprint.segment_numels(each) for each in cost.copied_segments(blueprint)]
    parts = []
    if blueprint.sharding.stage == 3 and blueprint.resident:
        parts.append(Part("scored weights, whole", sum(map(sum, copied)) * weight))
    if blueprint.has_drift:
        parts.append(Part("Fisher and reference", blueprint.sliced(scored) * (FLOAT32 + weight)))
    return parts + cost.steady_parts(blueprint)


def _moments(blueprint: Blueprint) -> dict[str, tuple[Part, ...]]:
    work, weight = blueprint.workload, blueprint.sharding.weight_bytes
    checkpointing = blueprint.config.train.gradient_checkpointing
    activations = Part("activations", activation_bytes(blueprint, checkpointing=checkpointing))
    gathered = _gathered(blueprint)
    # A layer's gradients on their way: about as much as its three largest activations.
    working = Part("gradients of one layer", 3 * blueprint.body.largest_bytes)
    vocabulary = blueprint.decoder.head.weight.shape[0]
    valued = bool(blueprint.depth)
    tokens = work.kept if valued else work.responses
    only_block = tokens * vocabulary * weight if tokens <= block_rows(vocabulary) else 0
    moments = {
        "loss": (gathered, activations, logits(blueprint, tokens)),
        "backward": (gathered, activations, working, Part("gradient of the logits", only_block)),
        "optimizer": (_step_gradients(blueprint),),
    }
    if blueprint.sharding.stage >= 2:
        trained = sum(numel for numel, trains in blueprint.numels if trains)
        copy = min(blueprint.sharding.reduce_bucket, trained) * weight
        moments["reduction"] = (gathered, Part("copy of the gradient bucket", copy))
    if valued:
        cost = cost_of(blueprint.config.valuation.estimator)
        moments["score"] = (gathered, activations, *cost.score_parts(blueprint))
        renewed = tuple(cost.renewed_parts(blueprint))
        moments = {name: (*renewed, *parts) for name, parts in moments.items()}
        moments["refresh"] = (gathered, *cost.refresh_parts(blueprint))
    return moments


def _gathered(blueprint: Blueprint) -> Part:
    """Weights that ZeRO-3 holds during a micro-batch, and the messages they arrive in."""
    sharding, gathers = blueprint.sharding, blueprint.gathers
    if gathers is None:
        return Part("gathered weights", 0)
    largest = max(numel for numel, _ in blueprint.numels)
    held = max(gathers.most_held, largest)
    arriving = min(sharding.prefetch_bucket, gathers.most_held) or largest
    return Part("gathered weights", (held + arriving) * sharding.weight_bytes)


def activation_bytes(blueprint: Blueprint, *, checkpointing: bool | Literal["offload"]) -> int:
    """What the forward pass of a micro-batch keeps on the device for its backward pass: all, or the
    states between layers and one layer's rest at a time; without those states where they are on the
    host."""
    kept = [layer.kept_bytes for layer in blueprint.body.layers]
    if not checkpointing:
        return sum(kept)
    states = 0 if checkpointing == "offload" else len(kept) * blueprint.body.state_bytes
    return states + max(kept)


def _pinned(blueprint: Blueprint) -> int:
    """Host memory of the states between layers; torch takes a power of two for each."""
    body = blueprint.body
    return len(body.layers) * (1 << (body.state_bytes - 1).bit_length())


def _step_gradients(blueprint: Blueprint) -> Part:
    """float32 gradients of the sub-group that is being updated, where they are not float32
    already."""
    sharding = blueprint.sharding
    trained = [numel for numel, trains in blueprint.numels if trains]
    own = sum(map(sharding.slice_of, trained)) if sharding.stage else sum(trained)
    return Part(
        "fp32 gradients",
        0 if sharding.optimizer_on_host else min(own, sharding.sub_group) * FLOAT32,
    )


def _disk(blueprint: Blueprint) -> list[Part]:
    """A checkpoint, an export, and the reference's losses."""
    weight = blueprint.sharding.weight_bytes
    checkpoint = checkpoint_bytes(blueprint.decoder.model, trains_in_16_bit=weight == 2)
    valuation = blueprint.config.valuation
    if valuation.enabled:
        checkpoint += cost_of(valuation.estimator).saved_bytes(blueprint)
    parts = [Part("one checkpoint", checkpoint, "disk")]
    parts.append(Part("export", sum(numel for numel, _ in blueprint.numels) * weight, "disk"))
    if blueprint.config.needs_reference and blueprint.config.reference.mode == "cached":
        work = blueprint.workload
        row = work.parts * work.responses // work.rows * len(blueprint.config.selections) * FLOAT32
        parts.append(Part("cached reference losses of 1,000 rows", 1000 * row, "disk"))
    return parts
