"""What a user sees of a run while it goes on and at its end, also of one that was continued with
other questions, and where the disk refuses."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from alphatoken.checkpoints.folder import RunFolder
from alphatoken.checkpoints.starting import start_run_folder
from alphatoken.config.file import save_config
from alphatoken.config.run import RunConfig
from alphatoken.errors import UserError
from alphatoken.evaluation.results import Evaluation, TaskResult, write_evaluation
from alphatoken.training.asking import show_change
from alphatoken.training.report import Report
from alphatoken.training.trackers import Trackers
from tests.test_trackers import response

STEP = {"loss_kept": 1.0, "loss_response": 1.5, "lr": 0.1, "tokens_per_second": 9.0}
COUNTS = {"kept_tokens": 1, "response_tokens": 2, "peak_memory_bytes": 0}


def config_of(folder: Path, **logging: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": "m"},
            "data": {"train": "t.jsonl", "validation": "v.jsonl"},
            "train": {"output_dir": str(folder)},
            "logging": logging,
        }
    )


def report_of(folder: Path, first_step: int = 0, *, owed: bool = False, **logging: Any) -> Report:
    return Report(
        config=config_of(folder, **logging),
        folder=RunFolder(folder),
        first_step=first_step,
        total_steps=2,
        active=True,
        owed=owed,
    )


def test_a_summary_compares_what_was_asked_at_both_ends(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = report_of(tmp_path)
    report.step({"step": 0, "eval_loss": 2.0, "eval_exact_match/gsm8k": 0.25})
    report.step({"step": 1, **STEP, **COUNTS})
    report.step({"step": 2, "eval_loss": 1.0, "eval_acc/arc": 0.5, **STEP, **COUNTS})
    report.finish(None)
    said = capsys.readouterr().out
    assert "2.0000 -> 1.0000" in said
    summary = said.partition("Run summary")[2]
    assert "gsm8k" not in summary
    assert "1 of 2" in summary


def test_a_finished_run_that_is_only_exported_has_a_summary(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_of(tmp_path, first_step=2).finish(None)
    said = capsys.readouterr().out
    assert "export" in said
    assert "optimizer steps" not in said


def test_evaluations_that_cannot_be_compared_are_told_of(tmp_path: Path) -> None:
    config, folder = config_of(tmp_path), RunFolder(tmp_path)
    for step, length in ((0, 512), (2, 1024)):
        items = [{"row": "a:1", "id": "x", "exact_match": 1.0, "answer": "1"}]
        settings = {"evaluation.max_length": length}
        result = TaskResult("exact_match", "target", settings, items)
        evaluation = Evaluation(f"step {step}", {"gsm8k": result})
        write_evaluation(folder.evaluation(step), evaluation, config.evaluation)
    said = io.StringIO()
    run: Any = SimpleNamespace(folder=folder, config=config)
    show_change(run, 2, Console(file=said))
    assert said.getvalue().startswith(
        "not compared: task gsm8k: evaluation.max_length was 512 before and is 1024 after"
    )


def test_a_step_without_responses_opens_no_file(tmp_path: Path) -> None:
    report_of(tmp_path).keep([])
    assert not [*tmp_path.iterdir()]


def test_a_step_whose_evaluation_is_owed_is_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its responses are written, its metrics come when the evaluation was made; also where that
    happened in a run that went on, and had to be begun again."""
    told: list[Any] = []

    def trackers(*_: Any, first_line: int, **__: Any) -> Any:
        told.append([f"from {first_line}"])
        return SimpleNamespace(
            keep=lambda responses: told[-1].extend(f"tokens of {each.step}" for each in responses),
            log=lambda metrics: told[-1].append(metrics["step"]),
        )

    monkeypatch.setattr("alphatoken.training.report.Trackers", trackers)
    first = report_of(tmp_path, report_to="tensorboard")
    first.step({"step": 0, "eval_loss": 3.0})
    first.keep([response(1)])
    for loss in (2.0, 2.5):
        again = report_of(tmp_path, first_step=1, owed=True, report_to="tensorboard")
        again.step({"step": 1, "eval_loss": loss})
        again.keep([response(2)])
        again.step({"step": 2, "eval_loss": 2.0})
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["eval_loss"]) for line in lines] == [(0, 3.0), (1, 2.5), (2, 2.0)]
    tokens = (tmp_path / "valued_tokens.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in tokens] == [1, 2]
    assert told == [["from 0", 0], *[["from 1", 1, "tokens of 2", 2]] * 2]


def test_a_disk_that_refuses_metrics_is_told_of(tmp_path: Path) -> None:
    report = report_of(tmp_path)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: Is a directory"):
        report.step({"step": 1})
    with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl: Is a directory"):
        report_of(tmp_path, first_step=1)


def test_a_run_folder_that_cannot_be_made_is_told_of(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder, nothing = RunFolder(tmp_path / "file" / "run"), SimpleNamespace()
    with pytest.raises(UserError, match=r"cannot write .*run: Not a directory"):
        start_run_folder(folder, config_of(folder.path), nothing, nothing, {})


def test_names_of_trackers_that_cannot_be_written_are_a_warning(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "trackers.json").mkdir()
    run = config_of(tmp_path, report_to="tensorboard")
    trackers = Trackers(run, RunFolder(tmp_path), first_line=0, say=said.append)
    trackers.log({"step": 1, "loss_kept": 1.0})
    trackers.finish()
    (line,) = said
    assert line.startswith(f"warning: {tmp_path / 'trackers.json'} cannot be written: ")


def test_a_configuration_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "config.yaml"
    save_config(config_of(tmp_path), file)
    before = file.read_text()

    def refuse(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("alphatoken.util.files.flush", refuse)
    with pytest.raises(OSError, match="No space left"):
        save_config(config_of(tmp_path / "other"), file)
    assert file.read_text() == before
    assert [*tmp_path.iterdir()] == [file]
