"""Bytes on one rank: what stays for the whole run, and what the busiest moments of a step add to
it."""

from __future__ import annotations

from dataclasses import dataclass

from alphatoken.checkpoints.saving import checkpoint_bytes
from alphatoken.models.head import block_rows
from alphatoken.planner.blueprint import Blueprint

# What a process takes on a CPU besides its imports and tensors, measured with a model of 0.2
# million parameters (benchmarks/plan_accuracy.py): threads, sockets, files that were read, and
# libraries that are loaded when first used.
CPU_PROCESS_BYTES = 80 * 2**20
CPU_LOADED_LATER = {"valuation": 12 * 2**20, "exact": 24 * 2**20, "reference": 24 * 2**20}

FLOAT32 = 4


@dataclass(frozen=True)
class Part:
    """Something that takes memory. `where` is device, host (of one rank) or disk (of the whole
    run)."""

    name: str
    bytes: int
    where: str = "device"


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
    steady, host = _states(blueprint, on_cpu)
    if blueprint.depth:
        steady += _valuation(blueprint)
    if on_cpu:
        steady.append(Part("process, after its imports", _process(blueprint)))
        steady += host  # all is host memory
        host = []
    elsewhere = [Part(part.name, part.bytes, "host") for part in host]
    return Memory(tuple(steady), _moments(blueprint), (*elsewhere, *_disk(blueprint)))


def _process(blueprint: Blueprint) -> int:
    used = {"valuation": blueprint.depth > 0, "exact": blueprint.depth > 0 and blueprint.exact}
    used["reference"] = blueprint.config.needs_reference
    return CPU_PROCESS_BYTES + sum(size for what, size in CPU_LOADED_LATER.items() if used[what])


def _states(blueprint: Blueprint, on_cpu: bool) -> tuple[list[Part], list[Part]]:
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
    sharding, weight = blueprint.sharding, blueprint.sharding.weight_bytes
    sharded = sharding.stage == 3

    def sliced(numels: list[int]) -> int:
        return sum(map(sharding.slice_of, numels)) if sharded else sum(numels)

    scored = [numel for numels in blueprint.scored_numels.values() for numel in numels]
    copied = [
        blueprint.segment_numels(segment) for segment in (*blueprint.scored_layers, "norm", "head")
    ]
    parts = []
    if sharded and blueprint.resident:
        parts.append(Part("scored weights, whole", sum(map(sum, copied)) * weight))
    if blueprint.has_drift:
        parts.append(Part("Fisher and reference", sliced(scored) * (FLOAT32 + weight)))
    if blueprint.exact:
        parts.append(Part("slices of G", sliced(scored) * FLOAT32))
        parts.append(
            Part("slices of the directions", sliced(scored) * weight * blueprint.directions)
        )
        if blueprint.resident:
            parts.append(Part("directions, whole", sum(scored) * weight * blueprint.directions))
        return parts
    formed = [linear.numel for linear in blueprint.scored if linear.contraction == "matrix"]
    # Below stage 3 too, G is kept in slices.
    parts.append(Part("slices of G", sum(map(sharding.slice_of, formed)) * FLOAT32))
    parts.append(Part("held-out signals", _signals(blueprint)))
    if blueprint.resident:
        parts.append(
            Part(
                "G and V, whole",
                _matrices(blueprint, sum(formed), sum(each.numel for each in blueprint.scored)),
            )
        )
    return parts


def _signals(blueprint: Blueprint) -> int:
    """Held-out signals of this rank, and where they stay of all ranks."""
    features = sum(
        each.out_features + each.in_features
        for each in blueprint.scored
        if each.contraction == "signals"
    )
    work = blueprint.workload
    own = work.held_out_batches * work.held_out_responses
    everywhere = blueprint.held_out_count if blueprint.resident else 0
    return (own + everywhere) * features * blueprint.sharding.weight_bytes


def _matrices(blueprint: Blueprint, formed: int, scored: int) -> int:
    """Whole matrices that signals are contracted with: G where it is formed, and V; or their
    sum."""
    fused = not blueprint.config.valuation.split_terms
    drift = (scored - formed if fused else scored) if blueprint.has_drift else 0
    return (formed + drift) * blueprint.sharding.weight_bytes


def _moments(blueprint: Blueprint) -> dict[str, tuple[Part, ...]]:
    work, weight = blueprint.workload, blueprint.sharding.weight_bytes
    gathered, activations = _gathered(blueprint), _activations(blueprint)
    # A layer's gradients on their way: about as much as its three largest activations.
    working = Part("gradients of one layer", 3 * blueprint.body.largest_bytes)
    vocabulary = blueprint.decoder.head.weight.shape[0]
    valued = bool(blueprint.depth)
    tokens = work.kept if valued else work.responses
    only_block = tokens * vocabulary * weight if tokens <= block_rows(vocabulary) else 0
    moments = {
        "loss": (gathered, activations, _logits(blueprint, tokens)),
        "backward": (gathered, activations, working, Part("gradient of the logits", only_block)),
        "optimizer": (_step_gradients(blueprint),),
    }
    if blueprint.sharding.stage >= 2:
        trained = sum(numel for numel, trains in blueprint.numels if trains)
        copy = min(blueprint.sharding.reduce_bucket, trained) * weight
        moments["reduction"] = (gathered, Part("copy of the gradient bucket", copy))
    if valued:
        moments["score"] = (gathered, activations, *_scoring(blueprint))
        moments["refresh"] = _refresh(blueprint)
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


def _activations(blueprint: Blueprint, checkpointing: bool | None = None) -> Part:
    """What the forward pass of a micro-batch keeps for its backward pass."""
    body = blueprint.body
    if blueprint.config.train.gradient_checkpointing if checkpointing is None else checkpointing:
        largest = max(layer.training_bytes for layer in body.layers)
        return Part("activations", len(body.layers) * body.state_bytes + largest)
    return Part("activations", sum(layer.training_bytes for layer in body.layers))


def activation_bytes(blueprint: Blueprint, *, checkpointing: bool) -> int:
    """Activations of one micro-batch, with or without recomputing them."""
    return _activations(blueprint, checkpointing).bytes


def _logits(blueprint: Blueprint, tokens: int) -> Part:
    """One block of logits: in float32, and as much again inside the log-sum-exp."""
    vocabulary = blueprint.decoder.head.weight.shape[0]
    rows = min(tokens, block_rows(vocabulary))
    return Part("logits", 2 * rows * vocabulary * FLOAT32)


def _chunk_share(blueprint: Blueprint, rows: int) -> float:
    """Which share of a micro-batch is scored at a time."""
    size = max(1, blueprint.config.valuation.chunk_tokens // blueprint.workload.row_tokens)
    return min(1.0, size / max(rows, 1))


def _scoring(blueprint: Blueprint) -> tuple[Part, ...]:
    work, body = blueprint.workload, blueprint.body
    share = _chunk_share(blueprint, work.rows)
    if blueprint.exact:
        states = (1 + 2 * blueprint.directions) * body.state_bytes
        return (
            Part("states and derivatives", states),
            *_stage(blueprint, int(6 * share * body.largest_bytes)),
        )
    layers = [body.layers[index].scoring_bytes for index in blueprint.scored_layers]
    kept = (
        sum(layers)
        if blueprint.resident
        else max(layers) + (2 * blueprint.depth + 1) * body.state_bytes
    )
    tokens = int(share * work.responses)
    parts = (Part("activations of scoring", int(share * kept)), _logits(blueprint, tokens))
    return parts if blueprint.resident else (*parts, *_stage(blueprint, 0))


def _stage(blueprint: Blueprint, working: int) -> tuple[Part, ...]:
    """One streamed layer with what it is contracted with or moves along."""
    weight = blueprint.sharding.weight_bytes
    layers = [sum(blueprint.segment_numels(layer)) for layer in blueprint.scored_layers]
    held = 0
    if not blueprint.resident:
        scored = max(sum(numels) for numels in blueprint.scored_numels.values())
        matrices = blueprint.directions if blueprint.exact else 1 + blueprint.has_drift
        held = (
            max(layers) * weight + 2 * scored * matrices * weight
        )  # arriving in messages of the same size
    return (Part("one scored layer", held), Part("working memory of one layer", working))


def _refresh(blueprint: Blueprint) -> tuple[Part, ...]:
    """Forming the held-out signals; nothing of training is there."""
    work, body = blueprint.workload, blueprint.held_out
    logits = _logits(blueprint, work.held_out_responses)
    layers = [body.layers[index] for index in blueprint.scored_layers]
    if blueprint.exact:
        states = (blueprint.depth + 2) * body.state_bytes * work.held_out_batches
        largest = max(sum(numels) for numels in blueprint.scored_numels.values())
        kept = max(layer.training_bytes for layer in layers)
        formed = Part("gradients of one layer", 2 * largest * FLOAT32)
        return (Part("states", states), Part("activations of one layer", kept), formed, logits)
    held = [layer.scoring_bytes for layer in layers]
    formed_by_layer = [
        sum(
            each.numel
            for each in blueprint.scored
            if each.layer == layer and each.contraction == "matrix"
        )
        for layer in blueprint.scored_layers
    ]
    pending = sum(formed_by_layer) if blueprint.resident else max(formed_by_layer)
    activations = sum(held) if blueprint.resident else max(held)
    return (
        Part("activations of scoring", activations),
        Part("G before it is divided", (pending + max(formed_by_layer)) * FLOAT32),
        logits,
    )


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
    parts = [Part("one checkpoint", checkpoint, "disk")]
    parts.append(Part("export", sum(numel for numel, _ in blueprint.numels) * weight, "disk"))
    if blueprint.config.needs_reference and blueprint.config.reference.mode == "cached":
        work = blueprint.workload
        row = work.responses // work.rows * len(blueprint.config.selections) * FLOAT32
        parts.append(Part("cached reference losses of 1,000 rows", 1000 * row, "disk"))
    return parts
