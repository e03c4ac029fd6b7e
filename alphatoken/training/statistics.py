"""Metrics of one optimizer step over its micro-batches and ranks, and what to say when something in
them is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.distributed import collectives
from alphatoken.distributed.sums import NamedSums, mean
from alphatoken.errors import NonFiniteError
from alphatoken.selection.facts import MissingFactError
from alphatoken.selection.select import Selection
from alphatoken.training.by_source import BySource
from alphatoken.training.dropped import DroppedTokens, counts_of
from alphatoken.training.metrics import CORRELATION, LOSS, LOSS_KEPT, RESPONSE_MEANS
from alphatoken.training.moments import ValueColumns, rank_correlation
from alphatoken.training.valued_model import StepOutput
from alphatoken.util.metrics import Metrics

# What the objective reports and means that anyone declares are summed beside our own sums, under
# names that cannot collide.
OBJECTIVE = "objective/"
MEAN = "mean/"
COUNTS = "counts"
SOURCES = "sources"


class Located(Protocol):
    """Rows that came from somewhere."""

    def location(self, index: int) -> str:
        """Where a row came from, for a message."""
        ...


@dataclass(frozen=True, kw_only=True)
class StepSums:
    """What a step's statistics come to, over all ranks."""

    metrics: Metrics
    dropped: DroppedTokens


class StepStatistics:
    """Collects on the device, without making the host wait, until `reduce`.

    `part_weights` are what adaptation and stability are multiplied by in the composite of this
    step, `contrast` is how much the contrast terms count against adaptation; `has_drift` says
    whether there is any stability; `selections` are those of the step, and `branches` names the
    responses of each row where there are several. `by_source` tells the sources of a mixture apart.
    """

    def __init__(
        self,
        *,
        device: torch.device,
        part_weights: tuple[float, float],
        has_drift: bool,
        selections: Sequence[Selection],
        contrast: float = 0.0,
        branches: Sequence[str] = (),
        by_source: BySource | None = None,
    ) -> None:
        self._columns = ValueColumns(contrast)
        self._part_weights = part_weights
        self._has_drift = has_drift
        self._selections = selections
        self._branches = branches
        self._by_source = by_source
        self._has_spread = False
        self._sums = NamedSums(device)
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._parts = [torch.zeros(0, len(self._columns.parts), device=device)]

    def add_steering(self, part: str, batch: Batch, nll_BT: Tensor) -> None:
        """Takes in the losses of rows that steer values; `part` names where they are from."""
        self._check(part, batch, nll_BT + batch.get("reference_nll", 0.0))

    def add(self, batch: Batch, output: StepOutput) -> None:
        """Takes in one training micro-batch."""
        facts = output["facts"]
        self._sums.add(COUNTS, counts_of(facts, output["choice"], len(self._branches) or 1))
        self._has_spread |= "spread" in facts.values
        self._sums.add(LOSS_KEPT, output["kept_nll_R"].double().sum())
        for name, of in RESPONSE_MEANS.items():
            with suppress(MissingFactError):
                number_R = batch["response_index"].take(of(facts))
                self._sums.add_vectors({name: number_R}, prefix=MEAN)
        self._sums.add(LOSS, output["total"])
        self._sums.add_vectors(output["metrics"], prefix=OBJECTIVE)
        if self._by_source is not None:
            self._sums.add(SOURCES, self._by_source.sums(output))
        if "composite" in facts.values:
            self._add_values(batch, facts.values)
        self._check("data.train", batch, _everything(batch, output))

    def reduce(self, denominator: int) -> StepSums:
        """Means over all ranks, by one all-reduce; what the objective is divided by is of the whole
        step.

        Raises NonFiniteError on every rank if any rank saw something that is not finite.
        """
        sums = self._sums.reduce()
        if float(sums["faults"]) > 0:
            raise NonFiniteError("a loss or signal is not finite")
        dropped = DroppedTokens(
            sums[COUNTS], self._selections, self._branches, has_spread=self._has_spread
        )
        metrics: Metrics = {
            LOSS_KEPT: float(sums[LOSS_KEPT]) / max(dropped.count("trained"), 1),
            **{name: mean(sums[MEAN + name]) for name in RESPONSE_MEANS if MEAN + name in sums},
            **dropped.metrics(),
        }
        if self._branches:
            metrics[LOSS] = float(sums[LOSS]) / max(denominator, 1)
        for name, sum_and_count in sums.items():
            if name.startswith(OBJECTIVE):
                metrics[name.removeprefix(OBJECTIVE)] = mean(sum_and_count)
        if "gram" in sums:
            metrics |= self._value_metrics(sums["gram"])
        if self._by_source is not None:
            metrics |= self._by_source.metrics(sums[SOURCES], has_values="gram" in sums)
        return StepSums(metrics=metrics, dropped=dropped)

    def describe_faults(
        self, parts: Mapping[str, Located], faulty_parts: Sequence[str]
    ) -> list[str]:
        """A line for each rank with rows or signals that are not finite. Every rank must call
        it."""
        rows = [f"{part} {parts[part].location(row)}" for part, row in self.faulty_rows()]
        own = f"rank {collectives.rank()}: {', '.join(rows)}" if rows else ""
        if own and faulty_parts:
            own += (
                f" (signals of {len(faulty_parts)} parts, the last in the forward pass: "
                f"{faulty_parts[-1]})"
            )
        return [line for line in collectives.gather_objects(own) if line]

    def faulty_rows(self) -> list[tuple[str, int]]:
        """(part, dataset index) of this rank's rows with something that is not finite."""
        found = [
            (part, int(row))
            for part, rows, fine_B in self._seen
            for row, fine in zip(rows.tolist(), fine_B.tolist(), strict=True)
            if not fine
        ]
        return list(dict.fromkeys(found))  # both documents of a pair

    def _add_values(self, batch: Batch, values: Mapping[str, Tensor]) -> None:
        """Adds each branch's Gram matrix, and keeps adaptation and stability of every token."""
        index = batch["response_index"]
        terms_R = [index.take(values[name]).double() for name in self._columns.names[1:]]
        table_RC = torch.stack([torch.ones_like(terms_R[0]), *terms_R], dim=1)
        branches = len(self._branches) or 1
        branch_R = index.take(batch["document_ids"]) % branches
        grams = []
        for branch in range(branches):
            own_RC = torch.where((branch_R == branch)[:, None], table_RC, 0.0)
            grams.append(own_RC.T @ own_RC)
        self._sums.add("gram", torch.stack(grams))
        self._parts.append(self._columns.part_sums(table_RC).float())

    def _value_metrics(self, gram_NCC: Tensor) -> dict[str, float]:
        """Metrics of all values, and of each branch's; nothing where no token was valued."""
        metrics: dict[str, float] = {}
        gram_CC = gram_NCC.sum(0)
        if gram_CC[0, 0] > 0:
            moment_CC = gram_CC / gram_CC[0, 0]
            metrics |= self._columns.moments(moment_CC)
            if not math.isnan(moment_CC[0, 1]):  # the terms were computed
                metrics |= self._columns.part_deviations(moment_CC)
                metrics |= self._columns.variance_shares(moment_CC, self._part_weights)
                metrics |= self._correlation()
        for branch, own_CC in zip(self._branches, gram_NCC, strict=False):
            if own_CC[0, 0] > 0:
                for name, number in self._columns.moments(own_CC / own_CC[0, 0]).items():
                    metrics[f"{name}_{branch}"] = number
        return metrics

    def _correlation(self) -> dict[str, float]:
        if not self._has_drift:
            return {}
        parts_RP = collectives.gather_rows(torch.cat(self._parts))
        adaptation_R, stability_R = parts_RP.unbind(1)
        return {CORRELATION: rank_correlation(adaptation_R, stability_R)}

    def _check(self, part: str, batch: Batch, number_BT: Tensor) -> None:
        """Remembers which documents have a number that is not finite."""
        rows, documents_BT = batch["rows"], batch["document_ids"]
        faults = torch.zeros(len(rows) + 1, device=rows.device)
        document_N = documents_BT.flatten() + 1  # padding, which is -1, is counted apart
        faults.index_add_(0, document_N, (~torch.isfinite(number_BT)).flatten().float())
        faults = faults[1:]
        self._sums.add("faults", faults.sum())
        self._seen.append((part, rows, faults == 0))


def _everything(batch: Batch, output: StepOutput) -> Tensor:
    """The sum of all that is known of each token, (B, T): finite where all of it is."""
    facts = output["facts"]
    everything_BT = facts.nll_BT + batch.get("reference_nll", 0.0)
    for name in ("composite", "spread"):
        everything_BT = everything_BT + facts.values.get(name, 0.0)
    everything_BT.view(-1).index_add_(0, output["kept_index_R"], output["kept_nll_R"])
    return everything_BT
