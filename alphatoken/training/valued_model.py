"""The module the engine wraps: decoder, then score, select, and the loss of the kept tokens.

Shape legend: B rows, T loss positions, R response (or kept) positions in order of (row, position),
H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch
from alphatoken.models.decoder import Decoder
from alphatoken.models.head import HeadLoss
from alphatoken.models.token_losses import token_losses
from alphatoken.objectives.base import Objective
from alphatoken.passes.capture import Entry
from alphatoken.selection.facts import Assessment
from alphatoken.selection.policy import ranking
from alphatoken.selection.select import Selection, weigh_branches
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.estimator import Scorer


class StepOutput(TypedDict):
    """One micro-batch of training. Only `total` carries a graph. (A dict: ZeRO-3 looks into those
    for tensors.)"""

    total: Tensor
    """The objective summed over the kept tokens; divide by the step's denominator."""
    weight_BT: Tensor
    """Weight of each token in the objective, zero where it is masked out."""
    kept_nll_R: Tensor
    """Losses of the kept tokens from the training graph."""
    metrics: dict[str, Tensor]
    """What the objective reports, a number per row each."""
    assessment: Assessment


class ValuedModel(nn.Module):
    """A causal LM whose forward pass returns the objective of the valuable tokens.

    The engine must neither shard nor save the scoring tower, so the scorer is attached outside the
    module tree. `batch` is always a micro-batch as `data.batches` makes it. Every rank makes the
    same module calls, also with no token.
    """

    scorer: Scorer | None

    def __init__(
        self,
        decoder: Decoder,
        objective: Objective,
        selections: Sequence[Selection],
        eos_token_ids: list[int],
        stopwatch: Stopwatch,
    ) -> None:
        super().__init__()
        self.lm = decoder.model
        self.head_loss = HeadLoss(decoder.head, decoder.logit_softcap)
        self.selections = selections
        self._decoder = decoder
        self._objective = objective
        self._eos_token_ids = eos_token_ids
        self._stopwatch = stopwatch
        self.attach(None)

    def attach(self, scorer: Scorer | None) -> None:
        """Values tokens with `scorer` from now on; without one every policy but `top_value` still
        works."""
        object.__setattr__(self, "scorer", scorer)

    def forward(self, batch: Batch, chosen: tuple[Assessment, Tensor] | None = None) -> StepOutput:
        """The objective of a micro-batch.

        Tokens are valued and selected here, unless `chosen` brings an assessment and weights (R,)
        that were made for the whole step before.
        """
        if chosen is not None:
            return self._objective_of(batch, self._decoder.hidden_states(batch), *chosen)
        if self.scorer is None:
            return self._without_scorer(batch)
        with self.scorer.capture() as capture:
            hidden_BTH = self._decoder.hidden_states(batch)
        assessment = self._score(batch, self.scorer, capture.entry)
        return self._objective_of(batch, hidden_BTH, assessment, self.choose(batch, assessment))

    @torch.no_grad()
    def assess(self, batch: Batch) -> Assessment:
        """Values a micro-batch ahead of its training pass (scope `global_batch`), by a forward pass
        of its own."""
        if self.scorer is not None:
            with self.scorer.capture() as capture:
                self._decoder.hidden_states(batch)
            return self._score(batch, self.scorer, capture.entry)
        return self._assessment(batch, self.token_losses(batch), {})

    def token_losses(self, batch: Batch) -> Tensor:
        """Losses of response tokens, (B, T) float32, without training or scoring."""
        return token_losses(self._decoder, self.head_loss, batch)

    def choose(self, batch: Batch, assessment: Assessment) -> Tensor:
        """Weights of the response tokens of one micro-batch, (R,)."""
        response_BT = assessment["response_BT"]
        return weigh_branches(
            self.selections,
            assessment["rank_BT"][response_BT],
            batch["document_ids"][response_BT],
            assessment["protected_BT"][response_BT],
        )

    def _score(self, batch: Batch, scorer: Scorer, entry: Entry) -> Assessment:
        with self._stopwatch.phase("score"):
            scores = scorer.score(entry, batch)
            # Values are linear in their own sequence's gradient, so it may be scaled
            # afterwards.
            response_BT = batch["response"]
            coefficient_BT = self._objective.coefficients(batch, scores.nll_BT, response_BT)
            values = {name: coefficient_BT * value_BT for name, value_BT in scores.values.items()}
            return self._assessment(batch, scores.nll_BT, values)

    def _assessment(self, batch: Batch, nll_BT: Tensor, values: dict[str, Tensor]) -> Assessment:
        response_BT, targets_BT = batch["response"], batch["targets"]
        branch_BT = batch["document_ids"] % len(self.selections)
        rank_BT = torch.zeros_like(nll_BT)
        for branch, selection in enumerate(self.selections):
            others = (
                values.get("composite"),
                nll_BT,
                batch.get("noise"),
                batch.get("reference_nll"),
            )
            rank_BT = torch.where(branch_BT == branch, ranking(selection.policy, *others), rank_BT)
        return Assessment(
            response_BT=response_BT,
            protected_BT=torch.isin(
                targets_BT, torch.tensor(self._eos_token_ids, device=targets_BT.device)
            ),
            nll_BT=nll_BT,
            rank_BT=rank_BT,
            values=values,
        )

    def _without_scorer(self, batch: Batch) -> StepOutput:
        """Without scoring, the training graph itself gives the losses that are ranked."""
        response_BT, targets_BT = batch["response"], batch["targets"]
        hidden_BTH = self._decoder.hidden_states(batch)
        every_nll_R = self.head_loss(hidden_BTH[response_BT], targets_BT[response_BT])
        nll_BT = torch.zeros(response_BT.shape, device=response_BT.device)
        nll_BT[response_BT] = every_nll_R.detach()
        assessment = self._assessment(batch, nll_BT, {})
        weight_R = self.choose(batch, assessment)
        return self._output(batch, every_nll_R[weight_R > 0], assessment, weight_R)

    def _objective_of(
        self, batch: Batch, hidden_BTH: Tensor, assessment: Assessment, weight_R: Tensor
    ) -> StepOutput:
        """The head runs on the kept tokens only."""
        targets_BT = batch["targets"]
        kept_BT = torch.zeros_like(assessment["response_BT"])
        kept_BT[assessment["response_BT"]] = weight_R > 0
        nll_R = self.head_loss(hidden_BTH[kept_BT], targets_BT[kept_BT])
        return self._output(batch, nll_R, assessment, weight_R)

    def _output(
        self, batch: Batch, nll_R: Tensor, assessment: Assessment, weight_R: Tensor
    ) -> StepOutput:
        """`nll_R` are the losses of the tokens whose weight is not zero."""
        weight_BT = torch.zeros_like(assessment["nll_BT"])
        weight_BT[assessment["response_BT"]] = weight_R
        known = (batch, assessment["nll_BT"], assessment["response_BT"], weight_BT)
        return StepOutput(
            total=self._objective.total(*known, nll_R),
            metrics=self._objective.metrics(*known),
            weight_BT=weight_BT,
            kept_nll_R=nll_R.detach(),
            assessment=assessment,
        )
