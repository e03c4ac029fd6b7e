"""Sums over the micro-batches and ranks of one optimizer step, and what to say when something in them is not finite."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from alphatoken import collectives
from alphatoken.errors import NonFiniteError
from alphatoken.model import StepOutput
from alphatoken.valuation import TERMS

VALUE_NAMES = (*TERMS, "composite")


class StepStatistics:
    """Collects on the device, without making the host wait, until `reduce`."""

    def __init__(self, device: torch.device) -> None:
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)
        self._moments = torch.zeros(len(VALUE_NAMES), 2, dtype=torch.float64, device=device)
        self._faults = torch.zeros(1, dtype=torch.float64, device=device)
        self._seen: list[tuple[str, Tensor, Tensor]] = []
        self._has_values = False

    def add_validation(self, batch: Mapping[str, Tensor], nll_BT: Tensor) -> None:
        """Losses of held-out rows at a refresh."""
        self._check("data.validation", batch, nll_BT)

    def add(self, batch: Mapping[str, Tensor], output: StepOutput) -> None:
        """One training micro-batch."""
        assessment, weight_BT = output["assessment"], output["weight_BT"]
        nll_BT, values = assessment["nll_BT"], assessment["values"]
        self._losses += torch.stack([output["kept_nll_R"].double().sum(), nll_BT.double().sum()])
        for index, name in enumerate(VALUE_NAMES):
            if name in values:
                self._has_values = True
                value_R = values[name][assessment["response_BT"]].double()
                self._moments[index] += torch.stack([value_R.sum(), value_R.square().sum()])
        everything_BT = nll_BT + values.get("composite", 0.0)
        everything_BT[weight_BT > 0] += output["kept_nll_R"]
        self._check("data.train", batch, everything_BT)

    def _check(self, part: str, batch: Mapping[str, Tensor], number_BT: Tensor) -> None:
        """Remembers which documents have a number that is not finite."""
        rows, documents_BT = batch["rows"], batch["document_ids"]
        inside_BT = documents_BT >= 0
        faults = torch.zeros(len(rows), device=rows.device)
        faults.index_add_(0, documents_BT[inside_BT], (~torch.isfinite(number_BT[inside_BT])).float())
        self._faults += faults.sum()
        self._seen.append((part, rows, faults == 0))

    def reduce(self, response_tokens: int, kept_tokens: int) -> dict[str, float]:
        """Means over all ranks, from one all-reduce of 13 float64; the token counts are of the whole step.

        Raises NonFiniteError on every rank if any rank saw something that is not finite.
        """
        packed = torch.cat([self._losses, self._faults, self._moments.flatten()])
        sums = collectives.sum_over_ranks(packed).tolist()
        if sums[2] > 0:
            raise NonFiniteError("a loss or signal is not finite")
        metrics = {"loss_kept": sums[0] / max(kept_tokens, 1), "loss_response": sums[1] / max(response_tokens, 1)}
        if self._has_values:
            for index, name in enumerate(VALUE_NAMES):
                mean = sums[3 + 2 * index] / max(response_tokens, 1)
                variance = sums[4 + 2 * index] / max(response_tokens, 1) - mean**2
                if not math.isnan(mean):  # a term that was not computed is absent
                    metrics |= {f"{name}_mean": mean, f"{name}_std": math.sqrt(max(variance, 0.0))}
        return metrics

    def faulty_rows(self) -> list[tuple[str, int]]:
        """(part, dataset index) of this rank's rows with something that is not finite."""
        return [
            (part, int(row))
            for part, rows, fine_B in self._seen
            for row, fine in zip(rows.tolist(), fine_B.tolist(), strict=True)
            if not fine
        ]
