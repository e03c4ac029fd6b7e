"""What a rank hands to the others at a time, and the messages that several parts send."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alphatoken.planner.blueprint import Blueprint

Op = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all"]


@dataclass(frozen=True)
class Message:
    """Messages of one kind. `bytes` is what a rank hands in, as DeepSpeed's communications log
    counts them."""

    about: str
    op: Op
    count: float
    bytes: float
    """Of all of them together."""
    among: int | None = None
    """How many ranks take part, where it is not all."""

    def received(self, ranks: int) -> float:
        """Bytes that reach a rank of so many, in a ring where all get the same."""
        ranks = self.among or ranks
        factor = {
            "all_gather": ranks - 1,
            "reduce_scatter": (ranks - 1) / ranks,
            "all_reduce": 2 * (ranks - 1) / ranks,
            "all_to_all": (ranks - 1) / ranks,
        }
        return self.bytes * factor[self.op]


def gather(
    blueprint: Blueprint, about: str, numels: list[int], width: int, times: float
) -> Message:
    """Slices of tensors with so many elements, of `width` bytes each, in one message."""
    own = sum(map(blueprint.sharding.slice_of, numels)) if blueprint.sharding.stage == 3 else 0
    return Message(about, "all_gather", times, times * own * width)


def reduce(blueprint: Blueprint, about: str, numels: list[int], times: float) -> Message:
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


def merged(messages: list[Message]) -> list[Message]:
    """One entry for each kind."""
    sums: dict[tuple[str, Op], list[float]] = {}
    for each in messages:
        total = sums.setdefault((each.about, each.op), [0.0, 0.0])
        total[0] += each.count
        total[1] += each.bytes
    return [Message(about, op, count, size) for (about, op), (count, size) in sums.items()]
