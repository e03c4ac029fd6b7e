"""A run as its folder tells of it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alphatoken.checkpoints.folder import RunFolder
from alphatoken.errors import UserError
from alphatoken.report.responses import ValuedResponse, read_responses
from alphatoken.util.metrics import Metrics


@dataclass(frozen=True)
class RunRecord:
    """What a run has written so far."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    """By dotted key, as `config.yaml` has it."""
    lines: Sequence[Metrics]
    """Of `metrics.jsonl`; the first may be the evaluation of step 0."""
    responses: Sequence[ValuedResponse]

    @property
    def steps(self) -> Sequence[Metrics]:
        """The lines of optimizer steps."""
        return [line for line in self.lines if line["step"] > 0]

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, number) wherever the metric was written."""
        return [(int(line["step"]), line[metric]) for line in self.lines if metric in line]


def read_runs(folders: Sequence[Path]) -> list[RunRecord]:
    """Several runs, by the names of their folders, or by the paths given where names recur. Raises
    UserError for a folder that holds no run, naming the file that is missing or damaged."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError("the same run is given twice")
    try:
        return [_read_run(folder, name) for folder, name in zip(folders, names, strict=True)]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def _read_run(folder: Path, name: str) -> RunRecord:
    files = RunFolder(folder)
    for file in (files.config, files.metrics):
        if not file.is_file():
            raise UserError(f"{file} does not exist, so {folder} is no folder of a run")
    try:
        config = yaml.safe_load(files.config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{files.config} cannot be read: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"{files.config} is no configuration of a run")
    return RunRecord(
        name=name,
        folder=folder,
        config=dict(_flat(config)),
        lines=_read_metrics(files.metrics),
        responses=read_responses(files.valued_tokens),
    )


def _read_metrics(file: Path) -> list[Metrics]:
    text = file.read_text(encoding="utf-8", errors="replace")
    if not text.strip():
        raise UserError(f"{file} is empty: the run has not finished its first step")
    lines = []
    for number, line in enumerate(text.splitlines(), start=1):
        try:
            metrics = json.loads(line)
        except ValueError:
            metrics = None
        if not _is_metrics(metrics):
            raise UserError(
                f"{file}:{number} is no line of metrics: {line[:60]!r}. A run that was killed "
                "while it wrote leaves such a last line; resume it, or delete the line"
            )
        lines.append(metrics)
    return lines


def _is_metrics(value: object) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("step"), int)
        and all(isinstance(number, int | float) for number in value.values())
    )


def _flat(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Values by dotted key."""
    found: list[tuple[str, Any]] = []
    for key, value in config.items():
        name = f"{prefix}{key}"
        found += _flat(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found
