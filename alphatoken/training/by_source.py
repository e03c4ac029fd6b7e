"""Metrics of each source of a mixture, so that it can be told what each contributes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from alphatoken.training.valued_model import StepOutput
from alphatoken.util.metrics import Metrics

COLUMNS = ("response", "value", "trained", "loss")


class BySource:
    """Sums over the tokens of each source. `names` are those of the sources, `first_rows` the index
    of the first row of each."""

    def __init__(
        self, names: Sequence[str], first_rows: Sequence[int], device: torch.device
    ) -> None:
        self._names = names
        self._starts = torch.tensor(first_rows[1:], device=device)

    def sums(self, output: StepOutput) -> Tensor:
        """The sums of one micro-batch, (sources, COLUMNS) float64, without making the host wait."""
        facts = output["facts"]
        batch, index = facts.batch, facts.response_index
        source_D = torch.bucketize(batch["rows"], self._starts, right=True)
        document_BT = batch["document_ids"]
        source_R = source_D.index_select(0, index.take(document_BT))
        kept_R = document_BT.flatten().index_select(0, output["kept_index_R"])
        value_BT = facts.values.get("composite", torch.zeros_like(facts.nll_BT))
        of_responses = _with_ones(index.take(value_BT))
        of_kept = _with_ones(output["kept_nll_R"])
        sums_SC = of_kept.new_zeros(len(self._names), len(COLUMNS))
        sums_SC[:, :2].index_add_(0, source_R, of_responses)
        sums_SC[:, 2:].index_add_(0, source_D.index_select(0, kept_R), of_kept)
        return sums_SC

    def metrics(self, sums_SC: Tensor, *, has_values: bool) -> Metrics:
        """From the sums over micro-batches and ranks. Nothing is said of a source without
        tokens."""
        metrics: Metrics = {}
        for name, row in zip(self._names, sums_SC.tolist(), strict=True):
            of = dict(zip(COLUMNS, row, strict=True))
            if of["response"]:
                metrics[f"kept_share/{name}"] = of["trained"] / of["response"]
                if has_values:
                    metrics[f"composite_mean/{name}"] = of["value"] / of["response"]
            if of["trained"]:
                metrics[f"loss_kept/{name}"] = of["loss"] / of["trained"]
        return metrics


def _with_ones(number_R: Tensor) -> Tensor:
    """Each number with a 1 before it, to be counted: (R, 2) float64."""
    return torch.stack([torch.ones_like(number_R), number_R], dim=1).double()
