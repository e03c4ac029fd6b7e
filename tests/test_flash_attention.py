"""Flash attention around a stand-in of its kernels (`tests.flash_attention`): values are the
oracle's, packed and not, and `auto` finds what is installed."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_flash_attention_utils as dispatch
import yaml

from alphatoken.batch import make_batch
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.data.batches import ONE_ROW, Layout, micro_batches
from alphatoken.doctor.comparing import compare_model_settings
from alphatoken.errors import UserError
from alphatoken.models import compatibility
from alphatoken.models.decoder import decoder_of
from alphatoken.models.loading import (
    attention_of,
    different_kernels,
    settle_model,
    usable_attention,
)
from alphatoken.stability.fisher_sum import FisherSum
from tests import test_exact, test_valuation
from tests.cases import run_flash_trainers
from tests.flash_attention import Calls, stand_in
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of
from tests.tiny import CASES, by_architecture, collate, pack, random_sequences, unpack, unpad

CPU = torch.device("cpu")


def lengths_of(calls: Calls, kind: str) -> set[tuple[int, ...]]:
    return {tuple(lengths) for called, lengths in calls if called == kind}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", by_architecture())
def test_ghost_matches_the_oracle(name: str, version: int) -> None:
    """Unpacked rows run the dense kernel, padding on the left and packed rows the other one."""
    case = CASES[name]
    setting = test_valuation.Setting(case, window=4)
    with stand_in(version) as calls:
        setting.model.set_attn_implementation(f"flash_attention_{version}")
        for side, kind in (("right", "dense"), ("left", "varlen")):
            calls.clear()
            values = setting.score(
                collate(setting.sequences, side), collate(setting.validation, side)
            )
            setting.check(
                {
                    term: unpad(getattr(values, term), setting.sequences, side)
                    for term in test_valuation.TERMS
                }
            )
            assert {called for called, _ in calls} == {kind}
        if case.packable:
            calls.clear()
            values = setting.score(pack(setting.sequences, 2), pack(setting.validation, 1))
            setting.check(
                {
                    term: unpack(getattr(values, term), setting.sequences, 2)
                    for term in test_valuation.TERMS
                }
            )
            assert (10, 13, 10) in lengths_of(calls, "varlen"), "the documents of the held-out row"


@pytest.mark.parametrize("name", by_architecture())
def test_exact_matches_per_token_gradients(name: str) -> None:
    setting = test_exact.Setting(name, None, "all")
    with stand_in():
        setting.model.set_attn_implementation("flash_attention_2")
        for side in ("right", "left"):
            values = setting.score(
                collate(setting.sequences, side), collate(setting.validation, side)
            )
            setting.check(partial(unpad, sequences=setting.sequences, side=side), values, side)
        if setting.case.packable:
            values = setting.score(pack(setting.sequences, 2), pack(setting.validation, 1))
            setting.check(partial(unpack, sequences=setting.sequences, rows=2), values, "packed")


def test_the_fisher_is_that_of_sdpa() -> None:
    batch = collate(random_sequences([(3, 9), (5, 4)], seed=0))
    sums = {}
    with stand_in():
        for attention in ("sdpa", "flash_attention_2"):
            model = CASES["llama"].build()
            model.set_attn_implementation(attention)
            total = FisherSum(decoder_of(model), 2, "token", CPU)
            entry, _ = total.forward(batch["input_ids"])
            total.add(entry, make_batch(batch))
            sums[attention] = total.slices
    for name, expected in sums["sdpa"].items():
        assert expected.any()
        torch.testing.assert_close(
            sums["flash_attention_2"][name], expected, rtol=1e-4, atol=1e-6 * float(expected.max())
        )


def test_the_kernel_that_is_loaded_stays_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers` keeps one kernel for the whole process, by the name it was asked for."""
    loaded: list[str | None] = []
    load = vars(dispatch)["_lazy_imports"]

    def spy(implementation: str | None, *arguments: Any, **named: Any) -> Any:
        loaded.append(implementation)
        return load(implementation, *arguments, **named)

    monkeypatch.setattr(dispatch, "_lazy_imports", spy)
    setting = test_valuation.Setting(CASES["llama"], window=4)
    with stand_in():
        setting.model.set_attn_implementation("flash_attention_2")
        setting.score(collate(setting.sequences), collate(setting.validation))
    assert loaded == ["flash_attention_2"]


def test_boundaries_reach_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No layer looks for documents in the positions, which would wait for the device: not in the
    model, nor in what scores."""

    def refuse(*_: Any) -> None:
        raise AssertionError("boundaries are derived from positions")

    monkeypatch.setattr(dispatch, "_is_packed_sequence", refuse)
    for name in ("llama", "gpt2", "gemma3"):
        setting = test_valuation.Setting(CASES[name], window=32)
        with stand_in():
            setting.model.set_attn_implementation("flash_attention_2")
            for extra in ({}, {"estimator": "exact", "window": 32}):
                setting.score(pack(setting.sequences, 2), pack(setting.validation, 1), **extra)


class Documents:
    """A dataset of documents of given lengths, as far as `micro_batches` reads it."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def __getitem__(self, row: int) -> list[tuple[Any, Any]]:
        ids = np.arange(3, 3 + self.lengths[row])
        return [(ids, np.ones(len(ids), dtype=bool))]


def test_packed_into_one_row_a_micro_batch_brings_its_boundaries() -> None:
    dataset: Any = Documents([4, 9, 2])
    layout = Layout(3, 0, ONE_ROW)
    first, placeholder = micro_batches(dataset, np.arange(3), layout, 0, 2) + micro_batches(
        dataset, np.arange(3), layout, 1, 2
    )
    assert first["input_ids"].shape == (1, 15)
    assert first["cu_seq_lens"].dtype == torch.int32
    assert first["cu_seq_lens"].tolist() == [0, 9, 13, 15]
    assert first["max_length"] == 9
    assert type(first["max_length"]) is int, "a kernel would wait for a tensor"
    assert placeholder["cu_seq_lens"].tolist() == [0, 1]
    assert placeholder["max_length"] == 1
    (several,) = micro_batches(dataset, np.arange(3), Layout(3, 0, 10), 0, 1)
    assert "cu_seq_lens" not in several


def model_config(folder: Any, **values: Any) -> ModelConfig:
    return ModelConfig.model_validate({"name_or_path": str(folder), **values})


@pytest.fixture
def folder_of(tmp_path: Any) -> Any:
    def saved(name: str) -> Any:
        model = CASES[name].build()
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(tmp_path / name)
        return tmp_path / name

    return saved


def test_auto_is_the_best_that_is_installed(folder_of: Any) -> None:
    llama, gemma2 = folder_of("llama"), folder_of("gemma2")
    if not torch.cuda.is_available():
        assert attention_of(model_config(llama)) == "sdpa"
        assert attention_of(model_config(gemma2)) == "eager", "SDPA has no soft-capping"
    with stand_in(2):
        assert attention_of(model_config(llama)) == "flash_attention_2"
        assert attention_of(model_config(gemma2)) == "flash_attention_2"
        assert attention_of(model_config(llama, dtype="float32")) == "sdpa"
        assert attention_of(model_config(llama, attn_implementation="eager")) == "eager"
        with stand_in(3):
            assert attention_of(model_config(llama)) == "flash_attention_3"


@pytest.mark.parametrize(("generation", "chosen"), [(7, "sdpa"), (10, "flash_attention_2")])
def test_auto_knows_what_a_device_can_run(
    folder_of: Any, monkeypatch: pytest.MonkeyPatch, generation: int, chosen: str
) -> None:
    folder = folder_of("llama")
    with stand_in(2), stand_in(3):
        monkeypatch.setattr(compatibility, "cuda_generation", lambda: generation)
        assert attention_of(model_config(folder)) == chosen
        refused = model_config(folder, attn_implementation="flash_attention_3")
        with pytest.raises(UserError, match=rf"compute capability 8 to 9, not {generation}"):
            compatibility.check_attention(
                transformers_config(folder), refused.attn_implementation, "bfloat16"
            )


def transformers_config(folder: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(folder)


def test_large_heads_are_not_for_flash_attention(folder_of: Any) -> None:
    config = transformers_config(folder_of("llama"))
    config.head_dim = 512
    with stand_in():
        with pytest.raises(UserError, match="heads of size 512, above 256"):
            compatibility.check_attention(config, "flash_attention_2", "bfloat16")
        assert compatibility.best_attention(config, "bfloat16") == "sdpa"


def test_a_kernel_of_the_hub_needs_a_device(folder_of: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device, so the kernel is not refused")
    config = transformers_config(folder_of("llama"))
    name = "kernels-community/flash-attn2"
    with pytest.raises(UserError, match=f"model.attn_implementation={name} needs a CUDA device"):
        compatibility.check_attention(config, name, "bfloat16")
    compatibility.check_attention(config, name, "bfloat16", here=False)


def test_another_models_kernel_is_one_that_it_can_run(folder_of: Any) -> None:
    """A reference of another class than the policy's."""
    chosen = model_config(folder_of("gemma2"), attn_implementation="sdpa")
    assert usable_attention(chosen) == "eager"
    chosen = model_config(folder_of("llama"), attn_implementation="eager")
    assert usable_attention(chosen) == "eager"


def test_every_rank_has_the_same_kernel() -> None:
    assert different_kernels(["sdpa", "sdpa"]) is None
    problem = different_kernels(["flash_attention_2", "sdpa", "sdpa"])
    assert problem is not None
    assert "flash_attention_2 on rank 0, sdpa on rank 1" in problem


def test_every_flash_kernel_that_can_be_configured_is_known() -> None:
    names = ModelConfig.model_fields["attn_implementation"].annotation.__args__  # type: ignore[union-attr]
    assert {name for name in names if "flash" in name} == set(compatibility.FLASH_KERNELS)
    assert set(compatibility.BEST_FIRST) < set(names)


def test_a_run_records_the_kernels_name(run_values: dict[str, Any]) -> None:
    """So a checkpoint of before `auto` was the default goes on where that stands for the same."""
    config = RunConfig.model_validate(changed(run_values, model={"dtype": "bfloat16"}))
    assert config.model.attn_implementation == "auto"
    explicit = changed(
        run_values, model={"dtype": "bfloat16", "attn_implementation": "flash_attention_2"}
    )
    with stand_in():
        assert settle_model(config) == RunConfig.model_validate(explicit)


def test_the_doctor_names_ranks_with_another_kernel() -> None:
    alike = compare_model_settings(["sdpa attention, no valuation"] * 2, ["a", "b"])
    assert (alike.outcome, alike.found) == ("ok", "sdpa attention, no valuation")
    found = ["flash_attention_2 attention", "flash_attention_2 attention", "sdpa attention"]
    different = compare_model_settings(found, ["a", "b", "c"])
    assert different.outcome == "failed"
    assert "sdpa attention, elsewhere flash_attention_2" in different.found


@pytest.mark.slow
def test_runs_pack_and_value_with_flash_attention(
    run_values: dict[str, Any], pair_values: dict[str, Any], tmp_path: Path
) -> None:
    """From rows to metrics on two ranks under ZeRO-3: `auto` finds the kernel, the Fisher is
    estimated, rows are packed; losses are SDPA's as far as 16 bits tell."""
    configs = {}
    for kind, values in {"sft": run_values, "pairs": pair_values}.items():
        for attention in ("auto", "sdpa"):
            configs[f"{kind} {attention}"] = changed(
                values,
                model={"dtype": "bfloat16", "attn_implementation": attention},
                data={"packing": True},
                selection={"policy": "all"},
                train={"output_dir": str(tmp_path / f"{kind} {attention}")},
            )
    for found in run_ranks(run_flash_trainers.__name__, 2, tmp_path / "ranks", configs=configs):
        assert {message for message, _ in found.values()} == {""}
        assert {name: kinds for name, (_, kinds) in found.items() if "sdpa" in name} == {
            "sft sdpa": [],
            "pairs sdpa": [],
        }
        assert all("varlen" in found[f"{kind} auto"][1] for kind in ("sft", "pairs"))
    for kind in ("sft", "pairs"):
        recorded = yaml.safe_load((tmp_path / f"{kind} auto" / "config.yaml").read_text())
        assert recorded["model"]["attn_implementation"] == "flash_attention_2"
        flash, sdpa = (metrics_of(tmp_path / f"{kind} {name}") for name in ("auto", "sdpa"))
        steps = [pair for pair in zip(flash, sdpa, strict=True) if "loss_kept" in pair[0]]
        assert len(steps) == 2, "an evaluation before the first step is not one"
        for one, other in steps:
            for key in ("loss_kept", "grad_norm"):
                assert one[key] == pytest.approx(other[key], rel=0.02), (kind, key)
            spread = other["composite_std"]
            assert one["composite_mean"] == pytest.approx(other["composite_mean"], abs=0.1 * spread)
