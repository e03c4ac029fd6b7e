"""LoRA adapters: where a model gets them, and folders of them in place of a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from alphatoken.checkpoints.export import export_checkpoint
from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import LoraConfig, ModelConfig
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.doctor import refusals
from alphatoken.errors import UserError
from alphatoken.models.loading import adapters_note, load_model
from alphatoken.reference.losses import check_reference
from tests.runs import changed
from tests.tiny import CASES


def adapted(name: str, folder: Path, targets: list[str] | None) -> tuple[Any, ModelConfig]:
    """A tiny model with adapters on some linears, or on all, and its settings."""
    CASES[name].build().save_pretrained(folder)
    lora = LoraConfig(r=2, target_modules=targets or "all-linear")
    config = ModelConfig(name_or_path=str(folder), attn_implementation="eager", lora=lora)
    return load_model(config, {}, seed=0), config


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"], ["q_proj", "fc1"]])
def test_a_vision_tower_gets_none(targets: list[str] | None, tmp_path: Path) -> None:
    model, config = adapted("gemma3_multimodal", tmp_path / "model", targets)
    names = {name.partition(".lora_A")[0] for name in model.state_dict() if "lora_A" in name}
    linears = 7 if targets is None else len(targets) - ("fc1" in targets)
    assert len(names) == 4 * linears
    assert all(name.startswith("model.language_model.layers.") for name in names)
    assert adapters_note(model, config) == (
        "adapters are in the decoder alone: no text runs through model.vision_tower"
    )
    # peft finds the same places when it reads them again.
    model.save_pretrained(tmp_path / "adapters")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    again.load_adapter(str(tmp_path / "adapters"))
    assert {name for name in again.state_dict() if "lora_" in name} == {
        name for name in model.state_dict() if "lora_" in name
    }


def test_linears_of_a_vision_tower_alone_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model.lora.target_modules=\['fc1'\]: .*excluded"):
        adapted("gemma3_multimodal", tmp_path / "model", ["fc1"])


def test_a_text_model_has_nothing_to_say_of(tmp_path: Path) -> None:
    model, config = adapted("llama", tmp_path / "model", None)
    assert adapters_note(model, config) is None
    assert model.peft_config["default"].exclude_modules is None


@pytest.fixture
def adapters(tiny_model: Path, tmp_path: Path) -> Path:
    """Adapters of the tiny model as peft writes them, which change what it computes."""
    model = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_model),
        peft.LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False),
    )
    model.save_pretrained(str(tmp_path / "adapters"))
    return tmp_path / "adapters"


def test_a_folder_of_adapters_is_no_model(
    adapters: Path, run_values: dict[str, Any], tiny_model: Path
) -> None:
    """Nor where a tokenizer or a config.json lies beside them, which transformers would load as the
    model with adapters."""
    fix = f"alphatoken export --merge {adapters} NEW_FOLDER"
    as_model = validate(
        RunConfig, changed(run_values, model={"name_or_path": str(adapters)}), "test"
    )
    compared = changed(
        run_values, selection={"policy": "excess_loss"}, reference={"model": str(adapters)}
    )
    as_reference = validate(RunConfig, compared, "test")
    tokenizer = load_tokenizer(as_reference.model)
    for beside in ((), ("tokenizer.json", "tokenizer_config.json"), ("config.json",)):
        for file in beside:
            shutil.copy(tiny_model / file, adapters)
        for check in (refusals.tokenizer, refusals.model):
            with pytest.raises(UserError, match="holds LoRA adapters") as raised:
                check(as_model)
            assert str(raised.value).startswith(f"model.name_or_path={adapters} holds")
            assert fix in str(raised.value)
        with pytest.raises(UserError, match=r"^reference.model=.* holds LoRA adapters") as raised:
            check_reference(as_reference, tokenizer)
        assert fix in str(raised.value)


@pytest.mark.parametrize("place", ["adapters", "a run"])
def test_adapters_are_merged_without_a_checkpoint(
    place: str, adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    source = adapters
    if place == "a run":  # finished, of which the checkpoints were removed, or never saved
        source = tmp_path / "run"
        (source / "model").mkdir(parents=True)
        adapters.rename(source / "export")
        adapters = source / "export"
        (source / "config.yaml").write_text("model: {dtype: bfloat16}\n")
        GenerationConfig(eos_token_id=[2, 0]).save_pretrained(source / "model")
        with pytest.raises(UserError, match=r"has no checkpoint.*own export is .*run/export"):
            export_checkpoint(source, tmp_path / "new")
    done = export_checkpoint(source, tmp_path / "merged", merge=True)
    dtype = torch.bfloat16 if place == "a run" else torch.float32
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    assert merged.dtype == dtype
    assert done.parameters == sum(each.numel() for each in base.parameters())
    ids = AutoTokenizer.from_pretrained(tmp_path / "merged")("Hello", return_tensors="pt").input_ids
    plain = base(ids).logits
    expected = peft.PeftModel.from_pretrained(base, str(adapters))(ids).logits
    assert torch.allclose(merged(ids).logits, expected, atol=1e-5 if place != "a run" else 0.1)
    assert not torch.allclose(plain, expected, atol=0.2)
    if place == "a run":
        assert merged.generation_config.eos_token_id == [2, 0]


def test_adapters_of_a_model_that_is_gone_are_named(adapters: Path, tmp_path: Path) -> None:
    file = adapters / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "no")})
    )
    with pytest.raises(UserError, match=r"base_model_name_or_path in .*adapters=.*cannot be loade"):
        export_checkpoint(adapters, tmp_path / "merged", merge=True)


def test_adapters_of_a_model_that_lacks_weights_are_not_merged(
    adapters: Path, tiny_model: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    weights = load_file(base / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    file = adapters / "adapter_config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(base)})
    )
    with pytest.raises(
        UserError, match=r"model \S+base: its files lack 1 weight of .*norm\.weight"
    ):
        export_checkpoint(adapters, tmp_path / "merged", merge=True)
    assert not (tmp_path / "merged").exists()


def test_merged_adapters_that_the_disk_refuses_leave_nothing(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PreTrainedTokenizerBase, "save_pretrained", refused)
    with pytest.raises(UserError, match=r"cannot write the export .*merged: .*No space left"):
        export_checkpoint(adapters, tmp_path / "new" / "merged", merge=True)
    assert list((tmp_path / "new").iterdir()) == []
