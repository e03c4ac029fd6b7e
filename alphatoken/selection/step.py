"""Selection over ranks: the settings of an optimizer step, how many tokens it will keep, and the
choice among the tokens of several ranks.

Shape legend: R response positions, C columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from alphatoken.batch import Batch, response_counts
from alphatoken.config.policies import POLICY_TRAITS
from alphatoken.config.run import RunConfig
from alphatoken.config.selection import SelectionConfig, VetoConfig
from alphatoken.distributed import collectives
from alphatoken.distributed.mesh import Axis, all_ranks, mesh
from alphatoken.selection.facts import Choice, TokenFacts, WeighedTokens
from alphatoken.selection.select import (
    Cut,
    ResponseTokens,
    Selection,
    choose_by_branch,
    lexsort,
    response_tokens,
    scheduled_ratio,
    select,
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


def vetoes_on_b(config: RunConfig) -> tuple[Selection, ...] | None:
    """Selections, one per branch, that keep the tokens which B of drawn rows is the mean of: all
    that the branch's veto leaves, where that is a threshold on what is known of a token before it
    is valued. None where no veto is on B."""
    if config.valuation.contrast_source != "drawn":  # else B is of what was scored, or trained on
        return None
    vetoes = [
        section.veto if section.veto is not None and _precedes_values(section.veto) else None
        for section in config.selections
    ]
    if not any(vetoes):
        return None
    return tuple(
        Selection(
            "all",
            Fraction(1),
            protect_eos=section.protect_eos,
            veto=None if veto is None else _veto(veto),
        )
        for section, veto in zip(config.selections, vetoes, strict=True)
    )


def _precedes_values(veto: VetoConfig) -> bool:
    # A share is one of a group, and rows of B are in other groups than those that are trained on.
    if veto.threshold is None or veto.unit == "noise":
        return False
    return POLICY_TRAITS[veto.by].needs <= {"reference", "start", "store"}


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
    """Counts the response tokens of the micro-batches of this rank's data group, and those of the
    step.

    Every rank must call it: one all-reduce of 3 int64 per branch.
    """
    branches = len(selections)
    # Response, kept and forced tokens of each branch.
    sums = torch.zeros(branches, 3, dtype=torch.int64)
    for batch in batches:
        counts = response_counts(batch)
        for branch, selection in enumerate(selections):
            own = counts[branch::branches]
            sums[branch] += torch.tensor(
                [sum(own), selection.kept_count(own), selection.forced_count(own)]
            )
    own_response = sum(batch["response_index"].count for batch in batches)
    device = batches[0]["response"].device
    everywhere = collectives.sum_over_ranks(sums.to(device), mesh().data).tolist()
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


def weigh(selections: Sequence[Selection], facts: TokenFacts) -> WeighedTokens:
    """Weighs the tokens of one micro-batch by a choice among them. Where its rows are divided over
    ranks it is among those of all parts, and every rank of the data group must call it."""
    if "whole_rows" not in facts.batch:
        return select(selections, facts)
    (choice,), _ = _chosen_together(selections, [facts], mesh().sequence)
    return WeighedTokens(facts=facts, choice=choice)


def weigh_globally(
    selections: Sequence[Selection], micro_batches: Sequence[TokenFacts]
) -> WeighedStep:
    """Weighs this rank's micro-batches by a choice among the response tokens of the whole step.

    Every rank must call it.
    """
    choices, kept = _chosen_together(selections, micro_batches, all_ranks())
    weighed = [
        WeighedTokens(facts=facts, choice=choice)
        for facts, choice in zip(micro_batches, choices, strict=True)
    ]
    return WeighedStep(micro_batches=weighed, kept=kept)


def _chosen_together(
    selections: Sequence[Selection], micro_batches: Sequence[TokenFacts], among: Axis
) -> tuple[list[Choice], int]:
    """What becomes of the tokens of this rank's micro-batches, or of its parts of them, by a choice
    among those of some ranks; and how many of them all are kept.

    It gathers 3 float64 per response token and one for each column that the selections read, and
    every rank makes the same choice. Tokens are ordered by (micro-batch, sequence, position), so
    ties fall the same way on any number of ranks.
    """
    own = [response_tokens(selections, facts) for facts in micro_batches]
    names = list(own[0].columns)
    packed = [
        _packed(tokens, part=number * among.size + among.place) for number, tokens in enumerate(own)
    ]
    gathered_RC = collectives.gather_rows(torch.cat(packed), among)
    # The ranks of a data group are neighbours, in order of their parts.
    micro_batch_R = gathered_RC[:, 0].long() // mesh().sequence.size
    order_R = lexsort(micro_batch_R, gathered_RC[:, 1])
    tokens = _unpacked(gathered_RC[order_R], micro_batch_R[order_R], names, len(selections))
    choice = choose_by_branch(selections, tokens)
    # Back into the order in which they came: documents that are packed do not lie in theirs.
    is_own_R = gathered_RC[:, 0].long() % among.size == among.place
    own_choice = choice.where(order_R.argsort()[is_own_R])
    counts = [len(tokens.sequence_R) for tokens in own]
    return own_choice.split(counts), int(choice.kept_R.sum())


def _packed(tokens: ResponseTokens, part: int) -> Tensor:
    """(R, 3 + columns) float64: the number of the micro-batch, or of the part of one, over the
    ranks; that of the sequence in the micro-batch, whether the token is protected, and its columns.
    They travel in one message; numbers below 2^53 are exact in it."""
    part_R = torch.full_like(tokens.sequence_R, part)
    fields = (part_R, tokens.sequence_R, tokens.protected_R, *tokens.columns.values())
    return torch.stack([field_R.double() for field_R in fields], dim=1)


def _unpacked(
    packed_RC: Tensor, micro_batch_R: Tensor, names: Sequence[str], branches: int
) -> ResponseTokens:
    """Reverses `_packed`, with sequences numbered in the whole step: ascending with the
    micro-batch, and with the same remainder by `branches`, which tells the branch."""
    _, sequence_R, protected_R, *columns = packed_RC.unbind(1)
    stride = int(sequence_R.max()) + 1 if len(sequence_R) else 1
    stride += -stride % branches
    return ResponseTokens(
        sequence_R=micro_batch_R * stride + sequence_R.long(),
        protected_R=protected_R > 0,
        columns=dict(zip(names, columns, strict=True)),
    )
