"""One optimizer step: refresh, choose, forward and backward of each micro-batch, update."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alphatoken.batch import Batch
from alphatoken.distributed import collectives
from alphatoken.errors import NonFiniteError
from alphatoken.models.decoder import decoder_of
from alphatoken.report.responses import ValuedResponse
from alphatoken.selection.step import (
    TokenCounts,
    WeighedStep,
    count_tokens,
    selections_at,
    weigh_globally,
)
from alphatoken.training.by_source import BySource
from alphatoken.training.feed import Feed, StepRows
from alphatoken.training.setup import Run
from alphatoken.training.speed import peak_flops, training_flops
from alphatoken.training.statistics import StepStatistics, StepSums
from alphatoken.training.stopping import StopRequest
from alphatoken.training.valued_model import StepOutput
from alphatoken.training.valued_responses import ResponseReader
from alphatoken.training.watchdog import Watchdog
from alphatoken.util.memory import peak_memory
from alphatoken.util.metrics import Metrics
from alphatoken.values.refresh import HeldOutRefresh

# Phases that are always reported, and those that only some configurations have.
PHASES = ("forward", "score", "backward", "refresh", "optimizer")
OPTIONAL_PHASES = ("ahead", "reference")


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step is known by."""

    metrics: Metrics
    responses: list[ValuedResponse]
    """Of one micro-batch on this rank, as many as were asked for and it has."""
    notes: tuple[str, ...]
    """What the user should know about the step."""


class OptimizerStep:
    """Takes the optimizer steps of a run. Every rank must take the same ones."""

    def __init__(
        self,
        *,
        run: Run,
        feed: Feed,
        refresh: HeldOutRefresh | None,
        stop: StopRequest,
        watchdog: Watchdog,
    ) -> None:
        self._run = run
        self._feed = feed
        self._refresh = refresh
        self._stop = stop
        self._watchdog = watchdog
        self.under_way = 0
        """The step that is being taken, or was taken last, from 0."""
        train = run.splits.train
        self._by_source = (
            BySource(train.names, train.first_rows, run.device) if len(train.sizes) > 1 else None
        )
        self._flops = training_flops(decoder_of(run.model.lm))
        self._peak = _peak_of(run)
        self._told: set[str] = set()
        """What the user was told about what selections rule out."""
        self._warnings: list[str] = []
        self._reader = ResponseReader(
            run.tokenizer, run.splits.train.location, run.objective.branches
        )

    def take(self, step: int, *, evaluates: bool, responses: int = 0) -> StepResult:
        """Takes optimizer step `step` (from 0); `evaluates` says whether an evaluation follows that
        cannot be left for later, `responses` how many are to be told token by token.

        Raises NonFiniteError on every rank before a step that would spoil the weights, and
        WindowDroppedError where a run that was asked to stop has no time to finish it.
        """
        run, began = self._run, time.perf_counter()
        self.under_way = step
        run.stopwatch.read()  # what an evaluation took is no part of the step
        run.model.selections = selections_at(run.config, step, run.total_steps)
        run.model.scores_tokens = run.config.selects_at(step)
        rows = self._feed.training(step)
        tokens = count_tokens(run.model.selections, rows.batches)
        statistics = self._bring_up_to_date(step, tokens.own_response)
        ahead = self._weighed_ahead(rows.batches)
        denominator = run.objective.denominator(self._counted(tokens, ahead), rows.rows)
        # DeepSpeed averages gradients over ranks; ours are sums over all ranks and
        # micro-batches, divided here.
        scale = collectives.world_size() / denominator if denominator else 0.0

        chosen = [None] * len(rows.batches) if ahead is None else ahead.micro_batches
        for number, (batch, weighed) in enumerate(zip(rows.batches, chosen, strict=True), start=1):
            left = len(rows.batches) - number
            self._stop.drop_if_short(left + 1, evaluates=evaluates)
            pass_began = time.perf_counter()
            self._watchdog.moved(f"step {step + 1}, micro-batch {number} of {len(rows.batches)}")
            with run.stopwatch.phase("forward"):
                output: StepOutput = run.engine(batch, weighed)
            with run.stopwatch.phase("backward"):
                run.engine.backward(output["total"] * scale, scale_wrt_gas=False)
            statistics.add(batch, output)
            if number - 1 == step % len(rows.batches):  # they are sorted by length: each in turn
                told = self._read(step, output, responses)
            self._stop.took("micro-batch", time.perf_counter() - pass_began)
            if left == 0:  # looked at before the engine takes the step
                sums = self._reduce(statistics, step, denominator)
                learning_rate = run.engine.get_lr()[0]
            with run.stopwatch.phase("optimizer"):
                run.engine.step()

        means = sums.metrics | self._after_update(step, sums.metrics)
        norm = self._finite_norm(step)
        metrics: Metrics = {
            "step": step + 1,
            **means,
            "lr": learning_rate,
            **({} if norm is None else {"grad_norm": norm}),
            "response_tokens": tokens.response,
            **self._speed(rows, began),
            "peak_memory_bytes": peak_memory(run.device),
        }
        return StepResult(metrics, told, self._notes(step, sums))

    def _bring_up_to_date(self, step: int, own_tokens: int) -> StepStatistics:
        """Refreshes the scorer, and starts the step's statistics with what that showed."""
        run = self._run
        scorer = run.model.scorer
        statistics = StepStatistics(
            device=run.device,
            part_weights=(1.0, 0.0) if scorer is None else scorer.part_weights,
            has_drift=run.drift is not None,
            selections=run.model.selections,
            contrast=run.config.valuation.contrast,
            branches=run.objective.branches,
            by_source=self._by_source,
        )
        self._watchdog.moved(f"step {step + 1}, refresh")
        if self._refresh is not None:
            with run.stopwatch.phase("refresh"):
                for seen in self._refresh.before(step, own_tokens):
                    part = run.config.valuation.held_out if seen.is_held_out else "train"
                    statistics.add_steering(f"data.{part}", seen.batch, seen.nll_BT)
        return statistics

    def _weighed_ahead(self, batches: Sequence[Batch]) -> WeighedStep | None:
        """The tokens of each micro-batch, weighed ahead of its pass: with scope `global_batch` all
        are assessed first and the tokens of all ranks weighed together. None with other scopes."""
        run = self._run
        if run.model.selections[0].scope != "global_batch":
            return None
        with run.stopwatch.phase("ahead"):
            facts = [run.model.assess(batch) for batch in batches]
            return weigh_globally(run.model.selections, facts)

    def _counted(self, tokens: TokenCounts, ahead: WeighedStep | None) -> int:
        """The tokens that `selection.normalise` names."""
        if self._run.config.normalise == "response":
            return tokens.response
        return tokens.kept if ahead is None else ahead.kept

    def _notes(self, step: int, sums: StepSums) -> tuple[str, ...]:
        """That there was nothing to train on, and what selections rule out when they first do."""
        notes, self._warnings = self._warnings, []
        if not sums.dropped.count("trained"):
            notes.append("no token to train on, so nothing is learned")
        for name, sentence in sums.dropped.reasons().items():
            if name not in self._told:
                self._told.add(name)
                notes.append(sentence)
        return tuple(f"step {step + 1}: {note}" for note in notes)

    def _read(self, step: int, output: StepOutput, most: int) -> list[ValuedResponse]:
        """Responses of a micro-batch, token by token. What goes wrong is no reason to stop
        training."""
        if not most:
            return []
        try:
            return self._reader.read(step + 1, output, most)
        except Exception as error:
            self._warnings.append(f"warning: no tokens for the report: {error!r}")
            return []

    def _after_update(self, step: int, means: Metrics) -> Metrics:
        """Lets the running scales observe the step; returns how far the weights have drifted."""
        run = self._run
        scorer = run.model.scorer
        # Before Adam's first step its scale is 1, so values are in another unit than ever
        # after.
        comparable = run.config.valuation.preconditioner == "none" or step > 0
        if scorer is not None:
            if "stability_std" in means and comparable:
                scorer.scales.observe((means["adaptation_std"], means["stability_std"]))
            with run.stopwatch.phase("refresh"):
                scorer.after_step()
        if run.drift is None:
            return {}
        with run.stopwatch.phase("refresh"):
            norm, weighted = run.drift.magnitudes()
        return {"drift_norm": norm, "fisher_weighted_drift": weighted}

    def _finite_norm(self, step: int) -> float | None:
        """The gradient's norm; None where DeepSpeed keeps none, as at stage 0 in float32. Raises
        NonFiniteError."""
        norm = self._run.engine.get_global_grad_norm()
        if norm is None:
            return None
        if not math.isfinite(norm):
            raise NonFiniteError(
                f"step {step + 1}: the gradient norm is {norm}, so the weights are spoiled. "
                "Continue from the last checkpoint with train.resume=auto, a lower optim.lr and "
                "train.resume_allow=[optim.lr]"
            )
        return float(norm)

    def _speed(self, rows: StepRows, began: float) -> Metrics:
        seconds = self._run.stopwatch.read()
        whole = time.perf_counter() - began
        phases = [*PHASES, *(phase for phase in OPTIONAL_PHASES if phase in seconds)]
        devices = collectives.world_size()
        speed: Metrics = {
            **{f"seconds_{phase}": seconds.get(phase, 0.0) for phase in phases},
            "seconds_step": whole,
            "tokens_per_second": rows.tokens / whole,
            "tokens_per_second_per_device": rows.tokens / whole / devices,
        }
        if self._flops is not None and self._peak is not None:
            used = self._flops.of(rows.tokens, rows.token_pairs) / whole
            speed["mfu"] = used / (self._peak * devices)
        return speed

    def _reduce(
        self,
        statistics: StepStatistics,
        step: int,
        denominator: int,
    ) -> StepSums:
        """The step's means and counts. Raises NonFiniteError on every rank, naming rows and
        linears, if anything is not finite."""
        try:
            return statistics.reduce(denominator)
        except NonFiniteError as error:
            scorer = self._run.model.scorer
            faulty = [] if scorer is None else scorer.nonfinite_parts()
            named = self._run.splits.named()
            found = "\n  ".join(statistics.describe_faults(named, faulty))
            raise NonFiniteError(
                f"step {step + 1}: {error}; the optimizer step was not taken. Rows concerned:\n"
                f"  {found}\nLook at them, or continue from the last checkpoint with "
                "train.resume=auto, a lower optim.lr and train.resume_allow=[optim.lr]"
            ) from None


def _peak_of(run: Run) -> float | None:
    """FLOPs a second that a rank's device is known to reach in the run's dtype."""
    if run.device.type != "cuda" or run.config.model.dtype != "bfloat16":
        return None
    return peak_flops(torch.cuda.get_device_name(run.device))
