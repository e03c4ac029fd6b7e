"""What the selections of a step kept and dropped, and why: counts of a micro-batch, and metrics of
their sums."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from alphatoken.selection.facts import Choice, TokenFacts
from alphatoken.selection.select import Selection
from alphatoken.util.metrics import Metrics

COUNTS = ("response", "trained", "vetoed", "below", "weight", "squared_spread", "harmful")


def counts_of(facts: TokenFacts, choice: Choice, branches: int) -> Tensor:
    """Sums over the response tokens of a micro-batch, by branch: (branches, COUNTS) float64."""
    index = facts.response_index
    ones_R = torch.ones_like(choice.weight_R)
    spread_R, harmful_R = torch.zeros_like(ones_R), torch.zeros_like(ones_R)
    if "spread" in facts.values:
        spread_R = index.take(facts.spread_BT)
        harmful_R = (index.take(facts.composite_BT) + spread_R.abs() < 0).float()
    columns = (
        *(ones_R, choice.weight_R > 0, choice.vetoed_R, choice.below_R),
        *(choice.weight_R, spread_R.double().square(), harmful_R),
    )
    table_RC = torch.stack([column_R.double() for column_R in columns], dim=1)
    branch_R = index.take(facts.batch["document_ids"]) % branches
    sums_NC = torch.zeros(branches, len(COUNTS), dtype=torch.float64, device=table_RC.device)
    return sums_NC.index_add_(0, branch_R, table_RC)


@dataclass(frozen=True)
class DroppedTokens:
    """What became of the response tokens of a step, from the sums of `counts_of` over its
    micro-batches and ranks."""

    counts_NC: Tensor
    selections: Sequence[Selection]
    branches: Sequence[str]
    """Names of the responses of each row, where it has several."""
    has_spread: bool
    """Whether values were computed under halves of the held-out rows."""

    def count(self, name: str) -> float:
        """One of COUNTS, of all branches."""
        return float(self.counts_NC[:, COUNTS.index(name)].sum())

    def metrics(self) -> Metrics:
        """What the selections of the step can have done; nothing of what they cannot."""
        metrics: Metrics = {"kept_tokens": round(self.count("trained"))}
        if any(selection.veto is not None for selection in self.selections):
            metrics["vetoed_tokens"] = round(self.count("vetoed"))
            metrics |= self._shares("vetoed_share", "vetoed")
        if any(selection.floor is not None for selection in self.selections):
            metrics |= self._shares("below_threshold_share", "below")
        if any(selection.weights != "hard" for selection in self.selections):
            metrics["weight_mean"] = self.count("weight") / max(self.count("trained"), 1)
        if self.has_spread:
            square = self.count("squared_spread") / max(self.count("response"), 1)
            metrics["noise_scale"] = math.sqrt(square)
            metrics |= self._shares("harmful_share", "harmful")
        return metrics

    def reasons(self) -> dict[str, str]:
        """A sentence each on what was vetoed and what lay below a threshold: how many tokens, and
        by what."""
        cuts = {
            "vetoed": [selection.veto for selection in self.selections],
            "below": [selection.floor for selection in self.selections],
        }
        found = {}
        for name, by_branch in cuts.items():
            if self.count(name):
                rules = dict.fromkeys(str(cut) for cut in by_branch if cut is not None)
                share = f"{self.count(name):.0f} of {self.count('response'):.0f} response tokens"
                verb = "vetoed" if name == "vetoed" else "dropped"
                found[name] = f"{verb} {share}: {', '.join(rules)}"
        return found

    def _shares(self, metric: str, count: str) -> Metrics:
        """The share of the response tokens, and of those of each branch."""
        shares: Metrics = {metric: self.count(count) / max(self.count("response"), 1)}
        column, response = COUNTS.index(count), COUNTS.index("response")
        for branch, own_C in zip(self.branches, self.counts_NC, strict=False):
            shares[f"{metric}_{branch}"] = float(own_C[column] / own_C[response].clamp_min(1))
        return shares
