"""What an evaluation found, as a file that another one can be compared with and as a table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table

from alphatoken.config.evaluation import TASKS, EvaluationConfig, EvaluationTask, Part
from alphatoken.config.run import RunConfig
from alphatoken.errors import UserError
from alphatoken.evaluation.measures import Item, measured
from alphatoken.evaluation.rows import pair_lengths
from alphatoken.util.files import publish_text
from alphatoken.util.resampling import Estimate

FORMAT_VERSION = 1
PACKAGES = ("alphatoken", "torch", "transformers")


@dataclass(frozen=True)
class TaskResult:
    """What one task found."""

    task: str
    part: Part
    settings: Mapping[str, Any]
    """What decides the numbers besides model and items; equal in evaluations that can be
    compared."""
    items: Sequence[Item]

    def measured(self, resamples: int, seed: int) -> dict[str, Estimate]:
        """Its measures by name."""
        return measured(self.task, self.items, resamples, seed)


@dataclass(frozen=True)
class Evaluation:
    """What all tasks found of a model, by their names."""

    model: str
    tasks: Mapping[str, TaskResult]


def result_of(task: EvaluationTask, config: RunConfig, items: Sequence[Item]) -> TaskResult:
    """The items of a task with what decided their numbers."""
    settings: dict[str, Any] = {"dtype": config.model.dtype}
    if task.task == "target_loss":
        settings["data.max_length"] = config.data.max_length
    elif task.task == "preference_accuracy":
        settings["preference.max_prompt_tokens"], settings["preference.max_response_tokens"] = (
            pair_lengths(config)
        )
    else:
        settings["evaluation.max_length"] = config.evaluation.max_length
    if task.task == "exact_match":
        settings["match"] = task.match
    if task.task == "exact_match" or task.traits.runs_code:
        settings["max_new_tokens"] = task.max_new_tokens
    if task.traits.runs_code:
        settings["evaluation.code_seconds"] = config.evaluation.code_seconds
        settings["evaluation.code_megabytes"] = config.evaluation.code_megabytes
    return TaskResult(task.task, task.counts_to, settings, items)


def write_evaluation(file: Path, evaluation: Evaluation, config: EvaluationConfig) -> None:
    """Writes an evaluation whole or not at all. Raises UserError where the disk refuses."""
    tasks = {
        name: {
            "task": each.task,
            "part": each.part,
            "settings": dict(each.settings),
            "measures": {
                measure: found.as_json()
                for measure, found in each.measured(config.resamples, config.seed).items()
            },
            "items": list(each.items),
        }
        for name, each in evaluation.tasks.items()
    }
    content = {
        "format_version": FORMAT_VERSION,
        "model": evaluation.model,
        "versions": {package: version(package) for package in PACKAGES},
        "resamples": config.resamples,
        "seed": config.seed,
        "tasks": tasks,
    }
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        publish_text(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write the evaluation {file}: {error.strerror}") from None


def read_evaluation(file: Path) -> Evaluation:
    """Reads what `write_evaluation` wrote. Raises UserError for a file that is something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the evaluation {file}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is not an evaluation: {error}") from None
    known = isinstance(content, dict) and "tasks" in content and "format_version" in content
    if not known or content["format_version"] != FORMAT_VERSION:
        found = content.get("format_version") if isinstance(content, dict) else None
        raise UserError(
            f"{file} is not an evaluation that this version reads (format_version {found!r}, not "
            f"{FORMAT_VERSION}): recipes/evaluate.py writes them"
        )
    try:
        tasks = {
            name: TaskResult(each["task"], each["part"], each["settings"], each["items"])
            for name, each in content["tasks"].items()
        }
        evaluation = Evaluation(content["model"], tasks)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({type(error).__name__}: {error}): evaluate again"
        ) from None
    for name, result in tasks.items():
        if result.task not in TASKS:
            raise UserError(f"{file}: task {name} is of an unknown kind, {result.task!r}")
    return evaluation


def table_of(evaluation: Evaluation, config: EvaluationConfig) -> Table:
    """Every measure of every task, with its 95 % interval."""
    table = Table("task", "measure", "value", "95 % interval", "items", title_justify="left")
    table.title = f"Evaluation of {evaluation.model}"
    for name, each in evaluation.tasks.items():
        for measure, found in each.measured(config.resamples, config.seed).items():
            interval = f"[{found.low:.4f}, {found.high:.4f}]"
            table.add_row(name, measure, f"{found.value:.4f}", interval, str(len(each.items)))
    return table
