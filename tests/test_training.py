"""Whole runs: the recipe as a user starts it, equality with plain fine-tuning, resuming, and
stopping in time."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from alphatoken import UserError
from alphatoken.config.run import RunConfig
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.training.setup import build_run
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of, run_recipe, start_recipe
from tests.tiny import tokenised

TERMS = ("direct_target", "causal_target", "direct_proxy", "causal_proxy")
METRICS = {
    *("step", "loss_kept", "loss_response", "lr", "grad_norm", "response_tokens", "kept_tokens"),
    *("seconds_score", "seconds_forward", "seconds_backward", "seconds_refresh", "seconds_step"),
    *("tokens_per_second", "tokens_per_second_per_device", "peak_memory_bytes"),
    *(f"{term}_{moment}" for term in (*TERMS, "composite") for moment in ("mean", "std")),
}


@pytest.fixture
def config_file(run_values: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(run_values))
    return file


@pytest.mark.slow
def test_the_recipe_trains_reports_and_exports(
    config_file: Path, run_values: dict[str, Any]
) -> None:
    finished = start_recipe(
        config_file, "logging.wandb=offline", "train.save_every=3", "train.max_steps=3"
    )
    assert finished.returncode == 0, finished.stderr[-4000:]
    folder = Path(run_values["train"]["output_dir"])

    before, *steps = metrics_of(folder)
    assert before.keys() == {"step", "eval_loss"}
    assert [step["step"] for step in steps] == [1, 2, 3]
    for step in steps:
        assert step.keys() >= METRICS
        assert step["kept_tokens"] == pytest.approx(step["response_tokens"] / 2, abs=3)
        assert step["direct_target_std"] > 0
        assert sum(step[f"{term}_share"] for term in TERMS) == pytest.approx(1)
    # The first step has learning rate 0, so nothing has moved before the third.
    assert [step["direct_proxy_std"] > 0 for step in steps] == [False, False, True]
    assert [step["drift_norm"] > 0 for step in steps] == [False, True, True]
    assert 0 < steps[1]["fisher_weighted_drift"] < steps[2]["fisher_weighted_drift"]
    assert -1 <= steps[2]["adaptation_stability_rank_correlation"] <= 1
    for step in steps:
        assert step["tokens_per_second"] > 0
    assert "eval_loss" in steps[-1]

    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    assert resolved["selection"]["keep_ratio"] == 0.5
    assert resolved["logging"]["wandb"] == "offline"
    assert list(folder.glob("wandb/offline-run-*"))
    assert (folder / "checkpoints" / "latest").read_text() == "step-3"

    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    tokenizer = AutoTokenizer.from_pretrained(folder / "export")
    start = AutoModelForCausalLM.from_pretrained(run_values["model"]["name_or_path"])
    assert tokenizer.chat_template
    assert set(model.state_dict()) == set(start.state_dict())
    moved = [
        (a - b).abs().max() for a, b in zip(model.parameters(), start.parameters(), strict=True)
    ]
    assert 0 < max(moved) <= 2.1e-3, "AdamW steps at lr 0, 1e-3 and less"

    for shown in (
        "step 3/3",
        "Fisher: ",
        "[+most valued fifth+]",
        "Run summary",
        str(folder / "export"),
    ):
        assert shown in finished.stdout

    again = run_recipe(config_file)
    assert again.returncode != 0
    assert "holds another run" in again.stderr
    assert "Traceback" not in again.stderr


@pytest.mark.slow
def test_the_default_says_what_it_drops_and_why(tmp_path: Path, run_values: dict[str, Any]) -> None:
    values = {name: keys for name, keys in run_values.items() if name != "selection"}
    file = tmp_path / "default.yaml"
    file.write_text(yaml.safe_dump(values))
    # A model of noise agrees on little.
    finished = run_recipe(file, "selection.auto_margin=0.1", "valuation.contrast=3")
    assert finished.returncode == 0, finished.stderr[-4000:]
    rules = "probability below 0.0001", "agreement below -0.1 times the noise of values"
    said = finished.stdout
    assert f"what is kept: all response tokens but those of {' and of '.join(rules)}" in said
    first, *_ = (step for step in metrics_of(run_values["train"]["output_dir"]) if step["step"])
    dropped = round(first["below_threshold_share"] * first["response_tokens"])
    assert 0 < dropped < first["response_tokens"]
    assert f"step 1: dropped {dropped} of {first['response_tokens']} response tokens: " in said
    assert first["kept_tokens"] == first["response_tokens"] - dropped - first["vetoed_tokens"]
    assert first["noise_scale"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "override", "message"),
    [
        (
            run_recipe,
            "valuation.layers=5",
            "error: valuation.layers=5, but the model has only 4 decoder layers",
        ),
        (start_recipe, "data.train=nowhere.jsonl", "error: data file nowhere.jsonl does not exist"),
    ],
)
def test_a_mistake_ends_the_run_with_a_message(
    start: Callable[..., subprocess.CompletedProcess[str]],
    config_file: Path,
    override: str,
    message: str,
) -> None:
    finished = start(config_file, override)
    assert finished.returncode != 0
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr


@pytest.mark.slow
def test_keeping_everything_equals_a_plain_deepspeed_loop(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    variants = {
        "valuation off": changed(
            run_values,
            train={"max_steps": 5, "output_dir": str(tmp_path / "off")},
            valuation={"enabled": False},
        ),
        "keep ratio 1": changed(
            run_values,
            train={"max_steps": 5, "output_dir": str(tmp_path / "all")},
            selection={"keep_ratio": 1.0},
        ),
    }
    (plain, _) = run_ranks(
        "plain_deepspeed_loop", 2, tmp_path / "plain", values=run_values, steps=5
    )
    assert (
        run_ranks("run_trainers", 2, tmp_path / "ours", configs=variants)
        == [dict.fromkeys(variants, "")] * 2
    )
    for name, values in variants.items():
        folder = Path(values["train"]["output_dir"])
        ours = [step["loss_kept"] for step in metrics_of(folder)[1:]]
        assert ours == pytest.approx(plain["losses"], abs=1e-6), name
        weights = AutoModelForCausalLM.from_pretrained(folder / "export").state_dict()
        for parameter, expected in plain["weights"].items():
            error = (weights[parameter] - expected).abs().max()
            assert error <= 1e-6, f"{name}: {parameter} is off by {error:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("estimator", ["ghost", "exact"])
def test_a_resumed_run_equals_an_uninterrupted_one(
    estimator: str, run_values: dict[str, Any], tiny_fisher: Path, tmp_path: Path
) -> None:
    run_values = changed(run_values, valuation={"fisher": str(tiny_fisher)})

    def run(name: str, **train: Any) -> dict[str, Any]:
        # The running scales of `balance` are part of the state.
        values = changed(run_values, valuation={"balance": "std"}, optim={"warmup_ratio": 0.0})
        if estimator == "exact":
            exact = {
                "estimator": "exact",
                "parameters": "all",
                "preconditioner": "adam",
                "window": 32,
            }
            values = changed(values, valuation=exact)
        return changed(values, train={"max_steps": 4, "output_dir": str(tmp_path / name), **train})

    configs = {
        "straight": run("straight", eval_every=2),
        "first": run("resumed", save_every=2, eval_every=2),
        "never": run("resumed", save_every=2, eval_every=2),
        "changed": changed(run("resumed", resume="auto"), optim={"lr": 2e-3}),
    }
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "ranks", configs=configs)
    assert (messages["straight"], messages["first"]) == ("", "")
    assert "holds another run" in messages["never"]
    assert "optim.lr: was 0.001, is 0.002" in messages["changed"]

    # As if the run had died in step 4, and the checkpoint of step 4 had been damaged.
    newest = tmp_path / "resumed" / "checkpoints" / "step-4"
    shard = sorted(newest.glob("*optim_states.pt"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with (tmp_path / "resumed" / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 5, "loss_k')
    final = run("resumed", resume="auto", eval_every=2)
    (messages, _) = run_ranks("run_trainers", 2, tmp_path / "again", configs={"resumed": final})
    assert messages["resumed"] == ""
    log = (tmp_path / "again" / "rank-0.log").read_text()
    assert f"not resuming from {newest}: {shard} has" in log
    assert "continuing after step 2" in log

    def comparable(folder: str) -> list[dict[str, Any]]:
        timing = ("seconds", "tokens_per_second", "mfu", "peak")
        return [
            {key: value for key, value in step.items() if not key.startswith(timing)}
            for step in metrics_of(tmp_path / folder)
        ]

    assert comparable("resumed") == comparable("straight")
    straight, resumed = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "export").state_dict()
        for name in ("straight", "resumed")
    )
    for name, weight in straight.items():
        assert torch.equal(weight, resumed[name]), f"{name} differs after resuming"


@pytest.mark.slow
def test_a_non_finite_loss_stops_before_the_optimizer_step(
    run_values: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    (poison,) = tokenizer("~", add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.inf
    model.save_pretrained(tmp_path / "poisoned")
    tokenizer.save_pretrained(tmp_path / "poisoned")

    configs = {}
    for part in ("train", "validation"):
        rows = Path(run_values["data"][part]).read_text().splitlines()
        rows[2] = json.dumps({"prompt": "What is this ~?", "response": "red"})
        file = tmp_path / f"{part}.jsonl"
        file.write_text("\n".join(rows) + "\n")
        configs[part] = changed(
            run_values,
            model={"name_or_path": str(tmp_path / "poisoned")},
            data={part: str(file)},
            fisher={"prompts": run_values["data"]["eval"]},
            valuation={"validation_sequences": 7},
            train={
                "global_batch_size": 30,
                "micro_batch_size": 1,
                "output_dir": str(tmp_path / part),
            },
        )
    both = run_ranks("run_trainers", 2, tmp_path / "ranks", configs=configs)
    for part in ("train", "validation"):
        for messages in both:
            assert (
                "step 1: a loss or signal is not finite; the optimizer step was not taken"
                in messages[part]
            )
            assert f"data.{part} {tmp_path}/{part}.jsonl:3" in messages[part]
        assert [step["step"] for step in metrics_of(tmp_path / part)] == [0]
    assert (
        "signals of 14 parts, the last in the forward pass: model.layers.3.mlp.down_proj"
        in both[0]["train"]
    )


@pytest.mark.slow
def test_lora_trains_values_and_exports_adapters(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """On 1 and 2 ranks, with and without activation checkpointing and a streamed tower: the same
    curves."""
    lora = changed(
        run_values,
        model={"lora": {"r": 3, "alpha": 12}},
        optim={"lr": 1e-2},
        train={"max_steps": 3},
    )

    def variants(ranks: int) -> dict[str, dict[str, Any]]:
        sections: dict[str, dict[str, Any]] = {
            "plain": {},
            "checkpointed": {"train": {"gradient_checkpointing": True}},
            "streamed": {"valuation": {"residency": "streamed"}},
            "exact": {
                "valuation": {
                    "estimator": "exact",
                    "layers": "all",
                    "parameters": "all",
                    "window": 32,
                }
            },
        }
        return {
            name: changed(
                changed(lora, **content), train={"output_dir": str(tmp_path / f"{name}-{ranks}")}
            )
            for name, content in sections.items()
        }

    for ranks in (1, 2):
        configs = variants(ranks)
        (messages, *_) = run_ranks(
            "run_trainers", ranks, tmp_path / f"ranks-{ranks}", configs=configs
        )
        assert messages == dict.fromkeys(configs, "")
    expected = metrics_of(tmp_path / "plain-1")
    assert expected[-1]["eval_loss"] < expected[0]["eval_loss"]
    assert expected[1]["composite_std"] > 0
    for name in (
        "plain-2",
        *(f"{variant}-{ranks}" for variant in ("checkpointed", "streamed") for ranks in (1, 2)),
    ):
        for ours, theirs in zip(metrics_of(tmp_path / name), expected, strict=True):
            for key in theirs.keys() & {
                "loss_kept",
                "eval_loss",
                "composite_std",
                "causal_target_std",
                "grad_norm",
            }:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (
                    f"{name}, step {ours['step']}: {key}"
                )

    for ours, theirs in zip(
        metrics_of(tmp_path / "exact-2"), metrics_of(tmp_path / "exact-1"), strict=True
    ):
        for key in theirs.keys() & {
            "loss_kept",
            "eval_loss",
            "composite_std",
            "direct_proxy_std",
            "grad_norm",
        }:
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (
                f"exact, step {ours['step']}: {key}"
            )

    export = tmp_path / "checkpointed-2" / "export"
    assert (export / "adapter_config.json").exists()
    assert not (export / "model.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(run_values["model"]["name_or_path"])
    model.load_adapter(str(export))
    assert eval_loss(model, run_values) == pytest.approx(expected[-1]["eval_loss"], rel=1e-4)


def eval_loss(model: PreTrainedModel, values: dict[str, Any]) -> float:
    """Mean loss per response token of `data.eval`, row by row in plain transformers."""
    tokenizer = AutoTokenizer.from_pretrained(values["model"]["name_or_path"])
    losses = []
    for ids, labels in tokenised(tokenizer, values["data"]["eval"]):
        with torch.no_grad():
            logits = model(input_ids=ids[None]).logits[0, :-1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, labels[1:], reduction="none")[
                labels[1:] != -100
            ]
        )
    return float(torch.cat(losses).mean())


@pytest.mark.slow
def test_every_way_to_select_gives_the_same_run_on_any_number_of_ranks(
    run_values: dict[str, Any], tiny_fisher: Path, tmp_path: Path
) -> None:
    run_values = changed(run_values, valuation={"fisher": str(tiny_fisher)})
    del run_values["data"]["eval"]
    off = {"enabled": False}
    sections: dict[str, dict[str, Any]] = {
        **{
            policy: {"selection": {"policy": policy}, "valuation": off}
            for policy in ("random", "loss", "low_perplexity", "all")
        },
        "random, whole step": {
            "selection": {"policy": "random", "scope": "global_batch"},
            "valuation": off,
        },
        "loss, valued": {"selection": {"policy": "loss"}},
        "soft": {"selection": {"weights": "sigmoid", "keep_ratio": 1.0, "protect_eos": True}},
        "soft, whole step": {
            "selection": {"weights": "sigmoid", "keep_ratio": 1.0, "scope": "global_batch"}
        },
        "schedule": {
            "selection": {
                "schedule": "linear",
                "keep_ratio_start": 1.0,
                "keep_ratio": 0.2,
                "schedule_steps": 2,
            },
        },
        "balanced": {"valuation": {"balance": "std"}, "optim": {"warmup_ratio": 0.0}},
        "refreshed every 2nd step": {"valuation": {"refresh_every": 2}},
        "valued from the 3rd step": {
            "valuation": {"refresh_every": 2, "start_step": 2},
            "selection": {"scope": "global_batch"},
        },
        "vetoed": {
            "selection": {"policy": "all", "veto": {"by": "probability", "share": 0.3}},
            "valuation": off,
        },
        "harmful beyond the noise": {
            "selection": {
                "keep_ratio": "auto",
                "auto_margin": 0.5,
                "scope": "global_batch",
                "normalise": "kept",
            },
            "valuation": {"reliability": True, "contrast": 1.0},
        },
        "vetoed in the unit of the noise": {
            "selection": {
                "policy": "agreement",
                "veto": {"by": "adaptation", "threshold": -0.5, "unit": "noise"},
            },
            "valuation": {"reliability": True, "contrast": 1.0},
        },
        "vetoed by response": {
            "selection": {"policy": "all", "veto": {"by": "response_agreement", "share": 0.3}},
            "valuation": {"reliability": True, "contrast": 1.0},
        },
        "softmax of the harmless": {"selection": {"threshold": 0.0, "weights": "softmax"}},
        "protected, packed": {
            "selection": {
                "scope": "sequence",
                "protect_eos": True,
                "min_keep": 2,
                "keep_ratio": 0.1,
            },
            "data": {"packing": True},
        },
    }
    for ranks in (1, 3):
        configs = {
            name: changed(
                changed(run_values, **content),
                train={"max_steps": 3, "output_dir": str(tmp_path / f"{name}-{ranks}")},
            )
            for name, content in sections.items()
        }
        (messages, *_) = run_ranks(
            "run_trainers", ranks, tmp_path / f"ranks-{ranks}", configs=configs
        )
        assert messages == dict.fromkeys(configs, "")
    shares = {}
    for name in sections:
        one, three = ([*metrics_of(tmp_path / f"{name}-{ranks}")] for ranks in (1, 3))
        for ours, theirs in zip(three, one, strict=True):
            for key in theirs.keys() & {
                "loss_kept",
                "loss_response",
                "grad_norm",
                "kept_tokens",
            }:
                assert ours[key] == pytest.approx(theirs[key], rel=1e-4), (
                    f"{name}, step {ours['step']}: {key}"
                )
        shares[name] = [step["kept_tokens"] / step["response_tokens"] for step in one]
        first = one[0]
        difference = first["loss_kept"] - first["loss_response"]
        if name.startswith("loss"):
            assert difference > 0.05
        elif name == "low_perplexity":
            assert difference < -0.05
    assert shares["all"] == shares["soft"] == [1, 1, 1]
    assert all(0.5 < share <= 1 for share in shares["harmful beyond the noise"])
    for name in ("vetoed", "vetoed by response"):
        assert shares[name] == pytest.approx([0.7] * 3, abs=0.02)
    assert shares["valued from the 3rd step"] == pytest.approx([1.0, 1.0, 0.5], abs=0.02)
    assert shares["schedule"] == pytest.approx([1.0, 0.6, 0.2], abs=0.02)
    assert shares["random, whole step"] == pytest.approx([0.5] * 3, abs=0.002)


@pytest.mark.slow
def test_without_stability_adaptation_is_the_value(
    run_values: dict[str, Any], tmp_path: Path
) -> None:
    """With contrast as well, which is part of it."""
    valuation = {"stability_weight": 0.0, "contrast": 0.7}
    configs = {
        policy: changed(
            run_values,
            valuation=valuation,
            selection={"policy": policy},
            train={"output_dir": str(tmp_path / policy)},
        )
        for policy in ("top_value", "adaptation")
    }
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "ranks", configs=configs)
    assert messages == dict.fromkeys(configs, "")
    by_value, by_adaptation = (metrics_of(tmp_path / policy) for policy in configs)
    for one, other in zip(by_value, by_adaptation, strict=True):
        for key in one.keys() & {"loss_kept", "grad_norm", "eval_loss"}:
            assert other[key] == pytest.approx(one[key], rel=1e-5), (one["step"], key)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"model": {"name_or_path": "no/such/model"}}, "model.name_or_path=no/such/model"),
        (
            {"data": {"packing": True}, "model": {"name_or_path": "{recurrent}"}},
            "data.packing=true is not possible",
        ),
        ({"model": {"name_or_path": "{dropout}"}}, "config.json has attention_dropout=0.1"),
        (
            {"model": {"name_or_path": "{softcap}", "attn_implementation": "sdpa"}},
            "sdpa is not possible with Gemma2ForCausalLM",
        ),
        (
            {"model": {"attn_implementation": "flash_attention_2", "dtype": "float32"}},
            "attn_implementation=flash_attention_2 needs model.dtype=bfloat16",
        ),
        (
            {
                "deepspeed": {
                    "config": {
                        "zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}
                    }
                }
            },
            "offload_param.device=nvme is not possible with valuation",
        ),
        ({"model": {"name_or_path": "{unknown}"}}, "model class OPTForCausalLM has no entry"),
        ({"valuation": {"fisher": "nowhere.safetensors"}}, "cannot read nowhere.safetensors"),
        ({"train": {"resume": "nowhere"}}, "nowhere/complete.json cannot be read"),
    ],
)
def test_what_can_be_known_before_loading_is_said_before_loading(
    run_values: dict[str, Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sections: dict[str, dict[str, Any]],
    message: str,
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for name, config in {
        "recurrent": transformers.Qwen3_5TextConfig(),
        "dropout": transformers.LlamaConfig(attention_dropout=0.1),
        "softcap": transformers.Gemma2Config(),
        "unknown": transformers.OPTConfig(),
    }.items():
        config.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        for content in sections.values():
            for key, value in content.items():
                if value == f"{{{name}}}":
                    content[key] = str(tmp_path / name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(
        "alphatoken.training.setup.initialise_ranks", lambda minutes: torch.device("cpu")
    )
    monkeypatch.setattr(
        "alphatoken.training.setup.load_model", lambda *_: pytest.fail("the model was loaded")
    )
    values = changed(run_values, **sections)
    with pytest.raises(UserError, match=message):
        build_run(RunConfig.model_validate(values), SupervisedObjective())


def test_deterministic_kernels_are_asked_of_torch_and_the_libraries(
    run_values: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are in force before the device is first used; a run without the key leaves all alone."""
    found: list[tuple[bool | str | None, ...]] = []

    def stop(_minutes: float | None) -> None:
        names = ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC")
        found.append((torch.are_deterministic_algorithms_enabled(), *map(os.environ.get, names)))
        raise KeyboardInterrupt

    monkeypatch.setattr("alphatoken.training.setup.initialise_ranks", stop)
    for name in ("CUBLAS_WORKSPACE_CONFIG", "FLASH_ATTENTION_DETERMINISTIC"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    try:
        for deterministic in (False, True):
            run_values["train"]["deterministic"] = deterministic
            with pytest.raises(KeyboardInterrupt):
                build_run(RunConfig.model_validate(run_values), SupervisedObjective())
    finally:
        torch.use_deterministic_algorithms(mode=False)
    assert found == [(False, None, None), (True, ":4096:8", "1")]
