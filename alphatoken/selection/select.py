"""From values to token weights. How many are kept follows from labels alone, so normalisers are
known beforehand.

Shape legend: B rows, T loss positions, R response positions in order of (row, position), S
sequences (documents) in order of their first position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

import torch
from torch import Tensor

from alphatoken.selection.policy import Policy

Scope = Literal["sequence", "micro_batch", "global_batch"]
Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True)
class Selection:
    """Keeps the best tokens of each group: of each sequence, of a micro-batch, or of all
    micro-batches of a step.

    A group of n response tokens keeps exactly max(ceil(keep_ratio n), sum over its sequences of
    min(min_keep, n_s)). First come the `min_keep` best of every sequence, then protected tokens if
    `protect_eos`, then the best of the rest; ties go to the earlier position. With `soft` weights
    every token is kept and weighed by the sigmoid of its rank value, standardised over its group;
    protected tokens weigh 1.
    """

    policy: Policy
    keep_ratio: Fraction
    scope: Scope = "micro_batch"
    protect_eos: bool = False
    min_keep: int = 0
    soft: bool = False

    def kept_count(self, counts: Sequence[int]) -> int:
        """Tokens that will be kept of a micro-batch (or step) whose sequences have `counts`
        response tokens."""
        groups = [[count] for count in counts] if self.scope == "sequence" else [list(counts)]
        return sum(self.budget(sum(group), self.forced_count(group)) for group in groups)

    def forced_count(self, counts: Sequence[int]) -> int:
        """Tokens that `min_keep` keeps whatever their rank."""
        return sum(min(self.min_keep, count) for count in counts)

    def budget(self, total: int, forced: int) -> int:
        """Tokens kept of a group of `total`, `forced` of them by `min_keep`."""
        return total if self.policy == "all" else max(math.ceil(self.keep_ratio * total), forced)

    def weigh(self, rank_R: Tensor, sequence_R: Tensor, protected_R: Tensor) -> Tensor:
        """Weights of the tokens of one micro-batch (or, for `global_batch`, of a whole step), (R,)
        float32.

        `rank_R` is what the policy ranks by (`ranking`), higher first, NaN last; `sequence_R` int64
        numbers the sequences in ascending order; `protected_R` bool marks end-of-turn targets.
        """
        rank_R = rank_R.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        protected_R = protected_R & self.protect_eos
        group_R = sequence_R if self.scope == "sequence" else torch.zeros_like(sequence_R)
        if self.soft:
            return torch.where(protected_R, 1.0, torch.sigmoid(_standardised(rank_R, group_R)))
        order_R = torch.arange(rank_R.numel(), device=rank_R.device)
        # Stable sorts, least significant key first: position, rank, protection; then forced
        # tokens, then the group.
        order_R = order_R[rank_R[order_R].argsort(descending=True, stable=True)]
        order_R = order_R[(~protected_R[order_R]).int().argsort(stable=True)]
        by_sequence_R = order_R[sequence_R[order_R].argsort(stable=True)]
        forced_R = torch.zeros_like(protected_R)
        forced_R[by_sequence_R] = _place_in_group(sequence_R[by_sequence_R]) < self.min_keep
        order_R = order_R[(~forced_R[order_R]).int().argsort(stable=True)]

        order_R = order_R[group_R[order_R].argsort(stable=True)]
        totals, forced = (
            group_R.bincount().tolist(),
            group_R[forced_R].bincount(minlength=1).tolist(),
        )
        forced += [0] * (len(totals) - len(forced))
        budgets = [self.budget(*pair) for pair in zip(totals, forced, strict=False)]
        weight_R = torch.zeros(rank_R.shape, device=rank_R.device)
        budget_R = torch.tensor(budgets, dtype=torch.int64, device=rank_R.device)[group_R[order_R]]
        kept_R = _place_in_group(group_R[order_R]) < budget_R
        weight_R[order_R[kept_R]] = 1.0
        return weight_R


def scheduled_ratio(
    schedule: Schedule, start: float | None, end: float, step: int, steps: int
) -> Fraction:
    """The keep ratio of optimizer step `step` (from 0) of a schedule over `steps` steps.

    Ratios are the decimals the user wrote, not the binary fractions nearest to them: 0.55 of 100 is
    55, not 56.
    """
    last = Fraction(str(end))
    if schedule == "constant" or start is None or step >= steps:
        return last
    first, progress = Fraction(str(start)), Fraction(step, steps)
    if schedule == "cosine":
        progress = Fraction((1 - math.cos(math.pi * float(progress))) / 2)
    return first + (last - first) * progress


def weigh_branches(
    selections: Sequence[Selection], rank_R: Tensor, sequence_R: Tensor, protected_R: Tensor
) -> Tensor:
    """As `Selection.weigh`, every branch by its own selection, (R,) float32.

    Sequences are numbered row by row, so with n selections sequence s is of branch s mod n.
    """
    weight_R = torch.empty(rank_R.shape, device=rank_R.device)
    for branch, selection in enumerate(selections):
        own_R = sequence_R % len(selections) == branch
        weight_R[own_R] = selection.weigh(rank_R[own_R], sequence_R[own_R], protected_R[own_R])
    return weight_R


def _standardised(rank_R: Tensor, group_R: Tensor) -> Tensor:
    """(value - mean) / standard deviation within each group; 0 where a group has one value only."""
    count_G = group_R.bincount().clamp_min(1).double()
    mean_G = torch.zeros_like(count_G).index_add_(0, group_R, rank_R.double()) / count_G
    centred_R = rank_R.double() - mean_G[group_R]
    deviation_G = (
        torch.zeros_like(count_G).index_add_(0, group_R, centred_R.square()) / count_G
    ).sqrt()
    scale_R = deviation_G[group_R]
    return torch.where(scale_R > 0, centred_R / scale_R, 0.0).float()


def _place_in_group(group_R: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal entries of a sorted tensor, (R,)."""
    index_R = torch.arange(group_R.numel(), device=group_R.device)
    starts_R = torch.ones_like(group_R, dtype=torch.bool)
    starts_R[1:] = group_R[1:] != group_R[:-1]
    return index_R - torch.cummax(torch.where(starts_R, index_R, 0), dim=0).values
