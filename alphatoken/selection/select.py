"""From sort keys to token weights. How many are kept follows from labels alone, so normalisers are
known beforehand.

Shape legend: B rows, T loss positions, R response positions in order of (row, position), S
sequences (documents) in order of their first position.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from alphatoken.config.policies import POLICY_TRAITS
from alphatoken.config.sections import Schedule, Scope
from alphatoken.selection.facts import TokenFacts, WeighedTokens
from alphatoken.selection.policy import SORT_KEYS


@dataclass(frozen=True)
class Selection:
    """Keeps the best tokens of each group: of each sequence, of a micro-batch, or of all
    micro-batches of a step.

    A group of n response tokens keeps exactly max(ceil(keep_ratio n), sum over its sequences of
    min(min_keep, n_s)). First come the `min_keep` best of every sequence, then protected tokens if
    `protect_eos`, then the best of the rest; ties go to the earlier position. With `soft` weights
    every token is kept and weighed by the sigmoid of its sort key, standardised over its group;
    protected tokens weigh 1.
    """

    policy: str
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
        """Tokens that `min_keep` keeps whatever their sort keys are."""
        return sum(min(self.min_keep, count) for count in counts)

    def budget(self, total: int, forced: int) -> int:
        """Tokens kept of a group of `total`, `forced` of them by `min_keep`."""
        if POLICY_TRAITS[self.policy].keeps_all:
            return total
        return max(math.ceil(self.keep_ratio * total), forced)

    def weigh(self, *, key_R: Tensor, sequence_R: Tensor, protected_R: Tensor) -> Tensor:
        """Weights of the tokens of one micro-batch (or, for `global_batch`, of a whole step), (R,)
        float32.

        `key_R` is the policy's sort key, higher first, NaN last; `sequence_R` int64 numbers the
        sequences in ascending order; `protected_R` bool marks end-of-turn targets.
        """
        key_R = key_R.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        protected_R = protected_R & self.protect_eos
        group_R = sequence_R if self.scope == "sequence" else torch.zeros_like(sequence_R)
        if self.soft:
            return torch.where(protected_R, 1.0, torch.sigmoid(_standardised(key_R, group_R)))
        best_first = ((~protected_R).int(), -key_R)
        # `min_keep` is owed to sequences, the budget to groups, which may span several of them.
        by_sequence_R = lexsort(sequence_R, *best_first)
        forced_R = among_first(
            sequence_R, by_sequence_R, torch.full_like(sequence_R, self.min_keep)
        )
        by_group_R = lexsort(group_R, (~forced_R).int(), *best_first)
        return among_first(group_R, by_group_R, self._budgets(group_R, forced_R)[group_R]).float()

    def _budgets(self, group_R: Tensor, forced_R: Tensor) -> Tensor:
        """How many tokens are kept of each group 0, 1, ..., (G,) int64."""
        total_G = group_R.bincount()
        forced_G = torch.zeros_like(total_G).index_add_(0, group_R, forced_R.long())
        counts = zip(total_G.tolist(), forced_G.tolist(), strict=True)
        budgets = [self.budget(total, forced) for total, forced in counts]
        return torch.tensor(budgets, dtype=torch.int64, device=group_R.device)


def lexsort(*keys: Tensor) -> Tensor:
    """The order that sorts by the first key, then by the second, and so on, (R,) int64; ties keep
    their position."""
    order_R = torch.arange(len(keys[0]), device=keys[0].device)
    for key_R in reversed(keys):
        order_R = order_R[key_R[order_R].argsort(stable=True)]
    return order_R


def among_first(group_R: Tensor, order_R: Tensor, limit_R: Tensor) -> Tensor:
    """Whether each token is among the first `limit_R` of its group, (R,) bool, in an order that is
    sorted by group."""
    kept_R = torch.zeros_like(group_R, dtype=torch.bool)
    kept_R[order_R] = _place_in_group(group_R[order_R]) < limit_R[order_R]
    return kept_R


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


def select(selections: Sequence[Selection], facts: TokenFacts) -> WeighedTokens:
    """The tokens of one micro-batch with the weights of its selections, one per branch."""
    response_BT = facts.response_BT
    weight_R = weigh_branches(
        selections,
        key_R=sort_keys(selections, facts)[response_BT],
        sequence_R=facts.batch["document_ids"][response_BT],
        protected_R=facts.protected_BT[response_BT],
    )
    return WeighedTokens(facts=facts, weight_R=weight_R)


def sort_keys(selections: Sequence[Selection], facts: TokenFacts) -> Tensor:
    """What tokens are sorted by, each by its branch's policy, (B, T).

    With n selections sequence s is of branch s mod n. Raises LookupError where a policy reads a
    fact that it does not state among its needs.
    """
    branch_BT = facts.batch["document_ids"] % len(selections)
    key_BT = torch.zeros_like(facts.nll_BT)
    for branch, selection in enumerate(selections):
        own_key_BT = SORT_KEYS[selection.policy](facts)
        key_BT = torch.where(branch_BT == branch, own_key_BT, key_BT)
    return key_BT


def weigh_branches(
    selections: Sequence[Selection], *, key_R: Tensor, sequence_R: Tensor, protected_R: Tensor
) -> Tensor:
    """Weights as of `Selection.weigh`, (R,) float32, each branch's by its own selection.

    Sequences are numbered row by row, so with n selections sequence s is of branch s mod n.
    """
    weight_R = torch.empty(key_R.shape, device=key_R.device)
    for branch, selection in enumerate(selections):
        own_R = sequence_R % len(selections) == branch
        weight_R[own_R] = selection.weigh(
            key_R=key_R[own_R],
            sequence_R=sequence_R[own_R],
            protected_R=protected_R[own_R],
        )
    return weight_R


def _standardised(key_R: Tensor, group_R: Tensor) -> Tensor:
    """(key - mean) / standard deviation within each group; 0 where a group has one key only."""
    count_G = group_R.bincount().clamp_min(1).double()
    mean_G = torch.zeros_like(count_G).index_add_(0, group_R, key_R.double()) / count_G
    centred_R = key_R.double() - mean_G[group_R]
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
