"""A run in a few numbers, where its time went, and how runs were configured differently."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from alphatoken.report.charts import PHASE
from alphatoken.report.reading import RunRecord
from alphatoken.report.wording import number, sentence_of, unit_of

STEP = f"{PHASE}step"
SETTINGS = (
    ("model", "model.name_or_path"),
    ("training rows", "data.train"),
    ("held-out rows", "data.validation"),
    ("preference objective", "preference.objective"),
    ("values by", "valuation.estimator"),
    ("policy", "selection.policy"),
    ("keep ratio", "selection.keep_ratio"),
    ("rows a step", "train.global_batch_size"),
    ("learning rate", "optim.lr"),
    ("seed", "train.seed"),
)
PHASES = {
    "ahead": "valuing the whole step ahead",
    "forward": "forward",
    "score": "scoring",
    "backward": "backward",
    "refresh": "held-out signals and drift",
    "optimizer": "optimizer",
    "reference": "reference model",
}


@dataclass(frozen=True)
class Fact:
    """A line of the summary: what it is, and its text for each run."""

    name: str
    sentence: str
    cells: Sequence[str]


@dataclass(frozen=True)
class Phase:
    """Time of a part of the steps, of one run, in seconds."""

    name: str
    total: float
    share: float
    """Of the time of all steps."""
    mean: float
    """Per optimizer step."""


def summary_of(runs: Sequence[RunRecord]) -> list[Fact]:
    """What is known of each run as a whole."""
    facts = [Fact("folder", "", [str(run.folder) for run in runs])]
    for name, key in SETTINGS:
        cells = [setting(run.config.get(key)) for run in runs]
        if any(cells):
            facts.append(Fact(name, f"`{key}`", cells))
    facts.append(Fact("optimizer steps", "", [_steps(run) for run in runs]))
    for metric in ("eval_loss", "eval_rewards_accuracy", "loss_kept", "loss_response"):
        if any(run.curve(metric) for run in runs):
            facts.append(
                Fact(metric, sentence_of(metric), [_first_and_last(run, metric) for run in runs])
            )
    facts.append(
        Fact("kept tokens", "of the response tokens of all steps", [_kept(run) for run in runs])
    )
    facts.append(Fact("time of all steps", sentence_of(STEP), [_time(run) for run in runs]))
    for name, metric, gather in (
        ("tokens per second, mean of the steps", "tokens_per_second", _mean),
        ("peak memory", "peak_memory_bytes", max),
    ):
        cells = []
        for run in runs:
            values = [value for _, value in run.curve(metric)]
            cells.append(number(gather(values), unit_of(metric)) if values else "")
        facts.append(Fact(name, sentence_of(metric), cells))
    return facts


def differing_settings(runs: Sequence[RunRecord]) -> list[Fact]:
    """Configuration keys in which the runs are not alike; none of one run."""
    keys = sorted({key for run in runs for key in run.config})
    written = {key: [json.dumps(run.config.get(key), default=str) for run in runs] for key in keys}
    return [Fact(key, "", cells) for key, cells in written.items() if len(set(cells)) > 1]


def phases_of(run: RunRecord) -> list[Phase]:
    """Where the time of the optimizer steps went, and what is left of it; nothing of a run without
    a step."""
    steps = run.steps
    whole = math.fsum(step.get(STEP, 0.0) for step in steps)
    if not whole:
        return []
    totals = {
        title: math.fsum(step.get(f"{PHASE}{phase}", 0.0) for step in steps)
        for phase, title in PHASES.items()
        if any(f"{PHASE}{phase}" in step for step in steps)
    }
    totals["rest of the step"] = max(0.0, whole - math.fsum(totals.values()))
    return [
        Phase(title, total, total / whole, total / len(steps)) for title, total in totals.items()
    ]


def setting(value: Any) -> str:
    """A value of a configuration as its file has it; of sources of data their paths."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, list) and all(isinstance(each, dict) and "path" in each for each in value):
        return ", ".join(str(each["path"]) for each in value)
    return json.dumps(value, default=str)


def _steps(run: RunRecord) -> str:
    done, planned = int(run.lines[-1]["step"]), run.config.get("train.max_steps")
    return f"{done} of {planned}" if planned is not None else str(done)


def _first_and_last(run: RunRecord, metric: str) -> str:
    curve, unit = run.curve(metric), unit_of(metric)
    if not curve:
        return ""
    (_, first), (_, last) = curve[0], curve[-1]
    return number(first, unit) if len(curve) == 1 else f"{number(first)} → {number(last, unit)}"


def _kept(run: RunRecord) -> str:
    kept, of = (
        sum(int(step.get(name, 0)) for step in run.steps)
        for name in ("kept_tokens", "response_tokens")
    )
    return f"{kept:,} of {of:,} ({kept / of:.1%})" if of else ""


def _time(run: RunRecord) -> str:
    seconds = math.fsum(value for _, value in run.curve(STEP))
    return f"{number(seconds, unit_of(STEP))} ({timedelta(seconds=round(seconds))})"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)
