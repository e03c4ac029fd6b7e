"""The estimator and the architecture of docs/extending.md, taken from the page and run; and the
entries of the estimators that are built in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken import UserError, ValuationConfig, register_estimator, score_tokens
from alphatoken.config.estimators import ESTIMATORS, keys_of_some
from alphatoken.config.run import RunConfig
from alphatoken.models.architectures import ARCHITECTURES
from alphatoken.models.decoder import decoder_of
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.planner.costs import cost_of
from alphatoken.planner.costs.base import ScoringCost
from alphatoken.planner.plan import make_plan
from alphatoken.planner.workload import Rows
from alphatoken.training.setup import build_run
from alphatoken.values.estimator import Scorer
from alphatoken.values.registry import build_scorer, scorer_class, valuation_notes
from tests.test_extending import last_metrics, names_of, python_block, run_example
from tests.tiny import CASES, VOCABULARY

OUTPUT_BIAS: dict[str, Any] = {"estimator": "output_bias", "stability_weight": 0}


@pytest.fixture
def tables() -> Iterator[None]:
    """Takes what a test registers out of the tables again."""
    estimators, architectures = dict(ESTIMATORS), dict(ARCHITECTURES)
    yield
    for table, before in ((ESTIMATORS, estimators), (ARCHITECTURES, architectures)):
        table.clear()
        table.update(before)  # type: ignore[arg-type]


def batch_of(rows: int, seed: int) -> dict[str, Tensor]:
    """Random rows of 9 tokens; a prompt of 3, and padding on the right of the last row."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(VOCABULARY, (rows, 9), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[-1, 7:] = 0
    labels_BT = ids_BT.masked_fill(mask_BT == 0, -100)
    labels_BT[:, :3] = -100
    return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_BT}


def bias_gradients(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    """The gradient of every token's loss for a bias on the last layer's output, (B, T, H)."""
    decoder = decoder_of(model)
    rows, length = batch["input_ids"].shape
    found = torch.zeros(rows, length, decoder.head.weight.shape[1])
    for row in range(rows):
        for place in range(length - 1):
            target = batch["labels"][row, place + 1]
            if target == -100:
                continue
            bias_H = torch.zeros(found.shape[2], requires_grad=True)
            hook = decoder.layers[-1].register_forward_hook(
                lambda _module, _args, output, bias_H=bias_H: output + bias_H
            )
            logits_TV = model(batch["input_ids"][row : row + 1]).logits[0]
            hook.remove()
            loss = torch.nn.functional.cross_entropy(logits_TV[place], target)
            (found[row, place],) = torch.autograd.grad(loss, bias_H)
    return found


@pytest.mark.usefixtures("tables")
def test_the_estimator_of_the_page_is_the_effect_through_a_bias() -> None:
    names_of(python_block("An estimator"))
    model = CASES["llama"].build()
    batch, validation = batch_of(3, seed=1), batch_of(2, seed=2)
    values = score_tokens(model, batch, validation, config=ValuationConfig(**OUTPUT_BIAS))
    held_out = bias_gradients(model, validation)
    count = int((validation["labels"][:, 1:] != -100).sum())
    expected_BT = bias_gradients(model, batch) @ (held_out.sum((0, 1)) / count)
    assert expected_BT.abs().max() > 0
    torch.testing.assert_close(values.composite, expected_BT, rtol=1e-4, atol=1e-7)
    assert not values.direct_proxy.any()


@pytest.mark.usefixtures("tables")
def test_the_estimator_of_the_page_is_configured_like_one_of_ours() -> None:
    names_of(python_block("An estimator"))
    with pytest.raises(ValueError, match=r"only valuation\.estimator=ghost reads this"):
        ValuationConfig(**OUTPUT_BIAS, window=4)
    with pytest.raises(ValueError, match="'exact' or 'output_bias'"):
        ValuationConfig(estimator="output")
    config = ValuationConfig(**OUTPUT_BIAS)
    assert config.is_resident
    decoder = decoder_of(CASES["llama"].build())
    assert "valuation.layers is not read" in valuation_notes(decoder, config)[0]
    with pytest.raises(UserError, match="knows no stability"):
        build_scorer(decoder, config, torch.device("cpu"), drift=object())  # type: ignore[arg-type]


@pytest.mark.usefixtures("tables")
def test_an_estimator_refuses_settings_before_a_fisher_is_estimated(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    names_of(python_block("An estimator"))
    monkeypatch.setattr("alphatoken.training.setup.load_splits", lambda *_: pytest.fail("too late"))
    config = RunConfig.model_validate({**run_values, "valuation": {"estimator": "output_bias"}})
    with pytest.raises(UserError, match=r"knows no stability: set valuation\.stability_weight=0"):
        build_run(config, SupervisedObjective())


def plan_values(model: Path, **valuation: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "model": {"name_or_path": str(model)},
            "data": {"train": "rows.jsonl", "validation": "rows.jsonl"},
            "train": {"output_dir": "run", "global_batch_size": 16, "micro_batch_size": 4},
            "valuation": {"validation_sequences": 4, **valuation},
        }
    )


@pytest.mark.usefixtures("tables")
def test_the_estimator_of_the_page_is_planned_with_its_own_cost(tiny_model: Path) -> None:
    names_of(python_block("An estimator"))
    plan = make_plan(plan_values(tiny_model, **OUTPUT_BIAS), Rows(64), ranks=2)
    assert set(plan.compute) == set(ESTIMATORS)
    head, work = plan.blueprint.head_flops, plan.blueprint.workload
    assert plan.own.score == work.micro_batches * 2 * work.responses * head
    assert plan.own.score < plan.compute["ghost"].score
    parts = {part.name for part in plan.memory.moments["score"]}
    assert "gradients at the last layer" in parts
    (whole,) = (part for part in plan.memory.steady if part.name == "scored weights, whole")
    kept = [*plan.blueprint.segment_numels("norm"), *plan.blueprint.segment_numels("head")]
    assert whole.bytes == sum(kept) * 2


@pytest.mark.usefixtures("tables")
def test_an_estimator_without_a_cost_cannot_be_planned(tiny_model: Path) -> None:
    scorer = names_of(python_block("An estimator"))["OutputBiasScorer"]
    register_estimator("unpriced", scorer)
    config = plan_values(tiny_model, estimator="unpriced", stability_weight=0)
    with pytest.raises(UserError, match=r"valuation\.estimator=unpriced cannot be planned"):
        make_plan(config, Rows(64), ranks=2)
    plan = make_plan(plan_values(tiny_model), Rows(64), ranks=2)
    assert "unpriced" not in plan.compute


@pytest.mark.usefixtures("tables")
def test_a_name_is_registered_once_and_keys_must_exist() -> None:
    scorer = scorer_class("ghost")
    with pytest.raises(ValueError, match="there is a value estimator 'ghost' already"):
        register_estimator("ghost", scorer)
    with pytest.raises(ValueError, match="reads windows, but the keys"):
        register_estimator("other", scorer, keys=("windows",))
    assert "other" not in ESTIMATORS


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_estimator_has_a_scorer_keys_and_a_cost(name: str) -> None:
    assert issubclass(scorer_class(name), Scorer)
    assert isinstance(cost_of(name), ScoringCost)
    assert set(ESTIMATORS[name].keys) <= set(ValuationConfig.model_fields)


def test_keys_that_only_some_estimators_read() -> None:
    contrast = ["contrast", "contrast_from", "reliability", "contrast_memory"]
    ghost = ["window", "contraction", "target", *contrast]
    assert keys_of_some() == [*ghost, "parameters", "preconditioner"]


@pytest.mark.slow
def test_the_estimator_of_the_page_trains_from_a_configuration_file(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = {**run_values, "valuation": {**OUTPUT_BIAS, "validation_sequences": 5}}
    ran = run_example("An estimator", tmp_path, values)
    assert ran.returncode == 0, ran.stderr
    metrics = last_metrics(values)
    assert metrics["step"] == 2
    assert 0.5 * metrics["response_tokens"] <= metrics["kept_tokens"] < metrics["response_tokens"]


@pytest.mark.usefixtures("tables")
def test_the_architecture_of_the_page_gives_the_values_of_the_class_it_renames() -> None:
    house = names_of(python_block("An architecture"))
    llama = CASES["llama"].build()
    config = house["HouseConfig"](**{**llama.config.to_dict(), "model_type": "house"})
    renamed = house["HouseForCausalLM"](config)
    renamed.load_state_dict(llama.state_dict())
    batches = batch_of(2, seed=1), batch_of(2, seed=2)
    found, expected = (score_tokens(each, *batches).composite for each in (renamed, llama))
    assert expected.abs().max() > 0
    assert found.equal(expected)
    entry = ARCHITECTURES["HouseForCausalLM"]
    ARCHITECTURES["HouseForCausalLM"] = replace(entry, linears=entry.linears[:-1])
    with pytest.raises(
        UserError, match=r"HouseForCausalLM: .* the linear mlp\.down_proj of a layer"
    ):
        score_tokens(renamed, *batches)
    del ARCHITECTURES["HouseForCausalLM"]
    with pytest.raises(UserError, match="HouseForCausalLM has no entry"):
        score_tokens(renamed, *batches)
