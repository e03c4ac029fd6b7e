"""Selection over a whole optimizer step: its settings, how many tokens it will keep, and the choice
among all ranks'.

Shape legend: R response positions, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.run import RunConfig
from alphatoken.config.selection import SelectionConfig, VetoConfig
from alphatoken.distributed import collectives
from alphatoken.selection.facts import TokenFacts, WeighedTokens
from alphatoken.selection.select import (
    Cut,
    ResponseTokens,
    Selection,
    choose_by_branch,
    response_tokens,
    scheduled_ratio,
)


def selections_at(config: RunConfig, step: int, total_steps: int) -> tuple[Selection, ...]:
    """The selections of optimizer step `step` (from 0), one per branch.

    Keep ratios may follow a schedule. Before `valuation.start_step` every token is kept, and
    weighs 1.
    """
    if not config.selects_at(step):
        return tuple(Selection("all", Fraction(1)) for _ in config.selections)
    pairs = zip(config.selections, config.policies, strict=True)
    return tuple(_selection(section, policy, step, total_steps) for section, policy in pairs)


def _selection(section: SelectionConfig, policy: str, step: int, total_steps: int) -> Selection:
    ratio = scheduled_ratio(
        section.schedule,
        start=section.keep_ratio_start,
        end=section.ratio,
        step=step,
        steps=section.schedule_steps or total_steps,
    )
    return Selection(
        policy=policy,
        keep_ratio=ratio,
        scope=section.scope,
        protect_eos=section.protect_eos,
        min_keep=section.min_keep,
        veto=None if section.veto is None else _veto(section.veto),
        floor=_floor(section, policy),
        weights=section.weights,
        parameters=section.weight_parameters,
    )


def _veto(section: VetoConfig) -> Cut:
    return Cut(
        by=section.by,
        threshold=section.threshold,
        in_noise=section.unit == "noise",
        share=Fraction(str(section.share or 0)),
    )


def _floor(section: SelectionConfig, policy: str) -> Cut | None:
    """What `selection.threshold` or `keep_ratio: auto` rules out."""
    if section.keep_ratio == "auto":
        return Cut(by="agreement", threshold=-section.auto_margin, in_noise=True)
    if section.threshold is None:
        return None
    return Cut(by=policy, threshold=section.threshold, in_noise=section.threshold_unit == "noise")


@dataclass(frozen=True, kw_only=True)
class TokenCounts:
    """Response tokens of one optimizer step, known from labels alone."""

    own_response: int
    """Those of this rank."""
    response: int
    """Those of all ranks."""
    kept: int
    """How many of all ranks' the selections keep; at most, where a veto or a floor rules tokens
    out."""


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


@dataclass(frozen=True, kw_only=True)
class WeighedStep:
    """The choice among the response tokens of a whole optimizer step."""

    micro_batches: list[WeighedTokens]
    """Those of this rank."""
    kept: int
    """Tokens of all ranks that are kept."""


def weigh_globally(
    selections: Sequence[Selection], micro_batches: Sequence[TokenFacts]
) -> WeighedStep:
    """Weighs this rank's micro-batches by a choice among the response tokens of the whole step.

    Every rank must call it: it gathers 3 float64 per response token of the step and one for each
    column that the selections read, and every rank makes the same choice. Tokens are ordered by
    (micro-batch, position), so ties fall the same way on any number of ranks.
    """
    this_rank, ranks = collectives.rank(), collectives.world_size()
    own = [response_tokens(selections, facts) for facts in micro_batches]
    names = list(own[0].columns)
    packed = [
        _packed(tokens, micro_batch=number * ranks + this_rank) for number, tokens in enumerate(own)
    ]
    gathered_RC = collectives.gather_rows(torch.cat(packed))
    gathered_RC = gathered_RC[gathered_RC[:, 0].argsort(stable=True)]
    micro_batch_R = gathered_RC[:, 0].long()
    choice = choose_by_branch(selections, _unpacked(gathered_RC, names, branches=len(selections)))
    own_choice = choice.where((micro_batch_R % ranks == this_rank).nonzero()[:, 0])
    choices = own_choice.split([len(tokens.sequence_R) for tokens in own])
    weighed = [
        WeighedTokens(facts=facts, choice=choice)
        for facts, choice in zip(micro_batches, choices, strict=True)
    ]
    return WeighedStep(micro_batches=weighed, kept=int(choice.kept_R.sum()))


def _packed(tokens: ResponseTokens, micro_batch: int) -> Tensor:
    """(R, 3 + columns) float64: the number of the micro-batch in the step over all ranks, that of
    the sequence in the micro-batch, whether the token is protected, and its columns. They travel in
    one message; numbers below 2^53 are exact in it."""
    micro_batch_R = torch.full_like(tokens.sequence_R, micro_batch)
    fields = (micro_batch_R, tokens.sequence_R, tokens.protected_R, *tokens.columns.values())
    return torch.stack([field_R.double() for field_R in fields], dim=1)


def _unpacked(packed_RC: Tensor, names: Sequence[str], branches: int) -> ResponseTokens:
    """Reverses `_packed`, with sequences numbered in the whole step: ascending with the
    micro-batch, and with the same remainder by `branches`, which tells the branch."""
    micro_batch_R, sequence_R, protected_R, *columns = packed_RC.unbind(1)
    stride = int(sequence_R.max()) + 1 if len(sequence_R) else 1
    stride += -stride % branches
    return ResponseTokens(
        sequence_R=micro_batch_R.long() * stride + sequence_R.long(),
        protected_R=protected_R > 0,
        columns=dict(zip(names, columns, strict=True)),
    )
