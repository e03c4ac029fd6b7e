"""The loop, shared by all recipes: steps, evaluations, checkpoints, and ending in time."""

from __future__ import annotations

import time
from contextlib import closing
from functools import partial
from pathlib import Path

from alphatoken.checkpoints.best import Best, updated, why_void
from alphatoken.checkpoints.export import export_checkpoint, export_model
from alphatoken.checkpoints.resuming import Continuation, changed_inputs
from alphatoken.checkpoints.saving import (
    Checkpoints,
    TrainingState,
    checkpoint_bytes,
    random_state,
    set_random_state,
)
from alphatoken.checkpoints.starting import start_run_folder
from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.report.responses import ValuedResponse
from alphatoken.training.asking import ask, questions_of, show_change
from alphatoken.training.evaluation import evaluate
from alphatoken.training.feed import Feed, held_out_refresh
from alphatoken.training.report import Report
from alphatoken.training.setup import Run
from alphatoken.training.step import OptimizerStep, StepResult
from alphatoken.training.stopping import (
    EvaluationDroppedError,
    EvaluationUnderWay,
    StopRequest,
    WindowDroppedError,
)
from alphatoken.training.watchdog import Watchdog
from alphatoken.util.metrics import Metrics
from alphatoken.util.wording import plural


class Trainer:
    """Trains a run to its end. Every rank builds it and calls `train`.

    Building loads the checkpoint to continue from, where there is one. Raises UserError where that
    was trained with other inputs, or where checkpoints do not fit on the disk.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run = run
        self.feed = Feed(run)
        self.refresh = held_out_refresh(run, self.feed)
        self.stop = StopRequest(run.device, config.train.grace_seconds)
        self.watchdog = Watchdog(
            run.folder.heartbeats,
            collectives.rank(),
            collectives.world_size(),
            config.train.watchdog_seconds,
        )
        self.step = OptimizerStep(
            run=run,
            feed=self.feed,
            refresh=self.refresh,
            stop=self.stop,
            watchdog=self.watchdog,
        )
        in_16_bit = config.model.dtype == "bfloat16"
        self.checkpoints = Checkpoints(
            folder=run.folder,
            engine=run.engine,
            config=config,
            needed=checkpoint_bytes(run.model, trains_in_16_bit=in_16_bit)
            + (0 if run.model.scorer is None else run.model.scorer.saved_bytes),
        )
        self.first_step = 0
        """Optimizer steps that were taken before this run."""
        self.best: Best | None = None
        """The best evaluation so far, with `train.keep_best`."""
        self._owed: Metrics | None = None
        """Metrics of the last step, as long as the evaluation after it is still to be made."""
        self.notes = run.notes
        if run.continuation is not None:
            self._continue(run.continuation)
        if config.train.save_every is not None or config.train.keep_best is not None:
            self.checkpoints.check_space()
        self._told: ValuedResponse | None = None
        """The newest response that is known token by token."""

    def train(self) -> None:
        """Trains to the end, or until asked to stop. Raises NonFiniteError on every rank before a
        step that would spoil the weights."""
        run = self.run
        data = {name: part.described() for name, part in run.splits.named().items()}
        start_run_folder(run.folder, run.config, run.model.lm, run.tokenizer, {"data": data})
        report = collectives.agree(
            lambda: Report(
                config=run.config,
                folder=run.folder,
                first_step=self.first_step,
                total_steps=run.total_steps,
                active=collectives.rank() == 0,
                owed=self._owed is not None,
            )
        )
        with self.stop, self.watchdog, closing(report):
            self._announce(report)
            done, stops = self._take_steps(report)
            if stops:
                self._stop_after(done, report)
                return
            exported = self._export(done, report)
            report.finish(self._told)
            if run.tasks and collectives.rank() == 0:
                show_change(run, exported, report.console)

    def _take_steps(self, report: Report) -> tuple[int, bool]:
        """Makes the evaluation that comes first, if any, and takes steps until training ends or the
        run is to stop. Returns how many were taken then, and whether it is to stop."""
        done = self.first_step
        try:
            self._evaluate_first(report)
            while done < self.run.total_steps and not self._is_past_best():
                if self.stop.is_agreed() and self._can_save(done):
                    return done, True
                result = self.step.take(
                    done,
                    evaluates=self._evaluates(done + 1) and not self._can_save(done + 1),
                    responses=report.responses_of(done + 1),
                )
                done += 1
                self._after_step(done, result, report)
        except WindowDroppedError:
            report.say(f"no time to finish step {done + 1}: it will be done again")
            return done, True
        except EvaluationDroppedError:
            where = f"after step {done}" if done else "before the first step"
            report.say(f"no time to finish the evaluation {where}: it will be made again")
            return done, True
        return done, self.stop.is_agreed()

    @property
    def _has_evaluations(self) -> bool:
        return self.run.splits.eval is not None or bool(self.run.tasks)

    def _is_past_best(self) -> bool:
        """Whether so many evaluations were no better than the best that training is to end."""
        limit = self.run.config.train.stop_after
        return limit is not None and self.best is not None and self.best.stale >= limit

    def _export(self, done: int, report: Report) -> int:
        """Exports the weights after `done` steps, or those of the best checkpoint; returns after
        how many steps they were."""
        run, best = self.run, self.best
        moved = partial(self.watchdog.moved, "the export")
        moved()
        if best is None or best.step == done:
            export_model(run.engine, run.tokenizer, run.folder.export, moved)
        else:
            step = best.step
            collectives.on_rank_0(
                lambda: str(
                    export_checkpoint(run.folder.path, run.folder.export, step, replace=True).folder
                )
            )
        if best is not None:
            report.say(
                f"exported step {best.step} of {done}, the best by {best.metric}: {best.value:.4f}"
            )
        return done if best is None else best.step

    def save(self, done: int) -> Path:
        """Saves a checkpoint after `done` optimizer steps. Every rank must call it."""
        self.watchdog.moved(f"saving after step {done}")
        began = time.perf_counter()
        scorer = self.run.model.scorer
        state = TrainingState(
            scales=None if scorer is None else scorer.scales.state,
            inputs=self.run.inputs,
            best=self.best,
            random=random_state(self.run.device),
            owed=self._owed,
        )
        slices = None if scorer is None else scorer.state()
        saved = self.checkpoints.save(done, state, slices)
        self.stop.took("save", time.perf_counter() - began)
        return saved

    def _continue(self, continuation: Continuation) -> None:
        """Takes over the state of a checkpoint. Raises UserError where it was trained with other
        inputs."""
        run, checkpoint = self.run, continuation.checkpoint
        state = self.checkpoints.load(checkpoint, continuation.step)
        allowed = run.config.train.resume_allow
        changed = changed_inputs(state.inputs, run.inputs, allowed, checkpoint.name)
        scorer, slices = run.model.scorer, self.checkpoints.scorer_slices(checkpoint)
        if scorer is not None and state.scales is not None:
            scorer.scales.state = state.scales
        if scorer is not None and slices is not None:
            scorer.restore(slices)
        if state.random is not None:
            set_random_state(state.random, run.device)
        self._check_signals(continuation)
        self.first_step, self._owed = continuation.step, state.owed
        self.best, lost = self._best_of(state.best)
        self.notes = (*self.notes, *changed, *map(str, continuation.notes), *lost)

    def _check_signals(self, continuation: Continuation) -> None:
        """Raises UserError where the held-out signals of the next step are neither in the
        checkpoint nor made before that step."""
        step, every = continuation.step, self.run.config.valuation.refresh_every
        if step == self.run.total_steps or self.refresh is None:
            return
        if not self.refresh.can_be_rebuilt_after(step):
            raise UserError(
                f"{continuation.checkpoint} lies between two refreshes of the held-out signals, "
                f"which are no part of it: with valuation.refresh_every={every} a run goes on from "
                f"a multiple of {every} steps, not from {step}. Name an earlier checkpoint with "
                "train.resume, or another refresh_every, with train.resume_allow"
            )

    def _best_of(self, saved: Best | None) -> tuple[Best | None, list[str]]:
        """The best evaluation that a checkpoint tells of, where it still counts, and what to say
        where it does not."""
        wanted = self.run.config.train.keep_best
        if saved is None or wanted is None:
            return None, []
        void = why_void(saved, wanted, questions_of(self.run, wanted))
        if void is not None:
            return None, [void]
        kept = self.run.folder.checkpoints / f"step-{saved.step}"
        if not collectives.on_rank_0(kept.is_dir):
            return None, [f"warning: {kept}, the best by {wanted}, is gone: the best starts anew"]
        return saved, []

    def _announce(self, report: Report) -> None:
        for line in (*self.run.data_lines(), *self.notes):
            report.say(line)
        if self.first_step:
            report.say(f"continuing after step {self.first_step}")

    def _after_step(self, done: int, result: StepResult, report: Report) -> None:
        """Tells of a step, evaluates, reports and saves what is due."""
        for note in result.notes:
            report.say(note)
        self._told = next(iter(result.responses), self._told)
        report.keep(result.responses)
        self._conclude(done, result.metrics, report, evaluates=self._evaluates(done))

    def _evaluate_first(self, report: Report) -> None:
        """The evaluation before the first step, or the one that an earlier run owes."""
        if self.first_step == 0 and self._has_evaluations:
            report.step({"step": 0, **self._evaluate(0)})
        if self._owed is not None:
            report.say(f"the evaluation after step {self.first_step} is still owed: it comes first")
            self._conclude(self.first_step, self._owed, report, evaluates=True)

    def _conclude(self, done: int, metrics: Metrics, report: Report, *, evaluates: bool) -> None:
        """Evaluates after a step if it `evaluates`, reports its metrics and saves what is due: also
        what a checkpoint owed, so that it is not owed for ever.

        Raises EvaluationDroppedError on every rank where there is no time to evaluate, which is
        then owed.
        """
        was_owed = self._owed is not None
        if evaluates:
            self._owed = metrics
            metrics = metrics | self._evaluate(done)
            self._owed = None
            self._note_best(done, metrics)
        report.step(metrics)
        ends = self._is_past_best()
        if ends and self.best is not None:
            report.say(
                f"training ends after step {done} of {self.run.total_steps}: "
                f"{self.best.metric} was not better in {plural(self.best.stale, 'evaluation')} "
                "(train.stop_after)"
            )
        save_every = self.run.config.train.save_every
        due = save_every is not None and (
            done % save_every == 0 or ends or done == self.run.total_steps
        )
        if due or was_owed or (evaluates and self.best is not None and self.best.step == done):
            report.say(f"saved {self.save(done)}")

    def _note_best(self, done: int, metrics: Metrics) -> None:
        """Compares an evaluation with the best one so far."""
        metric = self.run.config.train.keep_best
        if metric is not None:
            better = self.run.config.evaluated_metrics[metric]
            questions = questions_of(self.run, metric)
            self.best = updated(self.best, metric, better, float(metrics[metric]), done, questions)

    def _stop_after(self, done: int, report: Report) -> None:
        """Ends a run that was asked to stop, so that it can go on; what it owes is saved."""
        if done != self.checkpoints.newest and self._can_save(done):
            self.save(done)
        newest = self.checkpoints.newest
        after = f"step {newest}, which is saved" if newest else "no step, so nothing is saved"
        owes = newest == done and self._owed is not None
        first = ", which makes the evaluation of that step first" if owes else ""
        how = "continue with the same command and train.resume=auto"
        report.say(f"stopped after {after}; {how}{first}")

    def _can_save(self, done: int) -> bool:
        """Whether a run continued after `done` steps could rebuild the held-out signals as they
        are, or needs none, as no step follows."""
        ends = done == self.run.total_steps
        return done > 0 and (
            ends or self.refresh is None or self.refresh.can_be_rebuilt_after(done)
        )

    def _evaluates(self, done: int) -> bool:
        """Whether the run evaluates after `done` steps."""
        every = self.run.config.train.eval_every
        due = done == self.run.total_steps or (every is not None and done % every == 0)
        return due and self._has_evaluations

    def _evaluate(self, done: int) -> Metrics:
        """The metrics of an evaluation after `done` steps. Raises EvaluationDroppedError on every
        rank where there is no time to finish it."""
        under_way = EvaluationUnderWay(self.stop)
        moved = partial(self.watchdog.moved, "an evaluation")

        def on_batch() -> None:
            moved()
            under_way.drop_if_short()

        try:
            metrics = evaluate(
                model=self.run.model,
                objective=self.run.objective,
                batches=self.feed.evaluation(),
                device=self.run.device,
                on_batch=on_batch,
            )
            metrics |= ask(self.run, done, on_batch, moved)
        except EvaluationDroppedError:
            zero3.release_weights(self.run.engine)
            raise
        zero3.release_weights(self.run.engine)
        under_way.finished()
        return metrics
