"""Sums over the micro-batches and ranks of one optimizer step, and what to say when something in
them is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from alphatoken.distributed import collectives
from alphatoken.errors import NonFiniteError
from alphatoken.training.moments import COLUMNS, moments, rank_correlation
from alphatoken.training.valued_model import StepOutput
from alphatoken.values.algebra import TERMS


class Located(Protocol):
    """Rows that came from somewhere."""

    def location(self, index: int) -> str: ...


class Means:
    """Means over all micro-batches and ranks of vectors by name; the names are the same in every
    call."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, vectors: Mapping[str, Tensor]) -> None:
        for name, vector in vectors.items():
            own = torch.stack(
                [vector.double().sum(), torch.ones_like(vector, dtype=torch.float64).sum()]
            )
            self._sums[name] = self._sums[name] + own if name in self._sums else own

    def reduce(self) -> dict[str, float]:
        """Every rank must call it: one all-reduce of 2 float64 per name."""
        if not self._sums:
            return {}
        sums = collectives.sum_over_ranks(torch.stack(list(self._sums.values())).to(self._device))
        return {
            name: total / max(count, 1)
            for name, (total, count) in zip(self._sums, sums.tolist(), strict=True)
        }


class StepStatistics:
    """Collects on the device, without making the host wait, until `reduce`.

    `part_weights` are what adaptation and stability are multiplied by in the composite of this
    step; `has_drift` says whether there is any stability; `branches` names the responses of each
    row where there are several.
    """

    def __init__(
        self,
        device: torch.device,
        part_weights: tuple[float, float],
        has_drift: bool,
        branches: Sequence[str] = (),
    ) -> None:
        self._part_weights = part_weights
        self._has_drift = has_drift
        self._branches = branches
        self._losses = torch.zeros(3, dtype=torch.float64, device=device)
        self._grams = torch.zeros(
            len(branches) or 1, len(COLUMNS), len(COLUMNS), dtype=torch.float64, device=device
        )
        self._objective = Means(device)
        self._faults = torch.zeros(1, dtype=torch.float64, device=device)
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._parts = [torch.zeros(0, 2, device=device)]

    def add_validation(self, batch: Mapping[str, Tensor], nll_BT: Tensor) -> None:
        """Losses of held-out rows at a refresh."""
        self._check("data.validation", batch, nll_BT)

    def add(self, batch: Mapping[str, Tensor], output: StepOutput) -> None:
        """One training micro-batch."""
        assessment, weight_BT = output["assessment"], output["weight_BT"]
        nll_BT, values = assessment["nll_BT"], assessment["values"]
        sums = (output["kept_nll_R"], nll_BT, output["total"].detach())
        self._losses += torch.stack([numbers.double().sum() for numbers in sums])
        self._objective.add(output["metrics"])
        if "composite" in values:
            response_BT = assessment["response_BT"]
            terms_R = [values[name][response_BT].double() for name in COLUMNS[1:]]
            table_RC = torch.stack([torch.ones_like(terms_R[0]), *terms_R], dim=1)
            branch_R = batch["document_ids"][response_BT] % len(self._grams)
            for branch, gram_CC in enumerate(self._grams):
                own_RC = table_RC[branch_R == branch]
                gram_CC += own_RC.T @ own_RC
            self._parts.append(
                torch.stack([table_RC[:, 1:3].sum(1), table_RC[:, 3:5].sum(1)], dim=1).float()
            )
        everything_BT = nll_BT + values.get("composite", 0.0) + batch.get("reference_nll", 0.0)
        everything_BT[weight_BT > 0] += output["kept_nll_R"]
        self._check("data.train", batch, everything_BT)

    def _check(self, part: str, batch: Mapping[str, Tensor], number_BT: Tensor) -> None:
        """Remembers which documents have a number that is not finite."""
        rows, documents_BT = batch["rows"], batch["document_ids"]
        inside_BT = documents_BT >= 0
        faults = torch.zeros(len(rows), device=rows.device)
        faults.index_add_(
            0, documents_BT[inside_BT], (~torch.isfinite(number_BT[inside_BT])).float()
        )
        self._faults += faults.sum()
        self._seen.append((part, rows, faults == 0))

    def reduce(self, response_tokens: int, kept_tokens: int, denominator: int) -> dict[str, float]:
        """Means over all ranks; the token counts and what the objective is divided by are of the
        whole step.

        Raises NonFiniteError on every rank if any rank saw something that is not finite.
        """
        packed = torch.cat([self._losses, self._faults, self._grams.flatten()])
        sums = collectives.sum_over_ranks(packed)
        kept_sum, response_sum, total, faults = sums[:4].tolist()
        if faults > 0:
            raise NonFiniteError("a loss or signal is not finite")
        metrics = {
            "loss_kept": kept_sum / max(kept_tokens, 1),
            "loss_response": response_sum / max(response_tokens, 1),
        }
        if self._branches:
            metrics["loss"] = total / max(denominator, 1)
        metrics |= self._objective.reduce()
        grams = sums[4:].view_as(self._grams).cpu()
        gram_CC = grams.sum(0)
        if gram_CC[0, 0] > 0:
            metrics |= self._value_metrics(gram_CC / gram_CC[0, 0])
        for name, own_CC in zip(self._branches, grams, strict=False):
            if own_CC[0, 0] > 0:
                metrics |= {
                    f"{key}_{name}": number
                    for key, number in moments(own_CC / own_CC[0, 0]).items()
                }
        return metrics

    def _value_metrics(self, moment_CC: Tensor) -> dict[str, float]:
        mean_C = moment_CC[0]
        covariance_CC = moment_CC - torch.outer(mean_C, mean_C)
        metrics = moments(moment_CC)
        if math.isnan(mean_C[1]):
            return metrics
        for part, columns in (("adaptation", slice(1, 3)), ("stability", slice(3, 5))):
            metrics[f"{part}_std"] = float(
                covariance_CC[columns, columns].sum().clamp_min(0).sqrt()
            )
        # The composite is a weighted sum of the terms, so their covariances with it add up to
        # its variance.
        variance = float(covariance_CC[5, 5])
        for index, name in enumerate(TERMS, start=1):
            weight = self._part_weights[0 if index < 3 else 1]
            metrics[f"{name}_share"] = (
                weight * float(covariance_CC[index, 5]) / variance if variance > 0 else 0.0
            )
        if self._has_drift:
            adaptation_R, stability_R = collectives.gather_rows(torch.cat(self._parts)).unbind(1)
            metrics["adaptation_stability_rank_correlation"] = rank_correlation(
                adaptation_R, stability_R
            )
        return metrics

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
