"""A study does every run once, from disk, and its table says what its runs say."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TextIO, cast

import pytest
import torch

from alphatoken.batch import make_batch
from alphatoken.config.file import load_config
from alphatoken.errors import UserError
from alphatoken.objectives.base import KeptLosses
from alphatoken.training.setup import Run
from benchmarks import study
from benchmarks.studies.job import (
    BadTokens,
    configuration,
    pull_to_start,
    reference_job,
    reported,
)
from benchmarks.studies.settings import Arm, StudySettings
from benchmarks.studies.tables import Estimate, Outcome, markdown, picture
from recipes.quickstart.get_model import save_tiny
from tests.ranks import ROOT, run_program

STUDIES = sorted((ROOT / "benchmarks/studies").glob("*.yaml"))

STUDY = """
name: tiny
title: A study of nothing
model: {model}
threads: 1
sizes: {{train: 24, held_out: 8, tuning: 8, test: 8}}
run:
  model: {{dtype: float32}}
  data: {{max_length: 512}}
  valuation: {{layers: 1, window: 2, stability_weight: 0.0, validation_sequences: 4}}
  train: {{global_batch_size: 8, micro_batch_size: 4, max_steps: 2}}
  deepspeed: {{config: {{zero_optimization: {{stage: 1}}}}}}
conditions:
  junk: {{corruption: junk}}
arms:
  untrained: {{kind: untrained}}
  all: [valuation.enabled=false]
  oracle: {{kind: oracle, set: [valuation.enabled=false]}}
  both: {{kind: with_held_out, set: [valuation.enabled=false]}}
  "ghost, half": [selection.keep_ratio=0.5]
  rho:
    reference: held_out
    set: [valuation.enabled=false, selection.policy=excess_loss, selection.keep_ratio=0.5]
seeds: [0]
measures: {{generated: 2, max_new_tokens: 4}}
"""

ARMS = ["untrained", "all", "oracle", "both", "ghost, half", "rho"]


@pytest.mark.parametrize("file", STUDIES, ids=lambda file: file.stem)
def test_every_run_of_every_study_is_valid(file: Path, tmp_path: Path) -> None:
    settings = load_config(StudySettings, file)
    assert settings.name == file.stem
    for place in study.Study(settings, tmp_path, None).places():
        configuration(place.job, tmp_path)


def test_an_arm_is_skipped_where_the_file_says_so(tmp_path: Path) -> None:
    settings = load_config(StudySettings, ROOT / "benchmarks/studies/a_small.yaml")
    places = list(study.Study(settings, tmp_path, None).places())
    arms = {
        condition: [place.arm for place in places if place.condition == condition]
        for condition in settings.conditions
    }
    assert arms["advertisement"] == list(settings.arms)
    assert arms["clean"] == ["untrained", "all", "drop harmful, c 0.75, and improbable"]


@pytest.mark.parametrize("skip", ["{klean: [all]}", "{clean: [al]}", "{clean: [all]}"])
def test_what_cannot_be_skipped_is_refused(skip: str) -> None:
    with pytest.raises(UserError, match="skip"):
        load_config(StudySettings, ROOT / "benchmarks/studies/a_small.yaml", [f"skip={skip}"])


def test_a_wrong_arm_is_named_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model="nowhere"))
    settings = load_config(StudySettings, file, ["arms.x=[selection.polcy=loss]"])
    with pytest.raises(UserError, match=r"(?s)^arm 'x': .*selection\.polcy: unknown key"):
        study.Study(settings, tmp_path, None).run(1)


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("baseline=none", "there is no arm 'none'"),
        ("rates=[1e-4]", "set sizes.tuning"),
        ("conditions.x={corruption: jnk}", "'jnk' is not one of junk, digits"),
        ("conditions.x={rows: hh}", "hh do not fit recipe: sft"),
        ("arms.x={knd: oracle}", "arms.x.knd: unknown key"),
        ("arms.x={reference: end}", "arms.x.reference"),
        ("arms.x={kind: untrained, reference: held_out}", "of no use to kind: untrained"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    tmp_path: Path, override: str, complaint: str
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model="nowhere").replace("tuning: 8, ", ""))
    with pytest.raises(UserError, match=complaint):
        load_config(StudySettings, file, [override])


def forked(
    command: list[str], *, env: dict[str, str], stdout: TextIO, **_: Any
) -> subprocess.CompletedProcess[str]:
    """Stands in for the processes of runs: without their imports."""
    (finished,) = run_program(*command[1:], environments=[env])
    stdout.write(finished.stdout + finished.stderr)
    return finished


@pytest.mark.slow
def test_a_study_runs_once_and_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run that is added is a process of its own, as all are; those before are forked."""
    save_tiny(tmp_path / "tiny")
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model=tmp_path / "tiny"))
    results = tmp_path / "results.json"
    command = [
        "run",
        str(file),
        "--folder",
        str(tmp_path),
        "--results",
        str(results),
        "--together",
        "2",
    ]
    with monkeypatch.context() as patch:
        patch.setattr(study, "subprocess", SimpleNamespace(run=forked, STDOUT=None))
        study.main(command)
    metrics = {run["arm"]: run["metrics"] for run in json.loads(results.read_text())["runs"]}
    assert list(metrics) == ARMS
    assert "bad_trained" not in metrics["untrained"]
    assert metrics["all"]["bad_trained"] == metrics["all"]["trained_share"] == 1
    assert metrics["oracle"]["bad_trained"] == 0
    share_of_bad = metrics["all"]["bad_of_trained"]
    assert metrics["oracle"]["trained_share"] == pytest.approx(1 - share_of_bad)
    assert metrics["ghost, half"]["trained_share"] == pytest.approx(0.5, abs=0.01)
    assert metrics["both"]["bad_of_trained"] > 0
    assert metrics["rho"]["trained_share"] == pytest.approx(0.5, abs=0.01)
    rho = tmp_path / "tiny" / "junk" / "rho" / "seed-0"
    assert f"model: {rho / 'reference' / 'run' / 'export'}" in (rho / "run.yaml").read_text()
    assert not (rho / "reference").exists()
    assert len({each["eval_loss"] for each in metrics.values()}) == len(metrics)
    assert "| oracle | 1 |" in capsys.readouterr().out
    assert results.with_suffix(".svg").read_text().startswith("<svg")

    done = tmp_path / "tiny" / "junk" / "all" / "seed-0" / "result.json"
    written = done.stat().st_mtime_ns
    study.main([*command, "arms.random=[valuation.enabled=false, selection.policy=random]"])
    assert done.stat().st_mtime_ns == written
    assert len(json.loads(results.read_text())["runs"]) == len(ARMS) + 1
    with pytest.raises(SystemExit):
        study.main([*command, "run.optim={lr: 1.0}"])
    assert "is of other settings (run)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "undone"),
    [
        ("seeds=[0, 1]", [(arm, 1) for arm in ARMS[1:]]),
        ("arms.both.held_out_share=0.4", [("both", 0)]),
        ("arms.more=[valuation.enabled=false]", [("more", 0)]),
        ("measures.generated=3", [(arm, 0) for arm in ARMS]),
        ("conditions.junk.share=0.5", [(arm, 0) for arm in ARMS]),
        ("conditions={rule: {corruption: rule}}", [(arm, 0) for arm in ARMS]),
    ],
)
def test_what_the_json_has_with_the_same_settings_is_not_done_again(
    override: str, undone: list[tuple[str, int]], tmp_path: Path
) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model="nowhere"))
    before = study.Study(load_config(StudySettings, file), tmp_path, None)
    for place in before.places():
        place.folder.mkdir(parents=True)
        result = {
            "job": json.loads(place.job.model_dump_json()),
            "metrics": {"eval_loss": ARMS.index(place.arm)},
            "seconds": {},
            "device": "CPU",
            "versions": {"torch": "1"},
        }
        (place.folder / "result.json").write_text(json.dumps(result))
    earlier = before.results("command")

    settings = load_config(StudySettings, file, [override])
    now = study.Study(settings, tmp_path / "elsewhere", None, earlier)
    assert [(place.arm, place.seeds[0]) for place in now.missing()] == undone
    found = {
        (run["arm"], run["seed"]): run["metrics"]["eval_loss"]
        for run in now.results("command")["runs"]
    }
    cells = [(arm, seed) for arm in settings.arms for seed in settings.seeds]
    assert found == {
        (arm, seed): ARMS.index(arm) for arm, seed in cells if (arm, seed) not in undone
    }


def test_the_reference_is_trained_on_all_tokens_of_the_held_out_rows_alone(tmp_path: Path) -> None:
    """Whatever rule and reference the study's runs have."""
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model="nowhere"))
    rule = "{policy: top_value, keep_ratio: 0.3, weights: softmax}"
    overrides = [f"run.selection={rule}", "run.reference=online"]
    settings = load_config(StudySettings, file, overrides)
    settings = settings.model_copy(
        update={"arms": {"rho": Arm(reference="held_out", set=["selection.policy=excess_loss"])}}
    )
    (place,) = study.Study(settings, tmp_path, None).places()
    config = configuration(place.job, tmp_path)
    assert config.reference.mode == "online"
    assert config.reference.model == str(tmp_path / "reference" / "run" / "export")
    (tmp_path / "reference").mkdir()
    config = configuration(reference_job(place.job), tmp_path / "reference")
    (source,) = config.data.train
    assert str(source.path) == str(tmp_path / "reference" / "data" / "held_out.jsonl")
    assert not config.valuation.enabled
    assert (config.selection.policy, config.selection.weights) == ("all", "hard")
    assert config.selection.veto is None
    assert config.reference.model is None


def test_a_result_from_before_a_setting_was_added_still_counts(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model="nowhere"))
    place = next(study.Study(load_config(StudySettings, file), tmp_path, None).places())
    place.folder.mkdir(parents=True)
    job = json.loads(place.job.model_dump_json())
    for arm, problem in (
        ({"kind": "untrained"}, None),
        ({"kind": "untrained", "pull": 0.1}, r"of other settings \(arm\)"),
        ({"kind": "untrained", "push": 0.1}, "of another version of this program"),
    ):
        result = {"job": {**job, "arm": arm}, "metrics": {}}
        (place.folder / "result.json").write_text(json.dumps(result))
        if problem is None:
            assert study.finished(place) == result
        else:
            with pytest.raises(UserError, match=problem):
                study.finished(place)


def test_versions_of_all_runs_are_named() -> None:
    assert study.joined({"torch": "1"}, {"torch": "2", "x": "3"}) == {"torch": "1, 2", "x": "3"}
    assert study.joined({"torch": "1, 2"}, {"torch": "2"}) == {"torch": "1, 2"}


def test_a_run_that_was_stopped_has_no_result(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "loss_kept": 1.0}\n{"step": 3, "eval_loss": 0.5, "lr": 0.1}\n')
    assert reported(file, total_steps=3) == {"eval_loss": 0.5}
    with pytest.raises(UserError, match="stopped after step 3 of 5"):
        reported(file, total_steps=5)


def test_each_arm_gets_the_rate_with_the_lowest_tuning_loss(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(STUDY.format(model="nowhere"))
    settings = load_config(StudySettings, file, ["rates=[1e-5, 1e-4, 1e-3]"])
    planned = study.Study(settings, tmp_path, None)
    assert {place.job.rate for place in planned.places()} == {None}
    losses = {"all": [3, 1, 2], "oracle": [1, 2, 3], "both": [3, 2, 1]}
    losses |= {"ghost, half": [1, 0, 1], "rho": [2, 1, 0]}
    for place in planned.tuning():
        loss = losses[place.arm][[1e-5, 1e-4, 1e-3].index(place.job.rate or 0)]
        assert (place.job.purpose, place.seeds) == ("tuning", (1000,))
        place.folder.mkdir(parents=True)
        job = json.loads(place.job.model_dump_json())
        result = {"job": job, "metrics": {"eval_loss": loss}}
        (place.folder / "result.json").write_text(json.dumps(result))
    rates = {place.arm: place.job.rate for place in planned.places()}
    assert rates == {
        "untrained": None,
        "all": 1e-4,
        "oracle": 1e-5,
        "both": 1e-3,
        "ghost, half": 1e-4,
        "rho": 1e-3,
    }


def test_bad_tokens_are_counted_where_they_are_predicted() -> None:
    """Two rows in a micro-batch that lists the second first; the last position predicts nothing."""
    labels = torch.tensor([[-100, 5, 6, -100], [-100, -100, 7, 8]])
    batch = make_batch(
        {
            "input_ids": torch.zeros(2, 4, dtype=torch.int64),
            "labels": labels,
            "document_ids": torch.tensor([[0, 0, 0, -1], [1, 1, 1, 1]]),
            "rows": torch.tensor([1, 0]),
        }
    )
    bad = BadTokens([[False, False, True, True], [False, True, False]])
    expected = torch.tensor([[True, False, False, False], [False, True, True, False]])
    assert bad.predicted_by(batch).equal(expected)
    weight_BT = torch.tensor([[1.0, 1.0, 0, 0], [0, 0.5, 0, 0]])
    bad.observe(
        KeptLosses(
            batch=batch,
            nll_BT=torch.zeros(2, 4),
            weight_BT=weight_BT,
            kept_index_R=torch.tensor([0, 1, 5]),
            kept_nll_R=torch.zeros(3),
        )
    )
    assert bad.metrics() == {
        "trained_share": 2.5 / 4,
        "bad_trained": 1.5 / 3,
        "bad_of_trained": 1.5 / 2.5,
    }


def test_a_pull_adds_the_distance_to_the_start() -> None:
    """Of a step in two passes; a stand-in has what `pull_to_start` reads of a run."""
    model = torch.nn.Linear(2, 1)
    start = model.weight.detach().clone()
    train = SimpleNamespace(global_batch_size=4, micro_batch_size=2)
    run = SimpleNamespace(config=SimpleNamespace(train=train), model=model)
    pull_to_start(cast(Run, run), 0.1)
    with torch.no_grad():
        model.weight += torch.tensor([[1.0, -2.0]])
    for _ in range(2):
        (3 * model.weight.sum()).backward()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad, 6 + 0.1 * (model.weight - start))


def finished(metric: str, by_arm: dict[str, list[float]]) -> dict[str, Any]:
    kinds = {"oracle": "oracle"}
    return {
        "command": "x",
        "study": {
            "title": "T",
            "baseline": "all",
            "conditions": {"junk": {}},
            "arms": {arm: {"kind": kinds.get(arm, "trained")} for arm in by_arm},
        },
        "runs": [
            {"condition": "junk", "arm": arm, "seed": seed, "metrics": {metric: value}}
            for arm, values in by_arm.items()
            for seed, value in enumerate(values)
        ],
    }


def test_intervals_are_students_and_differences_are_paired() -> None:
    assert Estimate.of([1.0, 2.0, 3.0]).half == pytest.approx(4.303 / 3**0.5)
    assert Estimate.of([1.0]) == Estimate(1.0, None)
    results = finished("exact_match", {"all": [0.1, 0.3], "oracle": [0.5, 0.7], "ours": [0.4, 0.6]})
    outcome = Outcome(results, "junk")
    difference = outcome.difference("ours", "exact_match")
    assert difference is not None
    assert difference.mean == pytest.approx(0.3)
    assert difference.half == pytest.approx(0)
    assert outcome.difference("all", "exact_match") is None
    assert outcome.recovered("ours", "exact_match") == pytest.approx(0.75)
    assert outcome.recovered("oracle", "exact_match") is None
    assert "0.500 ± 1.271 (+0.300 ± 0.000; 75 %)" in markdown(results)
    assert picture(results).count("<circle") == 3


def test_nothing_is_recovered_of_a_distance_within_its_interval() -> None:
    results = finished("exact_match", {"all": [0.1, 0.3], "oracle": [0.3, 0.2], "ours": [0.4, 0.6]})
    assert Outcome(results, "junk").recovered("ours", "exact_match") is None


def test_the_frontier_has_the_arms_that_none_beats_in_both() -> None:
    results = finished(
        "eval_loss", {"all": [1.0], "safe": [2.0], "worse": [2.0], "same": [1.0], "half": [0.5]}
    )
    general = {"all": 3.0, "safe": 1.0, "worse": 3.5, "same": 3.0}
    for run in results["runs"]:
        if run["arm"] in general:
            run["metrics"]["general_loss"] = general[run["arm"]]
    assert Outcome(results, "junk").frontier("eval_loss", "general_loss") == ["all", "safe", "same"]
    assert "at once: all; safe; same." in markdown(results)
