"""The plan of a run: memory, messages and work of one rank, whether it fits, and what to change
where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from alphatoken.config.estimators import ESTIMATORS, keys_of_some
from alphatoken.config.run import RunConfig
from alphatoken.config.training import DeepSpeedConfig
from alphatoken.config.valuation import ValuationConfig
from alphatoken.distributed.settings import DEFAULT_DEEPSPEED, read_deepspeed_config
from alphatoken.errors import UserError
from alphatoken.planner.blueprint import Blueprint, draw
from alphatoken.planner.compute import Compute, compute_of
from alphatoken.planner.memory import Memory, activation_bytes, memory_of
from alphatoken.planner.messages import Message
from alphatoken.planner.traffic import traffic_of
from alphatoken.planner.workload import Rows

GIB = 2**30

# Memory in GiB as the drivers report it.
GPUS = {
    "a100-40g": 40.0,
    "a100-80g": 80.0,
    "h100-80g": 79.6,
    "h200-141g": 140.4,
    "b200-180g": 178.4,
    "l40s-48g": 45.0,
    "mi300x-192g": 192.0,
    "rtx4090-24g": 24.0,
}

# Assumed, not measured: the driver's context and the buffers of communication, and what the
# allocator cannot use.
GPU_CONTEXT_BYTES = int(1.5 * GIB)
GPU_FRAGMENTATION = 0.05

# How far plans were below what runs took, at most, as a share of that (docs/planning.md,
# "Accuracy").
PLANNED_BELOW_MEASURED = 0.062


@dataclass(frozen=True)
class Advice:
    """A change, on top of those before it, and the memory of one rank with all of them."""

    change: str
    bytes: int


@dataclass(frozen=True)
class Plan:
    """A run before it starts: memory of one rank, messages, work, and what makes it fit."""

    blueprint: Blueprint
    memory: Memory
    traffic: tuple[Message, ...]
    compute: dict[str, Compute]
    """By estimator; empty without valuation."""
    own: Compute
    """Of the run as it is configured."""
    device: str | None
    """A name of `GPUS`, or cpu; None where it was not told."""
    needed: int
    """Bytes of one rank at the peak, with what the device takes for itself."""
    advice: tuple[Advice, ...]

    @property
    def capacity(self) -> int | None:
        """Bytes of the device."""
        return int(GPUS[self.device] * GIB) if self.device in GPUS else None

    @property
    def fits(self) -> bool | None:
        """Whether it fits even if the plan is as far below what the run takes as plans have been;
        None where there is no device to fit into."""
        return None if self.budget is None else self.needed <= self.budget

    @property
    def budget(self) -> float | None:
        """Bytes that may be planned for the device."""
        return None if self.capacity is None else _budget(self.capacity)

    @property
    def activations(self) -> dict[str, int]:
        """Bytes on the device of one micro-batch's activations, with and without recomputing
        them."""
        return {
            "with offloaded checkpointing": activation_bytes(
                self.blueprint, checkpointing="offload"
            ),
            "with checkpointing": activation_bytes(self.blueprint, checkpointing=True),
            "without checkpointing": activation_bytes(self.blueprint, checkpointing=False),
        }

    @property
    def offloaded(self) -> int:
        """Bytes of states between layers that a step copies from the device to the host, and as
        many back; 0 where they stay."""
        blueprint = self.blueprint
        if not blueprint.offloads or self.device == "cpu":
            return 0
        states = blueprint.workload.micro_batches * len(blueprint.body.layers)
        return states * blueprint.body.state_bytes


def make_plan(config: RunConfig, rows: Rows, ranks: int, device: str | None = None) -> Plan:
    """Plans a run on so many ranks. Raises UserError for an unknown device, and as `draw` does."""
    if device is not None and device not in (*GPUS, "cpu"):
        raise UserError(f"--gpu {device} is not known; known: {', '.join(GPUS)}")
    blueprint = draw(config, rows, ranks)
    memory = memory_of(blueprint, on_cpu=device == "cpu")
    needed = _with_overhead(memory, device)
    capacity = _budget(GPUS.get(device or "", float("inf")) * GIB)
    advice: tuple[Advice, ...] = ()
    if needed > capacity:
        advice = tuple(_advise(config, rows, ranks, device, needed, capacity))
    own = compute_of(blueprint)
    compute = _compute_by_estimator(config, rows, ranks, own)
    return Plan(
        blueprint, memory, tuple(traffic_of(blueprint)), compute, own, device, needed, advice
    )


def _budget(capacity: float) -> float:
    """Bytes that may be planned for a device of that size."""
    return capacity * (1 - PLANNED_BELOW_MEASURED)


def _with_overhead(memory: Memory, device: str | None) -> int:
    if device == "cpu":
        return memory.peak
    return int(memory.peak * (1 + GPU_FRAGMENTATION)) + GPU_CONTEXT_BYTES


def _compute_by_estimator(
    config: RunConfig, rows: Rows, ranks: int, own: Compute
) -> dict[str, Compute]:
    """The work of the run with every estimator that can be planned; none without valuation."""
    if not config.valuation.enabled:
        return {}
    found: dict[str, Compute] = {}
    for name, estimator in ESTIMATORS.items():
        if name == config.valuation.estimator:
            found[name] = own
        elif estimator.cost is not None:
            found[name] = compute_of(draw(_estimating(config, name), rows, ranks))
    return found


def _estimating(config: RunConfig, estimator: str) -> RunConfig:
    """A run like `config` with another estimator, and the keys that this one does not read at their
    defaults."""
    unread = set(keys_of_some()) - set(ESTIMATORS[estimator].keys)
    if estimator != config.valuation.estimator:
        unread.add("contrast_from")  # not every source is every estimator's
    shared = config.valuation.model_dump(exclude={"estimator", "residency", *unread})
    valuation = ValuationConfig.model_validate({**shared, "estimator": estimator}, strict=False)
    return config.model_copy(update={"valuation": valuation})


def _advise(
    config: RunConfig, rows: Rows, ranks: int, device: str | None, lowest: int, capacity: float
) -> Iterator[Advice]:
    """Changes that lower the peak below `lowest`, each on top of the others, until it fits; what
    does not lower it is left out."""
    for change, changed, more in _changes(config, ranks):
        try:
            memory = memory_of(draw(changed(config), rows, ranks * more), on_cpu=False)
        except UserError:  # such as a batch that so many ranks do not divide
            continue
        needed = _with_overhead(memory, device)
        if needed >= lowest:
            continue
        lowest, config, ranks = needed, changed(config), ranks * more
        yield Advice(change, needed)
        if needed <= capacity:
            return


def _changes(config: RunConfig, ranks: int) -> Iterator[tuple[str, Any, int]]:
    """What to write, what it does to the configuration, and by how much it multiplies the ranks;
    cheapest first."""

    def train(**values: Any) -> Any:
        return lambda each: each.model_copy(update={"train": each.train.model_copy(update=values)})

    def valuation(**values: Any) -> Any:
        return lambda each: each.model_copy(
            update={"valuation": each.valuation.model_copy(update=values)}
        )

    yield "train.gradient_checkpointing=true", train(gradient_checkpointing=True), 1
    if config.valuation.enabled:
        yield "valuation.residency=streamed", valuation(residency="streamed"), 1
    size = config.train.micro_batch_size
    while size > 1 and size % 2 == 0:
        size //= 2
        yield f"train.micro_batch_size={size}", train(micro_batch_size=size), 1
    if config.valuation.enabled:
        yield "valuation.chunk_tokens=1", valuation(chunk_tokens=1), 1
    yield "train.gradient_checkpointing=offload", train(gradient_checkpointing="offload"), 1
    values = read_deepspeed_config(config.deepspeed.config)
    small = {"reduce_bucket_size": 50_000_000}
    offloaded = {**small, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    for about, extra in (
        ("reduce_bucket_size: 5e7", small),
        ("offload_optimizer: {device: cpu}", offloaded),
    ):
        zero = {**values.get("zero_optimization", DEFAULT_DEEPSPEED["zero_optimization"]), **extra}
        written = DeepSpeedConfig(config={**values, "zero_optimization": zero})
        yield (
            f"deepspeed.config: zero_optimization.{about}",
            lambda each, to=written: each.model_copy(update={"deepspeed": to}),
            1,
        )
    for parts in (2, 4, 8):
        if parts > config.train.sequence_parallel:
            yield f"train.sequence_parallel={parts}", train(sequence_parallel=parts), 1
    for more in (2, 2, 2):
        ranks *= more
        yield f"--world {ranks}", lambda each: each, more
