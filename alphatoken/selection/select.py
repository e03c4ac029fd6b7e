"""From what is known of tokens to their weights. Unless a veto or a floor rules tokens out, how
many are kept follows from labels alone.

Shape legend: B rows, T loss positions, R response positions in order of (row, position), S
sequences (documents) in order of their first position.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import torch
from torch import Tensor

from alphatoken.config.policies import POLICY_TRAITS
from alphatoken.config.selection import Schedule, Scope
from alphatoken.config.weights import WEIGHT_TRAITS
from alphatoken.selection.facts import Choice, KeptTokens, TokenFacts, WeighedTokens
from alphatoken.selection.policy import SORT_KEYS, SortKey
from alphatoken.selection.weights import WEIGHT_RULES

KEY, SPREAD, VETO, FLOOR = "key", "spread", "veto", "floor"
"""Names of the columns that selections read; what a weight rule reads has a prefix."""
RULE = "rule "


@dataclass(frozen=True, kw_only=True)
class ResponseTokens:
    """Response tokens of one micro-batch, or of a whole step, (R,) each."""

    sequence_R: Tensor
    """Number of the token's response, int64; in any order where documents are packed."""
    protected_R: Tensor
    """Whether the target ends a turn, bool."""
    columns: Mapping[str, Tensor]
    """What selections read of each token, by name; float64."""

    def where(self, own_R: Tensor) -> ResponseTokens:
        """Those at these places, int64."""
        return ResponseTokens(
            sequence_R=self.sequence_R[own_R],
            protected_R=self.protected_R[own_R],
            columns={name: column_R[own_R] for name, column_R in self.columns.items()},
        )


@dataclass(frozen=True, kw_only=True)
class Cut:
    """Rules tokens out by a policy's sort key: those below a threshold, or the lowest share of each
    group."""

    by: str
    threshold: float | None = None
    """NaN is below every threshold. None: the share decides."""
    in_noise: bool = False
    """Whether the threshold is multiplied by the noise scale of its group: the root mean square of
    `spread` over the group's tokens."""
    share: Fraction = Fraction(0)
    """floor(share n) tokens of a group of n are ruled out, of equal ones the later."""

    def __str__(self) -> str:
        if self.threshold is None:
            return f"the lowest {float(self.share):.1%} by {self.by}"
        noise = " times the noise of values" if self.in_noise and self.threshold else ""
        return f"{self.by} below {self.threshold or 0:g}{noise}"

    def marks(
        self, key_R: Tensor, *, spread_R: Tensor | None, group_R: Tensor, exempt_R: Tensor
    ) -> Tensor:
        """The tokens that are ruled out, (R,) bool; exempt ones never are. `spread_R` is read for
        `in_noise` only."""
        if self.threshold is None:
            return self._lowest(key_R, group_R, exempt_R) & ~exempt_R
        if not self.in_noise:
            return (key_R < self.threshold) & ~exempt_R
        assert spread_R is not None
        return (key_R < self.threshold * noise_scale(spread_R, group_R)[group_R]) & ~exempt_R

    def _lowest(self, key_R: Tensor, group_R: Tensor, exempt_R: Tensor) -> Tensor:
        """The lowest share of each group, exempt tokens last."""
        later_first_R = torch.arange(len(key_R), 0, -1, device=key_R.device)
        worst_first_R = lexsort(group_R, exempt_R.int(), key_R, later_first_R)
        counts = [math.floor(self.share * total) for total in group_R.bincount().tolist()]
        limit_G = torch.tensor(counts, dtype=torch.int64, device=group_R.device)
        return among_first(group_R, worst_first_R, limit_G[group_R])


@dataclass(frozen=True)
class Selection:
    """Keeps the best tokens of each group: of each sequence, of a micro-batch, or of all
    micro-batches of a step.

    Of a group of n response tokens max(ceil(keep_ratio n), sum over its sequences of
    min(min_keep, n_s)) are kept, or as many as `veto` and `floor` leave. First come the `min_keep`
    best of every sequence, then protected tokens if `protect_eos`, then the best of the rest; ties
    go to the earlier position. Protected tokens are never ruled out, the `min_keep` best only by
    `veto`. `weights` says how kept tokens are weighed; protected ones weigh 1.
    """

    policy: str
    keep_ratio: Fraction
    scope: Scope = "micro_batch"
    protect_eos: bool = False
    min_keep: int = 0
    veto: Cut | None = None
    floor: Cut | None = None
    weights: str = "hard"
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Those of the weight rule."""

    def __str__(self) -> str:
        among = {"sequence": "each response", "micro_batch": "each micro-batch"}
        if POLICY_TRAITS[self.policy].keeps_all or self.keep_ratio == 1:
            kept = "all response tokens"
        else:
            kept = (
                f"{float(self.keep_ratio):.4g} of the response tokens of "
                f"{among.get(self.scope, 'each step')}, by {self.policy}"
            )
        cuts = [str(cut) for cut in (self.veto, self.floor) if cut is not None]
        but = f" but those of {' and of '.join(cuts)}" if cuts else ""
        return kept + but + ("" if self.weights == "hard" else f", weighed by {self.weights}")

    def kept_count(self, counts: Sequence[int]) -> int:
        """Tokens that will be kept of a micro-batch (or step) whose sequences have `counts`
        response tokens; at most, where there is a veto or a floor."""
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

    def columns(self) -> dict[str, SortKey]:
        """What it reads of every token, by the names that `choose` finds it under."""
        found: dict[str, SortKey] = {KEY: SORT_KEYS[self.policy]}
        for name, cut in ((VETO, self.veto), (FLOOR, self.floor)):
            if cut is not None:
                found[name] = SORT_KEYS[cut.by]
                if cut.in_noise:
                    found[SPREAD] = lambda facts: facts.spread_BT
        reads = WEIGHT_RULES[self.weights].reads
        return found | {RULE + name: read for name, read in reads.items()}

    def choose(self, tokens: ResponseTokens) -> Choice:
        """What becomes of the tokens of one micro-batch (or, for `global_batch`, of a whole
        step)."""
        sequence_R, key_R = tokens.sequence_R, _ranked(tokens.columns[KEY])
        group_R = sequence_R if self.scope == "sequence" else torch.zeros_like(sequence_R)
        exempt_R = tokens.protected_R & self.protect_eos
        best_first = ((~exempt_R).int(), -key_R)

        vetoed_R = self._marked(VETO, self.veto, tokens, group_R)
        # `min_keep` is owed to sequences, the budget to groups, which may span several of them.
        by_sequence_R = lexsort(sequence_R, vetoed_R.int(), *best_first)
        min_keep_R = torch.full_like(sequence_R, self.min_keep)
        forced_R = among_first(sequence_R, by_sequence_R, min_keep_R) & ~vetoed_R
        below_R = self._marked(FLOOR, self.floor, tokens, group_R) & ~forced_R & ~vetoed_R

        out_R = vetoed_R | below_R
        by_group_R = lexsort(group_R, out_R.int(), (~forced_R).int(), *best_first)
        budget_R = self._budgets(group_R, forced_R)[group_R]
        kept_R = among_first(group_R, by_group_R, budget_R) & ~out_R

        rule = WEIGHT_RULES[self.weights]
        places = kept_R.nonzero()[:, 0]
        kept = KeptTokens(
            facts={name: tokens.columns[RULE + name][places] for name in rule.reads},
            key_R=key_R[places],
            group_R=group_R[places],
            sequence_R=sequence_R[places],
            exempt_R=exempt_R[places],
            parameters={**WEIGHT_TRAITS[self.weights].parameters, **self.parameters},
        )
        weight_R = torch.zeros(kept_R.shape, device=kept_R.device)
        weight_R[places] = torch.where(kept.exempt_R, 1.0, rule.weigh(kept)).float()
        return Choice(weight_R=weight_R, kept_R=kept_R, vetoed_R=vetoed_R, below_R=below_R)

    def _marked(
        self, name: str, cut: Cut | None, tokens: ResponseTokens, group_R: Tensor
    ) -> Tensor:
        """Tokens that a cut rules out, (R,) bool."""
        if cut is None:
            return torch.zeros_like(tokens.protected_R)
        return cut.marks(
            _ranked(tokens.columns[name]),
            spread_R=tokens.columns.get(SPREAD),
            group_R=group_R,
            exempt_R=tokens.protected_R & self.protect_eos,
        )

    def _budgets(self, group_R: Tensor, forced_R: Tensor) -> Tensor:
        """How many tokens are kept of each group 0, 1, ..., (G,) int64."""
        if self.scope != "sequence" and not self.min_keep:  # one group, whose size is known
            return torch.full((1,), self.budget(len(group_R), 0), device=group_R.device)
        total_G = group_R.bincount()
        forced_G = torch.zeros_like(total_G).index_add_(0, group_R, forced_R.long())
        counts = torch.stack([total_G, forced_G], dim=1).tolist()
        budgets = [self.budget(total, forced) for total, forced in counts]
        return torch.tensor(budgets, dtype=torch.int64, device=group_R.device)


def noise_scale(spread_R: Tensor, group_R: Tensor) -> Tensor:
    """The root mean square of the spread over each group 0, 1, ..., (G,)."""
    count_G = group_R.bincount().clamp_min(1)
    square_G = torch.zeros(len(count_G), dtype=spread_R.dtype, device=spread_R.device)
    return (square_G.index_add_(0, group_R, spread_R.square()) / count_G).sqrt()


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
    """The tokens of one micro-batch with what its selections, one per branch, make of them."""
    return WeighedTokens(
        facts=facts, choice=choose_by_branch(selections, response_tokens(selections, facts))
    )


def response_tokens(selections: Sequence[Selection], facts: TokenFacts) -> ResponseTokens:
    """A micro-batch's response tokens with what selections read of them, each by its branch's.

    With n selections sequence s is of branch s mod n. A column that a branch does not read is zero
    there. Raises LookupError where a policy or a weight rule reads a fact that it does not state
    among its needs.
    """
    index = facts.response_index
    sequence_R = index.take(facts.batch["document_ids"])
    zero_R = torch.zeros(sequence_R.shape, dtype=torch.float64, device=sequence_R.device)
    columns: dict[str, Tensor] = {}
    for branch, selection in enumerate(selections):
        own_R = sequence_R % len(selections) == branch
        for name, read in selection.columns().items():
            column_R = columns.get(name, zero_R)
            columns[name] = torch.where(own_R, index.take(read(facts)).double(), column_R)
    return ResponseTokens(
        sequence_R=sequence_R, protected_R=index.take(facts.protected_BT), columns=columns
    )


def choose_by_branch(selections: Sequence[Selection], tokens: ResponseTokens) -> Choice:
    """What becomes of tokens, each branch's by its own selection.

    Sequences are numbered row by row, so with n selections sequence s is of branch s mod n.
    """
    if len(selections) == 1:
        return selections[0].choose(tokens)
    choice = Choice.nothing(len(tokens.sequence_R), tokens.sequence_R.device)
    for branch, selection in enumerate(selections):
        own_R = (tokens.sequence_R % len(selections) == branch).nonzero()[:, 0]
        choice.put(own_R, selection.choose(tokens.where(own_R)))
    return choice


def _ranked(key_R: Tensor) -> Tensor:
    """A sort key without NaN, which comes last."""
    return key_R.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)


def _place_in_group(group_R: Tensor) -> Tensor:
    """0, 1, 2, ... within each run of equal entries of a sorted tensor, (R,)."""
    index_R = torch.arange(group_R.numel(), device=group_R.device)
    starts_R = torch.ones_like(group_R, dtype=torch.bool)
    starts_R[1:] = group_R[1:] != group_R[:-1]
    return index_R - torch.cummax(torch.where(starts_R, index_R, 0), dim=0).values
