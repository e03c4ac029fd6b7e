"""Contrast in training runs: where B comes from, on any number of ranks and after resuming."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data.batches import Order
from alphatoken.data.splits import load_splits
from alphatoken.errors import NonFiniteError, UserError
from alphatoken.selection.step import vetoes_on_b
from alphatoken.values.algebra import TERMS
from tests.cases import trainer_of
from tests.exact_oracle import exact_values
from tests.oracle import (
    Sequences,
    half_differences,
    oracle_copy,
    relative_error,
    sequence_signals,
    token_values,
)
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of
from tests.test_pairs import documents_of
from tests.test_valuation import scored_set
from tests.tiny import CASES, tokenised

C, LAMBDA, MEMORY, BATCH, HELD_OUT, ROWS = 0.7, 1.3, 0.6, 12, 5, 30
CONTRAST = {"contrast": C, "reliability": True, "stability_weight": 0.0}
VETO: dict[str, Any] = {"by": "low_perplexity", "threshold": -5.6}
"""Rules out about every fourth token of a model that was not trained."""
Directions = dict[str, Tensor]


def rows_of(step: int) -> list[int]:
    return [int(row) for row in Order([ROWS], None, (0, 0)).step(step, BATCH)]


def others_of(step: int) -> list[int]:
    """The next rows of the order that are not among the step's, in order, each once."""
    found: list[int] = []
    for later in range(step + 1, step + 5):
        found += [row for row in rows_of(later) if row not in rows_of(step) and row not in found]
    return found[:HELD_OUT]


def held_out_of(step: int) -> list[int]:
    return [int(row) for row in Order([7], None, (0, 1)).step(step, HELD_OUT)]


def halves_of(rows: list[int]) -> tuple[list[int], list[int]]:
    """The rows with an even and with an odd number among the distinct ones of a draw."""
    distinct = list(dict.fromkeys(rows))
    even, odd = ([row for row in rows if distinct.index(row) % 2 == half] for half in (0, 1))
    return even, odd


class Truth:
    """What every step's values must be, in float64, from the weights before each step.

    Rows of `silent`, by step, are trained on without labels. `fisher` and `reference` make V, which
    counts by LAMBDA.
    """

    silent: Mapping[int, list[int]] = {}
    fisher: Directions | None = None
    reference: Directions | None = None

    def __init__(self, values: dict[str, Any], steps: dict[int, dict[str, Any]]) -> None:
        folder = values["model"]["name_or_path"]
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.train = [[row] for row in tokenised(tokenizer, values["data"]["train"])]
        self.held_out = tokenised(tokenizer, values["data"]["validation"])
        self.scored = scored_set(CASES["llama"], self.model, depth=2)
        self.steps = steps

    def at(self, step: int) -> PreTrainedModel:
        self.model.load_state_dict(self.steps[step]["weights"], strict=False)
        return oracle_copy(self.model)

    def documents(self, rows: list[int]) -> Sequences:
        return [document for row in rows for document in self.train[row]]

    def trained(self, step: int, rows: list[int]) -> Sequences:
        """The documents of rows of a step as they are trained on."""
        return [
            (ids, torch.full_like(labels, -100) if row in self.silent.get(step, ()) else labels)
            for row in rows
            for ids, labels in self.train[row]
        ]

    def scored_mean(self, step: int) -> tuple[Directions, Directions]:
        """B and half the difference of its halves: an exponential mean of the steps before."""
        sums = {name: torch.zeros(()).double() for name in self.scored.linears}
        signed, count = dict(sums), 0.0
        for earlier in range(step):
            twin, decay = self.at(earlier), MEMORY ** (step - 1 - earlier)
            for row in rows_of(earlier):
                sign = 1 if row in halves_of(rows_of(earlier))[0] else -1
                for ids, labels in self.trained(earlier, [row]):
                    signals = sequence_signals(twin, self.scored, ids, labels)
                    count += decay * len(signals.response)
                    for name in sums:
                        for t in signals.response:
                            outer = torch.outer(signals.outgrad[name][t], signals.act[name][t])
                            sums[name] = sums[name] + decay * outer
                            signed[name] = signed[name] + sign * decay * outer
        return (
            {name: each / count for name, each in sums.items()},
            {name: each / count for name, each in signed.items()},
        )

    def drawn_mean(self, step: int, *, vetoed: bool) -> tuple[Directions, Directions]:
        """B and half the difference of its halves; with `vetoed` of the summed losses of tokens
        that no veto rules out, at all response positions, divided by the number of those tokens."""
        twin, rows = self.at(step), others_of(step)
        sums = {name: torch.zeros(()).double() for name in self.scored.linears}
        signed, count = dict(sums), 0
        for row in rows:
            sign = 1 if row in halves_of(rows)[0] else -1
            counted = self.eligible([row]) if vetoed else self.train[row]
            for (ids, labels), (_, masked) in zip(self.train[row], counted, strict=True):
                signals = sequence_signals(twin, self.scored, ids, masked)
                count += len(signals.response)
                for name in sums:
                    for t in sequence_signals(twin, self.scored, ids, labels).response:
                        outer = torch.outer(signals.outgrad[name][t], signals.act[name][t])
                        sums[name] = sums[name] + outer
                        signed[name] = signed[name] + sign * outer
        return (
            {name: each / count for name, each in sums.items()},
            {name: each / count for name, each in signed.items()},
        )

    def eligible(self, rows: list[int]) -> Sequences:
        """The documents of rows, without the labels that VETO rules out at the current weights."""
        found = []
        for ids, labels in self.documents(rows):
            logits = oracle_copy(self.model)(input_ids=ids[None]).logits[0]
            key = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None])[:, 0]
            masked = labels.clone()
            masked[1:][key < VETO["threshold"]] = -100
            found.append((ids, masked))
        return found

    def ghost(self, step: int, *, scored: bool) -> dict[int, dict[str, Tensor]]:
        """Values of the documents of a step, by number."""
        contrast, difference = (
            self.scored_mean(step)
            if scored and step > 0
            else self.drawn_mean(step, vetoed=not scored)
        )
        held_out = [self.held_out[row] for row in held_out_of(step)]
        sides = [[self.held_out[row] for row in half] for half in halves_of(held_out_of(step))]
        halves = half_differences(self.at(step), self.scored, *sides)
        found = token_values(
            self.model,
            self.trained(step, rows_of(step)),
            held_out,
            scored=self.scored,
            window=4,
            stability_weight=LAMBDA,
            fisher=self.fisher,
            reference=self.reference,
            contrast_weight=C,
            contrast=contrast,
            spread={name: halves[name] - C * difference[name] for name in halves},
        )
        return dict(zip(self.numbers(step), found, strict=True))

    def exact(self, step: int, *, vetoed: bool) -> dict[int, dict[str, Tensor]]:
        self.at(step)
        found = exact_values(
            self.model,
            self.trained(step, rows_of(step)),
            [self.held_out[row] for row in held_out_of(step)],
            list(self.scored.linears),
            fisher=self.fisher,
            reference=self.reference,
            contrast=(self.eligible if vetoed else self.documents)(others_of(step)),
            contrast_weight=C,
        )
        for row in found:
            row["composite"] = row["direct_target"] - C * row["direct_contrast"]
            row["composite"] += LAMBDA * row["direct_proxy"]
        return dict(zip(self.numbers(step), found, strict=True))

    def numbers(self, step: int) -> list[int]:
        documents = len(self.train[0])
        return [documents * row + place for row in rows_of(step) for place in range(documents)]


def merged(results: list[dict[str, Any]], name: str) -> dict[int, dict[str, Any]]:
    """A run's steps with the documents of all ranks."""
    return {
        step: {
            "weights": found["weights"],
            "moments": found["moments"],
            "rows": {
                number: each
                for result in results
                for number, each in result[name][step]["rows"].items()
            },
        }
        for step, found in results[0][name].items()
    }


def check(
    steps: dict[int, dict[str, Any]],
    step: int,
    expected: dict[int, dict[str, Tensor]],
    terms: tuple[str, ...],
    where: str,
    tolerance: float = 1e-4,
) -> None:
    rows = steps[step]["rows"]
    assert rows.keys() == expected.keys(), where
    for term in terms:
        wanted = torch.cat([expected[number][term] for number in expected])
        found = torch.cat([rows[number][term] for number in expected])
        assert wanted.any(), f"{term}, {where}"
        error = relative_error(found, wanted)
        assert error <= tolerance, f"{term}, step {step}, {where}: off by {error:.1e}"


GHOST_TERMS = ("direct_target", "causal_target", "direct_contrast", "causal_contrast")


VALUATIONS: dict[str, dict[str, Any]] = {
    "scored": {"contrast_memory": MEMORY},
    "streamed": {
        "contrast_memory": MEMORY,
        "residency": "streamed",
        "contraction": "ghost",
        "chunk_tokens": 40,
    },
    "fused": {"contrast_memory": MEMORY, "split_terms": False, "contraction": "materialised"},
    "drawn": {"contrast_from": "drawn", "contraction": "materialised"},
    "exact": {"estimator": "exact", "window": 32},
    "exact fused": {
        "estimator": "exact",
        "window": 32,
        "split_terms": False,
        "residency": "resident",
    },
}


def terms_of(valuation: dict[str, Any]) -> tuple[str, ...]:
    """The terms that are known with these settings and not zero."""
    if not valuation.get("split_terms", True):
        return ("composite", "spread")
    own = GHOST_TERMS[::2] if valuation.get("estimator") == "exact" else GHOST_TERMS
    return (*own, "composite", "spread")


def three_steps(
    run_values: dict[str, Any], names: list[str], world_size: int, folder: Path
) -> dict[str, dict[int, dict[str, Any]]]:
    """Three steps with each of the named settings, on so many ranks, without evaluations. VETO
    rules out some of the tokens."""
    values = changed(
        run_values, valuation=CONTRAST, selection={"veto": VETO}, train={"max_steps": 3}
    )
    del values["data"]["eval"]
    configs = {
        name: changed(
            values,
            valuation=VALUATIONS[name],
            train={"output_dir": str(folder / name)},
            data={"packing": name == "streamed"},
        )
        for name in names
    }
    results = run_ranks("valued_run", world_size, folder / "ranks", configs=configs)
    return {name: merged(results, name) for name in names}


@pytest.mark.slow
def test_every_source_of_b_is_what_it_says_on_any_number_of_ranks(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Three ranks have slices of uneven length: all settings. Two ranks: those whose messages
    differ."""
    alone = three_steps(run_values, list(VALUATIONS), 1, tmp_path / "1")
    for name, valuation in VALUATIONS.items():
        check_truth(alone[name], Truth(run_values, alone[name]), name)
        last = metrics_of(tmp_path / "1" / name)[-1]
        shares = [last[f"{term}_share"] for term in TERMS if f"{term}_share" in last]
        assert len(shares) == (6 if valuation.get("split_terms", True) else 0)
        assert sum(shares) == pytest.approx(1 if shares else 0)
    for world_size, names in ((2, ["scored", "drawn", "exact"]), (3, list(VALUATIONS))):
        shared = three_steps(run_values, names, world_size, tmp_path / f"{world_size}")
        for name in names:
            for step, tolerance in ((0, 1e-5), (1, 1e-4), (2, 1e-4)):
                expected, where = alone[name][step]["rows"], f"{name} on {world_size} ranks"
                check(shared[name], step, expected, terms_of(VALUATIONS[name]), where, tolerance)


def check_truth(steps: dict[int, dict[str, Any]], truth: Truth, name: str) -> None:
    """The first and the third step's values against the oracle's."""
    valuation = VALUATIONS[name]
    for step in (0, 2):
        if valuation.get("estimator") == "exact":
            expected = truth.exact(step, vetoed=True)
        else:
            expected = truth.ghost(step, scored=valuation.get("contrast_from") != "drawn")
        check(steps, step, expected, terms_of(valuation), name)


ONE_DIRECTION: dict[str, dict[str, Any]] = {
    "scored": {"contrast_memory": MEMORY, "contraction": "materialised"},
    "drawn": {"contrast_from": "drawn", "residency": "streamed", "contraction": "materialised"},
    "exact": {"estimator": "exact", "window": 32},
}
"""Settings in which G, B and V are one direction, by the name of a run."""


@pytest.mark.slow
def test_one_direction_of_all_parts_where_a_rank_has_no_token(
    run_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    """`split_terms: false` with V and B on three ranks, whose slices are of uneven length and of
    which the last one trains on rows without labels in both steps, against the oracle."""
    direction = {**CONTRAST, **stability, "stability_weight": LAMBDA, "split_terms": False}
    values = changed(
        run_values, valuation=direction, selection={"veto": VETO}, train={"max_steps": 2}
    )
    del values["data"]["eval"]
    configs = {
        name: changed(values, valuation=valuation, train={"output_dir": str(tmp_path / name)})
        for name, valuation in ONE_DIRECTION.items()
    }
    tokenizer = AutoTokenizer.from_pretrained(values["model"]["name_or_path"])
    train = tokenised(tokenizer, values["data"]["train"])
    silent = {}
    for step in (0, 1):  # rank 2 has the third and the sixth pair of rows by length
        by_length = sorted(rows_of(step), key=lambda row: -len(train[row][0]))
        silent[step] = [*by_length[4:6], *by_length[10:12]]
    results = run_ranks("valued_run", 3, tmp_path / "ranks", configs=configs, silent=silent)
    for name in ONE_DIRECTION:
        steps = merged(results, name)
        truth = Truth(values, steps)
        truth.silent, truth.fisher = silent, load_file(stability["fisher"])
        reference = AutoModelForCausalLM.from_pretrained(stability["reference"])
        truth.reference = reference.state_dict()
        for step in (0, 1):
            if name == "exact":
                expected = truth.exact(step, vetoed=True)
            else:
                expected = truth.ghost(step, scored=name == "scored")
            check(steps, step, expected, ("composite", "spread"), name)
            of_last = results[-1][name][step]["rows"]
            assert of_last.keys() == set(silent[step])
            assert not any(each["composite"].any() for each in of_last.values())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_adams_first_moment_is_b(stage: int, run_values: dict[str, Any], tmp_path: Path) -> None:
    """Drawn rows before the first step; then the moment without its bias. It has no halves."""
    valuation = {"estimator": "exact", "window": 32, "contrast_from": "moment"}
    values = changed(
        run_values,
        valuation={**CONTRAST, **valuation},
        train={"max_steps": 3},
        deepspeed={"config": {"zero_optimization": {"stage": stage}}},
    )
    steps = merged(run_ranks("valued_run", 2, tmp_path / "ranks", configs={"run": values}), "run")
    truth = Truth(run_values, steps)
    check(steps, 0, truth.exact(0, vetoed=False), terms_of(valuation), "before the first step")
    twin, moments = truth.at(2), steps[1]["moments"]
    moment = {name: moments[name].double() / (1 - 0.9**2) for name in truth.scored.linears}
    found = exact_values(
        truth.model,
        truth.documents(rows_of(2)),
        [truth.held_out[row] for row in held_out_of(2)],
        list(moment),
        fisher={name: torch.ones_like(each) for name, each in moment.items()},
        reference={name: twin.get_parameter(name).detach() - each for name, each in moment.items()},
    )
    for row in found:  # a drift as large as the moment
        row["direct_contrast"] = row["direct_proxy"]
        row["composite"] = row["direct_target"] - C * row["direct_contrast"]
    expected = dict(zip(truth.numbers(2), found, strict=True))
    check(steps, 2, expected, terms_of(valuation), "after two steps")


@pytest.mark.slow
def test_contrast_of_pairs(pair_values: dict[str, Any], tmp_path: Path) -> None:
    """B is of both responses, without coefficients; values are multiplied by the coefficient of
    their document."""
    values = changed(
        pair_values,
        valuation={**CONTRAST, "contrast_memory": MEMORY},
        train={"max_steps": 2, "output_dir": str(tmp_path / "pairs")},
        reference={"model": pair_values["model"]["name_or_path"]},
    )
    results = run_ranks("valued_run", 2, tmp_path / "ranks", configs={"pairs": values})
    steps = merged(results, "pairs")
    tokenizer = AutoTokenizer.from_pretrained(values["model"]["name_or_path"])
    truth = Truth.__new__(Truth)
    truth.model = AutoModelForCausalLM.from_pretrained(values["model"]["name_or_path"])
    truth.train = documents_of(tokenizer, values["data"]["train"])
    truth.held_out = [chosen for chosen, _ in documents_of(tokenizer, values["data"]["validation"])]
    truth.scored = scored_set(CASES["llama"], truth.model, depth=2)
    truth.steps = steps
    for step in range(2):
        expected = truth.ghost(step, scored=True)
        for number, terms in expected.items():
            target = terms["direct_target"]
            found = steps[step]["rows"][number]["direct_target"].double()
            coefficient = (found @ target) / (target @ target)
            assert (coefficient > 0) == (number % 2 == 0)
            expected[number] = {term: coefficient * each for term, each in terms.items()}
        check(steps, step, expected, (*GHOST_TERMS, "composite", "spread"), "pairs")


@pytest.mark.slow
def test_a_resumed_run_has_the_same_values(run_values: dict[str, Any], tmp_path: Path) -> None:
    """Bit for bit on the same ranks, and to rounding on another number of them."""
    values = changed(
        run_values,
        valuation={**CONTRAST, "contrast_memory": MEMORY},
        train={"max_steps": 4, "save_every": 2, "output_dir": str(tmp_path / "whole")},
    )
    whole = merged(run_ranks("valued_run", 2, tmp_path / "a", configs={"run": values}), "run")
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-2"
    assert sorted(path.name for path in (checkpoint / "scorer").iterdir()) == [
        f"slices-{rank:05}-of-00002.safetensors" for rank in range(2)
    ]
    for ranks in (2, 1, 3):
        again = changed(
            values,
            train={"resume": str(checkpoint), "output_dir": str(tmp_path / f"resumed-{ranks}")},
        )
        results = run_ranks("valued_run", ranks, tmp_path / f"b{ranks}", configs={"run": again})
        resumed = merged(results, "run")
        assert sorted(resumed) == [2, 3]
        for step, found in resumed.items():
            before = whole[step]["rows"]
            if ranks == 2:
                for number, terms in found["rows"].items():
                    assert all(
                        torch.equal(each, before[number][name]) for name, each in terms.items()
                    )
            check(resumed, step, before, (*GHOST_TERMS, "spread"), f"on {ranks} ranks")


def test_contrast_needs_rows_that_are_not_scored(run_values: dict[str, Any]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_values["model"]["name_or_path"])
    for rows in (30, 29):  # B of one row has no halves
        values = changed(
            run_values, valuation=CONTRAST, train={"global_batch_size": rows, "micro_batch_size": 1}
        )
        with pytest.raises(UserError, match=r"data\.train has 30, and the 1 optimizer steps"):
            load_splits(validate(RunConfig, values, "of the test"), tokenizer)
    trainer_of(changed(values, valuation={"reliability": False}))


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_a_row_of_b_that_is_not_finite_is_named(
    estimator: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(run_values["model"]["name_or_path"])
    model = AutoModelForCausalLM.from_pretrained(run_values["model"]["name_or_path"])
    (poison,) = tokenizer("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.inf
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")
    rows = Path(run_values["data"]["train"]).read_text().splitlines()
    row = others_of(0)[0]
    rows[row] = json.dumps({"prompt": "What is this ~?", "response": "red"})
    (tmp_path / "train.jsonl").write_text("\n".join(rows) + "\n")
    values = changed(
        run_values,
        model={"name_or_path": str(tmp_path / "poisoned")},
        data={"train": str(tmp_path / "train.jsonl")},
        valuation={**CONTRAST, "estimator": estimator},
    )
    if estimator == "exact":
        del values["valuation"]["window"]
    trainer = trainer_of(values)
    with pytest.raises(NonFiniteError, match=rf"data\.train \S+/train\.jsonl:{row + 1}\b"):
        trainer.step.take(0, evaluates=False)


def test_rows_of_b_are_neither_scored_nor_held_out(run_values: dict[str, Any]) -> None:
    """With `held_out: train` both come from the training rows: were they the same, B would be G."""
    values = changed(run_values, valuation={**CONTRAST, "held_out": "train", "refresh_every": 2})
    values["train"]["global_batch_size"] = 8
    del values["data"]["validation"]
    feed = trainer_of(values).feed
    found = [
        {int(row) for batch in batches for row in batch["rows"]}
        for batches in (
            feed.training(2).batches,
            feed.training(3).batches,
            feed.held_out(1),
            feed.contrast(2),
        )
    ]
    assert [len(rows) for rows in found[2:]] == [HELD_OUT, HELD_OUT]
    assert not found[3] & (found[0] | found[1] | found[2])


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_b_of_the_held_out_rows_is_g(estimator: str, pair_values: dict[str, Any]) -> None:
    """With `target: preference` the losses of B have the coefficients that those of G have."""
    valuation = {"target": "preference", "estimator": estimator, "contrast_from": "drawn"}
    values = changed(pair_values, valuation={**CONTRAST, **valuation})
    if estimator == "exact":
        del values["valuation"]["window"]
    trainer = trainer_of(values)
    run, feed = trainer.run, trainer.feed
    assert run.model.scorer is not None
    coefficients = run.objective.coefficients
    rows, batch = feed.held_out(0), feed.training(0).batches[0]
    run.model.scorer.refresh(rows, 1, contrast=rows, coefficients=coefficients)
    found = run.model.assess(batch).values
    assert found["direct_target"].any()
    torch.testing.assert_close(found["direct_contrast"], found["direct_target"])
    torch.testing.assert_close(
        found["composite"], (1 - C) * (found["direct_target"] + found["causal_target"])
    )
    run.model.scorer.refresh(rows, 1, contrast=rows)
    plain = run.model.assess(batch).values
    assert relative_error(plain["direct_contrast"], found["direct_contrast"]) > 0.1


@pytest.mark.parametrize(
    ("veto", "valuation", "on_b"),
    [
        (VETO, {}, True),
        ({"by": "reference_probability", "threshold": 0.1}, {}, True),
        (VETO, {"contrast_from": "scored"}, False),
        ({"by": "loss", "share": 0.1}, {}, False),
        ({"by": "top_value", "threshold": 0.0}, {}, False),
        ({"by": "agreement", "threshold": 0.0, "unit": "noise"}, {}, False),
        (None, {}, False),
    ],
)
def test_which_vetoes_are_on_b(
    veto: dict[str, Any] | None,
    valuation: dict[str, Any],
    on_b: bool,
    run_values: dict[str, Any],
) -> None:
    """Those that know of a token before values do, and that no group of tokens decides."""
    valuation = {**CONTRAST, "contrast_from": "drawn", **valuation}
    values = changed(run_values, valuation=valuation, selection={"veto": veto, "protect_eos": True})
    found = vetoes_on_b(validate(RunConfig, values, "of the test"))
    assert (found is not None) == on_b
    if found is not None:
        (selection,) = found
        assert (selection.policy, selection.floor, selection.protect_eos) == ("all", None, True)


def test_each_branch_has_its_own_veto_on_b(pair_values: dict[str, Any]) -> None:
    values = changed(
        pair_values,
        valuation={**CONTRAST, "contrast_from": "drawn"},
        selection={"rejected": {"veto": VETO}},
    )
    found = vetoes_on_b(validate(PreferenceRunConfig, values, "of the test"))
    assert found is not None
    assert [selection.veto is not None for selection in found] == [False, True]


@pytest.mark.slow
def test_rows_that_are_scored_one_by_one_fill_both_halves_of_b(run_values: dict[str, Any]) -> None:
    values = changed(
        run_values,
        train={"global_batch_size": 1, "micro_batch_size": 1},
        valuation={"contrast": 1.0, "reliability": True, "stability_weight": 0.0},
    )
    feed = trainer_of(values).feed
    signs = [feed.training(step).batches[0]["half_sign"].unique().tolist() for step in range(3)]
    assert signs == [[1.0], [-1.0], [1.0]]
