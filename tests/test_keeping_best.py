"""Evaluations during a run: what they ask, which checkpoint they keep, and when they end it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from alphatoken.checkpoints.best import Best, updated, why_void
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.errors import UserError
from alphatoken.evaluation.rows import Questions, Setting
from alphatoken.training.asking import questions_of
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of

LOSS, MATCH = "eval_loss", "eval_exact_match/maths"


def test_the_best_so_far_is_the_first_of_equals() -> None:
    best = None
    for step, value in enumerate([3.0, 2.0, 2.0, 2.5, 1.0, float("nan")], start=1):
        best = updated(best, LOSS, "lower", value, step)
    assert best == Best(LOSS, 1.0, 5, stale=1)
    assert Best.from_json(best.as_json()) == best
    assert updated(best, LOSS, "lower", 1.0, 7).stale == 2
    assert updated(best, LOSS, "higher", 1.5, 7) == Best(LOSS, 1.5, 7)
    unknown = updated(None, LOSS, "lower", float("nan"), 1)
    assert updated(unknown, LOSS, "lower", 9.0, 2) == Best(LOSS, 9.0, 2)


def test_a_best_of_other_questions_does_not_count() -> None:
    best = updated(None, MATCH, "higher", 0.5, 10, "a")
    assert why_void(best, MATCH, "a") is None
    assert "of other questions than so far" in str(why_void(best, MATCH, "b"))
    assert "the best so far was by" in str(why_void(best, LOSS, None))
    older = Best.from_json({"metric": MATCH, "value": 0.5, "step": 10, "stale": 1})
    assert older is not None
    assert why_void(older, MATCH, "a") is None
    assert updated(older, MATCH, "higher", 0.4, 11, "a").questions == "a"


@pytest.fixture
def values(run_values: dict[str, Any], tiny_data: dict[str, str]) -> dict[str, Any]:
    """Plain fine-tuning of six steps, evaluated at every one, on two tasks beside eval_loss."""
    tasks = [
        {
            "task": "exact_match",
            "name": "maths",
            "match": "text",
            "max_new_tokens": 5,
            "data": tiny_data["validation"],
        },
        {"task": "target_loss", "part": "retention", "data": tiny_data["validation"]},
    ]
    return changed(
        run_values,
        valuation={"enabled": False},
        optim={"warmup_ratio": 0.0, "schedule": "constant"},
        train={"max_steps": 6, "eval_every": 1, "evaluate": ["maths", "target_loss"]},
        evaluation={"tasks": tasks, "batch_size": 3, "resamples": 20},
    )


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"evaluate": ["math"]},
            "names 'math', which evaluation.tasks does not have; it has maths, t",
        ),
        ({"stop_after": 2}, "train.stop_after=2 needs train.keep_best"),
        (
            {"keep_best": "loss_kept"},
            "loss_kept is not evaluated; evaluations give eval_loss, eval_ex",
        ),
        ({"keep_best": MATCH, "evaluate": []}, "is not evaluated; evaluations give eval_loss$"),
        ({"keep_best": LOSS, "eval_every": None}, "set train.eval_every .now None. to a multiple"),
    ],
)
def test_what_cannot_be_kept_is_refused(
    train: dict[str, Any], message: str, values: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=message):
        validate(RunConfig, changed(values, train=train), "of the test")


def test_evaluations_have_to_be_where_checkpoints_can(
    values: dict[str, Any], pair_values: dict[str, Any]
) -> None:
    for every, refused in ((3, True), (4, False)):
        aged = changed(
            values, valuation={"refresh_every": 2}, train={"keep_best": LOSS, "eval_every": every}
        )
        if refused:
            with pytest.raises(UserError, match=r"a multiple of valuation\.refresh_every=2"):
                validate(RunConfig, aged, "of the test")
        else:
            validate(RunConfig, aged, "of the test")
    train = {"keep_best": "eval_rewards_accuracy", "eval_every": 1}
    pairs = validate(PreferenceRunConfig, changed(pair_values, train=train), "of the test")
    assert pairs.evaluated_metrics["eval_rewards_accuracy"] == "higher"


def run_asking(values: dict[str, Any], rows: list[str]) -> Any:
    """As much of a run as its questions take."""
    config = validate(RunConfig, values, "of the test")
    tasks = []
    for task in config.evaluation.tasks:
        questions = Questions[str](Setting(config, SimpleNamespace()), task)
        for number, row in enumerate(rows):
            questions.add(f"file:{number}", row, row)
        tasks.append(SimpleNamespace(settings=task, questions=questions))
    return SimpleNamespace(config=config, tasks=tasks)


def test_questions_are_rows_and_settings_of_their_task(values: dict[str, Any]) -> None:
    asked = questions_of(run_asking(values, ["1 + 1", "2 + 2"]), MATCH)
    assert asked is not None
    assert questions_of(run_asking(values, ["1 + 1", "2 + 2"]), MATCH) == asked
    assert questions_of(run_asking(values, ["1 + 1", "2 + 3"]), MATCH) != asked
    longer = copy.deepcopy(values)
    longer["evaluation"]["tasks"][0]["max_new_tokens"] = 6
    assert questions_of(run_asking(longer, ["1 + 1", "2 + 2"]), MATCH) != asked
    assert questions_of(run_asking(values, ["1 + 1"]), LOSS) is None


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return weights


def equal(one: Path, other: Path) -> bool:
    left, right = weights_of(one), weights_of(other)
    return all(torch.equal(weight, right[name]) for name, weight in left.items())


def comparable(folder: Path, prefix: str = "") -> list[dict[str, Any]]:
    timing = ("seconds", "tokens_per_second", "peak")
    return [
        {k: v for k, v in step.items() if k.startswith(prefix) and not k.startswith(timing)}
        for step in metrics_of(folder)
    ]


@pytest.mark.slow
def test_a_run_keeps_its_best_and_ends_without_improvement(
    values: dict[str, Any], tmp_path: Path
) -> None:
    """With a rate that is far too high the first step is the best. Asking changes no weight, and a
    run that is cut off goes on with the best it had."""

    def run(name: str, **train: Any) -> dict[str, Any]:
        return changed(
            values, optim={"lr": 0.5}, train={"output_dir": str(tmp_path / name), **train}
        )

    keep = {"keep_best": LOSS, "stop_after": 3}
    configs = {
        "unasked": run("unasked", evaluate=[]),
        "asked": run("asked", save_every=1),
        "kept": run("kept", **keep, save_every=1, keep_last=1),
        "resumed": run("kept", **keep, save_every=1, keep_last=1, resume="auto"),
        "cut": run("cut", **keep, max_steps=3),
        "on": run("cut", **keep, resume="auto", resume_allow=["train.max_steps"]),
    }
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "ranks", configs=configs)
    assert set(messages.values()) == {""}, messages
    unasked, asked, kept = (tmp_path / name for name in ("unasked", "asked", "kept"))
    assert equal(unasked / "export", asked / "export")
    for without, with_tasks in zip(comparable(unasked), comparable(asked), strict=True):
        assert without == {k: v for k, v in with_tasks.items() if "/" not in k}
    assert {MATCH, "eval_loss/target_loss"} <= metrics_of(asked)[0].keys()

    losses = [step[LOSS] for step in metrics_of(asked)]
    best = min(range(1, 7), key=losses.__getitem__)
    assert best <= 3, "the rate is to be too high"
    last = best + 3
    assert [step["step"] for step in metrics_of(kept)] == list(range(last + 1))
    checkpoints = {path.name for path in (kept / "checkpoints").iterdir() if path.is_dir()}
    assert checkpoints == {f"step-{best}", f"step-{last}"}
    assert not equal(kept / "export", asked / "export")
    log = (tmp_path / "ranks" / "rank-0.log").read_text(encoding="utf-8")
    assert f"exported step {best} of {last}, the best by eval_loss: {losses[best]:.4f}" in log
    assert log.count(f"training ends after step {last} of 6: eval_loss was not better in 3") == 2

    # Cut off after three steps, it knew its best, and ended as the other one.
    cut = tmp_path / "cut"
    assert {path.name for path in (cut / "checkpoints").iterdir() if path.is_dir()} == {
        f"step-{best}"
    }
    assert comparable(cut) == comparable(kept)
    assert equal(cut / "export", kept / "export")
    before, after = (
        json.loads((kept / "evaluations" / f"step-{step}.json").read_text()) for step in (0, best)
    )
    assert before["tasks"]["maths"]["items"][0]["row"].endswith("validation.jsonl:1")
    assert len(after["tasks"]["maths"]["items"]) == 7
    *_, line = (each for each in log.splitlines() if each.startswith("target "))
    assert "(maths exact_match), retention " in line
    assert line.endswith("(target_loss loss)")
