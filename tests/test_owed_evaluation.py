"""Runs that are asked to stop in the middle of an evaluation, and have no time to finish it."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.checkpoints.folder import step_folders
from alphatoken.training.stopping import EvaluationDroppedError, EvaluationUnderWay, StopRequest
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of

TIMING = ("seconds", "tokens_per_second", "mfu", "peak")


def left_out(
    monkeypatch: pytest.MonkeyPatch,
    *,
    last: float | None,
    batches: list[float],
    waited: float | None = 0.0,
    grace: float | None = 60.0,
) -> int:
    """How many batches are given up of an evaluation whose batches take so many seconds, where the
    `last` one took as long as that, a save takes 10 s, and the run was asked to stop `waited`
    seconds before it begins; None for never."""
    clock = SimpleNamespace(now=1000.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("alphatoken.training.stopping.time", clock)
    with StopRequest(torch.device("cpu"), grace=grace) as stop:
        stop.took("save", 10.0)
        if last is not None:
            stop.took("evaluation", last)
        if waited is not None:
            os.kill(os.getpid(), signal.SIGTERM)
            clock.now += waited
        under_way = EvaluationUnderWay(stop)
        for number, seconds in enumerate(batches):
            try:
                under_way.drop_if_short()
            except EvaluationDroppedError:
                return len(batches) - number
            clock.now += seconds
    return 0


def test_an_evaluation_is_given_up_where_it_would_last_too_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It is expected to take as long as the last one, or half of the grace period, and one more
    batch like the longest so far."""

    def given_up(*batches: float, **named: Any) -> int:
        return left_out(monkeypatch, batches=[*batches], **named)

    assert given_up(20, 20, last=40) == 0
    assert given_up(20, 20, last=40, waited=11) == 2
    assert given_up(1, 1, last=None, waited=19) == 0, "30 s and 10 s of 41 s"
    assert given_up(1, 1, last=None, waited=21) == 2
    assert given_up(20, 20, 20, last=10) == 1, "after 40 s there is no time for another 20 s"
    assert given_up(1, 40, 1, 1, last=10) == 2
    assert given_up(500, 500, last=1000, waited=None) == 0, "nobody asked"
    assert given_up(500, 500, last=1000, grace=None) == 0, "it always has time"


def test_how_long_an_evaluation_took_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("alphatoken.training.stopping.time", clock)
    with StopRequest(torch.device("cpu"), grace=60.0) as stop:
        stop.took("save", 10.0)
        under_way = EvaluationUnderWay(stop)
        clock.now += 45.0
        under_way.finished()
        os.kill(os.getpid(), signal.SIGTERM)
        EvaluationUnderWay(stop).drop_if_short()
        clock.now += 6.0
        with pytest.raises(EvaluationDroppedError):
            EvaluationUnderWay(stop).drop_if_short()


@pytest.fixture
def values(run_values: dict[str, Any], tiny_data: dict[str, str]) -> dict[str, Any]:
    """Plain fine-tuning of six steps with a rate that is far too high, so that one of the first
    steps is the best; evaluated at every one, on rows and on two tasks."""
    generated: dict[str, Any] = {
        "task": "exact_match",
        "name": "maths",
        "match": "text",
        "max_new_tokens": 5,
    }
    tasks = [generated, {"task": "target_loss", "part": "retention"}]
    return changed(
        run_values,
        valuation={"enabled": False},
        optim={"lr": 0.5, "warmup_ratio": 0.0, "schedule": "constant"},
        train={"max_steps": 6, "eval_every": 1, "evaluate": ["maths", "target_loss"]},
        evaluation={
            "tasks": [{**task, "data": tiny_data["validation"]} for task in tasks],
            "batch_size": 3,
            "resamples": 20,
        },
    )


class Stopped:
    """A run that is stopped in evaluations, each time in new processes, with so many seconds of
    grace."""

    def __init__(
        self, values: dict[str, Any], folder: Path, ranks: int, grace: float = 0.01
    ) -> None:
        train = {"output_dir": str(folder), "resume": "auto", "grace_seconds": grace}
        self.folder, self._ranks = folder, ranks
        self._values = changed(values, train=train)
        self._times = 0

    def go_on(self, at: tuple[int, int] | None = None, **named: Any) -> tuple[str, list[list[int]]]:
        """What rank 0 said, and the batches of each evaluation by rank. at: (evaluation, batch) in
        which the last rank is asked to stop; others are the case's."""
        self._times += 1
        log = self.folder.with_name(f"{self.folder.name}-{self._times}")
        asked = None if at is None else (self._ranks - 1, *at)
        found = run_ranks(
            "asked_in_evaluation", self._ranks, log, values=self._values, at=asked, **named
        )
        return (log / "rank-0.log").read_text(encoding="utf-8"), found

    @property
    def steps(self) -> list[int]:
        """Those that metrics.jsonl tells of."""
        there = (self.folder / "metrics.jsonl").exists()
        return [step["step"] for step in metrics_of(self.folder)] if there else []

    @property
    def checkpoints(self) -> list[int]:
        return sorted(step_folders(self.folder / "checkpoints"))


def comparable(folder: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in step.items() if not key.startswith(TIMING)}
        for step in metrics_of(folder)
    ]


def answers_of(folder: Path) -> dict[str, Any]:
    """What tasks found, by file."""
    files = sorted((folder / "evaluations").glob("*.json"))
    return {file.name: json.loads(file.read_text(encoding="utf-8"))["tasks"] for file in files}


def check_same(stopped: Path, straight: Path) -> None:
    """Metrics, answers, told responses and exported weights are the same, bit for bit."""
    assert comparable(stopped) == comparable(straight)
    assert answers_of(stopped) == answers_of(straight)
    told = "valued_tokens.jsonl"
    assert (stopped / told).read_text() == (straight / told).read_text()
    one, other = (
        AutoModelForCausalLM.from_pretrained(each / "export").state_dict()
        for each in (stopped, straight)
    )
    assert all(torch.equal(weight, other[name]) for name, weight in one.items())


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_an_evaluation_without_time_is_made_first_when_the_run_goes_on(
    ranks: int, values: dict[str, Any], tmp_path: Path
) -> None:
    """Before the first step, after it, again in the one that is owed, and in the one that ends
    training: best, count and everything written are those of a run that was left alone."""
    values = changed(values, train={"keep_best": "eval_loss", "stop_after": 3})
    straight, run = tmp_path / "straight", Stopped(values, tmp_path / "stopped", ranks)
    whole = changed(values, train={"output_dir": str(straight)})
    first, *_ = run_ranks("asked_in_evaluation", ranks, tmp_path / "ranks", values=whole)
    batches, last = first[0], len(first) - 1
    assert 4 <= last <= 6, "one of the first three steps is to be the best"

    said, begun = run.go_on(at=(1, 3))
    assert "no time to finish the evaluation before the first step" in said
    assert "stopped after no step, so nothing is saved" in said
    assert begun == [[3]] * ranks
    assert (run.steps, run.checkpoints) == ([], [])

    said, begun = run.go_on(at=(2, batches - 1))
    assert "no time to finish the evaluation after step 1" in said
    owed = "train.resume=auto, which makes the evaluation of that step first"
    assert "stopped after step 1, which is saved; continue with the same command" in said
    assert owed in said
    assert begun == [[batches, batches - 1]] * ranks
    assert (run.steps, run.checkpoints) == ([0], [1])

    said, begun = run.go_on(at=(1, 2))
    assert owed in said
    assert begun == [[2]] * ranks
    assert (run.steps, run.checkpoints) == ([0], [1])

    # In its last batch there is nothing left of it to give up.
    said, begun = run.go_on(at=(1, batches))
    assert "the evaluation after step 1 is still owed: it comes first" in said
    assert "no time" not in said
    assert owed not in said
    assert "stopped after step 1, which is saved" in said
    assert (begun, run.steps) == ([[batches]] * ranks, [0, 1])

    said, begun = run.go_on(at=(last - 1, 1))
    assert "owed" not in said
    assert f"no time to finish the evaluation after step {last}" in said
    assert begun == [[*[batches] * (last - 2), 1]] * ranks
    assert run.steps == [*range(last)]
    assert last in run.checkpoints

    said, begun = run.go_on()
    assert f"training ends after step {last} of 6: eval_loss was not better in 3" in said
    assert begun == [[batches]] * ranks
    check_same(run.folder, straight)


@pytest.fixture
def aged(run_values: dict[str, Any], tiny_fisher: Path) -> dict[str, Any]:
    """Five steps with values, by held-out signals that are drawn before every other step, and an
    evaluation after each."""
    return changed(
        run_values,
        valuation={"refresh_every": 2, "fisher": str(tiny_fisher)},
        optim={"warmup_ratio": 0.0},
        train={"max_steps": 5, "eval_every": 1},
    )


@pytest.mark.slow
def test_an_evaluation_where_nothing_can_be_saved_is_made_again_with_its_step(
    aged: dict[str, Any], tmp_path: Path
) -> None:
    """A checkpoint can be continued after even steps, as held-out signals are no part of it, and
    after the last one. What the last one owes, another number of ranks can make as well."""
    aged = changed(aged, train={"save_every": 2})
    straight, run = tmp_path / "straight", Stopped(aged, tmp_path / "stopped", 2)
    whole = changed(aged, train={"output_dir": str(straight)})
    (begun, _) = run_ranks("asked_in_evaluation", 2, tmp_path / "ranks", values=whole)
    assert begun == [2] * 6

    said, _ = run.go_on(at=(4, 1))
    assert "no time to finish the evaluation after step 3: it will be made again" in said
    assert said.splitlines()[-1] == (
        "stopped after step 2, which is saved; continue with the same command and train.resume=auto"
    )
    assert (run.steps, run.checkpoints) == ([0, 1, 2], [2])

    said, begun = run.go_on(at=(3, 1))
    assert "owed" not in said
    assert "no time to finish the evaluation after step 5: it will be made again" in said
    assert "stopped after step 5, which is saved" in said
    assert begun == [[2, 2, 1]] * 2
    assert (run.steps, run.checkpoints) == ([0, 1, 2, 3, 4], [2, 4, 5])

    alone = Stopped(aged, tmp_path / "alone", 1)
    shutil.copytree(run.folder, alone.folder)
    said, begun = alone.go_on()
    assert "was written by 2 ranks and converted for 1" in said
    assert begun == [[3]]
    for one, other in zip(comparable(alone.folder), comparable(straight), strict=True):
        assert one == pytest.approx(other, rel=1e-5)

    run.go_on()
    check_same(run.folder, straight)


@pytest.mark.slow
def test_a_step_is_finished_where_its_evaluation_can_be_owed(
    aged: dict[str, Any], tmp_path: Path
) -> None:
    """Evaluations that take far longer than the time that is left: the second step, which can be
    saved, is finished without its evaluation; the third, which cannot, is dropped."""
    for step, said, begun in (
        (2, "no time to finish the evaluation after step 2", [3, 3, 0]),
        (3, "no time to finish step 3", [3, 3, 3]),
    ):
        run = Stopped(aged, tmp_path / str(step), 1, grace=600.0)
        shown, (found,) = run.go_on(in_step=step)
        assert [line for line in shown.splitlines() if "no time" in line] == [
            f"{said}: it will be {'made' if step == 2 else 'done'} again"
        ]
        assert "stopped after step 2, which is saved" in shown
        assert found == begun
        assert run.checkpoints == [2]


@pytest.mark.slow
def test_an_evaluation_that_was_made_is_owed_no_more(aged: dict[str, Any], tmp_path: Path) -> None:
    """Also where nothing else is saved: no checkpoint is due, and none is kept for being best."""
    run = Stopped(aged, tmp_path / "run", 1)
    run.go_on(at=(3, 2))
    said, begun = run.go_on(at=(1, 3))  # in the last batch, so that it is finished
    assert "the evaluation after step 2 is still owed: it comes first" in said
    assert "stopped after step 2, which is saved" in said
    assert (begun, run.steps, run.checkpoints) == ([[3]], [0, 1, 2], [2])
    said, begun = run.go_on(at=(1, 1))
    assert "owed" not in said
    assert "no time to finish the evaluation after step 3" in said
