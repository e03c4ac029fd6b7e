"""The folder of a run: where everything in it lies. It loads nothing, so that a command which names
a wrong folder says so at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from alphatoken.errors import UserError

STEP_FOLDER = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def valued_tokens(self) -> Path:
        return self.path / "valued_tokens.jsonl"

    @property
    def trackers(self) -> Path:
        return self.path / "trackers.json"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def export(self) -> Path:
        return self.path / "export"

    def evaluation(self, step: int) -> Path:
        """What the tasks of `train.evaluate` have found after so many optimizer steps."""
        return self.path / "evaluations" / f"step-{step}.json"

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeats"


def step_folders(checkpoints: Path) -> dict[int, Path]:
    """The checkpoints of a run by step, newest first, valid or not."""
    if not checkpoints.is_dir():
        return {}
    found = {
        int(match[1]): path
        for path in checkpoints.iterdir()
        if (match := STEP_FOLDER.fullmatch(path.name))
    }
    return dict(sorted(found.items(), reverse=True))


def checkpoints_to_export(run: Path, step: int | None = None) -> list[Path]:
    """The checkpoints of a run, newest first, or that of `step`, whether damaged or not. Raises
    UserError where there is none."""
    if not run.is_dir():
        raise UserError(f"the run folder {run} does not exist; train.output_dir names it")
    folders = step_folders(RunFolder(run).checkpoints)
    if not folders:
        own = f"; the run's own export is {run / 'export'}" if (run / "export").is_dir() else ""
        raise UserError(f"{run / 'checkpoints'} has no checkpoint; was train.save_every set?{own}")
    if step is not None and step not in folders:
        raise UserError(
            f"{run} has no checkpoint of step {step}, but of {', '.join(map(str, sorted(folders)))}"
        )
    return list(folders.values()) if step is None else [folders[step]]
