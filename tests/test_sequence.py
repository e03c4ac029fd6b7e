"""Rows that are divided over ranks, against one process that has them whole."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.run import RunConfig
from alphatoken.data.batches import ONE_ROW, Layout, micro_batches
from alphatoken.errors import UserError
from alphatoken.models.compatibility import check_divided_rows
from alphatoken.models.decoder import decoder_of
from alphatoken.models.head import HeadLoss
from alphatoken.planner.plan import make_plan
from alphatoken.planner.show import as_values, print_plan
from alphatoken.planner.workload import Rows
from alphatoken.selection.select import Cut, Selection
from alphatoken.training.valuing import check_valuing
from tests.cases import values_to_itself
from tests.oracle import relative_error
from tests.ranks import run_ranks
from tests.runs import changed
from tests.test_distributed import TERMS, PlainStep, check, exact, stage, variant
from tests.tiny import CASES, UNEVEN, random_sequences

# The last rank of four has no response token of the long row, nor any of the short ones.
LENGTHS = ((20, 3), (2, 9), (3, 1), (1, 5))


def dataset_of(lengths: Any = LENGTHS) -> Any:
    """Rows in memory, in the way of a `TokenDataset`."""
    sequences = random_sequences(lengths, seed=3)

    class InMemory:
        def __init__(self) -> None:
            self.lengths = np.array([len(ids) for ids, _ in sequences])

        def __getitem__(self, row: int) -> Any:
            ids, labels = sequences[row]
            return [(ids.numpy(), (labels != -100).numpy())]

    return InMemory()


def batches_of(parts: int) -> dict[str, Batch]:
    """Four rows, the same packed into rows of 24 tokens, and those of flash attention, which packs
    into one row."""
    rows = np.arange(len(LENGTHS))
    one_row = Layout(4, 0, ONE_ROW, parts=parts)
    return {
        "flash": micro_batches(dataset_of(), rows, Layout(4, 0, parts=parts), 0, 1)[0],
        "flash, packed": micro_batches(dataset_of(), rows, one_row, 0, 1)[0],
        "plain": micro_batches(dataset_of(), rows, Layout(4, 0, parts=parts), 0, 1)[0],
        "packed": micro_batches(dataset_of(), rows, Layout(4, 0, 24, parts=parts), 0, 1)[0],
    }


def whole_pass(
    name: str, batch: Batch, estimators: list[str]
) -> tuple[Tensor, Tensor, dict[str, Tensor], Any]:
    """What enters the head, the summed loss of the response, its gradients, and values."""
    model = (UNEVEN | CASES)[name].build()
    decoder = decoder_of(model)
    hidden = decoder.hidden_states(batch)
    index = batch["response_index"]
    loss = HeadLoss(decoder.head, decoder.logit_softcap)(
        index.take(hidden), index.take(batch["targets"])
    ).sum()
    loss.backward()
    gradients = {key: each.grad for key, each in model.named_parameters() if each.grad is not None}
    return hidden.detach(), loss.detach(), gradients, values_to_itself(decoder, batch, estimators)


WITH_ATTENTION = [name for name in CASES if CASES[name].packable]
FEWER_KEY_HEADS = ["llama", "gemma2", "phi3"]
"""Than four ranks, one of them with eager attention."""


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "names"), [(2, WITH_ATTENTION), (4, FEWER_KEY_HEADS)])
def test_every_architecture_equals_one_process(
    ranks: int, names: list[str], tmp_path: Path
) -> None:
    """Uneven rows, packed and not; grouped-query attention with fewer key heads than ranks, sliding
    windows; a rank without response token."""
    check_passes(ranks, names, tmp_path, ["ghost"], flash="llama")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (2, ["llama, 3 and 1", "llama, 9 and 3", "gpt2, 3 and 3"]),
        (4, ["llama, 9 and 3", "mistral, 6 and 2", "gemma2, 6 and 2"]),
    ],
)
def test_heads_that_ranks_do_not_divide(ranks: int, names: list[str], tmp_path: Path) -> None:
    """Some ranks have one head more; queries of one rank read key heads differently often, or all
    the same one; soft caps and sliding windows; the band averages over all heads alike."""
    check_passes(ranks, names, tmp_path, ["ghost", "exact"], flash="llama, 9 and 3")


def check_passes(
    ranks: int, names: list[str], folder: Path, estimators: list[str], flash: str
) -> None:
    """Compares tiny models on rows that ranks divide with one process; `flash` is one that runs
    with flash attention, too."""
    batches = batches_of(ranks)
    results = run_ranks(
        "divided_passes", ranks, folder, names=names, batches=batches, estimators=estimators
    )
    assert f"{flash}, flash, packed" in results[0]
    for name in names:
        for kind, batch in batches.items():
            if f"{name}, {kind}" not in results[0]:
                continue
            own = [result[f"{name}, {kind}"] for result in results]
            hidden, loss, gradients, values = whole_pass(name, batch, estimators)
            real = batch["document_ids"] >= 0
            found = torch.cat([each["hidden"] for each in own], dim=1)
            assert relative_error(found[real], hidden[real]) < 1e-5, f"{name}, {kind}"
            assert own[0]["loss"] == pytest.approx(float(loss), rel=1e-5), f"{name}, {kind}"
            for term, value_BT in values.items():
                found = torch.cat([each["values"][term] for each in own], dim=1)
                error = relative_error(found, value_BT)
                assert error < 1e-5, f"{name}, {kind}: {term} is off by {error:.1e}"
            for key, gradient in gradients.items():
                error = relative_error(own[0]["gradients"][key], gradient)
                assert error < 1e-5, f"{name}, {kind}: gradient of {key} is off by {error:.1e}"


@pytest.fixture
def plain_values(run_values: dict[str, Any]) -> dict[str, Any]:
    """Two steps of SFT, in float32; without values, unless a test asks for them."""
    return changed(
        run_values,
        logging={"responses": 0},
        valuation={"enabled": False},
    )


# Losses or noise decide, which every rank knows of its own part; or values.
VARIANTS: dict[str, dict[str, Any]] = {
    "packed, asked": {
        "data": {"packing": True},
        "selection": {"policy": "loss", "keep_ratio": 0.5},
        "train": {"evaluate": ["answers", "target_loss"]},
    },
    "global batch": {
        "selection": {"policy": "random", "scope": "global_batch", "keep_ratio": 0.3},
        "deepspeed": {"config": {"zero_optimization": {"stage": 1}}},
        "train": {"gradient_checkpointing": True},
    },
    "valued, adapters": {
        "model": {"lora": {"r": 2}},
        "valuation": {
            "enabled": True,
            "contrast": 0.5,
            "contrast_from": "scored",
            "reliability": True,
            "balance": "std",
            "refresh_every": 2,
        },
        "selection": {"keep_ratio": "auto", "weights": "softmax"},
    },
}
REPORTED = (
    *("eval_loss", "loss_kept", "loss_response", "kept_tokens", "grad_norm", "composite_mean"),
    *("adaptation_std", "stability_std", "noise_scale", "adaptation_stability_rank_correlation"),
    *("loss", "rewards_margin", "rewards_accuracy_masked", "omega", "kl_estimate"),
    *("kept_share_chosen", "length_rejected", "eval_rewards_margin"),
    *("eval_exact_match/answers", "eval_loss/target_loss"),
)


def variants(
    values: dict[str, Any], changes: dict[str, dict[str, Any]], folder: Path, parts: int
) -> dict[str, dict[str, Any]]:
    return {
        name: changed(
            changed(values, **sections),
            train={"sequence_parallel": parts, "output_dir": str(folder / name)},
        )
        for name, sections in changes.items()
    }


PAIRS: dict[str, dict[str, Any]] = {
    "cached reference": {
        "valuation": {"enabled": True, "stability_weight": 0.0, "target": "preference"},
        "data": {"packing": True},
        "preference": {"length_decay": 0.5},
    },
    "online reference": {
        "reference": {"mode": "online"},
        "preference": {"objective": "ipo"},
        "selection": {"policy": "retrospective_excess_loss", "scope": "sequence"},
        "model": {"lora": {"r": 2}},
    },
    "no reference": {"preference": {"objective": "simpo"}},
}


@pytest.mark.slow
def test_runs_equal_one_process(
    plain_values: dict[str, Any], tiny_data: dict[str, str], tmp_path: Path
) -> None:
    """Rows of very different lengths on two groups of two ranks; gradients of every step, metrics,
    and weights after all. Tasks during training are answered from whole rows."""
    held_out = {"data": tiny_data["validation"]}
    tasks = [
        {
            "task": "exact_match",
            "name": "answers",
            "match": "text",
            "max_new_tokens": 3,
            **held_out,
        },
        {"task": "target_loss", **held_out},
    ]
    asked = changed(plain_values, evaluation={"tasks": tasks})
    alone = check_runs(asked, VARIANTS, tmp_path)
    assert "eval_loss/target_loss" in alone["packed, asked"]["metrics"][-1]


@pytest.mark.slow
def test_runs_on_pairs_equal_one_process(
    plain_values: dict[str, Any], pair_values: dict[str, Any], tmp_path: Path
) -> None:
    """The sums over a response are of all parts, and so is what they are compared with."""
    values = {**plain_values, "data": pair_values["data"], "preference": {}}
    check_runs(values, PAIRS, tmp_path)


def check_runs(
    values: dict[str, Any], changes: dict[str, dict[str, Any]], folder: Path
) -> dict[str, Any]:
    """Compares runs on two groups of two ranks with those on one; returns what this one found."""
    (alone,) = run_ranks(
        "divided_runs", 1, folder / "1", configs=variants(values, changes, folder / "1", 1)
    )
    configs = variants(values, changes, folder / "n", 2)
    for result in run_ranks("divided_runs", 4, folder / "n", configs=configs):
        for name in changes:
            found, expected = result[name], alone[name]
            for step, gradients in enumerate(expected["gradients"]):
                for key, gradient in gradients.items():
                    error = relative_error(found["gradients"][step][key], gradient)
                    assert error < 1e-5, f"{name}, step {step}: {key} is off by {error:.1e}"
            for key, weight in expected["weights"].items():
                assert relative_error(found["weights"][key], weight) < 1e-5, f"{name}: {key}"
            for step, metrics in enumerate(expected["metrics"]):
                for key in metrics.keys() & set(REPORTED):
                    other = found["metrics"][step][key]
                    expected_number = pytest.approx(metrics[key], rel=1e-5, abs=1e-6)
                    assert other == expected_number, f"{name}: {key}"
    return dict(alone)


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_with_its_rows_divided_otherwise(
    plain_values: dict[str, Any], tmp_path: Path
) -> None:
    def config(name: str, parts: int, **train: Any) -> dict[str, Any]:
        output = {"sequence_parallel": parts, "output_dir": str(tmp_path / name), **train}
        return {name: changed(plain_values, train=output)}

    start = {"resume": str(tmp_path / "whole" / "checkpoints" / "step-1")}
    configs = config("whole", 2, save_every=1) | config("same", 2, **start)
    for result in run_ranks("divided_runs", 2, tmp_path / "2", configs=configs):
        whole = result["whole"]["weights"]
        assert all(torch.equal(each, whole[key]) for key, each in result["same"]["weights"].items())
    (alone,) = run_ranks("divided_runs", 1, tmp_path / "1", configs=config("alone", 1, **start))
    undivided, _ = run_ranks("divided_runs", 2, tmp_path / "3", configs=config("rows", 1, **start))
    for found in (alone["alone"]["weights"], undivided["rows"]["weights"]):
        for key, weight in whole.items():
            assert relative_error(found[key], weight) < 1e-5, key


REDUCTIONS = {
    "stage 3": (3, True, 1),
    "stage 3, all-reduce": (3, False, 2),
    "stage 2": (2, True, 2),
    "stage 2, all-reduce": (2, False, 2),
}
"""ZeRO's stage, whether it scatters what it reduces, and how many times ours a gradient is that
DeepSpeed divides for rows over two ranks."""


@pytest.mark.slow
def test_every_reduction_of_deepspeed_averages_over_all_ranks(
    plain_values: dict[str, Any], tmp_path: Path
) -> None:
    """DeepSpeed's own sequence parallelism divides a gradient by the number of data groups, but
    for the scattered one of stage 3, which it divides by that of all ranks. It is not told of ours:
    every reduction divides by the number of all ranks, by which losses are multiplied."""

    def configs(parts: int) -> dict[str, dict[str, Any]]:
        return {
            name: changed(
                plain_values,
                train={"sequence_parallel": parts, "output_dir": str(tmp_path / f"{name} {parts}")},
                deepspeed={
                    "config": {"zero_optimization": {"stage": number, "reduce_scatter": scatter}}
                },
            )
            for name, (number, scatter, _) in REDUCTIONS.items()
        }

    alone = configs(1)["stage 3"]
    (one,) = run_ranks("gradients_as_divided", 1, tmp_path, configs={"alone": alone}, told=1)
    for told in (1, 2):
        ranks = run_ranks("gradients_as_divided", 2, tmp_path, configs=configs(2), told=told)
        for name, (_, _, theirs) in REDUCTIONS.items():
            times = 1 if told == 1 else theirs
            for key, gradient in one["alone"].items():
                error = relative_error(ranks[0][name][key], times * gradient)
                assert error < 1e-5, f"{name}, told of {told}: {key} is off by {error:.1e}"


def test_values_on_disk_are_of_whole_rows(run_values: dict[str, Any]) -> None:
    values = changed(run_values, train={"sequence_parallel": 2})
    with pytest.raises(UserError, match="values are kept by whole responses"):
        check_valuing(RunConfig.model_validate(values))


def test_models_whose_rows_cannot_be_divided_are_refused_before_loading() -> None:
    with pytest.raises(UserError, match="linear-attention layers carry a state along the row"):
        check_divided_rows(CASES["qwen3_5"].build().config, 2)
    with pytest.raises(UserError, match=r"more than the 4 attention heads .* set it to 4 at most"):
        check_divided_rows(CASES["llama"].build().config, 5)
    check_divided_rows(CASES["llama"].build().config, 3)


@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_a_plan_divides_what_grows_with_rows(run_values: dict[str, Any], estimator: str) -> None:
    """Twice as many ranks on rows twice as long: activations stay, and attention is more
    work."""
    window = {} if estimator == "ghost" else {"window": 32}
    valuation = {"estimator": estimator, "stability_weight": 0.0, **window}
    alone = changed(run_values, valuation=valuation, train={"global_batch_size": 4})
    divided = changed(alone, train={"sequence_parallel": 2})
    one, two = (
        make_plan(RunConfig.model_validate(values), Rows(tokens), ranks=ranks)
        for values, tokens, ranks in ((alone, 64, 2), (divided, 128, 4))
    )
    for how, size in one.activations.items():  # what a kernel returns is kept apart from its parts
        assert size < two.activations[how] < 1.1 * size
    assert one.own.forward < two.own.forward < 2 * one.own.forward
    assert one.own.score < two.own.score < 2 * one.own.score
    ops = {message.about for message in two.traffic if message.op == "all_to_all"}
    bands = {"attention band"} if estimator == "ghost" else set()
    assert ops == {"parts of rows for heads", *bands}


def test_a_plan_tells_what_heads_that_ranks_do_not_divide_cost(
    run_values: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    """Of four heads the last of three ranks takes two, as the last of two does: the same attention
    on a third more tokens."""
    values = changed(run_values, train={"global_batch_size": 4, "micro_batch_size": 4})
    three, two = (
        make_plan(
            RunConfig.model_validate(changed(values, train={"sequence_parallel": parts})),
            Rows(96),
            ranks=parts,
        )
        for parts in (3, 2)
    )
    assert two.own.forward * 2 / 3 < three.own.forward < two.own.forward
    print_plan(three, Console(width=200))
    assert "4 attention heads the 3 ranks that divide a row take 1 or 2, so that 33%" in (
        capsys.readouterr().out
    )
    assert as_values(three)["waiting_in_attention"] == pytest.approx(1 / 3)
    assert as_values(two)["waiting_in_attention"] == 0


def merged(results: list[Any], name: str) -> list[Any]:
    """What ranks found, with the parts of each document put together, which neighbours have."""
    rows: dict[int, dict[str, Tensor]] = {}
    for result in results:
        for row, output in result[name]["rows"].items():
            before = rows.get(row, {term: part[:0] for term, part in output.items()})
            rows[row] = {term: torch.cat([before[term], part]) for term, part in output.items()}
    return [
        {name: {"rows": rows, "gradients": results[0][name]["gradients"]}},
        *({name: {"rows": {}, "gradients": each[name]["gradients"]}} for each in results[1:]),
    ]


@pytest.mark.slow
@pytest.mark.parametrize("by", ["below_mean_probability", "response_agreement"])
@pytest.mark.parametrize("branches", [1, 2])
def test_a_response_has_its_own_mean_wherever_its_parts_are(
    branches: int, by: str, tmp_path: Path
) -> None:
    """Sort keys that are made of all of a response, of which a rank has a part; a rank without any
    takes part."""
    selections = [Selection("all", Fraction(1), veto=Cut(by=by, threshold=0.0))] * branches
    generator = torch.Generator().manual_seed(0)
    batches: dict[str, dict[str, Any]] = {
        kind: {
            **batch,
            "composite": torch.randn(batch["labels"].shape, generator=generator),
            "spread": torch.randn(batch["labels"].shape, generator=generator) / 4,
        }
        for kind, batch in batches_of(2).items()
        if kind in {"plain", "packed"}
    }
    alone, *own = [
        found
        for ranks in (1, 2)
        for found in run_ranks(
            "vetoed_parts", ranks, tmp_path / f"{ranks}", batches=batches, selections=selections
        )
    ]
    for kind, expected in alone.items():
        assert 0 < expected.sum() < batches[kind]["response"].sum()
        assert torch.cat([each[kind] for each in own], dim=1).equal(expected), kind


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "parts"), [(4, 2), (4, 4)])
def test_values_masks_and_gradient_equal_one_process(
    ranks: int,
    parts: int,
    run_values: dict[str, Any],
    stability: dict[str, str],
    tmp_path: Path,
) -> None:
    """By `ghost`, with the causal window across the parts' borders, one of them longer than a
    part."""
    unstable = {"stability_weight": 0.0}
    streamed = {**stability, "residency": "streamed"}
    sections: dict[str, dict[str, Any]] = {
        "with stability": {"valuation": stability},
        "long window, packed": {
            "valuation": {**unstable, "window": 40},
            "data": {"packing": True, "max_length": 130},  # a micro-batch has several rows
        },
        "streamed, chunked, eager": {
            "valuation": {**streamed, "chunk_tokens": 1, "contraction": "ghost"},
            "model": {"attn_implementation": "eager"},
            "train": {"gradient_checkpointing": True},
        },
        "sequence": {"valuation": unstable, "selection": {"scope": "sequence"}},
        "exact, all": {"valuation": {**exact("all", "all"), **stability, "chunk_tokens": 1}},
        "exact, composite only, packed": {
            "valuation": {**exact("all", 2), **unstable, "split_terms": False},
            "data": {"packing": True},
        },
        "global batch": {
            "valuation": {**unstable, "split_terms": False},
            "selection": {
                "scope": "global_batch",
                "veto": {"by": "low_perplexity", "share": 0.25},
                "normalise": "kept",
            },
            "deepspeed": stage(2),
        },
    }
    configs = {
        name: variant(run_values, tmp_path / name.replace(" ", "-"), **changes)
        for name, changes in sections.items()
    }
    for values in configs.values():
        values["train"]["sequence_parallel"] = parts
    results = run_ranks("valued_steps", ranks, tmp_path / "ranks", configs=configs)
    for name, values in configs.items():
        terms = TERMS if values["valuation"].get("split_terms", True) else ("composite",)
        check(merged(results, name), name, PlainStep(values), terms)
