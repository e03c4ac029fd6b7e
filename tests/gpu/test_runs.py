"""Runs on a GPU: DeepSpeed's stages and offloading, messages, waits, resuming and recomputation.

On a GPU one rank sends through NCCL, on a CPU two through gloo.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from alphatoken.checkpoints.saving import random_state, set_random_state
from tests.gpu.conftest import Note
from tests.ranks import run_alone, run_on
from tests.runs import changed, metrics_of
from tests.test_distributed import PlainStep, check, check_gradients_of_kept, stage, variant
from tests.test_survival import comparable, weights_of
from tests.test_weight_messages import zero3

pytestmark = pytest.mark.slow

# On a CPU other files of tests ask the same of more cases.
suite = pytest.mark.suite


@pytest.fixture
def unstable(run_values: dict[str, Any]) -> dict[str, Any]:
    """A run without a Fisher, which would be estimated first."""
    return changed(run_values, valuation={"stability_weight": 0.0})


def zero(**settings: Any) -> dict[str, Any]:
    return {"config": {"zero_optimization": {"stage": 3, **settings}}}


ON_DEVICE = {"stage 3": {}, "stage 2": stage(2)}
ON_HOST = {
    "optimizer": zero(offload_optimizer={"device": "cpu", "pin_memory": True}),
    "optimizer and parameters": zero(
        offload_optimizer={"device": "cpu"}, offload_param={"device": "cpu"}
    ),
}


@suite
@pytest.mark.parametrize("where", ["device", "host"])
def test_a_step_is_that_of_plain_autograd(
    where: str, unstable: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    """Values, masks and gradients of one step are those of one plain process, also with states in
    host memory, where DeepSpeed compiles an optimizer of its own (on a CPU it has to do without).
    """
    variants = copy.deepcopy(ON_DEVICE if where == "device" else ON_HOST)
    if where == "host" and device.type == "cpu":
        for each in variants.values():
            each["config"]["zero_force_ds_cpu_optimizer"] = False
    configs = {
        name: variant(unstable, tmp_path / name.replace(" ", "-"), deepspeed=deepspeed)
        for name, deepspeed in variants.items()
    }
    results = run_on(device, "valued_steps", tmp_path / "ranks", configs=configs)
    plain = PlainStep(next(iter(configs.values())))
    for name in configs:
        check(results, name, plain, tolerance=1e-5 if device.type == "cpu" else 1e-4)


def test_a_reference_in_host_memory_changes_nothing(
    pair_values: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    shared = changed(pair_values, valuation={"stability_weight": 0.0})
    configs = {
        name: changed(
            shared,
            reference={"mode": "online", "offload": name == "host"},
            train={"deterministic": True, "output_dir": str(tmp_path / name)},
        )
        for name in ("device", "host")
    }
    run_on(device, "run_trainers", tmp_path / "ranks", configs=configs)
    here, there = (comparable(tmp_path / name) for name in configs)
    assert here == there


@suite
def test_passes_besides_training_keep_the_order_of_modules(
    unstable: dict[str, Any], device: torch.device, tmp_path: Path, note: Note
) -> None:
    """From the second step on, with a refresh, an evaluation and a choice ahead in each."""
    configs = {
        name: changed(
            unstable,
            deepspeed=zero3(),
            selection={"scope": scope},
            train={"max_steps": 5, "eval_every": 1, "output_dir": str(tmp_path / name)},
        )
        for name, scope in {"plain": "micro_batch", "ahead": "global_batch"}.items()
    }
    (found, *_) = run_on(
        device, "weight_messages", tmp_path / "ranks", configs=configs, keeps_order=True
    )
    for name, run in found.items():
        messages, orders_lost = zip(*run["messages"][2:], strict=True)
        note(f"{name}: {messages[-1]} messages a step")
        assert not any(orders_lost), name
        assert len(set(messages)) == 1, name


@pytest.mark.gpu
def test_the_host_seldom_waits(unstable: dict[str, Any], tmp_path: Path, note: Note) -> None:
    """A host that waits for the device cannot keep it busy. On a CPU there is nothing to wait
    for."""
    found = run_alone("host_waits", tmp_path, values=unstable)
    micro_batches = found.pop("micro-batches")
    note(f"in a step of {micro_batches} micro-batches: {found}")
    assert found.get("score", 0) <= 10 * micro_batches
    assert found.get("outside of phases", 0) <= 5 * micro_batches + 10


def test_overlapping_communication_changes_nothing(
    unstable: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    """Over 20 steps, with the kernels that repeat their bits. (On a CPU nothing overlaps.)"""
    configs, steps = {}, 20 if device.type == "cuda" else 3
    for overlaps in (False, True):
        folder = tmp_path / str(overlaps)
        train = {"max_steps": steps, "deterministic": True, "output_dir": str(folder)}
        configs[str(overlaps)] = changed(
            unstable, deepspeed=zero(overlap_comm=overlaps), train=train
        )
    run_on(device, "run_trainers", tmp_path / "ranks", configs=configs)
    serial, overlapped = (metrics_of(tmp_path / name) for name in configs)
    assert len(serial) >= steps
    for one, other in zip(serial, overlapped, strict=True):
        for key in ("loss_kept", "grad_norm", "eval_loss"):
            if key in one:
                assert one[key] == pytest.approx(other[key], rel=1e-6), (one["step"], key)


@pytest.mark.gpu
def test_overlapping_communication_passes_the_sanitizer(
    unstable: dict[str, Any], tmp_path: Path
) -> None:
    """torch's own, which finds a tensor that two streams use without waiting for each other. It
    looks at kernels on a GPU only."""
    values = changed(unstable, deepspeed=zero(overlap_comm=True))
    environment = {"TORCH_CUDA_SANITIZER": "1"}
    found = run_alone("run_trainers", tmp_path / "rank", environment, configs={"": values})
    assert found == {"": ""}
    assert "CSAN detected" not in (tmp_path / "rank" / "rank-0.log").read_text()


@suite
def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    unstable: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    """To the bit, with the kernels that repeat theirs."""
    train = {"max_steps": 4, "save_every": 1, "deterministic": True}
    values = {
        name: changed(
            unstable,
            model={"dtype": "bfloat16"},
            train={**train, "output_dir": str(tmp_path / name)},
        )
        for name in ("whole", "killed")
    }
    run_on(device, "recorded_run", tmp_path / "1", values=values["whole"])
    kill = ("scoring", 0, 8 if device.type == "cpu" else 14)  # in the third step
    with pytest.raises(AssertionError, match="killed in scoring"):
        run_on(device, "recorded_run", tmp_path / "2", values=values["killed"], kill=kill)
    again = changed(values["killed"], train={"resume": "auto"})
    run_on(device, "recorded_run", tmp_path / "3", values=again)
    whole, resumed = (tmp_path / name for name in values)
    assert comparable(whole) == comparable(resumed)
    assert largest_difference(whole, resumed) == 0


@pytest.mark.gpu
def test_two_runs_differ_by_what_kernels_do_not_repeat(
    unstable: dict[str, Any], tmp_path: Path, note: Note
) -> None:
    """Tells how far two equal runs are apart; on a CPU every kernel repeats its bits."""
    configs = {
        name: changed(
            unstable,
            model={"dtype": "bfloat16"},
            train={"max_steps": 4, "output_dir": str(tmp_path / name)},
        )
        for name in ("one", "other")
    }
    run_alone("run_trainers", tmp_path / "rank", configs=configs)
    off = largest_difference(*(tmp_path / name for name in configs))
    note(f"weights differ by {off:.1e} at most after 4 steps")
    assert off < 0.1


def largest_difference(first: Path, second: Path) -> float:
    """Between any two elements of the weights that two runs exported."""
    one, other = (weights_of(folder / "export") for folder in (first, second))
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def test_random_numbers_go_on_where_they_were_saved(device: torch.device) -> None:
    state = random_state(device)
    first = torch.rand(3, device=device), torch.rand(3)
    set_random_state(state, device)
    second = torch.rand(3, device=device), torch.rand(3)
    assert all(map(torch.equal, first, second))


def test_recomputing_activations_changes_nothing(
    unstable: dict[str, Any], device: torch.device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the hooks that capture states, adapters, and biases; and with states on the host."""
    biased = with_biases(unstable, tmp_path / "model")
    variants = {"lora": changed(unstable, model={"lora": {"r": 3}}), "biases": biased}
    configs = {
        f"{name} {again}": changed(
            values,
            train={
                "gradient_checkpointing": again,
                "output_dir": str(tmp_path / f"{name} {again}"),
            },
        )
        for name, values in variants.items()
        for again in (False, True, "offload")
    }
    run_on(device, "run_trainers", tmp_path / "ranks", configs=configs)
    for name in variants:
        kept = metrics_of(tmp_path / f"{name} False")
        for again in (True, "offload"):
            recomputed = metrics_of(tmp_path / f"{name} {again}")
            for one, other in zip(kept, recomputed, strict=True):
                for key in one.keys() & {"loss_kept", "grad_norm", "composite_mean", "kept_tokens"}:
                    assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6), (name, key)


def with_biases(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same run with a model whose attention has biases."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tiny = values["model"]["name_or_path"]
    settings = AutoConfig.from_pretrained(tiny, attention_bias=True)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(settings).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return changed(values, model={"name_or_path": str(folder)})


def test_a_micro_batch_without_response_tokens_trains_on_nothing(
    unstable: dict[str, Any], device: torch.device, tmp_path: Path
) -> None:
    values = variant(unstable, tmp_path / "run")
    results = run_on(device, "one_empty_micro_batch", tmp_path / "ranks", values=values)
    assert results[-1]["kept"][1] == 0
    assert results[-1]["kept"][0] > 0
    tolerance = 1e-5 if device.type == "cpu" else 1e-4
    check_gradients_of_kept(results, values["model"]["name_or_path"], tolerance)


def test_messages_may_be_empty(device: torch.device, tmp_path: Path) -> None:
    for found in run_on(device, "empty_messages", tmp_path):
        assert found.pop("all-gather")[-1] == 0
        assert found == {"all-reduce": [0, 3], "all-gather of rows": [0, 3], "reduce-scatter": [0]}
