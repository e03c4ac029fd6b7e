"""Trackers get what the run folder gets; a resumed run continues the same run there; one that fails
is told of and left out."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from alphatoken.checkpoints.folder import RunFolder
from alphatoken.config.run import RunConfig
from alphatoken.config.training import TRACKERS
from alphatoken.errors import UserError
from alphatoken.report.responses import ValuedResponse
from alphatoken.training import trackers
from alphatoken.training.trackers import Trackers, check_trackers

VALUES: dict[str, Any] = {
    "model": {"name_or_path": "m"},
    "data": {"train": ["a.jsonl", "b*.jsonl"], "validation": "v.jsonl"},
    "train": {"output_dir": "runs/r"},
}


def config(**logging: Any) -> RunConfig:
    return RunConfig.model_validate({**VALUES, "logging": logging})


def response(step: int) -> ValuedResponse:
    """One of two tokens, the second of which was dropped."""
    return ValuedResponse(
        step=step,
        where="a.jsonl:7",
        length=2,
        given=((0, "What?"),),
        tokens=(" It", " is"),
        ends_turn=(False, False),
        weights=(1.0, 0.0),
        columns={"loss": (0.5, 0.25), "composite": (2.0, -1.0)},
    )


def report(run: RunConfig, folder: Path, steps: Sequence[int], *, begin: int = 0) -> list[str]:
    """Reports steps of a run whose first line is that of step `begin`; what was said."""
    said: list[str] = []
    folder.mkdir(exist_ok=True)
    used = Trackers(run, RunFolder(folder), first_line=begin, say=said.append)
    for step in steps:
        used.keep([response(step)])
        used.log({"step": step, "loss_kept": 1 / (step + 1), "loss_kept/b*": 0.5})
    used.finish()
    return said


def test_tensorboard_has_every_number_and_what_it_means(tmp_path: Path) -> None:
    run = config(report_to="tensorboard")
    assert report(run, tmp_path / "r", [0, 1, 2, 3]) == []
    assert report(run, tmp_path / "r", [3, 4], begin=3) == []
    read = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in read.Scalars("loss_kept")}
    assert losses == pytest.approx({step: 1 / (step + 1) for step in range(5)})
    steps = [event.step for event in read.Scalars("loss_kept")]
    assert steps == [0, 1, 2, 3, 4], "a step that is done again takes the place of the one before"
    (text, *_) = read.Tensors("metrics/text_summary")
    assert b"mean loss of the tokens trained on" in text.tensor_proto.string_val[0]
    (settings,) = (tmp_path / "r" / "tensorboard").glob("*/hparams.yml")
    assert "train.global_batch_size: 64" in settings.read_text()


@pytest.mark.slow
def test_wandb_offline_has_tables_and_continues_its_run(tmp_path: Path) -> None:
    """By the key of its mode alone, as before there was `report_to`."""
    run = config(wandb="offline", project="p")
    assert report(run, tmp_path / "r", [0, 1]) == []
    assert report(run, tmp_path / "r", [2], begin=2) == []
    name = json.loads((tmp_path / "r" / "trackers.json").read_text())["wandb"]
    begun = sorted((tmp_path / "r" / "wandb").glob(f"offline-run-*-{name}"))
    assert len(begun) == 2
    assert len([*(tmp_path / "r" / "wandb").glob("offline-run-*")]) == 2
    table = json.loads(next(begun[0].rglob("valued_tokens_*.table.json")).read_text())
    assert table["columns"] == ["row", "branch", "place", "token", "weight", "loss", "composite"]
    assert table["data"][1] == ["a.jsonl:7", "", 1, " is", 0.0, 0.25, -1.0]
    assert report(run, tmp_path / "r", [0]) == [], "one that begins anew is another run"
    assert json.loads((tmp_path / "r" / "trackers.json").read_text())["wandb"] != name


class Mlflow(ModuleType):
    """What accelerate calls of mlflow, as far as a run needs it."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.parameters: list[dict[str, Any]] = []
        self.utils = SimpleNamespace(
            validation=SimpleNamespace(MAX_PARAM_VAL_LENGTH=500, MAX_PARAMS_TAGS_PER_BATCH=100)
        )

    def search_experiments(self, filter_string: str) -> list[Any]:
        return []

    def create_experiment(self, **_: Any) -> str:
        return "1"

    def start_run(self, run_id: str | None, **_: Any) -> Any:
        self.current = run_id or f"run{len(self.runs)}"
        self.runs.setdefault(self.current, {})
        return SimpleNamespace(info=SimpleNamespace(run_id=self.current))

    def log_params(self, values: dict[str, Any]) -> None:
        self.parameters.append(values)

    def log_metrics(self, values: dict[str, float], step: int) -> None:
        self.runs[self.current][step] = values

    def end_run(self) -> None:
        pass


def test_mlflow_continues_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    run = config(report_to=["mlflow"])
    assert report(run, tmp_path / "r", [0, 1]) == []
    written = len(mlflow.parameters)
    assert report(run, tmp_path / "r", [2], begin=2) == []
    assert {name: sorted(steps) for name, steps in mlflow.runs.items()} == {"run0": [0, 1, 2]}
    assert len(mlflow.parameters) == written, "parameters cannot be written twice"
    assert report(run, tmp_path / "late", [5], begin=5) == []
    assert [*mlflow.runs["run1"]] == [5], "report_to may be given first to a resumed run"
    assert len(mlflow.parameters) == 2 * written
    assert mlflow.runs["run0"][1]["loss_kept.b_"] == 0.5, (
        "it refuses an asterisk, and keeps loss_kept as a file, which is no folder"
    )


class Failing(tracking.GeneralTracker):  # type: ignore[misc]
    """A server that answers once."""

    name = "trackio"
    requires_logging_directory = False

    def __init__(self, run_name: str, **_: Any) -> None:
        super().__init__()
        self.asked = 0

    @property
    def tracker(self) -> Any:
        return SimpleNamespace(name="r")

    def log(self, values: dict[str, float], step: int | None = None, **_: Any) -> None:
        self.asked += 1
        if self.asked > 1:
            raise ConnectionError("no route to host")


def test_a_tracker_that_fails_is_told_of_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "trackio", Failing)
    said = report(config(report_to=["trackio", "tensorboard"]), tmp_path / "r", [1, 2, 3])
    numbers = tmp_path / "r" / "metrics.jsonl"
    assert said == [
        f"warning: trackio gets no more of this run, whose numbers are in {numbers}: "
        "ConnectionError: no route to host"
    ]
    read = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    assert len(read.Scalars("loss_kept")) == 3


def test_a_tracker_without_its_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(config(report_to=["tensorboard", "wandb"]).logging)
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"report_to=mlflow needs .* mlflow: pip install mlflow"):
        check_trackers(config(report_to=["mlflow"]).logging)
    check_trackers(config().logging)


def test_each_tracker_has_one_way_to_be_used() -> None:
    assert trackers.KINDS.keys() == TRACKERS.keys()
    assert trackers.KINDS.keys() <= tracking.LOGGER_TYPE_TO_CLASS.keys()
    assert config(report_to=["wandb", "wandb"], wandb="online").logging.trackers == ("wandb",)
