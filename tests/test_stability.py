"""The Fisher on several ranks against the oracle, interrupted and resumed; drift on shards; what is
refused."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alphatoken import UserError, ValuationConfig, load_fisher, score_tokens
from alphatoken.data.batches import Order
from alphatoken.data.noise import uniform_noise
from alphatoken.distributed.shard_files import TensorFile
from alphatoken.stability.fisher_folder import EstimateFolder
from alphatoken.training.moments import rank_correlation
from alphatoken.util.files import PartialFolder, WriterLock
from alphatoken.values.balance import RunningScales
from tests.fisher_oracle import position_gradients, squares
from tests.oracle import oracle_copy, relative_error
from tests.ranks import run_program, run_ranks
from tests.runs import changed
from tests.test_valuation import LENGTHS, stability
from tests.tiny import collate, random_sequences, tiny_llama, tokenised

SAMPLINGS = ("rollout", "teacher_forced", "empirical")
SEED, PROMPTS, NEW_TOKENS, LONGEST = 5, 6, 7, 60


def with_fisher(values: dict[str, Any], folder: Path, **fisher: Any) -> dict[str, Any]:
    own = {
        "num_prompts": PROMPTS,
        "batch_size": 1,
        "seed": SEED,
        "max_new_tokens": NEW_TOKENS,
        "output": str(folder),
    }
    return changed(values, fisher={**own, "max_prompt_tokens": LONGEST, **fisher})


def drawn(logits: Tensor, uniform: Tensor) -> int:
    """The first token whose cumulative probability is above `uniform`."""
    return int((torch.softmax(logits, -1).cumsum(-1) <= float(uniform)).sum())


def sampled(
    model: PreTrainedModel, ids: Tensor, labels: Tensor, row: int, sampling: str, stops: set[int]
) -> tuple[Tensor, Tensor]:
    """(ids, labels) that the gradients are of; written without caches and batches."""
    if sampling == "teacher_forced":
        logits, uniform = (
            model(input_ids=ids[None]).logits[0],
            uniform_noise(SEED, 0, row, len(ids)),
        )
        labels = labels.clone()
        for t in range(len(ids) - 1):
            if labels[t + 1] != -100:
                labels[t + 1] = drawn(logits[t], uniform[t])
    if sampling == "rollout":
        start = int((labels != -100).nonzero()[0])
        ids = ids[:start]
        for uniform in uniform_noise(SEED, 0, row, NEW_TOKENS):
            token = drawn(model(input_ids=ids[None]).logits[0, -1], uniform)
            ids = torch.cat([ids, torch.tensor([token])])
            if token in stops:
                break
        labels = torch.where(torch.arange(len(ids)) < start, -100, ids)
    return ids, labels


def estimate_variants(values: dict[str, Any], folder: Path, ranks: int) -> dict[str, Any]:
    """Configurations of estimates, by a name; each has an output folder of its own."""
    configs = {
        f"{sampling} {square}": with_fisher(
            values,
            folder / f"{sampling}-{square}-{ranks}",
            sampling=sampling,
            square=square,
        )
        for sampling in SAMPLINGS
        for square in ("token", "sequence")
    }
    configs["stage 2"] = changed(
        with_fisher(values, folder / f"stage-{ranks}", sampling="empirical"),
        deepspeed={"config": {"zero_optimization": {"stage": 2}}},
    )
    exact = {"estimator": "exact", "layers": "all", "parameters": "all", "window": 32}
    for square in ("token", "sequence"):
        of_all = with_fisher(
            values, folder / f"all-{square}-{ranks}", sampling="empirical", square=square
        )
        configs[f"all {square}"] = changed(of_all, valuation=exact)
    return configs


Row = tuple[int, Tensor, Tensor]
"""Number, token ids and labels of a prompt, (T,) each."""


def sum_squares(
    rows: list[Row], of_row: Callable[[Row], Mapping[str, tuple[Tensor, Tensor]]]
) -> dict[str, list[Tensor]]:
    """Token and sequence squares of all rows, summed, by parameter."""
    sums: dict[str, list[Tensor]] = {}
    for row in rows:
        for name, both in of_row(row).items():
            so_far = sums.get(name, [torch.zeros(()), torch.zeros(())])
            sums[name] = [total + square for total, square in zip(so_far, both, strict=True)]
    return sums


def assert_estimates_equal(folder: Path, kind: str, sums: dict[str, list[Tensor]]) -> None:
    """Estimates of a kind, with both squares and on 1, 2 and 3 ranks, are the mean over prompts."""
    for ranks, (index, square) in itertools.product((1, 2, 3), enumerate(("token", "sequence"))):
        estimate = TensorFile(folder / f"{kind}-{square}-{ranks}")
        assert set(estimate) == set(sums)
        for name, both in sums.items():
            error = relative_error(estimate[name], both[index] / PROMPTS)
            assert error <= 1e-5, f"{kind}, {square}, {ranks} ranks: {name} is off by {error:.1e}"


@pytest.mark.slow
def test_estimates_on_any_number_of_ranks_equal_the_oracle(
    run_values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """Six prompts in batches of one: on 1, 2 and 3 ranks, so on 4 in a run that began on 3, all
    with uneven lengths."""
    for ranks in (1, 2, 3):
        configs = estimate_variants(run_values, tmp_path, ranks)
        run_ranks("fisher_estimates", ranks, tmp_path / f"ranks-{ranks}", configs=configs)

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = oracle_copy(AutoModelForCausalLM.from_pretrained(tiny_model))
    tokens = tokenised(tokenizer, run_values["data"]["validation"])
    chosen = Order([len(tokens)], None, (SEED, 2)).step(0, PROMPTS)
    rows = [(int(row), *tokens[row]) for row in chosen]

    for sampling in SAMPLINGS:
        names = list(TensorFile(tmp_path / f"{sampling}-token-1"))
        assert len(names) == 14

        def of_sample(
            row: Row, sampling: str = sampling, names: list[str] = names
        ) -> Mapping[str, tuple[Tensor, Tensor]]:
            number, ids, labels = row
            with torch.no_grad():
                ids, labels = sampled(
                    model, ids, labels, number, sampling, {tokenizer.eos_token_id}
                )
            return squares(model, names, ids, labels)

        assert_estimates_equal(tmp_path, sampling, sum_squares(rows, of_sample))

    names = list(TensorFile(tmp_path / "all-token-1"))
    assert len(names) == len(list(model.parameters()))

    def of_all(row: Row) -> dict[str, tuple[Tensor, Tensor]]:
        _, ids, labels = row
        stacked = {
            name: torch.stack(gradients)
            for name, gradients in position_gradients(model, names, ids, labels).items()
        }
        return {
            name: (gradient.square().sum(0), gradient.sum(0).square())
            for name, gradient in stacked.items()
        }

    assert_estimates_equal(tmp_path, "all", sum_squares(rows, of_all))
    for ranks in (1, 2, 3):
        lower_stage, whole = (
            TensorFile(tmp_path / f"stage-{ranks}"),
            TensorFile(tmp_path / "empirical-token-1"),
        )
        assert all(relative_error(lower_stage[name], whole[name]) <= 1e-5 for name in whole)


@pytest.mark.slow
def test_an_interrupted_estimate_goes_on_to_the_same_bytes(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = {
        name: with_fisher(run_values, tmp_path / name, save_every=1)
        for name in ("straight", "cut", "moved")
    }
    run_ranks("fisher_estimates", 2, tmp_path / "a", configs={"": values["straight"]})
    with pytest.raises(AssertionError, match="killed in pass 3"):
        run_ranks(
            "fisher_estimates", 2, tmp_path / "b", configs={"": values["cut"]}, killed_in_pass=3
        )
    assert not (tmp_path / "cut").exists()
    assert [path.name for path in (tmp_path / "cut.partial").iterdir()] == ["prompts-4"]
    run_ranks("fisher_estimates", 2, tmp_path / "c", configs={"": values["cut"]})
    assert "4/6 prompts were done before" in (tmp_path / "c" / "rank-0.log").read_text()
    files = sorted(path.name for path in (tmp_path / "straight").iterdir())
    assert files == ["slices-00000-of-00002.safetensors", "slices-00001-of-00002.safetensors"]
    for file in files:
        assert (tmp_path / "straight" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()

    # Resumed on another number of ranks, and refused with other settings.
    with pytest.raises(AssertionError, match="killed in pass 3"):
        run_ranks(
            "fisher_estimates", 2, tmp_path / "d", configs={"": values["moved"]}, killed_in_pass=3
        )
    unfinished = changed(
        run_values,
        valuation={"fisher": str(tmp_path / "moved.partial" / "prompts-4")},
        train={"output_dir": str(tmp_path / "run")},
    )
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "unfinished", configs={"": unfinished})
    assert "holds the sums of an unfinished estimate" in messages[""]
    other = changed(values["moved"], fisher={"square": "sequence"})
    configs = {
        "other": other,
        "same": values["moved"],
        "again": values["moved"],
        "other again": other,
    }
    (messages,) = run_ranks("fisher_estimates", 1, tmp_path / "e", configs=configs)
    assert messages["same"] == messages["again"] == ""
    for name in ("other", "other again"):
        assert "square: 'token' there, 'sequence' here" in messages[name]
    moved, straight = TensorFile(tmp_path / "moved"), TensorFile(tmp_path / "straight")
    assert all(relative_error(moved[name], straight[name]) <= 1e-6 for name in straight)


def make_interrupted(folder: EstimateFolder) -> None:
    with folder.claimed() as is_to_be_made:
        assert is_to_be_made
        raise KeyboardInterrupt


def test_an_estimate_that_another_run_has_just_made_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended between the first look and the lock. An exception lets others make it."""
    folder = EstimateFolder(tmp_path / "new" / "fisher", {"seed": 1}, {})
    with pytest.raises(KeyboardInterrupt):
        make_interrupted(folder)
    acquire = WriterLock.acquire

    def acquire_late(lock: WriterLock) -> None:
        acquire(lock)
        folder.path.mkdir()
        header = {"alphatoken": json.dumps({"settings": {"seed": 1}})}
        save_file({"w": torch.ones(1)}, folder.path / "of_the_other.safetensors", header)

    monkeypatch.setattr(WriterLock, "acquire", acquire_late)
    for _ in range(2):
        with folder.claimed() as is_to_be_made:
            assert not is_to_be_made
    assert list(folder.path.parent.iterdir()) == [folder.path]


@pytest.mark.slow
def test_one_run_at_a_time_makes_an_estimate(run_values: dict[str, Any], tmp_path: Path) -> None:
    """A second one, with the sums of the first beside the output, is refused on every rank and
    leaves them; where nobody makes it any more, it does."""
    busy = with_fisher(run_values, tmp_path / "busy" / "fisher")
    free = with_fisher(run_values, tmp_path / "new" / "free")
    other = PartialFolder(tmp_path / "busy" / "fisher")
    other.create()
    (other.path / "prompts-2.writing").mkdir()
    ranks = run_ranks(
        "fisher_estimates", 2, tmp_path / "ranks", configs={"busy": busy, "free": free}
    )
    refusal = (
        f"another process is writing {tmp_path / 'busy' / 'fisher'} (it holds "
        f"{tmp_path / 'busy' / 'fisher'}.lock.partial); wait until it has ended, or "
        "set fisher.output to another folder"
    )
    for messages in ranks:
        assert refusal in messages["busy"]
        assert messages["free"] == ""
    assert [path.name for path in other.path.iterdir()] == ["prompts-2.writing"]
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "free"]
    other.discard()


OFFLOADED = {
    "zero_force_ds_cpu_optimizer": False,  # DeepSpeed's own would have to be compiled first
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu"},
        "offload_param": {"device": "cpu"},
    },
}


def check_drift(
    result: dict[str, Any], fisher: dict[str, Tensor], reference: dict[str, Tensor], name: str
) -> None:
    """V and its magnitudes from shards against whole tensors."""
    squared, weighted = 0.0, 0.0
    for parameter, master in result["masters"].items():
        moved = master - reference[parameter].detach().float()
        assert torch.equal(result["drift"][parameter], fisher[parameter] * moved), (
            f"{name}: {parameter}"
        )
        squared += float(moved.double().square().sum())
        weighted += float(0.5 * (fisher[parameter].double() * moved.double().square()).sum())
    assert squared > 0
    assert result["magnitudes"] == pytest.approx((squared**0.5, weighted), rel=1e-6), name


def drifting_run(
    run_values: dict[str, Any], dtype: str, folder: Path
) -> tuple[PreTrainedModel, dict[str, Tensor], dict[str, Any]]:
    """The starting model, a random Fisher, and the configuration of a run that moves and saves
    after two steps."""
    model = AutoModelForCausalLM.from_pretrained(
        run_values["model"]["name_or_path"], dtype=getattr(torch, dtype)
    )
    generator = torch.Generator().manual_seed(3)
    fisher = {
        name: torch.rand(p.shape, generator=generator) for name, p in model.named_parameters()
    }
    save_file(fisher, folder / "fisher.safetensors")
    values = changed(
        run_values,
        model={"dtype": dtype},
        valuation={"fisher": str(folder / "fisher.safetensors")},
        optim={"lr": 1e-2, "warmup_ratio": 0.0},
        train={"max_steps": 4, "save_every": 2},
    )
    return model, fisher, values


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_drift_on_shards_equals_the_whole_computation(
    dtype: str, run_values: dict[str, Any], tmp_path: Path
) -> None:
    """Under ZeRO-3 with and without offloading, and stage 2, with accumulation, before and after
    resuming."""
    model, fisher, base = drifting_run(run_values, dtype, tmp_path)
    sections: dict[str, dict[str, Any]] = {
        "plain": {},
        "offloaded": {"deepspeed": {"config": OFFLOADED}},
        "stage 2": {"deepspeed": {"config": {"zero_optimization": {"stage": 2}}}},
    }
    configs = {
        name: changed(changed(base, **section), train={"output_dir": str(tmp_path / name)})
        for name, section in sections.items()
    }
    before = run_ranks("drifts", 2, tmp_path / "before", configs=configs, steps=2)
    resumed = {
        name: changed(values, train={"resume": "auto", "save_every": None})
        for name, values in configs.items()
    }
    after = run_ranks("drifts", 2, tmp_path / "after", configs=resumed, steps=1)
    start = dict(model.named_parameters())
    for results in (before, after):
        for result in results:
            for name in configs:
                check_drift(result[name], fisher, start, name)
                elements = sum(master.numel() for master in result[name]["masters"].values())
                held = elements if name == "stage 2" else -(-elements // 2)
                assert result[name]["reference_bytes"] <= (held + 20) * (
                    2 if dtype == "bfloat16" else 4
                )
    for name in configs:
        for parameter, master in before[0][name]["masters"].items():
            assert torch.equal(after[0][name]["first"][parameter], master)


@pytest.mark.slow
def test_drift_with_secondary_partitions(run_values: dict[str, Any], tmp_path: Path) -> None:
    """ZeRO++: weights are gathered from copies held by pairs of ranks; drift reads the primary
    slices of all four."""
    model, fisher, base = drifting_run(run_values, "float32", tmp_path)
    sharding = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    values = changed(
        base, train={"global_batch_size": 16, "save_every": None}, deepspeed={"config": sharding}
    )
    for result in run_ranks("drifts", 4, tmp_path / "ranks", configs={"": values}, steps=2):
        check_drift(result[""], fisher, dict(model.named_parameters()), "secondary partitions")


@pytest.mark.slow
def test_drift_after_resuming_on_more_ranks(run_values: dict[str, Any], tmp_path: Path) -> None:
    """1 -> 2 -> 3 ranks through DeepSpeed's universal checkpoints: the reference stays the starting
    weights."""
    model, fisher, base = drifting_run(run_values, "float32", tmp_path)
    start = dict(model.named_parameters())
    universal: Path | None = None
    saved: dict[str, Tensor] = {}
    for ranks in (1, 2, 3):
        loading = {
            "zero_optimization": {"stage": 3},
            **({"checkpoint": {"load_universal": True}} if universal else {}),
        }
        values = changed(
            base,
            train={"output_dir": str(tmp_path / f"run-{ranks}")},
            deepspeed={"config": loading},
        )
        results = run_ranks(
            "drifts",
            ranks,
            tmp_path / f"{ranks}",
            configs={"": values},
            steps=2,
            universal=universal,
        )
        for result in results:
            check_drift(result[""], fisher, start, f"{ranks} ranks")
            for name, master in saved.items():
                assert torch.equal(result[""]["first"][name], master)
        saved = results[0][""]["masters"]
        checkpoint = tmp_path / f"run-{ranks}" / "checkpoints" / "step-2"
        universal = checkpoint.with_name("step-2_universal")
        folders = ["--input_folder", str(checkpoint), "--output_folder", str(universal)]
        workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
        if ranks < 3:
            (converted,) = run_program(
                "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers
            )
            assert converted.returncode == 0, converted.stderr


@pytest.mark.slow
def test_lora_drifts_from_the_adapters_start(run_values: dict[str, Any], tmp_path: Path) -> None:
    """With a Fisher estimated by the run itself; 2 ranks against 1."""
    base = changed(
        run_values,
        model={"lora": {"r": 3}},
        fisher={"sampling": "empirical"},
        optim={"lr": 1e-2, "warmup_ratio": 0.0},
        train={"max_steps": 3},
    )
    metrics = {}
    for ranks in (1, 2):
        values = changed(base, train={"output_dir": str(tmp_path / f"run-{ranks}")})
        (result, *_) = run_ranks(
            "drifts", ranks, tmp_path / f"ranks-{ranks}", configs={"": values}, steps=3
        )
        fisher = TensorFile(tmp_path / f"run-{ranks}" / "fisher")
        check_drift(result[""], dict(fisher), result[""]["first"], f"{ranks} ranks")
        assert all("lora" in name for name in fisher)
        metrics[ranks] = result[""]["magnitudes"]
    assert metrics[2] == pytest.approx(metrics[1], rel=1e-4)


@pytest.mark.slow
def test_a_fisher_of_another_model_is_refused(
    run_values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    run_ranks(
        "fisher_estimates",
        1,
        tmp_path / "estimate",
        configs={"": with_fisher(run_values, tmp_path / "fisher")},
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1.0  # not even scored
    model.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "other")
    dense = dict(load_fisher(tmp_path / "fisher"))
    save_file(dense, tmp_path / "dense.safetensors")
    save_file(dict(list(dense.items())[:-1]), tmp_path / "incomplete.safetensors")
    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "fisher", cut)
    (cut / "slices-00000-of-00001.safetensors").rename(cut / "slices-00000-of-00002.safetensors")
    part = cut / "slices-00000-of-00002.safetensors"
    part.write_bytes(part.read_bytes()[:-4])

    def uses(fisher: Path, **sections: dict[str, Any]) -> dict[str, Any]:
        values = changed(run_values, valuation={"fisher": str(fisher)}, train={"max_steps": 1})
        return changed(
            values, **sections, train={"output_dir": str(tmp_path / f"run-{len(configs)}")}
        )

    configs: dict[str, dict[str, Any]] = {}
    configs["same"] = uses(tmp_path / "fisher")
    configs["same, rounded"] = uses(tmp_path / "fisher", model={"dtype": "bfloat16"})
    configs["same as reference"] = uses(
        tmp_path / "fisher", valuation={"reference": str(tiny_model)}
    )
    configs["dense"] = uses(tmp_path / "dense.safetensors")
    configs["other"] = uses(tmp_path / "fisher", model={"name_or_path": str(tmp_path / "other")})
    configs["deeper"] = uses(tmp_path / "fisher", valuation={"layers": 3})
    configs["incomplete"] = uses(tmp_path / "incomplete.safetensors")
    configs["cut"] = uses(cut)
    for name, weight in model.state_dict().items():
        if name.endswith("layers.3.mlp.down_proj.weight"):
            weight[0, 0] += 1.0
    model.save_pretrained(tmp_path / "reference")
    configs["other reference"] = uses(
        tmp_path / "fisher", valuation={"reference": str(tmp_path / "reference")}
    )

    both = run_ranks("run_trainers", 2, tmp_path / "ranks", configs=configs)
    assert [both[0][name] for name in ("same", "same, rounded", "same as reference", "dense")] == [
        ""
    ] * 4
    expected = {
        "other": "was estimated for .* with other weights than those of model.name_or_path=.*other",
        "other reference": (
            "was estimated for .* with other weights than those of valuation.reference="
        ),
        "deeper": "has no tensor model.layers.1.self_attn.q_proj.weight, which is scored",
        "incomplete": "has no tensor",
        "cut": "cannot read .*slices-00000-of-00002.safetensors as safetensors",
    }
    for messages in both:
        for name, message in expected.items():
            assert re.search(message, messages[name]), f"{name}: {messages[name]}"
    assert "does not say which model it is of" in (tmp_path / "ranks" / "rank-0.log").read_text()


def test_a_missing_slice_is_noticed(tmp_path: Path) -> None:
    for number, (start, length) in enumerate(((0, 4), (4, 2))):
        header = {"tensors": {"w": {"shape": [2, 3], "start": start}}}
        flat = torch.arange(start, start + length, dtype=torch.float32)
        save_file(
            {"w": flat},
            tmp_path / f"slices-{number}.safetensors",
            {"alphatoken": json.dumps(header)},
        )
    file = TensorFile(tmp_path)
    assert torch.equal(file["w"], torch.arange(6.0).view(2, 3))
    assert torch.equal(file.flat("w", 3, 5), torch.tensor([3.0, 4.0]))
    (tmp_path / "slices-0.safetensors").unlink()
    with pytest.raises(UserError, match="does not hold all slices of w"):
        TensorFile(tmp_path)


def test_rank_correlation() -> None:
    first, second = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.1, 9.0, 8.0, 100.0])
    assert rank_correlation(first, second) == pytest.approx(0.8)
    assert rank_correlation(first, -second) == pytest.approx(-0.8)
    assert rank_correlation(first, torch.tensor([1.0, 1.0, 2.0, 2.0])) == pytest.approx(2 / 5**0.5)
    assert rank_correlation(first, torch.zeros(4)) == 0


def test_running_scales_forget_slowly_and_skip_what_does_not_vary() -> None:
    scales = RunningScales()
    assert scales.part_weights(1.5) == (1.0, 0.0)
    scales.observe((2.0, 0.0))
    assert scales.part_weights(1.5) == (0.5, 0.0)
    scales.observe((2.0, 0.1))
    assert scales.part_weights(1.5) == pytest.approx((0.5, 15.0))
    scales.observe((4.0, 0.1))
    assert scales.part_weights(1.5)[0] == pytest.approx((2.71 / (0.81 * 4 + 0.9 * 4 + 16)) ** 0.5)


def test_balanced_values_weigh_both_parts_by_their_deviation() -> None:
    model = tiny_llama()
    batch, held_out = (collate(random_sequences(LENGTHS, seed=seed)) for seed in (1, 2))
    names = [name for name, _ in model.named_parameters() if ".2." in name or ".3." in name]
    fisher, reference = stability(model, names)
    config = ValuationConfig(layers=2, window=4, balance="std")
    values = score_tokens(model, batch, held_out, fisher=fisher, reference=reference, config=config)
    response = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    adaptation = values.direct_target + values.causal_target
    proxy = values.direct_proxy + values.causal_proxy
    expected = adaptation / adaptation[response].std(correction=0) + 1.5 * proxy / proxy[
        response
    ].std(correction=0)
    assert relative_error(values.composite, expected) <= 1e-5
