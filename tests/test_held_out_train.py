"""`valuation.held_out: train`: other rows of the training data steer the values, never those of the
step itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from alphatoken import UserError
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data.batches import Order
from alphatoken.data.splits import load_splits
from alphatoken.planner.plan import make_plan
from alphatoken.planner.workload import Rows
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of
from tests.test_distributed import GLOBAL_BATCH, PlainStep, check, exact, variant
from tests.test_pairs import PlainPairs

FROM_TRAIN = {"held_out": "train"}


def without_validation(values: dict[str, Any], **valuation: Any) -> dict[str, Any]:
    """The configuration with held-out rows from data.train."""
    data = {key: each for key, each in values["data"].items() if key != "validation"}
    return changed({**values, "data": data}, valuation={**FROM_TRAIN, **valuation})


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    weighted=st.booleans(),
    rows=st.integers(1, 12),
    count=st.integers(1, 12),
    step=st.integers(0, 30),
)
def test_the_next_rows_are_never_those_of_the_step(
    sizes: list[int], weighted: bool, rows: int, count: int, step: int
) -> None:
    weights = [1.0 + place for place in range(len(sizes))] if weighted else None
    order = Order(sizes, weights, (3, 0))
    own, position = order.step(step, rows), (step + 1) * rows
    found = order.following(position, count, without=set(own.tolist()))
    assert not np.isin(found, own).any()
    later = order.step(0, position + 2 * sum(sizes))[position:]
    expected = list(dict.fromkeys(row for row in later.tolist() if row not in own))[:count]
    assert found.tolist() == expected
    if not weighted and sum(sizes) >= rows + count:
        assert len(found) == count
    if not weighted and position + count <= sum(sizes):
        trained = order.step(0, position)
        assert not np.isin(found, trained).any(), "in the first epoch they are new"


@pytest.mark.slow
def test_values_are_by_the_rows_that_come_next_on_1_and_2_ranks(
    run_values: dict[str, Any],
    pair_values: dict[str, Any],
    stability: dict[str, str],
    tmp_path: Path,
) -> None:
    """Of a supervised run, and of pairs by their chosen responses and by both, against one plain
    process with these rows in `data.validation`."""
    by_pairs = {"target": "preference"}
    variants: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "sft": (run_values, {"chunk_tokens": 1}),
        "sft, exact": (run_values, exact("linears", 2)),
        "chosen": (pair_values, {}),
        "pairs": (pair_values, by_pairs),
        "pairs, exact": (pair_values, {**by_pairs, **exact("all", "all")}),
    }
    configs, plain = {}, {}
    for name, (base, valuation) in variants.items():
        sections: dict[str, Any] = {}
        if base is pair_values:
            sections = {
                "reference": {"model": stability["reference"]},
                "preference": {"objective": "dpo", "beta": 0.2},
                "selection": {"scope": "sequence"},  # so that no response is without a token
            }
        values = variant(
            without_validation(base),
            tmp_path / name,
            valuation={**stability, **valuation},
            **sections,
        )
        configs[name] = values
        lines = Path(values["data"]["train"]).read_text().splitlines()
        order = Order([len(lines)], None, (0, 0)).step(0, GLOBAL_BATCH + 5)
        held_out = tmp_path / f"{name}.jsonl"
        held_out.write_text("".join(lines[row] + "\n" for row in order[GLOBAL_BATCH:]))
        known = changed(values, data={"validation": str(held_out)})
        plain[name] = PlainPairs(known, "dpo") if base is pair_values else PlainStep(known)
    for ranks in (1, 2):
        own = {
            name: changed(values, train={"output_dir": str(tmp_path / f"{name}-{ranks}")})
            for name, values in configs.items()
        }
        results = run_ranks("valued_steps", ranks, tmp_path / f"ranks-{ranks}", configs=own)
        for name in configs:
            check(results, name, plain[name])


@pytest.mark.slow
def test_a_run_without_held_out_rows_goes_through_several_epochs(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Steps between refreshes, the seams of epochs, and a checkpoint in between: interrupted equals
    uninterrupted."""
    values = without_validation(run_values, stability_weight=0.0, refresh_every=2)
    values = changed(values, train={"max_steps": 6, "output_dir": str(tmp_path / "whole")})
    part = changed(values, train={"output_dir": str(tmp_path / "part"), "save_every": 2})
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "ranks-whole", configs={"": values})
    assert messages == {"": ""}
    with pytest.raises(AssertionError, match="killed in save 2"):
        run_ranks("run_trainers", 2, tmp_path / "killed", configs={"": part}, killed_in_save=2)
    again = changed(part, train={"resume": "auto"})
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "again", configs={"": again})
    assert messages == {"": ""}
    one, two = (metrics_of(tmp_path / name) for name in ("whole", "part"))
    for each, other in zip(one, two, strict=True):
        for key in ("loss_kept", "composite_std", "grad_norm"):
            assert each.get(key) == other.get(key), f"{key} of step {each['step']}"


def test_what_does_not_go_with_it_is_refused(run_values: dict[str, Any]) -> None:
    cases = {
        "so data.validation is not read: leave it out": changed(run_values, valuation=FROM_TRAIN),
        "no data.validation to estimate the Fisher on: set fisher.prompts": without_validation(
            run_values
        ),
        "valuation.enabled=true needs data.validation.*or set valuation.held_out=train": (
            without_validation(run_values, held_out="validation")
        ),
    }
    for message, values in cases.items():
        with pytest.raises(UserError, match=message):
            validate(RunConfig, values, "of the test")
    off = without_validation(run_values, enabled=False)
    assert validate(RunConfig, off, "of the test")


def test_too_few_training_rows_are_said(run_values: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_values["model"]["name_or_path"])
    values = without_validation(run_values, stability_weight=0.0, validation_sequences=18)
    splits = load_splits(validate(RunConfig, values, "of the test"), tokenizer)
    assert splits.named().keys() == {"data.train", "data.eval"}
    many = changed(values, valuation={"validation_sequences": 19})
    with pytest.raises(UserError, match=r"has 30 usable rows, but .*held_out=train it needs 31: "):
        load_splits(validate(RunConfig, many, "of the test"), tokenizer)


def test_a_plan_counts_them_like_other_held_out_rows(
    run_values: dict[str, Any], pair_values: dict[str, Any]
) -> None:
    for values, schema in ((run_values, RunConfig), (pair_values, PreferenceRunConfig)):
        apart = changed(values, valuation={"stability_weight": 0.0})
        own = without_validation(apart)
        one, two = (
            make_plan(validate(schema, each, "of the test"), Rows(64, 0.5), 2)
            for each in (apart, own)
        )
        assert one.own == two.own
        assert one.memory == two.memory
