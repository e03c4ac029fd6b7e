"""The examples of docs/extending.md, taken from the page and run."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alphatoken.config.objectives import OBJECTIVE_TRAITS
from alphatoken.config.policies import POLICY_TRAITS
from alphatoken.config.preference import PreferenceConfig
from alphatoken.config.weights import WEIGHT_TRAITS
from alphatoken.objectives.pair_losses import PAIR_OBJECTIVES, Branch, Pairs, dpo
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.selection.facts import TokenFacts
from alphatoken.selection.policy import SORT_KEYS
from alphatoken.selection.select import Selection, select
from alphatoken.selection.weights import WEIGHT_RULES
from tests.ranks import ROOT, environment_of_no_rank, run_program
from tests.tiny import with_index

PAGE = ROOT / "docs" / "extending.md"


def python_block(heading: str) -> str:
    """The Python code of the section with this heading, which has one block of it."""
    _, found, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {heading}\n")
    assert found, f"{PAGE.name} has no section {heading!r}"
    section = rest.split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    return str(code)


def names_of(code: str) -> dict[str, Any]:
    """What a file with this code defines when it is imported."""
    names: dict[str, Any] = {"__name__": "example"}
    exec(compile(code, str(PAGE), "exec"), names)
    return names


def run_example(
    heading: str, folder: Path, values: dict[str, Any], *overrides: str, forked: bool = True
) -> subprocess.CompletedProcess[str]:
    """Runs the section's code as a user would: a file of its own, with a configuration file. It has
    imports of its own to make where it is not forked."""
    (folder / "mine.py").write_text(python_block(heading), encoding="utf-8")
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    words = [str(folder / "mine.py"), "--config", str(folder / "config.yaml"), *overrides]
    if forked:
        (finished,) = run_program(*words)
        return finished
    return subprocess.run(
        [sys.executable, *words],
        env={**environment_of_no_rank(), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def last_metrics(values: dict[str, Any]) -> dict[str, Any]:
    """The metrics of a run's last step."""
    lines = (Path(values["train"]["output_dir"]) / "metrics.jsonl").read_text().splitlines()
    metrics: dict[str, Any] = json.loads(lines[-1])
    return metrics


@pytest.fixture
def tables() -> Iterator[None]:
    """Takes what a test registers out of the tables again."""
    tables: list[dict[str, Any]] = [
        *(POLICY_TRAITS, SORT_KEYS, WEIGHT_TRAITS, WEIGHT_RULES),
        *(OBJECTIVE_TRAITS, PAIR_OBJECTIVES),
    ]
    before = [set(table) for table in tables]
    yield
    for table, names in zip(tables, before, strict=True):
        for name in set(table) - names:
            del table[name]


@pytest.mark.usefixtures("tables")
def test_the_policy_of_the_page_sorts_as_it_says() -> None:
    names_of(python_block("A selection policy"))
    response = torch.tensor([[True, True, True, True]])
    document = torch.zeros(1, 4, dtype=torch.int64)
    facts = TokenFacts(
        batch=with_index({"document_ids": document, "response": response}),
        nll_BT=torch.tensor([[0.01, 2.0, 1.0, 0.5]]),
        protected_BT=~response,
        values={"composite": torch.tensor([[9.0, 1.0, 3.0, 2.0]])},
    )
    weighed = select([Selection("unlearned_value", Fraction(1, 2))], facts)
    assert weighed.choice.weight_R.tolist() == [0.0, 0.0, 1.0, 1.0]


@pytest.mark.usefixtures("tables")
def test_the_weight_rule_of_the_page_weighs_as_it_says() -> None:
    names_of(python_block("A weight rule"))
    response = torch.tensor([[True, True, False, True]])
    facts = TokenFacts(
        batch=with_index({"document_ids": response.long() - 1, "response": response}),
        nll_BT=torch.tensor([[0.0, math.log(2), 0.0, math.log(4)]]),
        protected_BT=~response,
        values={},
    )
    selection = Selection("all", Fraction(1), weights="focal", parameters={"gamma": 3.0})
    assert torch.allclose(
        select([selection], facts).choice.weight_R, torch.tensor([0.0, 0.5**3, 0.75**3])
    )


@pytest.mark.usefixtures("tables")
def test_the_objective_of_the_page_is_dpo_until_the_chosen_response_becomes_less_likely() -> None:
    names_of(python_block("A preference objective"))
    settings = PreferenceConfig(objective="dpo_positive")
    assert (settings.scale, settings.needs_reference) == (0.3, True)

    def branch(log_ratio: float) -> Branch:
        zero = torch.zeros(1, dtype=torch.float64)
        return Branch(nll_P=zero - log_ratio, reference_P=zero, tokens_P=zero + 3)

    def loss(chosen: float, rejected: float) -> float:
        pairs = Pairs(chosen=branch(chosen), rejected=branch(rejected))
        if chosen >= 0:
            expected = dpo(pairs, 0.3)
            assert PreferenceObjective(settings).loss(kept=pairs, full=pairs).equal(expected)
        return float(PreferenceObjective(settings).loss(kept=pairs, full=pairs))

    assert loss(2.0, -1.0) == pytest.approx(math.log(1 + math.exp(-0.3 * 3.0)))
    assert loss(-2.0, -5.0) == pytest.approx(math.log(1 + math.exp(-0.3 * (3.0 - 5 * 2.0))))


@pytest.mark.slow
def test_the_policy_of_the_page_trains_from_a_configuration_file(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = {
        **run_values,
        "valuation": {**run_values["valuation"], "stability_weight": 0},
        "selection": {"policy": "unlearned_value", "keep_ratio": 0.5},
    }
    ran = run_example("A selection policy", tmp_path, values, forked=False)
    assert ran.returncode == 0, ran.stderr
    metrics = last_metrics(values)
    assert metrics["step"] == 2
    assert 0.5 * metrics["response_tokens"] <= metrics["kept_tokens"] < metrics["response_tokens"]
    resolved = yaml.safe_load((Path(values["train"]["output_dir"]) / "config.yaml").read_text())
    assert resolved["selection"]["policy"] == "unlearned_value"

    # It is checked like one of ours, by what it needs.
    refused = run_example(
        "A selection policy", tmp_path, values, "valuation.enabled=false", "train.resume=auto"
    )
    assert refused.returncode == 2
    assert "selection.policy=unlearned_value needs valuation.enabled=true" in refused.stderr
    unknown = run_example("A selection policy", tmp_path, values, "selection.policy=unlearned")
    assert "'all' or 'unlearned_value', not 'unlearned'" in unknown.stderr


@pytest.mark.slow
def test_the_metric_of_the_page_is_computed(run_values: dict[str, Any], tmp_path: Path) -> None:
    values = {**run_values, "valuation": {"enabled": False}}
    ran = run_example("A metric", tmp_path, values)
    assert ran.returncode == 0, ran.stderr
    metrics = last_metrics(values)
    # A mean of exponentials is above the exponential of the mean.
    assert math.exp(-metrics["loss_response"]) < metrics["probability_mean"] < 1


@pytest.mark.slow
def test_the_objective_of_the_page_trains_from_a_configuration_file(
    pair_values: dict[str, Any], tmp_path: Path
) -> None:
    values = {
        **pair_values,
        "valuation": {**pair_values["valuation"], "stability_weight": 0},
        "preference": {"objective": "dpo_positive"},
    }
    ran = run_example("A preference objective", tmp_path, values)
    assert ran.returncode == 0, ran.stderr
    metrics = last_metrics(values)
    assert metrics["step"] == 2
    # Warmup has rate 0 in the first step, so the model is still its own reference in the
    # second: the loss is that of equal log-ratios, and omega is beta / 2.
    assert metrics["loss"] == pytest.approx(math.log(2), rel=1e-3)
    assert "kl_estimate" in metrics, "it has a reference"

    refused = run_example("A preference objective", tmp_path, values, "preference.margin=1.0")
    assert refused.returncode == 2
    assert "only preference.objective=simpo reads this, not dpo_positive" in refused.stderr
