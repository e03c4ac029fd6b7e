"""What a user sees of a run: metrics.jsonl, trackers, the console, token values in colour,
and the HTML report. Rank 0 only."""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from alphatoken.checkpoints.folder import RunFolder
from alphatoken.config.run import RunConfig
from alphatoken.report.page import write_report
from alphatoken.report.responses import VALUE, ValuedResponse, append_responses
from alphatoken.training.trackers import Trackers
from alphatoken.util.files import publish_text, writing
from alphatoken.util.metrics import Metrics

TOLD_STEPS = 100
"""Optimizer steps of a run, about, of which responses are kept token by token."""


class Report:
    """Takes one dict of metrics per optimizer step. Ranks other than 0 pass `active=False` and
    write nothing. Building it raises UserError where what an earlier run left cannot be cut.

    `first_step` are the steps taken before; the metrics of the last of them are still to come where
    it is `owed`, as the evaluation after it was not finished.
    """

    def __init__(
        self,
        *,
        config: RunConfig,
        folder: RunFolder,
        first_step: int,
        total_steps: int,
        active: bool,
        owed: bool = False,
    ) -> None:
        self._config = config
        self._folder = folder
        self._active = active
        self._console = Console(quiet=not active, highlight=False)
        self._first_step, self._total_steps = first_step, total_steps
        self._started = time.monotonic()
        self._evaluations: list[Metrics] = []
        self._last: Metrics = {}
        self._untracked: Sequence[ValuedResponse] = ()
        """Responses of the step whose metrics are to come."""
        self._trackers: Trackers | None = None
        self._progress: Progress | None = None
        if not active:
            return
        next_step = first_step + 1 if first_step else 0
        first_line = first_step if owed else next_step
        for metrics in _cut_lines(folder.metrics, first_line):
            self._remember(metrics)
        _cut_lines(folder.valued_tokens, next_step)
        if config.logging.trackers:
            self._trackers = Trackers(config, folder, first_line=first_line, say=self.say)
        if self._console.is_terminal:
            self._progress = Progress(
                TextColumn("step {task.completed}/{task.total}"),
                BarColumn(bar_width=20),
                TextColumn("{task.description}  ETA"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "starting", total=total_steps, completed=first_step
            )

    @property
    def console(self) -> Console:
        """Where lines are printed; quiet on ranks other than 0."""
        return self._console

    def say(self, message: str) -> None:
        self._console.print(message, markup=False, soft_wrap=True)

    def step(self, metrics: Metrics) -> None:
        """Records the metrics of one optimizer step (from 1; 0 is the evaluation before
        training). Raises UserError when the disk refuses."""
        if not self._active:
            return
        file = self._folder.metrics
        with writing(file), file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(metrics) + "\n")
        if self._trackers is not None:
            self._trackers.keep(self._untracked)
            self._trackers.log(metrics)
        self._untracked = ()
        self._remember(metrics)
        step = int(metrics["step"])
        due = step % self._config.logging.every == 0
        if self._progress is not None:
            self._progress.update(self._task, description=_in_short(metrics), completed=step)
            due = due and self._config.logging.every > 1  # the bar shows every step already
        if due or _is_evaluation(metrics):
            rate = (time.monotonic() - self._started) / max(step - self._first_step, 1)
            left = (
                ""
                if step == 0
                else f"  ETA {timedelta(seconds=round(rate * (self._total_steps - step)))}"
            )
            self.say(f"step {step}/{self._total_steps}  {_in_full(metrics)}{left}")

    def responses_of(self, step: int) -> int:
        """How many responses of an optimizer step (from 1) are to be told token by token."""
        if not self._active or self._config.train.sequence_parallel > 1:
            return 0  # rank 0 has a part of a response
        every = max(self._config.logging.every, math.ceil(self._total_steps / TOLD_STEPS))
        last = step == self._total_steps
        due = last or step == 1 or step % every == 0
        most = self._config.logging.responses
        return max(most, 1) if last else most if due else 0  # the console shows one

    def keep(self, responses: Sequence[ValuedResponse]) -> None:
        """Keeps responses of a step in the run folder, and in trackers when its metrics come. That
        the disk refuses is said; a run goes on."""
        if not responses or not self._config.logging.responses:
            return
        self._untracked = responses
        try:
            append_responses(self._folder.valued_tokens, responses)
        except OSError as error:
            self.say(f"warning: {self._folder.valued_tokens} cannot be written: {error}")

    def _remember(self, metrics: Metrics) -> None:
        """For the summary at the end."""
        if _is_evaluation(metrics):
            self._evaluations.append(
                {key: value for key, value in metrics.items() if key.startswith("eval_")}
            )
        self._last = metrics

    def finish(self, told: ValuedResponse | None) -> None:
        """Ends the run: one valued response, a summary, and where everything lies."""
        self.close()
        if not self._active:
            return
        if self._trackers is not None:
            self._trackers.finish()
        if told is not None and told.is_valued:
            self._show_values(told)
        table = self._summary()
        table.add_row("time", str(timedelta(seconds=round(time.monotonic() - self._started))))
        for name in ("metrics.jsonl", "config.yaml", "export"):
            table.add_row(name, str(self._folder.path / name))
        if self._write_page():
            table.add_row(self._folder.report.name, str(self._folder.report))
        self._console.print(table)

    def _summary(self) -> Table:
        """What the run came to. A finished run that is only exported into a new folder has no lines
        to tell of, and a continued one may have been asked other things before."""
        table = Table(title="Run summary", title_justify="left", show_header=False)
        step = self._last
        if "step" in step:
            table.add_row("optimizer steps", str(step["step"]))
        if len(self._evaluations) > 1:
            first, *_, last = self._evaluations
            for key in (each for each in first if each in last):
                changed = "" if first[key] == last[key] else f" -> {last[key]:.4f}"
                table.add_row(key, f"{first[key]:.4f}{changed}")
        for key, name in (
            ("loss_kept", "loss of kept tokens"),
            ("rewards_margin", "reward margin"),
        ):
            if key in step:
                table.add_row(f"{name}, last step", f"{step[key]:.4f}")
        if "kept_tokens" in step:
            kept, of = step["kept_tokens"], step["response_tokens"]
            table.add_row("kept tokens, last step", f"{kept} of {of}")
            peak = step["peak_memory_bytes"] / 2**30
            table.add_row("peak memory of rank 0", f"{peak:.2f} GiB")
        return table

    def _write_page(self) -> bool:
        """Whether the HTML report was written. It is no reason for a run to fail, whatever
        happens."""
        try:
            write_report([self._folder.path], self._folder.report)
        except Exception as error:
            self.say(f"warning: no {self._folder.report}: {type(error).__name__}: {error}")
            return False
        return True

    def close(self) -> None:
        """Gives the terminal back."""
        if self._progress is not None:
            self._progress.stop()

    def _show_values(self, told: ValuedResponse) -> None:
        values = told.columns[VALUE]
        ranked = sorted(values)
        fifth = max(1, len(ranked) // 5)
        coloured = self._console.is_terminal
        marks = {"most": ("", "black on green"), "least": ("", "white on red"), "": ("", "")}
        if not coloured:  # a log file has no colours
            marks = {"most": ("+", ""), "least": ("-", ""), "": ("", "")}
        text = Text()
        classes = [
            "most" if value >= ranked[-fifth] else "least" if value <= ranked[fifth - 1] else ""
            for value in values
        ]
        for kind, run in itertools.groupby(
            zip(classes, told.tokens, strict=True), key=lambda pair: pair[0]
        ):
            mark, style = marks[kind]
            piece = "".join(token for _, token in run)
            text.append(f"[{mark}{piece}{mark}]" if mark else piece, style=style)
        legend = (
            "green: most valued fifth, red: least"
            if coloured
            else "[+most valued fifth+] [-least valued fifth-]"
        )
        self._console.print(f"\nOne response of the last step ({legend}):", markup=False)
        self._console.print(text, soft_wrap=True)


def _in_short(metrics: Metrics) -> str:
    if "loss_kept" not in metrics:
        return _evaluated(metrics)
    kept = 100 * metrics["kept_tokens"] / max(metrics["response_tokens"], 1)
    vetoed = f"  vetoed {100 * metrics['vetoed_share']:.1f}%" if "vetoed_share" in metrics else ""
    objective = f"loss {metrics['loss_kept']:.4f}"
    if "rewards_margin" in metrics:
        objective = (
            f"margin {metrics['rewards_margin']:.4f}  accuracy {metrics['rewards_accuracy']:.3f}"
        )
    return f"{objective}  kept {kept:.1f}%{vetoed}  {metrics['tokens_per_second']:.0f} tokens/s"


def _in_full(metrics: Metrics) -> str:
    parts = [_in_short(metrics)]
    if "loss_kept" in metrics:
        if "rewards_margin" not in metrics:
            parts.append(f"loss of all {metrics['loss_response']:.4f}")
        parts.append(f"lr {metrics['lr']:.2e}")
        if _is_evaluation(metrics):
            parts.append(_evaluated(metrics))
    return "  ".join(parts)


def _is_evaluation(metrics: Metrics) -> bool:
    return any(name.startswith("eval_") for name in metrics)


def _evaluated(metrics: Metrics) -> str:
    parts = []
    if "eval_loss" in metrics:
        parts.append(f"eval_loss {metrics['eval_loss']:.4f}")
    if "eval_rewards_accuracy" in metrics:
        parts.append(
            f"eval_accuracy {metrics['eval_rewards_accuracy']:.3f} (longer "
            f"{metrics['eval_length_accuracy']:.3f})"
        )
    asked = {name: value for name, value in metrics.items() if "/" in name and "eval_" in name}
    return "  ".join([*parts, *(f"{name} {value:.4f}" for name, value in asked.items())])


def _cut_lines(file: Path, first_line: int) -> list[Any]:
    """Drops the lines from step `first_line` on, which will be written again, so that a resumed run
    continues its file; returns the rest. Raises UserError when the disk refuses."""
    with writing(file):
        return _lines_before(file, first_line)


def _lines_before(file: Path, first_line: int) -> list[Any]:
    if not file.exists():
        return []
    if first_line == 0:  # the evaluation before training is done again, too
        file.unlink()
        return []
    kept, text = list[Any](), list[str]()
    # Not splitlines: a token may hold any other line separator of Unicode.
    for line in file.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            read = json.loads(line)
        except ValueError:  # the run was killed while it wrote its last line
            break
        if read["step"] < first_line:
            kept.append(read)
            text.append(f"{line}\n")
    publish_text(file, "".join(text))
    return kept
