"""Selection over a whole optimizer step: its ratios, how many tokens it will keep, and the choice
among all ranks'."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.selection.facts import Assessment
from alphatoken.selection.policy import Policy
from alphatoken.selection.select import Selection, scheduled_ratio, weigh_branches


def selections_at(config: RunConfig, step: int, total_steps: int) -> tuple[Selection, ...]:
    """The selections of optimizer step `step` (from 0), one per branch; keep ratios may follow a
    schedule."""
    default: Policy = "top_value" if config.valuation.enabled else "all"
    selections = []
    for chosen in config.selections:
        ratio = scheduled_ratio(
            chosen.schedule,
            chosen.keep_ratio_start,
            chosen.keep_ratio,
            step,
            chosen.schedule_steps or total_steps,
        )
        selections.append(
            Selection(
                policy=chosen.policy or default,
                keep_ratio=ratio,
                scope=chosen.scope,
                protect_eos=chosen.protect_eos,
                min_keep=chosen.min_keep,
                soft=chosen.weights == "sigmoid",
            )
        )
    return tuple(selections)


def count_tokens(selections: Sequence[Selection], batches: Sequence[Batch]) -> tuple[int, int, int]:
    """Response tokens of this rank, and response and kept tokens of the step over all ranks: known
    from labels."""
    sums = torch.zeros(
        len(selections), 3, dtype=torch.int64
    )  # response, kept and forced tokens of each branch
    for batch in batches:
        response_BT = batch["response"]
        counts = batch["document_ids"][response_BT].bincount(minlength=len(batch["rows"])).tolist()
        for branch, selection in enumerate(selections):
            own = counts[branch :: len(selections)]
            sums[branch] += torch.tensor(
                [sum(own), selection.kept_count(own), selection.forced_count(own)]
            )
    own_tokens = int(sums[:, 0].sum())
    device = batches[0]["response"].device
    everywhere = collectives.sum_over_ranks(sums.to(device)).tolist()
    kept_tokens = 0
    for selection, (response, kept, forced) in zip(selections, everywhere, strict=True):
        kept_tokens += (
            selection.budget(response, forced) if selection.scope == "global_batch" else kept
        )
    return own_tokens, sum(response for response, _, _ in everywhere), kept_tokens


def weigh_globally(
    selections: Sequence[Selection],
    batches: Sequence[Batch],
    assessments: Sequence[Assessment],
) -> list[Tensor]:
    """Weights of each micro-batch's response tokens, (R,), chosen among those of the whole step.

    Every rank gathers 4 numbers per response token of the step and makes the same choice. Tokens
    are ordered by (micro-batch, position), so ties fall the same way on any number of ranks.
    """
    rank, ranks = collectives.rank(), collectives.world_size()
    own, counts = [], []
    for number, (batch, assessment) in enumerate(zip(batches, assessments, strict=True)):
        response_BT = assessment["response_BT"]
        sequence_R = batch["document_ids"][response_BT]
        columns = (
            assessment["rank_BT"][response_BT],
            sequence_R,
            assessment["protected_BT"][response_BT],
        )
        micro_batch_R = torch.full_like(sequence_R, number * ranks + rank)
        own.append(
            torch.stack([micro_batch_R.double(), *(column.double() for column in columns)], dim=1)
        )
        counts.append(len(sequence_R))
    everywhere = collectives.gather_rows(torch.cat(own))
    micro_batch_R, order_R = everywhere[:, 0].sort(stable=True)
    _, rank_R, sequence_R, protected_R = everywhere[order_R].unbind(1)
    # Numbers of sequences in the whole step, which agree with those in a micro-batch on the
    # branch.
    stride = int(sequence_R.max()) + 1 if len(sequence_R) else 1
    stride += -stride % len(selections)
    number_R = micro_batch_R.long() * stride + sequence_R.long()
    weight_R = weigh_branches(selections, rank_R, number_R, protected_R > 0)
    mine_R = weight_R[(micro_batch_R.long() % ranks) == rank]
    return list(mine_R.split(counts))
