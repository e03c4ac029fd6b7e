"""How the tokens that a selection keeps are weighed.

A weight rule is an entry here and one in `config.weights`, or one call of `register_weight_rule`.

Shape legend: R kept tokens in order of (micro-batch, row, position), G groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from alphatoken.config.choices import register
from alphatoken.config.policies import Need
from alphatoken.config.weights import WEIGHT_TRAITS, WeightTraits
from alphatoken.selection import rules
from alphatoken.selection.facts import KeptTokens
from alphatoken.selection.policy import SortKey


@dataclass(frozen=True, kw_only=True)
class WeightRule:
    """An entry of `WEIGHT_RULES`."""

    weigh: Callable[[KeptTokens], Tensor]
    """Gives nonnegative weights, (R,); a token that weighs 0 is not trained on."""
    reads: Mapping[str, SortKey] = field(default_factory=dict)
    """What `weigh` reads of each token, by the names of `KeptTokens.facts`."""


def hard(tokens: KeptTokens) -> Tensor:
    """1 for every token that is kept."""
    return torch.ones_like(tokens.key_R)


def sigmoid(tokens: KeptTokens) -> Tensor:
    """The sigmoid of the sort key, standardised over its group."""
    return torch.sigmoid(_standardised(tokens.key_R, tokens.group_R))


def softmax(tokens: KeptTokens) -> Tensor:
    """min(cap, s exp(z / temperature)) with z the sort key, standardised over its group, and s such
    that the weights of a group have mean 1: whatever the keys are, a group weighs as much as the
    number of its kept tokens, and no token more than `cap`.

    Tokens that are exempt are left out, and weigh 1.
    """
    cap = tokens.parameters["cap"]
    logit_R = _standardised(tokens.key_R, tokens.group_R) / tokens.parameters["temperature"]
    weight_R = torch.ones_like(logit_R)
    for group in tokens.group_R.unique().tolist():
        own_R = (tokens.group_R == group) & ~tokens.exempt_R
        weight_R[own_R] = _mean_one(logit_R[own_R], cap)
    return weight_R


WEIGHT_RULES: dict[str, WeightRule] = {
    "hard": WeightRule(weigh=hard),
    "sigmoid": WeightRule(weigh=sigmoid),
    "softmax": WeightRule(weigh=softmax),
    "dft": WeightRule(
        weigh=lambda tokens: rules.power_weights(tokens.facts["nll"], tokens.parameters["power"]),
        reads={"nll": lambda facts: facts.nll_BT},
    ),
    "talr": WeightRule(
        weigh=lambda tokens: rules.talr_weights(
            tokens.facts["nll"], sequence_R=tokens.sequence_R, group_R=tokens.group_R
        ),
        reads={"nll": lambda facts: facts.nll_BT},
    ),
    "eaft": WeightRule(
        weigh=lambda tokens: rules.entropy_weights(tokens.facts["entropy"]),
        reads={"entropy": lambda facts: facts.entropy_BT},
    ),
    "gibbs": WeightRule(
        weigh=lambda tokens: rules.gibbs_weights(
            tokens.facts["value"],
            sequence_R=tokens.sequence_R,
            temperature=tokens.parameters["temperature"],
        ),
        reads={"value": lambda facts: facts.composite_BT},
    ),
}


def register_weight_rule(
    name: str,
    weigh: Callable[[KeptTokens], Tensor],
    *,
    reads: Mapping[str, SortKey] | None = None,
    needs: Iterable[Need] = (),
    parameters: Mapping[str, float] | None = None,
    at_least: Mapping[str, float] | None = None,
    grades: bool = False,
) -> None:
    """Makes a weight rule known as `selection.weights: name`, in this process.

    `weigh` and `reads` are as in `WeightRule`, the other arguments as in `WeightTraits`. Every rank
    must register it before the configuration is read. Raises ValueError where the name is taken.
    """
    traits = WeightTraits(
        needs=frozenset(needs),
        parameters=dict(parameters or {}),
        at_least=dict(at_least or {}),
        grades=grades,
    )
    register(WEIGHT_TRAITS, name, traits, notion="weight rule")
    WEIGHT_RULES[name] = WeightRule(weigh=weigh, reads=dict(reads or {}))


def _standardised(key_R: Tensor, group_R: Tensor) -> Tensor:
    """(key - mean) / standard deviation within each group; 0 where a group has one key only."""
    count_G = group_R.bincount().clamp_min(1).double()
    mean_G = torch.zeros_like(count_G).index_add_(0, group_R, key_R.double()) / count_G
    centred_R = key_R.double() - mean_G[group_R]
    deviation_G = (
        torch.zeros_like(count_G).index_add_(0, group_R, centred_R.square()) / count_G
    ).sqrt()
    scale_R = deviation_G[group_R]
    return torch.where(scale_R > 0, centred_R / scale_R, 0.0)


def _mean_one(logit_R: Tensor, cap: float) -> Tensor:
    """min(cap, s exp(logit)) of mean 1.

    The m largest weights are at the cap, and the others share what the sum of R leaves: m is the
    smallest number for which none of these is above the cap.
    """
    count = len(logit_R)
    logit_R, order_R = logit_R.sort(descending=True)
    log_tail_R = logit_R.flip(0).logcumsumexp(0).flip(0)  # of each token and all smaller ones
    left_R = count - cap * torch.arange(count, dtype=logit_R.dtype, device=logit_R.device)
    capped = int((left_R * (logit_R - log_tail_R).exp() > cap).sum())
    weight_R = torch.full_like(logit_R, cap)
    if capped < count:
        weight_R[capped:] = left_R[capped] * (logit_R[capped:] - log_tail_R[capped]).exp()
    return torch.empty_like(weight_R).index_copy_(0, order_R, weight_R)
