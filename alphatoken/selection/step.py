"""Selection over a whole optimizer step: its ratios, how many tokens it will keep, and the choice
among all ranks'.

Shape legend: B rows, T loss positions, R response positions, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.selection.facts import TokenFacts, WeighedTokens
from alphatoken.selection.select import (
    Selection,
    scheduled_ratio,
    sort_keys,
    weigh_branches,
)


def selections_at(config: RunConfig, step: int, total_steps: int) -> tuple[Selection, ...]:
    """The selections of optimizer step `step` (from 0), one per branch; keep ratios may follow a
    schedule."""
    selections = []
    for section, policy in zip(config.selections, config.policies, strict=True):
        ratio = scheduled_ratio(
            section.schedule,
            start=section.keep_ratio_start,
            end=section.keep_ratio,
            step=step,
            steps=section.schedule_steps or total_steps,
        )
        selections.append(
            Selection(
                policy=policy,
                keep_ratio=ratio,
                scope=section.scope,
                protect_eos=section.protect_eos,
                min_keep=section.min_keep,
                soft=section.weights == "sigmoid",
            )
        )
    return tuple(selections)


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Response tokens of one optimizer step, known from labels alone."""

    own_response: int
    """Those of this rank."""
    response: int
    """Those of all ranks."""
    kept: int
    """How many of all ranks' the selections keep."""


def count_tokens(selections: Sequence[Selection], batches: Sequence[Batch]) -> TokenCounts:
    """Counts the response tokens of this rank's micro-batches, and the step's over all ranks.

    Every rank must call it: one all-reduce of 3 int64 per branch.
    """
    branches = len(selections)
    # Response, kept and forced tokens of each branch.
    sums = torch.zeros(branches, 3, dtype=torch.int64)
    for batch in batches:
        counts = (
            batch["document_ids"][batch["response"]].bincount(minlength=len(batch["rows"])).tolist()
        )
        for branch, selection in enumerate(selections):
            own = counts[branch::branches]
            sums[branch] += torch.tensor(
                [sum(own), selection.kept_count(own), selection.forced_count(own)]
            )
    own_response = int(sums[:, 0].sum())
    device = batches[0]["response"].device
    everywhere = collectives.sum_over_ranks(sums.to(device)).tolist()
    kept_tokens = 0
    for selection, (response, kept, forced) in zip(selections, everywhere, strict=True):
        # A group that spans all micro-batches is rounded up once, not in each of them.
        whole_step = selection.scope == "global_batch"
        kept_tokens += selection.budget(response, forced) if whole_step else kept
    return TokenCounts(
        own_response=own_response,
        response=sum(response for response, _, _ in everywhere),
        kept=kept_tokens,
    )


def weigh_globally(
    selections: Sequence[Selection], micro_batches: Sequence[TokenFacts]
) -> list[WeighedTokens]:
    """Weights of this rank's micro-batches, chosen among the response tokens of the whole step.

    Every rank must call it: it gathers 4 float64 per response token of the step, and every rank
    makes the same choice. Tokens are ordered by (micro-batch, position), so ties fall the same way
    on any number of ranks.
    """
    this_rank, ranks = collectives.rank(), collectives.world_size()
    own = [
        _tokens_of(selections, facts, micro_batch=number * ranks + this_rank)
        for number, facts in enumerate(micro_batches)
    ]
    gathered_RC = collectives.gather_rows(torch.cat([tokens.packed() for tokens in own]))
    everywhere = _StepTokens.unpacked(gathered_RC[gathered_RC[:, 0].argsort(stable=True)])
    weight_R = weigh_branches(
        selections,
        key_R=everywhere.key_R,
        sequence_R=everywhere.sequence_in_step(branches=len(selections)),
        protected_R=everywhere.protected_R,
    )
    own_weight_R = weight_R[everywhere.micro_batch_R % ranks == this_rank]
    weights = own_weight_R.split([len(tokens.key_R) for tokens in own])
    return [
        WeighedTokens(facts=facts, weight_R=micro_batch_weight_R)
        for facts, micro_batch_weight_R in zip(micro_batches, weights, strict=True)
    ]


@dataclass(frozen=True, kw_only=True)
class _StepTokens:
    """Response tokens of several micro-batches, (R,) each."""

    micro_batch_R: Tensor
    """Number of the token's micro-batch in the step, over all ranks; int64."""
    key_R: Tensor
    """What the policy sorts by; float64."""
    sequence_R: Tensor
    """Number of the token's sequence in its micro-batch; int64."""
    protected_R: Tensor

    def packed(self) -> Tensor:
        """One column per field, (R, 4) float64, so that they travel in one message. Numbers below
        2^53 are exact in it."""
        columns = (self.micro_batch_R, self.key_R, self.sequence_R, self.protected_R)
        return torch.stack([column_R.double() for column_R in columns], dim=1)

    @classmethod
    def unpacked(cls, packed_RC: Tensor) -> _StepTokens:
        """Reverses `packed`."""
        micro_batch_R, key_R, sequence_R, protected_R = packed_RC.unbind(1)
        return cls(
            micro_batch_R=micro_batch_R.long(),
            key_R=key_R,
            sequence_R=sequence_R.long(),
            protected_R=protected_R > 0,
        )

    def sequence_in_step(self, branches: int) -> Tensor:
        """Numbers of sequences in the whole step, (R,) int64, ascending with the micro-batch.

        They leave the same remainder by `branches`, which tells the branch, as in a micro-batch.
        """
        stride = int(self.sequence_R.max()) + 1 if len(self.sequence_R) else 1
        stride += -stride % branches
        return self.micro_batch_R * stride + self.sequence_R


def _tokens_of(selections: Sequence[Selection], facts: TokenFacts, micro_batch: int) -> _StepTokens:
    sequence_R = facts.batch["document_ids"][facts.response_BT]
    return _StepTokens(
        micro_batch_R=torch.full_like(sequence_R, micro_batch),
        key_R=sort_keys(selections, facts)[facts.response_BT],
        sequence_R=sequence_R,
        protected_R=facts.protected_BT[facts.response_BT],
    )
