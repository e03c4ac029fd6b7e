"""The training loop, shared by all recipes: builds the parts, runs optimizer steps, reports, saves,
exports."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from alphatoken.batch import loss_positions
from alphatoken.checkpoints.export import export_model
from alphatoken.checkpoints.folder import start_run_folder
from alphatoken.checkpoints.resuming import Continuation, changed_inputs, open_run_folder
from alphatoken.checkpoints.saving import (
    check_space,
    checkpoint_bytes,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import FisherConfig
from alphatoken.data.batches import Indices, Layout, Order, micro_batches, row_tokens
from alphatoken.data.cache import TokenDataset
from alphatoken.data.chat import tokenizer_identity
from alphatoken.data.splits import Prompts, load_prompts, load_splits
from alphatoken.distributed import collectives, zero3
from alphatoken.distributed.adam_scale import adam_scale
from alphatoken.distributed.engine import build_engine
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.distributed.settings import deepspeed_config, without_ranks
from alphatoken.errors import NonFiniteError
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.models.loading import (
    check_before_loading,
    eos_token_ids,
    load_model,
    load_tokenizer,
)
from alphatoken.models.scored import scored_depth
from alphatoken.objectives.base import Objective
from alphatoken.reference.losses import Reference, check_reference
from alphatoken.selection.facts import Assessment
from alphatoken.selection.step import count_tokens, selections_at, weigh_globally
from alphatoken.stability.drift import Drift
from alphatoken.stability.estimate import estimate_fisher
from alphatoken.stability.of_run import build_drift, check_files
from alphatoken.training.report import Metrics, Report
from alphatoken.training.statistics import Means, StepStatistics
from alphatoken.training.stopping import StopRequest, WindowDroppedError
from alphatoken.training.valued_model import StepOutput, ValuedModel
from alphatoken.training.valued_text import ValuedText, valued_text
from alphatoken.training.watchdog import Watchdog
from alphatoken.util.files import fingerprint
from alphatoken.util.memory import peak_memory
from alphatoken.util.stopwatch import Stopwatch
from alphatoken.values.registry import build_scorer


class Trainer:
    """One run, built from its configuration. Every rank builds it and calls `run`.

    Building raises UserError for whatever can be known to be wrong before training starts. It
    writes nothing into the run folder but the Fisher, where that has to be estimated.
    """

    def __init__(self, config: RunConfig, objective: Objective) -> None:
        self._config = config
        self._objective = objective
        self._device = initialise_ranks()
        engine_config = deepspeed_config(config, collectives.world_size())
        self._tokenizer = load_tokenizer(config.model)
        check_before_loading(config)
        check_reference(config, self._tokenizer)
        check_files(config)
        self._folder, continuation = open_run_folder(config)
        if continuation is not None and continuation.universal:
            engine_config["checkpoint"] = {
                **engine_config.get("checkpoint", {}),
                "load_universal": True,
            }

        self._splits = load_splits(config, self._tokenizer)
        self._prompts: Prompts | None = None
        if config.estimates_fisher:
            self._prompts = load_prompts(config, self._tokenizer, self._splits.train)
        self._train_order = _order(self._splits.train, config.train.seed, stream=0)
        self._total_steps = config.train.total_steps(len(self._splits.train))

        self._stopwatch = Stopwatch(self._device)
        model = load_model(config.model, engine_config, config.train.seed)
        if config.train.gradient_checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        decoder = decoder_of(model.train())
        decoder.freeze_unreached()
        eos = eos_token_ids(self._tokenizer, model.generation_config)
        selections = selections_at(config, 0, self._total_steps)
        self._model = ValuedModel(decoder, objective, selections, eos, self._stopwatch)
        self._engine = build_engine(self._model, config, engine_config, self._total_steps)
        # The default stability reference is the starting weights: the scorer comes before a
        # checkpoint is loaded.
        self._notes: list[str] = []
        self._drift: Drift | None = None
        if config.valuation.enabled:
            chosen, depth = (
                config.valuation,
                scored_depth(config.valuation.layers, len(decoder.layers)),
            )
            self._notes = decoder.left_out(depth, chosen.parameters, chosen.estimator)
            self._drift = self._build_drift(decoder)
            self._model.attach(
                build_scorer(decoder, chosen, self._device, self._drift, self._adam_scale)
            )
        self._reference: Reference | None = None
        if config.needs_reference:
            # The default reference is the starting model as well.
            wanted = ("data.train", "data.eval") if objective.branches else ("data.train",)
            parts = {name: part for name, part in self._splits.named().items() if name in wanted}
            others = (decoder, self._model.token_losses, self._device)
            self._reference = Reference(config, self._tokenizer, parts, *others)
        self._first_step = self._steps_taken = self._saved_step = 0
        self._stop = StopRequest(self._device, config.train.grace_seconds)
        self._watchdog = Watchdog(
            self._folder.heartbeats,
            collectives.rank(),
            collectives.world_size(),
            config.train.watchdog_seconds,
        )
        self._inputs = {
            **{name: fingerprint(part.identity) for name, part in self._splits.named().items()},
            "model.tokenizer": tokenizer_identity(self._tokenizer),
            "deepspeed.config": fingerprint(without_ranks(engine_config)),
            "reference.model": None if self._reference is None else self._reference.identity,
            "valuation.fisher": None if self._drift is None else self._drift.identity(),
        }
        if continuation is not None:
            self._continue(continuation)
        self._needed = checkpoint_bytes(self._model, config.model.dtype == "bfloat16")
        if config.train.save_every is not None:
            check_space(self._folder, self._needed)
        self._sample: ValuedText | None = None

    def run(self) -> None:
        """Trains to the end. Raises NonFiniteError on every rank before a step that would spoil the
        weights."""
        config, total = self._config, self._total_steps
        about = {"data": {name: part.described() for name, part in self._splits.named().items()}}
        start_run_folder(self._folder, config, self._model.lm, self._tokenizer, about)
        report = Report(
            config, self._folder.metrics, self._first_step, total, active=collectives.rank() == 0
        )
        with self._stop, self._watchdog, closing(report):
            self._announce(report)
            if self._first_step == 0 and self._splits.eval is not None:
                report.step({"step": 0, **self._evaluate(self._splits.eval)})
            for step in range(self._first_step, total):
                if self._stop.is_agreed() and self._can_save(step):
                    self._stop_after(step, report)
                    return
                try:
                    metrics = self._optimizer_step(step, report)
                except WindowDroppedError:
                    report.say(f"no time to finish step {step + 1}: it will be done again")
                    self._stop_after(step, report)
                    return
                done = step + 1
                if self._splits.eval is not None and self._evaluates(done):
                    metrics |= self._evaluate(self._splits.eval)
                report.step(metrics)
                if _due(done, config.train.save_every) or (
                    done == total and config.train.save_every is not None
                ):
                    report.say(f"saved {self._save(done)}")
            if self._stop.is_agreed():
                self._stop_after(total, report)
                return
            self._watchdog.moved("the export")
            export_model(self._engine, self._tokenizer, self._folder.export)
            report.finish(self._folder.path, self._sample)

    def _build_drift(self, decoder: Decoder) -> Drift | None:
        """Estimates the Fisher first, where none is given. None where stability counts nothing."""
        config, prompts = self._config, self._prompts
        fisher = config.valuation.fisher
        if prompts is not None:
            fisher = estimate_fisher(config, decoder, self._tokenizer, prompts, self._device)
            self._notes.append(f"Fisher: {fisher}, estimated on {prompts}")
        if fisher is None:
            self._notes.append(
                "valuation.stability_weight=0 and no valuation.fisher: values are adaptation only"
            )
            return None
        if prompts is None and config.fisher != FisherConfig():
            self._notes.append("section fisher is not used: valuation.fisher is given")
        drift, note = build_drift(config, fisher, decoder, self._device)
        if note is not None:
            self._notes.append(note)
        return drift

    def _continue(self, continuation: Continuation) -> None:
        """Takes over the state of a checkpoint. Raises UserError where it was trained with other
        inputs."""
        state = load_checkpoint(self._engine, continuation.checkpoint)
        allowed = self._config.train.resume_allow
        self._notes += changed_inputs(
            state["inputs"], self._inputs, allowed, continuation.checkpoint.name
        )
        if self._model.scorer is not None:
            self._model.scorer.scales.state = state["scales"]
        if len(state["random"]) == collectives.world_size():
            set_random_state(state["random"][collectives.rank()], self._device)
        self._first_step = self._saved_step = continuation.step
        self._notes += continuation.notes

    def _save(self, done: int) -> Path:
        self._watchdog.moved(f"saving after step {done}")
        began = time.perf_counter()
        scorer = self._model.scorer
        state = {
            "scales": None if scorer is None else scorer.scales.state,
            "inputs": self._inputs,
            "random": collectives.gather_objects(random_state(self._device)),
        }
        saved = save_checkpoint(self._engine, self._folder, self._config, done, state, self._needed)
        self._saved_step = done
        self._stop.took("save", time.perf_counter() - began)
        return saved

    def _stop_after(self, done: int, report: Report) -> None:
        """Ends a run that was asked to stop, so that it can go on."""
        if done != self._saved_step and self._can_save(done):
            self._save(done)
        after = (
            f"step {self._saved_step}, which is saved"
            if self._saved_step
            else "no step, so nothing is saved"
        )
        report.say(f"stopped after {after}; continue with the same command and train.resume=auto")

    def _can_save(self, done: int) -> bool:
        """Whether a run continued after `done` steps could rebuild the held-out signals as they
        are."""
        valued = self._model.scorer is not None
        return done > 0 and (not valued or done % self._config.valuation.refresh_every == 0)

    def _evaluates(self, done: int) -> bool:
        return done == self._total_steps or _due(done, self._config.train.eval_every)

    def _announce(self, report: Report) -> None:
        for name, part in self._splits.named().items():
            for source in part.reports:
                report.say(f"{name}: {source}")
        for note in [
            *self._notes,
            *([f"continuing after step {self._first_step}"] if self._first_step else []),
        ]:
            report.say(note)

    def _optimizer_step(self, step: int, report: Report) -> Metrics:
        """One optimizer step (`step` counts from 0): refresh, then every micro-batch of the
        accumulation window."""
        began = time.perf_counter()
        self._stopwatch.read()  # what an evaluation took is no part of the step
        self._steps_taken = step
        self._model.selections = selections_at(self._config, step, self._total_steps)
        rows = self._train_order.step(step, self._config.train.global_batch_size)
        batches = self._micro_batches(self._splits.train, rows, step)
        own_tokens, response_tokens, kept_tokens = count_tokens(self._model.selections, batches)
        denominator = self._objective.denominator(kept_tokens, len(rows))
        if denominator == 0:
            report.say(f"step {step + 1}: no token to train on, so the loss of this step is zero")
        # DeepSpeed averages gradients over ranks; ours are sums over all ranks and
        # micro-batches, divided here.
        scale = collectives.world_size() / denominator if denominator else 0.0

        scorer = self._model.scorer
        part_weights = (1.0, 0.0) if scorer is None else scorer.part_weights
        statistics = StepStatistics(
            self._device, part_weights, self._drift is not None, self._objective.branches
        )
        self._watchdog.moved(f"step {step + 1}, refresh")
        with self._stopwatch.phase("refresh"):
            self._refresh(step, statistics, own_tokens)
        chosen = self._choose_ahead(batches)
        for number, (batch, choice) in enumerate(zip(batches, chosen, strict=True), start=1):
            self._stop.drop_if_short(len(batches) - number + 1, self._evaluates(step + 1))
            pass_began = time.perf_counter()
            self._watchdog.moved(f"step {step + 1}, micro-batch {number} of {len(batches)}")
            with self._stopwatch.phase("forward"):
                output: StepOutput = self._engine(batch, choice)
            with self._stopwatch.phase("backward"):
                self._engine.backward(output["total"] * scale, scale_wrt_gas=False)
            statistics.add(batch, output)
            self._stop.took("micro-batch", time.perf_counter() - pass_began)
            if number == len(batches):
                means = self._reduce(statistics, step, response_tokens, kept_tokens, denominator)
                learning_rate = self._engine.get_lr()[0]
                self._sample = (
                    valued_text(self._tokenizer, batch, output["assessment"]) or self._sample
                )
            with self._stopwatch.phase("optimizer"):
                self._engine.step()

        # Before Adam's first step its scale is 1, so values are in another unit than ever
        # after.
        comparable = self._config.valuation.preconditioner == "none" or step > 0
        if scorer is not None and "stability_std" in means and comparable:
            scorer.scales.observe((means["adaptation_std"], means["stability_std"]))
        if self._drift is not None:
            with self._stopwatch.phase("refresh"):
                means["drift_norm"], means["fisher_weighted_drift"] = self._drift.magnitudes()
        norm = (
            self._engine.get_global_grad_norm()
        )  # None: DeepSpeed does not tell at stage 0 in float32
        if norm is not None and not math.isfinite(norm):
            raise NonFiniteError(
                f"step {step + 1}: the gradient norm is {norm}, so the weights are spoiled. "
                "Continue from the last "
                "checkpoint with train.resume=auto, a lower optim.lr and "
                "train.resume_allow=[optim.lr]"
            )
        seconds = self._stopwatch.read()
        phases = ("ahead", "forward") if "ahead" in seconds else ("forward",)
        seconds[phases[0]] -= seconds.get(
            "score", 0.0
        )  # scoring happens inside the pass that comes first
        seconds["step"] = time.perf_counter() - began
        phases = (*phases, "score", "backward", "refresh", "optimizer", "step")
        if "reference" in seconds:
            phases = (*phases, "reference")
        return {
            "step": step + 1,
            **means,
            "lr": learning_rate,
            **({} if norm is None else {"grad_norm": float(norm)}),
            "response_tokens": response_tokens,
            "kept_tokens": kept_tokens,
            **{f"seconds_{phase}": seconds.get(phase, 0.0) for phase in phases},
            "tokens_per_second": int(self._splits.train.lengths[rows].sum()) / seconds["step"],
            "peak_memory_bytes": peak_memory(self._device),
        }

    def _choose_ahead(
        self, batches: list[dict[str, Tensor]]
    ) -> Sequence[tuple[Assessment, Tensor] | None]:
        """With scope `global_batch`: assesses every micro-batch, then weighs the tokens of all
        ranks together."""
        if self._config.selection.scope != "global_batch":
            return [None] * len(batches)
        with self._stopwatch.phase("ahead"):
            assessments = [self._model.assess(batch) for batch in batches]
            weights = weigh_globally(self._model.selections, batches, assessments)
            return list(zip(assessments, weights, strict=True))

    def _refresh(self, step: int, statistics: StepStatistics, own_tokens: int) -> None:
        """Current weights and drift before each step; every `refresh_every` steps, new validation
        signals too."""
        scorer, validation = self._model.scorer, self._splits.validation
        if scorer is None or validation is None:
            return
        if self._config.valuation.preconditioner == "adam" and self._steps_taken > 0:
            zero3.link_moments(self._engine)
        draw, waited = divmod(step, self._config.valuation.refresh_every)
        if waited:
            scorer.refresh(None)
            return
        order = _order(validation, self._config.train.seed, stream=1)
        rows = order.step(draw, self._config.valuation.validation_sequences)
        batches = self._micro_batches(validation, rows, step)
        losses = scorer.refresh(batches, own_tokens * self._config.valuation.refresh_every)
        for batch, nll_BT in zip(batches, losses, strict=True):
            statistics.add_validation(batch, nll_BT)

    def _adam_scale(self, parameter: nn.Parameter) -> Tensor | float:
        """What the optimizer multiplies a gradient by, on this rank's slice; 1 before its first
        step."""
        if self._steps_taken == 0:
            return 1.0
        moment, chosen = zero3.second_moment_slice(parameter, self._device), self._config.optim
        return adam_scale(moment, self._steps_taken, chosen.betas[1], chosen.eps)

    def _evaluate(self, part: TokenDataset) -> Metrics:
        """Means of what the objective reports of held-out rows, over all rows of `part`."""
        began, means = time.perf_counter(), Means(self._device)
        for batch in self._micro_batches(part, np.arange(len(part)), step=0):
            self._watchdog.moved("an evaluation")
            response_BT, _ = loss_positions(batch["labels"])
            means.add(
                self._objective.evaluation(batch, self._model.token_losses(batch), response_BT)
            )
        metrics: Metrics = {f"eval_{name}": mean for name, mean in means.reduce().items()}
        self._stop.took("evaluation", time.perf_counter() - began)
        return metrics

    def _micro_batches(
        self, part: TokenDataset, rows: Indices, step: int
    ) -> list[dict[str, Tensor]]:
        """This rank's micro-batches, on its device."""
        config, ranks = self._config, collectives.world_size()
        layout = Layout(
            # A few held-out rows are spread over all ranks rather than left to one.
            size=min(config.train.micro_batch_size, math.ceil(len(rows) / ranks)),
            pad_token=self._tokenizer.pad_token_id,
            row_tokens=row_tokens(config),
            noise_key=(config.train.seed, step)
            if any(each.policy == "random" for each in config.selections)
            else None,
            reference=None if self._reference is None else self._reference.cached(part),
        )
        dealt = micro_batches(part, rows, layout, collectives.rank(), ranks)
        batches = [
            {key: tensor.to(self._device) for key, tensor in batch.items()} for batch in dealt
        ]
        if (
            self._reference is not None
            and self._reference.is_online
            and part is not self._splits.validation
        ):
            with self._stopwatch.phase("reference"):
                self._reference.complete(batches)
        return batches

    def _reduce(
        self,
        statistics: StepStatistics,
        step: int,
        response_tokens: int,
        kept_tokens: int,
        denominator: int,
    ) -> dict[str, float]:
        """The step's means. Raises NonFiniteError on every rank, naming rows and linears, if
        anything is not finite."""
        try:
            return statistics.reduce(response_tokens, kept_tokens, denominator)
        except NonFiniteError as error:
            faulty = self._model.scorer.nonfinite_parts() if self._model.scorer else []
            found = "\n  ".join(statistics.describe_faults(self._splits.named(), faulty))
            raise NonFiniteError(
                f"step {step + 1}: {error}; the optimizer step was not taken. Rows concerned:\n  "
                f"{found}\n"
                "Look at them, or continue from the last checkpoint with train.resume=auto, a "
                "lower optim.lr and "
                "train.resume_allow=[optim.lr]"
            ) from None


def _order(part: TokenDataset, seed: int, stream: int) -> Order:
    """The order of a part's rows; `stream` keeps the draws of different parts apart."""
    return Order(part.sizes, part.weights, (seed, stream))


def _due(done: int, every: int | None) -> bool:
    return every is not None and done % every == 0
