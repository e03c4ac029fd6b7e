"""Floating-point operations of one optimizer step on one rank, by phase; matrix products only, 2
per multiply-add."""

from __future__ import annotations

from dataclasses import dataclass

from alphatoken.models.head import block_rows
from alphatoken.planner.blueprint import Blueprint
from alphatoken.planner.costs import cost_of


@dataclass(frozen=True)
class Compute:
    """FLOPs by phase. `plain` is the same step trained on every response token, without
    valuation."""

    refresh: float
    """Averaged over steps, where held-out signals are not refreshed in each."""
    ahead: int
    forward: int
    score: int
    backward: int
    plain: int

    @property
    def total(self) -> float:
        return self.refresh + self.ahead + self.forward + self.score + self.backward

    @property
    def over_plain(self) -> float:
        return self.total / self.plain


def compute_of(blueprint: Blueprint) -> Compute:
    """Floating-point operations of one optimizer step on one rank, by phase."""
    config, work = blueprint.config, blueprint.workload
    passes = work.micro_batches
    ahead = config.selection.scope == "global_batch"
    valued = config.valuation.enabled
    # Without a scorer, and without choosing ahead, the training graph itself needs the losses
    # of all response tokens.
    trained = work.kept if valued or ahead else work.responses
    forward, backward = _training(blueprint, trained)
    plain = sum(_training(blueprint, work.responses))
    score = refresh = 0
    if valued:
        cost = cost_of(config.valuation.estimator)
        score = cost.score_flops(blueprint)
        refresh = work.held_out_batches * (cost.refresh_flops(blueprint) + _compared(blueprint))
    entropy = work.responses * blueprint.head_flops if config.needs_entropy else 0
    assessed = blueprint.body.forward + (0 if valued else work.responses * blueprint.head_flops)
    if ahead:
        assessed += entropy
    else:
        forward += entropy
    return Compute(
        refresh=refresh / config.valuation.refresh_every,
        ahead=passes * assessed if ahead else 0,
        forward=passes * forward,
        score=passes * score,
        backward=passes * backward,
        plain=passes * plain,
    )


def _compared(blueprint: Blueprint) -> int:
    """An online reference's losses of one held-out micro-batch."""
    if not blueprint.compares_held_out:
        return 0
    head = blueprint.workload.held_out_responses * blueprint.head_flops
    return blueprint.held_out.forward + head


def _training(blueprint: Blueprint, tokens: int) -> tuple[int, int]:
    """Forward and backward of one micro-batch with a loss on so many tokens."""
    head = blueprint.decoder.head
    forward = blueprint.body.forward + tokens * blueprint.head_flops
    products = (
        1 + head.weight.requires_grad + (tokens > block_rows(head.weight.shape[0]))
    )  # logits are made again
    again = blueprint.body.forward if blueprint.config.train.gradient_checkpointing else 0
    return forward, blueprint.body.backward + again + products * tokens * blueprint.head_flops
