"""What takes memory, and the sizes that several parts share."""

from __future__ import annotations

from dataclasses import dataclass

from alphatoken.models.head import block_rows
from alphatoken.planner.blueprint import Blueprint

FLOAT32 = 4
"""Bytes of one number."""


@dataclass(frozen=True)
class Part:
    """Something that takes memory. `where` is device, host (of one rank) or disk (of the whole
    run)."""

    name: str
    bytes: int
    where: str = "device"


def logits(blueprint: Blueprint, tokens: int) -> Part:
    """One block of logits: in float32, and as much again inside the log-sum-exp."""
    vocabulary = blueprint.decoder.head.weight.shape[0]
    rows = min(tokens, block_rows(vocabulary))
    return Part("logits", 2 * rows * vocabulary * FLOAT32)


def chunk_share(blueprint: Blueprint) -> float:
    """Which share of a micro-batch is scored at a time."""
    work = blueprint.workload
    size = max(1, blueprint.config.valuation.chunk_tokens // work.row_tokens)
    return min(1.0, size / max(work.rows, 1))


def scored_layer(blueprint: Blueprint, *, matrices: int, working: int) -> tuple[Part, ...]:
    """One streamed layer with the `matrices` of each scored weight that it is contracted with or
    moves along, and its working memory in bytes. A resident layer is counted elsewhere."""
    weight = blueprint.sharding.weight_bytes
    held = 0
    if not blueprint.resident:
        layers = [sum(blueprint.segment_numels(layer)) for layer in blueprint.scored_layers]
        scored = max(sum(numels) for numels in blueprint.scored_numels.values())
        # Matrices arrive in messages of the same size.
        held = max(layers) * weight + 2 * scored * matrices * weight
    return (Part("one scored layer", held), Part("working memory of one layer", working))
