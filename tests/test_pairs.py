"""Preference runs under ZeRO on 1, 2 and 3 ranks against the same step in one plain process;
references; bad data."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alphatoken import TokenValues, UserError, ValuationConfig, score_tokens
from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.data.batches import Order
from alphatoken.reference.losses import CONTENTS, check_reference
from alphatoken.store.rows_folder import RowsFolder, StoredColumn, longest_chain
from tests.ranks import run_ranks
from tests.runs import metrics_of, run_recipe, start_recipe
from tests.test_distributed import (
    SCORED_BY,
    TERMS,
    check,
    exact,
    stability_tensors,
    stage,
    variant,
)
from tests.test_preference import Side, masked_loss, section, standard
from tests.test_training import METRICS
from tests.tiny import collate, tokenised

PAIRS, MICRO_BATCH, KEEP = 12, 2, 0.5
REFERENCE_FREE = ("simpo", "orpo", "cpo")
EVALUATED = {"eval_loss", "eval_rewards_margin", "eval_rewards_accuracy", "eval_length_accuracy"}
REPORTED = {
    *(
        f"rewards_{what}{masked}"
        for what in ("chosen", "rejected", "margin")
        for masked in ("", "_masked")
    ),
    *("loss", "rewards_accuracy", "omega", "kl_estimate"),
    *(
        f"{what}_{branch}"
        for what in ("length", "kept_share", "composite_mean")
        for branch in ("chosen", "rejected")
    ),
}


def documents_of(
    tokenizer: PreTrainedTokenizerBase, file: str
) -> list[list[tuple[Tensor, Tensor]]]:
    """(ids, labels) of chosen and rejected of every row; labels on the answer and the end of its
    turn only."""
    rows = []
    for line in Path(file).read_text().splitlines():
        fields = json.loads(line)
        prompt = fields["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
        documents = []
        for key in ("chosen", "rejected"):
            whole = [*prompt, {"role": "assistant", "content": fields[key]}]
            ids = torch.tensor(tokenizer.apply_chat_template(whole)["input_ids"])
            labels = ids.clone()
            labels[:start] = -100
            labels[-1] = -100  # the line break behind the end of the turn
            documents.append((ids, labels))
        rows.append(documents)
    return rows


def token_losses(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[
        :, :-1
    ]
    nll = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none"
    )
    return torch.nn.functional.pad(nll, (0, 1))


def by_pairs(
    name: str,
    scored: Callable[[list[tuple[Tensor, Tensor]]], TokenValues],
    pairs: list[list[tuple[Tensor, Tensor]]],
    model: PreTrainedModel,
    reference_model: PreTrainedModel,
) -> TokenValues:
    """Values by the gradient of a preference loss of held-out pairs, from values by each of their
    responses alone: they are linear in it, with the loss's derivative as coefficient."""
    terms = {term: torch.zeros(()) for term in ("direct_target", "causal_target")}
    total = 0
    for pair in pairs:
        sides = []
        for ids, labels in pair:
            with torch.no_grad():
                nll, reference = (
                    token_losses(each, collate([(ids, labels)]))[0, :-1][labels[1:] != -100]
                    for each in (model, reference_model)
                )
            sides.append(((-nll).double().requires_grad_(), -reference.double()))
        log_p, references = zip(*sides, strict=True)
        loss = standard(name, log_p[0], log_p[1], (references[0], references[1]))
        for document, derivative in zip(pair, torch.autograd.grad(loss, log_p), strict=True):
            values, count = scored([document]), len(derivative)
            total += count
            for term, value in terms.items():
                terms[term] = value - derivative[0] * count * getattr(values, term)
    parts = {term: (each / total).float() for term, each in terms.items()}
    parts |= {term: getattr(values, term) for term in ("direct_proxy", "causal_proxy")}
    return TokenValues.from_terms(parts, (1.0, 1.5))


class PlainPairs:
    """The step in one process: values of all documents at once, masks by sorting, the gradient by
    autograd."""

    def __init__(
        self, values: dict[str, Any], name: str, known: dict[str, TokenValues] | None = None
    ) -> None:
        """known: values by each held-out set and way to score, for steps of the same model, rows
        and stability to share; it grows."""
        folder, valuation = values["model"]["name_or_path"], values["valuation"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        train = documents_of(tokenizer, values["data"]["train"])
        held_out = documents_of(tokenizer, values["data"]["validation"])
        rows = Order([len(train)], None, (0, 0)).step(0, PAIRS)
        validation = Order([len(held_out)], None, (0, 1)).step(0, valuation["validation_sequences"])
        fisher, stability_reference = stability_tensors(valuation)
        batch = collate([document for row in rows for document in train[row]])
        config = {key: valuation[key] for key in SCORED_BY if key in valuation}
        documents = [(place, int(row), side) for place, row in enumerate(rows) for side in (0, 1)]
        self.places = {2 * row + side: 2 * place + side for place, row, side in documents}

        known = {} if known is None else known

        def scored(held_out: list[tuple[Tensor, Tensor]]) -> TokenValues:
            key = json.dumps([config, [ids.tolist() for ids, _ in held_out]])
            if key not in known:
                known[key] = score_tokens(
                    model,
                    batch,
                    collate(held_out),
                    fisher=fisher,
                    reference=stability_reference,
                    config=ValuationConfig.model_validate(config),
                )
            return copy.deepcopy(known[key])  # they will be multiplied in place

        reference_model = AutoModelForCausalLM.from_pretrained(values["reference"]["model"])
        pairs = [held_out[row] for row in validation]
        if valuation.get("target") == "preference":
            self.values = by_pairs(name, scored, pairs, model, reference_model)
        else:
            self.values = scored([chosen for chosen, _ in pairs])
        self.nll = token_losses(model, batch)
        with torch.no_grad():
            reference = token_losses(reference_model, batch)
        response = torch.zeros_like(self.nll, dtype=torch.bool)
        response[:, :-1] = batch["labels"][:, 1:] != -100
        for place in range(PAIRS):
            sides = [response[2 * place], response[2 * place + 1]]
            log_p = [
                -self.nll[2 * place + side][mask].detach().double().requires_grad_()
                for side, mask in enumerate(sides)
            ]
            references = [
                -reference[2 * place + side][mask].double() for side, mask in enumerate(sides)
            ]
            loss = standard(name, log_p[0], log_p[1], (references[0], references[1]))
            for side, gradient in enumerate(torch.autograd.grad(loss, log_p)):
                for term in TERMS:
                    getattr(self.values, term)[2 * place + side] *= -gradient[0]
        self.weight = self._weights(
            values, response, [sum(len(ids) for ids, _ in train[row]) for row in rows]
        )

        def side_of(document: int) -> Side:
            inside = response[document]
            return (
                self.nll[document][inside],
                reference[document][inside],
                self.weight[document][inside],
            )

        losses = [
            masked_loss(name, side_of(2 * place), side_of(2 * place + 1)) for place in range(PAIRS)
        ]
        (torch.stack(losses).sum() / PAIRS).backward()
        self.gradients = {key: parameter.grad for key, parameter in model.named_parameters()}

    def _weights(self, values: dict[str, Any], response: Tensor, lengths: list[int]) -> Tensor:
        """Each branch of each micro-batch (or of the step) keeps its own best tokens."""
        selection = values["selection"]
        order = np.argsort(-np.array(lengths), kind="stable")
        size = {"sequence": 1, "micro_batch": MICRO_BATCH, "global_batch": PAIRS}[
            selection["scope"]
        ]
        weight = torch.zeros_like(response, dtype=torch.float32)
        for start in range(0, PAIRS, size):
            for side, branch in enumerate(("chosen", "rejected")):
                ratio = selection.get(branch, {}).get("keep_ratio", KEEP)
                tokens = [
                    (float(self.values.composite[2 * place + side, t]), 2 * int(place) + side, t)
                    for place in order[start : start + size]
                    for t in response[2 * place + side].nonzero()[:, 0].tolist()
                ]
                for _, document, t in sorted(tokens, reverse=True)[
                    : math.ceil(ratio * len(tokens))
                ]:
                    weight[document, t] = 1
        return weight


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_values_masks_and_gradients_of_pairs_equal_one_process(
    world_size: int, pair_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    every_parameter = {**exact("all", "all"), **stability}
    variants: dict[str, tuple[str, dict[str, dict[str, Any]]]] = {
        "alpha": ("alpha_dpo", {}),
        "alpha, mean": ("alpha_dpo, mean", {"selection": {"scope": "sequence"}}),
        "alpha, exact": ("alpha_dpo", {"valuation": every_parameter, "data": {"packing": True}}),
        "alpha, online": (
            "alpha_dpo",
            {"reference": {"mode": "online"}, "data": {"packing": True}},
        ),
        "alpha, online, stage 2": (
            "alpha_dpo",
            {"reference": {"mode": "online"}, "deepspeed": stage(2)},
        ),
        "alpha, chunked, streamed": (
            "alpha_dpo",
            {"valuation": {**stability, "chunk_tokens": 1, "residency": "streamed"}},
        ),
        "alpha, global batch": (
            "alpha_dpo",
            {"selection": {"scope": "global_batch", "rejected": {"keep_ratio": 0.3}}},
        ),
        "dpo": (
            "dpo",
            {"selection": {"chosen": {"keep_ratio": 0.8}, "rejected": {"keep_ratio": 0.2}}},
        ),
        "dpo, smoothed": ("dpo, smoothed", {}),
        "dpo, with nll": ("dpo, with nll", {}),
        "ipo": ("ipo", {}),
        "hinge": ("hinge", {}),
        "simpo": ("simpo", {"selection": {"scope": "sequence"}}),
        "orpo": ("orpo", {"selection": {"scope": "sequence"}}),
        "cpo": ("cpo", {}),
    }
    if world_size != 2:  # what depends on ranks; objectives and data do not
        several: tuple[str, ...] = ("alpha", "alpha, online")
        if world_size == 3:
            several += ("alpha, exact", "alpha, global batch", "dpo", "simpo")
        variants = {name: variants[name] for name in several}
    configs = {}
    for name, (objective, sections) in variants.items():
        reference = {"model": stability["reference"]}
        common: dict[str, dict[str, Any]] = {
            "preference": section(objective),
            "valuation": stability,
        }
        if section(objective)["objective"] not in REFERENCE_FREE:
            common["reference"] = reference
        merged = {
            key: common.get(key, {}) | sections.get(key, {})
            for key in common.keys() | sections.keys()
        }
        configs[name] = variant(pair_values, tmp_path / name.replace(" ", "-"), **merged)
    results = run_ranks("valued_steps", world_size, tmp_path / "ranks", configs=configs)
    for name, values in configs.items():
        plain = PlainPairs(
            {**values, "reference": {"model": stability["reference"]}}, variants[name][0]
        )
        assert plain.values.direct_proxy.any()
        check(results, name, plain)


def runs(
    pair_values: dict[str, Any], folder: Path, changes: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Configurations by name, each with an output folder of its own and some sections changed."""
    configs = {}
    for name, sections in changes.items():
        train = {**pair_values["train"], "output_dir": str(folder / name)}
        configs[name] = {**pair_values, "train": train}
        for key, content in sections.items():
            configs[name][key] = {**configs[name].get(key, {}), **content}
    return configs


@pytest.mark.slow
def test_cached_and_online_references_give_the_same_run(
    pair_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    """Three steps, with the starting model as reference and with another one; the losses in each
    row's place."""
    other = {"model": stability["reference"]}
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "cached": {"reference": {}},
        "online": {"reference": {"mode": "online"}},
        "offloaded": {"reference": {"mode": "online", "offload": True}},
        "other cached": {"reference": {**other, "save_every": 7}},
        "other online": {"reference": {**other, "mode": "online"}},
    }
    pair_values["valuation"]["fisher"] = stability["fisher"]
    configs = runs({**pair_values, "optim": {"lr": 1e-3, "warmup_ratio": 0.0}}, tmp_path, changes)
    for values in configs.values():
        values["train"]["max_steps"] = 3
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "ranks", configs=configs)
    assert not any(messages.values()), messages
    found = {name: metrics_of(values["train"]["output_dir"]) for name, values in configs.items()}
    assert found["cached"][0]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6), (
        "the start is its own reference"
    )
    assert abs(found["cached"][-1]["rewards_margin"]) > 1e-3
    for cached, online in (
        ("cached", "online"),
        ("cached", "offloaded"),
        ("other cached", "other online"),
    ):
        for one, two in zip(found[cached], found[online], strict=True):
            for key in one.keys() & {
                "loss",
                "eval_loss",
                "rewards_chosen",
                "rewards_margin",
                "omega",
                "grad_norm",
            }:
                assert two[key] == pytest.approx(one[key], rel=1e-5, abs=1e-5), (
                    f"{online}: {key} of step {one['step']}"
                )
    assert abs(found["other cached"][0]["eval_loss"] - math.log(2)) > 1e-3


@pytest.mark.slow
def test_a_killed_cache_goes_on_and_a_stale_one_is_refused(
    pair_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    cache, whole = tmp_path / "losses", tmp_path / "whole"
    reference = {"model": stability["reference"], "save_every": 8, "cache": str(cache)}
    pair_values["valuation"]["fisher"] = stability["fisher"]
    values = {**pair_values, "reference": reference}
    with pytest.raises(AssertionError, match="killed in block 3"):
        run_ranks(
            "run_trainers", 2, tmp_path / "killed", configs={"run": values}, killed_in_block=3
        )
    files = sorted(path.name for path in (cache / "train").glob("*.parquet"))
    assert files == ["rows-000000000-000000008.parquet", "rows-000000008-000000016.parquet"]
    kept = {name: (cache / "train" / name).stat().st_mtime_ns for name in files}

    stale = {
        "other rows": {
            "data": {
                **pair_values["data"],
                "train": [{"path": pair_values["data"]["train"], "first": 20}],
            }
        },
        "other lengths": {"preference": {"max_response_tokens": 9}},
        "other model": {"reference": {**reference, "model": pair_values["model"]["name_or_path"]}},
        "other dtype": {"model": {**pair_values["model"], "dtype": "bfloat16"}},
    }
    changes: dict[str, dict[str, dict[str, Any]]] = {
        "resumed": {"reference": {**reference, "save_every": 5}},
        "whole": {"reference": {**reference, "save_every": 100, "cache": str(whole)}},
        **stale,
    }
    configs = runs(values, tmp_path, changes)
    (messages, _, _) = run_ranks("run_trainers", 3, tmp_path / "ranks", configs=configs)
    assert messages["resumed"] == messages["whole"] == ""
    named = {
        "other rows": "rows: 30 there, 20 here",
        "other lengths": "max_response_tokens",
        "other dtype": "dtype",
    }
    for name in stale:
        assert "holds losses of something else" in messages[name]
        assert named.get(name, "model_sha256") in messages[name]
    assert {name: (cache / "train" / name).stat().st_mtime_ns for name in files} == kept, (
        "what was there is used"
    )
    one, other = (
        StoredColumn(longest_chain(folder / "train", 30), "nll", CONTENTS)
        for folder in (cache, whole)
    )
    for row in range(30):
        assert np.allclose(one[row], other[row], rtol=1e-5, atol=1e-6)
    assert metrics_of(configs["resumed"]["train"]["output_dir"])[-1]["loss"] == pytest.approx(
        metrics_of(configs["whole"]["train"]["output_dir"])[-1]["loss"], rel=1e-5
    )


@pytest.mark.slow
def test_excess_loss_keeps_what_the_reference_finds_easier(
    run_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    """Rho-1 in supervised runs: the tokens with the highest loss above the reference's, by the same
    cache."""
    values = variant(
        run_values,
        tmp_path / "run",
        selection={"policy": "excess_loss", "scope": "sequence"},
        reference={"model": stability["reference"]},
        valuation={"enabled": False},
    )
    results = run_ranks("valued_steps", 2, tmp_path / "ranks", configs={"excess": values})
    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder)
        for folder in (values["model"]["name_or_path"], stability["reference"])
    )
    train = tokenised(
        AutoTokenizer.from_pretrained(values["model"]["name_or_path"]), values["data"]["train"]
    )
    rows = {row: output for rank in results for row, output in rank["excess"]["rows"].items()}
    assert len(rows) == 12
    for row, output in rows.items():
        batch = collate([train[row]])
        with torch.no_grad():
            excess = token_losses(model, batch)[0] - token_losses(reference, batch)[0]
        response = [t for t in range(len(excess) - 1) if batch["labels"][0, t + 1] != -100]
        best = sorted(response, key=lambda t: float(excess[t]), reverse=True)[
            : math.ceil(KEEP * len(response))
        ]
        assert output["weight"].nonzero()[:, 0].tolist() == sorted(best)


def test_a_reference_that_cannot_be_compared_is_refused_before_any_weight_is_read(
    pair_values: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer, other = (
        AutoTokenizer.from_pretrained(pair_values["model"]["name_or_path"]) for _ in range(2)
    )
    other.add_tokens(["<another>"])
    other.save_pretrained(tmp_path / "other")
    AutoConfig.from_pretrained(pair_values["model"]["name_or_path"]).save_pretrained(
        tmp_path / "other"
    )
    cases = {
        "has another vocabulary": {"reference": {"model": str(tmp_path / "other")}},
        f"cannot be loaded: there is no folder {tmp_path / 'missing'}$": {
            "reference": {"model": str(tmp_path / "missing")}
        },
        "nothing is compared with a reference: leave it out$": {
            "reference": {"mode": "online"},
            "preference": {"objective": "orpo"},
        },
        r"leave it out, or set reference\.model=null \(it is a/b\)": {
            "reference": {"model": "a/b"},
            "preference": {"objective": "orpo"},
        },
    }
    for message, sections in cases.items():
        config = validate(PreferenceRunConfig, {**pair_values, **sections}, "of the test")
        with pytest.raises(UserError, match=message):
            check_reference(config, tokenizer)


@pytest.mark.slow
def test_a_rank_without_response_tokens_takes_part(
    pair_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    """In the second micro-batch of three, rank 1 has nothing to score, nothing to keep, and no
    loss."""
    values = variant(
        pair_values,
        tmp_path / "run",
        valuation=stability,
        reference={"model": stability["reference"]},
    )
    results = run_ranks("one_empty_micro_batch", 2, tmp_path / "ranks", values=values)
    assert results[1]["kept"][1] == 0
    assert min(results[0]["kept"]) > 0
    for name, gradient in results[0]["gradients"].items():
        assert torch.isfinite(gradient).all()
        assert gradient.any()
        assert torch.equal(gradient, results[1]["gradients"][name])


@pytest.mark.slow
def test_the_recipe_starts_from_a_supervised_runs_export(
    run_values: dict[str, Any], pair_values: dict[str, Any], tmp_path: Path
) -> None:
    supervised = runs(run_values, tmp_path, {"sft": {"valuation": {"enabled": False}}})
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "ranks", configs=supervised)
    assert messages == {"sft": ""}
    values = runs(
        pair_values,
        tmp_path,
        {"preference": {"model": {"name_or_path": str(tmp_path / "sft" / "export")}}},
    )
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(values["preference"]))
    wrong = run_recipe(file, f"data.train={run_values['data']['train']}", recipe="preference")
    assert wrong.returncode != 0
    assert "train.jsonl:1: a row needs 'prompt', 'chosen' and 'rejected'" in wrong.stderr
    assert "Traceback" not in wrong.stderr

    finished = start_recipe(file, "preference.objective=dpo", recipe="preference")
    assert finished.returncode == 0, finished.stderr[-4000:]
    before, *steps = metrics_of(values["preference"]["train"]["output_dir"])
    assert before.keys() == {"step", *EVALUATED}
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert [step["step"] for step in steps] == [1, 2]
    for step in steps:
        assert step.keys() >= METRICS | REPORTED
        assert 0 < step["kept_share_rejected"] < 1
        assert step["composite_std_chosen"] > 0
    # The first step has learning rate 0.
    assert steps[0]["rewards_margin"] == pytest.approx(0, abs=1e-5)
    assert steps[0]["omega"] == pytest.approx(0.05, abs=1e-5)
    assert steps[-1].keys() >= EVALUATED
    for shown in (
        "step 2/2",
        "margin ",
        "eval_accuracy ",
        "(longer ",
        "eval_length_accuracy",
        "Reference losses of",
    ):
        assert shown in finished.stdout, finished.stdout
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "preference" / "export")
    start = AutoModelForCausalLM.from_pretrained(tmp_path / "sft" / "export")
    assert any(
        not torch.equal(a, b)
        for a, b in zip(exported.parameters(), start.parameters(), strict=True)
    )


def losses_of(rows: int) -> list[Any]:
    return [np.full(1 + row % 3, row, dtype=np.float32) for row in range(rows)]


def test_a_cache_survives_a_kill_at_any_moment_and_a_second_writer(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "settings.abc.partial").write_text(
        "{"
    )  # as a run leaves it that is killed while it writes
    cache = RowsFolder(folder, 40, {"rows": 40}, CONTENTS)
    assert cache.done() == 0
    losses = losses_of(40)
    cache.add(0, {"nll": losses[:10]})
    (folder / "rows-000000010-000000020.xyz.partial").write_bytes(b"PAR1")
    other = RowsFolder(folder, 40, {"rows": 40}, CONTENTS)
    assert other.done() == 10
    other.add(0, {"nll": losses[:16]})  # cut in blocks of another size
    other.add(16, {"nll": losses[16:40]})
    cache.add(10, {"nll": losses[10:20]})
    opened = RowsFolder(folder, 40, {"rows": 40}, CONTENTS).column("nll")
    for row, expected in enumerate(losses):
        assert opened[row].tolist() == expected.tolist()
    with pytest.raises(UserError, match="rows: 40 there, 41 here"):
        RowsFolder(folder, 41, {"rows": 41}, CONTENTS)


def test_what_is_wrong_with_a_cache_is_said(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="holds other files; choose an empty or a new folder"):
        RowsFolder(tmp_path, 3, {}, CONTENTS)
    (tmp_path / "notes.txt").unlink()
    cache = RowsFolder(tmp_path, 3, {}, CONTENTS)
    cache.add(0, {"nll": losses_of(3)})
    (file,) = tmp_path.glob("*.parquet")
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"rows-.*parquet is damaged .*; remove it"):
        cache.column("nll")
    spans = [(0, 3, file)]
    file.unlink()
    with pytest.raises(UserError, match=r"set reference.cache to a folder that all nodes see"):
        StoredColumn(spans, "nll", CONTENTS)
    file.parent.joinpath("settings.json").write_text("{")
    with pytest.raises(UserError, match=r"settings.json cannot be read"):
        RowsFolder(tmp_path, 3, {}, CONTENTS)


@pytest.mark.slow
def test_a_reference_that_was_cached_is_not_kept_in_memory(
    pair_values: dict[str, Any], stability: dict[str, str], tmp_path: Path
) -> None:
    live = {}
    for name, reference in (("start", {}), ("other", {"model": stability["reference"]})):
        values = variant(
            pair_values, tmp_path / name, valuation={"enabled": False}, reference=reference
        )
        (live[name],) = run_ranks("live_tensor_bytes", 1, tmp_path / f"ranks-{name}", values=values)
    assert live["other"] == pytest.approx(live["start"], rel=0.01)


@pytest.mark.slow
def test_a_run_goes_on_against_the_same_reference_only(
    pair_values: dict[str, Any], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(pair_values["model"]["name_or_path"], model)
    first = variant(
        pair_values,
        tmp_path / "run",
        model={"name_or_path": str(model)},
        valuation={"enabled": False},
        train={"save_every": 1},
    )
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "first", configs={"run": first})
    assert messages == {"run": ""}
    described = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**described, "rms_norm_eps": 1e-3}))
    resumed = {**first, "train": {**first["train"], "resume": "auto"}}
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "again", configs={"run": resumed})
    assert (
        "reference.model: the reference model (reference.model, by default model.name_or_path) "
        "changed" in messages["run"]
    )
