"""Floating-point operations of one optimizer step on one rank, by phase; matrix products only, 2
per multiply-add."""

from __future__ import annotations

from dataclasses import dataclass

from alphatoken.models.head import block_rows
from alphatoken.planner.blueprint import Blueprint


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
        score = _exact_score(blueprint) if blueprint.exact else _ghost_score(blueprint)
        refresh = work.held_out_batches * (_exact_refresh if blueprint.exact else _ghost_refresh)(
            blueprint
        )
    assessed = blueprint.body.forward + (0 if valued else work.responses * _head(blueprint))
    return Compute(
        refresh=refresh / config.valuation.refresh_every,
        ahead=passes * assessed if ahead else 0,
        forward=passes * forward,
        score=passes * score,
        backward=passes * backward,
        plain=passes * plain,
    )


def _head(blueprint: Blueprint) -> int:
    """The head's logits of one token."""
    vocabulary, hidden = blueprint.decoder.head.weight.shape
    return 2 * vocabulary * hidden


def _training(blueprint: Blueprint, tokens: int) -> tuple[int, int]:
    """Forward and backward of one micro-batch with a loss on so many tokens."""
    head = blueprint.decoder.head
    forward = blueprint.body.forward + tokens * _head(blueprint)
    products = (
        1 + head.weight.requires_grad + (tokens > block_rows(head.weight.shape[0]))
    )  # logits are made again
    again = blueprint.body.forward if blueprint.config.train.gradient_checkpointing else 0
    return forward, blueprint.body.backward + again + products * tokens * _head(blueprint)


def _ghost_score(blueprint: Blueprint) -> int:
    work, valuation = blueprint.workload, blueprint.config.valuation
    layers = [blueprint.body.layers[index] for index in blueprint.scored_layers]
    tower = sum(
        each.scoring_forward + each.band + each.scoring_backward + each.mixing for each in layers
    )
    products = 0
    for linear in blueprint.scored:
        paths = 2 if linear.is_value and valuation.window and valuation.split_terms else 1
        bilinear = linear.numel
        target = bilinear
        if linear.contraction == "signals":
            target = blueprint.held_out_count * (linear.out_features + linear.in_features)
        fused = not valuation.split_terms and linear.contraction == "matrix"
        products += paths * (target + (bilinear if blueprint.has_drift and not fused else 0))
    return tower + 2 * work.responses * (products + _head(blueprint))


def _ghost_refresh(blueprint: Blueprint) -> int:
    """One held-out micro-batch."""
    layers = [blueprint.held_out.layers[index] for index in blueprint.scored_layers]
    tower = sum(each.scoring_forward + each.scoring_backward for each in layers)
    formed = sum(linear.numel for linear in blueprint.scored if linear.contraction == "matrix")
    tokens = blueprint.workload.held_out_responses
    return blueprint.held_out.forward + tower + 2 * tokens * (formed + _head(blueprint))


def _exact_score(blueprint: Blueprint) -> int:
    tower = sum(blueprint.body.layers[index].scoring_forward for index in blueprint.scored_layers)
    head = (3 if "head" in blueprint.scored_numels else 2) * _head(blueprint)
    return blueprint.directions * (tower + blueprint.workload.responses * head)


def _exact_refresh(blueprint: Blueprint) -> int:
    """One held-out micro-batch."""
    layers = [blueprint.held_out.layers[index] for index in blueprint.scored_layers]
    tokens, head = blueprint.workload.held_out_responses, blueprint.decoder.head
    products = 2 + ("head" in blueprint.scored_numels) + (tokens > block_rows(head.weight.shape[0]))
    tower = sum(each.forward + each.backward for each in layers)
    return blueprint.held_out.forward + tower + products * tokens * _head(blueprint)
