"""The module the engine wraps: decoder, then score, select, and the loss of the kept tokens.

Shape legend: B rows, T loss positions, R response (or kept) positions in order of (row, position),
H hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch
from alphatoken.distributed.sums import sum_of_parts
from alphatoken.models.decoder import Decoder
from alphatoken.models.head import HeadLoss
from alphatoken.models.token_losses import losses_of
from alphatoken.objectives.base import KeptLosses, Objective, ResponseLosses
from alphatoken.passes.capture import Entry
from alphatoken.selection.facts import Choice, TokenFacts, WeighedTokens
from alphatoken.selection.select import Selection, select
from alphatoken.selection.step import weigh
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.estimator import Scorer


class StepOutput(TypedDict):
    """One micro-batch of training.

    Only `total` carries a graph. ZeRO-3's hooks look for such tensors in dicts, not in dataclasses:
    what is in `facts` and `choice` must not need them.
    """

    total: Tensor
    """The objective summed over the kept tokens; divide by the step's denominator."""
    weight_BT: Tensor
    """Weight of each token in the objective, zero where it is masked out."""
    kept_index_R: Tensor
    """Where that is not zero, int64 into the B T positions."""
    kept_nll_R: Tensor
    """Losses of the kept tokens from the training graph."""
    metrics: dict[str, Tensor]
    """What the objective reports, a number per row each."""
    facts: TokenFacts
    """What was known of the tokens when they were selected."""
    choice: Choice
    """What the selections made of them."""


class ValuedModel(nn.Module):
    """A causal LM whose forward pass returns the objective of the valuable tokens.

    The engine must neither shard nor save the scoring tower, so the scorer is attached outside the
    module tree. `batch` is always a micro-batch as `data.batches` makes it. Every rank makes the
    same module calls, also with no token.
    """

    scorer: Scorer | None

    def __init__(
        self,
        *,
        decoder: Decoder,
        objective: Objective,
        selections: Sequence[Selection],
        eos_token_ids: list[int],
        stopwatch: Stopwatch,
        needs_entropy: bool = False,
        vetoes: Sequence[Selection] | None = None,
    ) -> None:
        """`vetoes`, one per branch, keep the tokens that B of drawn rows is the mean of; None for
        all."""
        super().__init__()
        self.lm = decoder.model
        self.head_loss = HeadLoss(decoder.head, decoder.logit_softcap)
        self.selections = selections
        self.scores_tokens = True
        """Whether tokens are valued, where there is a scorer."""
        self._decoder = decoder
        self._objective = objective
        self._eos_token_ids = eos_token_ids
        self._stopwatch = stopwatch
        self._needs_entropy = needs_entropy
        self._vetoes = vetoes
        self._engine_knows_order: Callable[[], bool] = lambda: False
        self.attach(None)

    def attach(self, scorer: Scorer | None) -> None:
        """Values tokens with `scorer` from now on; without one every policy that needs no values
        still works."""
        object.__setattr__(self, "scorer", scorer)
        if scorer is not None:
            scorer.run_body = self.hidden_states
            scorer.eligible = None if self._vetoes is None else self._eligible

    def engaged(self, knows_order: Callable[[], bool]) -> None:
        """Takes note of its engine, of which `knows_order` says what `zero3.knows_order` does."""
        self._engine_knows_order = knows_order

    def forward(
        self, batch: Batch, ahead: WeighedTokens | None = None, *, body_only: bool = False
    ) -> StepOutput | Tensor:
        """The objective of a micro-batch; with `body_only` what `Decoder.hidden_states` returns.

        Tokens are valued and selected here, unless `ahead` brings what was known of them and their
        weights from a choice among the whole step.
        """
        if body_only:
            return self._decoder.hidden_states(batch)
        if ahead is not None:
            return self._trained_on_kept(self._decoder.hidden_states(batch), ahead)
        if self.scorer is None or not self.scores_tokens:
            return self._without_scorer(batch)
        hidden_BTH, facts = self._valued(batch, self.scorer)
        return self._trained_on_kept(hidden_BTH, weigh(self.selections, facts))

    @torch.no_grad()
    def hidden_states(self, batch: Batch) -> Tensor:
        """What enters the head, (B, T, H), by a forward pass of its own, without a graph.

        ZeRO-3 prefetches weights in the order in which a micro-batch uses them, and starts it anew
        where the engine's module is called. A pass that calls the modules below it instead is out
        of order: nothing is prefetched until two more micro-batches have run. It is not made the
        first pass that an order is learned from, which would have no backward half.
        """
        if self._engine_knows_order():
            hidden_BTH: Tensor = self(batch, body_only=True)
            return hidden_BTH
        return self._decoder.hidden_states(batch)

    @torch.no_grad()
    def assess(self, batch: Batch) -> TokenFacts:
        """Values a micro-batch ahead of its training pass (scope `global_batch`), by a forward pass
        of its own."""
        if self.scorer is not None:
            with self.scorer.capture() as capture:
                hidden_BTH = self.hidden_states(batch)
            return self._score(batch, self.scorer, capture.entry, hidden_BTH)
        hidden_BTH = self.hidden_states(batch)
        nll_BT = losses_of(hidden_BTH, self.head_loss, batch)
        return self._facts(batch, nll_BT=nll_BT, values={}, hidden_BTH=hidden_BTH)

    def token_losses(self, batch: Batch) -> Tensor:
        """Losses of response tokens, (B, T) float32, without training or scoring."""
        return losses_of(self.hidden_states(batch), self.head_loss, batch)

    def _valued(self, batch: Batch, scorer: Scorer) -> tuple[Tensor, TokenFacts]:
        """What enters the head, (B, T, H), with its graph, and what is known of tokens. The states
        that scoring needed are let go of: the head's logits may take their place."""
        with scorer.capture() as capture:
            hidden_BTH = self._decoder.hidden_states(batch)
        return hidden_BTH, self._score(batch, scorer, capture.entry, hidden_BTH)

    def _score(self, batch: Batch, scorer: Scorer, entry: Entry, hidden_BTH: Tensor) -> TokenFacts:
        """What is known of tokens, values included, from the states that entered scored layers;
        `hidden_BTH` are those that enter the head."""
        with self._stopwatch.phase("score"):
            scores = scorer.score(entry, batch)
            # 1, or of a pair d (objective) / d (the response's summed losses). Values are linear in
            # their own sequence's gradient, so it may be scaled afterwards.
            losses = ResponseLosses(batch=batch, nll_BT=scores.nll_BT)
            coefficient_BT = self._objective.coefficients(losses)
            values = {name: coefficient_BT * value_BT for name, value_BT in scores.values.items()}
            return self._facts(batch, nll_BT=scores.nll_BT, values=values, hidden_BTH=hidden_BTH)

    def _eligible(self, losses: ResponseLosses) -> Tensor:
        """The response tokens that no veto rules out, (B, T) bool."""
        assert self._vetoes is not None
        facts = self._facts(losses.batch, nll_BT=losses.nll_BT, values={}, hidden_BTH=None)
        return facts.response_index.put(select(self._vetoes, facts).choice.kept_R)

    def _facts(
        self, batch: Batch, *, nll_BT: Tensor, values: dict[str, Tensor], hidden_BTH: Tensor | None
    ) -> TokenFacts:
        """What is known of tokens; without `hidden_BTH` not their entropy."""
        protected_BT = torch.zeros_like(batch["response"])
        for token in self._eos_token_ids:  # a few; a tensor of them would have to be copied
            protected_BT |= batch["targets"] == token
        return TokenFacts(
            batch=batch,
            nll_BT=nll_BT,
            protected_BT=protected_BT,
            values=values,
            contrast=0.0 if self.scorer is None else self.scorer.config.contrast,
            entropy=(
                self._entropy(batch, hidden_BTH)
                if self._needs_entropy and hidden_BTH is not None
                else None
            ),
            total=sum_of_parts,
        )

    @torch.no_grad()
    def _entropy(self, batch: Batch, hidden_BTH: Tensor) -> Tensor:
        """Entropy of the predictions of response tokens, (B, T) float32, zero off the response."""
        index = batch["response_index"]
        return index.put(self.head_loss(index.take(hidden_BTH)))

    def _without_scorer(self, batch: Batch) -> StepOutput:
        """The objective where the training graph itself gives the losses that policies see, as
        nothing is scored before."""
        index = batch["response_index"]
        hidden_BTH = self._decoder.hidden_states(batch)
        nll_R = self.head_loss(index.take(hidden_BTH), index.take(batch["targets"]))
        nll_BT = index.put(nll_R.detach())
        facts = self._facts(batch, nll_BT=nll_BT, values={}, hidden_BTH=hidden_BTH)
        weighed = weigh(self.selections, facts)
        kept_R = _kept(weighed)
        return self._output(weighed, kept_R, kept_nll_R=nll_R.index_select(0, kept_R))

    def _trained_on_kept(self, hidden_BTH: Tensor, weighed: WeighedTokens) -> StepOutput:
        """The objective where the head runs on the kept tokens only."""
        kept_R = _kept(weighed)
        index_R = weighed.facts.response_index.index_R[kept_R]
        kept_nll_R = self.head_loss(
            hidden_BTH.flatten(0, 1).index_select(0, index_R),
            weighed.facts.batch["targets"].flatten().index_select(0, index_R),
        )
        return self._output(weighed, kept_R, kept_nll_R=kept_nll_R)

    def _output(self, weighed: WeighedTokens, kept_R: Tensor, *, kept_nll_R: Tensor) -> StepOutput:
        """The objective and its metrics; `kept_R` are the response tokens whose weight is not zero,
        `kept_nll_R` their losses, with their graph."""
        facts = weighed.facts
        weight_BT = facts.response_index.put(weighed.choice.weight_R)
        kept_index_R = facts.response_index.index_R[kept_R]
        losses = KeptLosses(
            batch=facts.batch,
            nll_BT=facts.nll_BT,
            weight_BT=weight_BT,
            kept_index_R=kept_index_R,
            kept_nll_R=kept_nll_R,
        )
        return StepOutput(
            total=self._objective.total(losses),
            metrics=self._objective.metrics(losses),
            weight_BT=weight_BT,
            kept_index_R=kept_index_R,
            kept_nll_R=kept_nll_R.detach(),
            facts=facts,
            choice=weighed.choice,
        )


def _kept(weighed: WeighedTokens) -> Tensor:
    """Which response tokens have a weight, int64 into them. The host waits: how many they are
    follows from values."""
    return (weighed.choice.weight_R > 0).nonzero()[:, 0]
