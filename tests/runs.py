"""Configurations of whole runs, starting them as a user does, and reading what they wrote."""

from __future__ import annotations

import copy
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import alphatoken.training.metrics  # noqa: F401  declares the metrics of runs
from alphatoken.config.merging import merged
from alphatoken.util.metrics import metric_of
from tests.ranks import ROOT, run_program


def changed(values: dict[str, Any], **sections: dict[str, Any]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    return merged(values, copy.deepcopy(sections))


def metrics_of(folder: str | Path) -> list[dict[str, Any]]:
    """A run's metrics, a dict per step. Every number must be one that was declared."""
    lines = (Path(folder) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps: list[dict[str, Any]] = [json.loads(line) for line in lines]
    unknown = {name for step in steps for name in step if metric_of(name) is None}
    assert not unknown, f"not declared as metrics: {unknown}"
    return steps


def start_recipe(
    file: Path, *overrides: str, recipe: str = "sft"
) -> subprocess.CompletedProcess[str]:
    """What a user types: the local launcher, two CPU ranks. Nearly all of its time goes to imports,
    in five processes: `run_recipe` shows what needs no launcher."""
    command = ["launch/local.sh", f"recipes/{recipe}.py", "--config", str(file), *overrides]
    environment = {**os.environ, "RANKS": "2", "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )


def run_recipe(
    file: Path, *overrides: str, recipe: str = "sft"
) -> subprocess.CompletedProcess[str]:
    """The recipe with its command line on one rank, without a launcher and without imports."""
    words = [f"recipes/{recipe}.py", "--config", str(file), *overrides]
    (finished,) = run_program(*words, environments=[{"COLUMNS": "200"}])
    return finished
