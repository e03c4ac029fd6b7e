"""Exports are written weight by weight, and hold what `save_pretrained` would write."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from alphatoken.checkpoints import weight_files
from alphatoken.checkpoints.weight_files import (
    Prefix,
    Source,
    WeightFiles,
    batches_to_save,
    names_to_save,
    prefixes_of,
)
from tests.cases import HeldBytes
from tests.ranks import run_ranks
from tests.tiny import CASES, by_architecture, save_published, tiny_llama

SHARD_BYTES = 20_000


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def sources_of(model: PreTrainedModel, held: HeldBytes | None = None) -> dict[str, Source]:
    state = model.state_dict()

    def read(name: str) -> Tensor:
        return state[name] if held is None else held.hold(state[name])

    return {
        name: Source(state[name].numel(), state[name].dtype, functools.partial(read, name))
        for name in names_to_save(model)
    }


def written(
    model: PreTrainedModel,
    folder: Path,
    held: HeldBytes | None = None,
    prefixes: Sequence[Prefix] = (),
) -> WeightFiles:
    folder.mkdir()
    files = WeightFiles(folder)
    for batch in batches_to_save(model, sources_of(model, held), prefixes):
        files.write(batch)
    files.finish()
    return files


@pytest.mark.parametrize("name", by_architecture())
def test_weights_are_those_of_save_pretrained_in_several_files(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Names, dtypes and bits; of a model that was built here and of one that was loaded, where
    transformers remembers what it converted."""
    monkeypatch.setattr(weight_files, "SHARD_BYTES", SHARD_BYTES)
    model = CASES[name].build()
    model.save_pretrained(tmp_path / "built")
    loaded = type(model).from_pretrained(tmp_path / "built").to(torch.bfloat16)
    loaded.save_pretrained(tmp_path / "loaded")
    files = written(model, tmp_path / "built, ours")
    assert_equal(tensors_of(tmp_path / "built, ours"), tensors_of(tmp_path / "built"))
    written(loaded, tmp_path / "loaded, ours")
    assert_equal(tensors_of(tmp_path / "loaded, ours"), tensors_of(tmp_path / "loaded"))
    assert files.files > 3
    # Loading finds all of them.
    model.config.save_pretrained(tmp_path / "built, ours")
    again = type(model).from_pretrained(tmp_path / "built, ours")
    assert_equal(dict(again.state_dict()), dict(model.state_dict()))


@pytest.mark.parametrize("name", ["llama", pytest.param("mixtral", marks=pytest.mark.exhaustive)])
def test_one_file_and_one_weight_are_in_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the last weight of a file made room for the next one, and where one is larger than
    a file."""
    model = CASES[name].build()
    weights = [4 * each.numel() for each in model.parameters()]
    for limit in (SHARD_BYTES, max(weights) // 2):
        monkeypatch.setattr(weight_files, "SHARD_BYTES", limit)
        held = HeldBytes()
        files = written(model, tmp_path / str(limit), held)
        assert max(limit, max(weights)) < sum(weights) / 2
        assert held.peak <= limit + max(weights)
        assert held.now == 0
        assert files.parameters == sum(weights) // 4
        sizes = [file.stat().st_size for file in (tmp_path / str(limit)).glob("*.safetensors")]
        header = 4000
        assert max(sizes) <= max(limit, max(weights)) + header


@pytest.mark.parametrize("name", ["qwen3_5", "gemma3_multimodal", "llama"])
def test_a_model_that_is_built_again_is_written_under_the_names_it_was_read_under(
    name: str, tmp_path: Path
) -> None:
    """For exports of checkpoints, which know the model's configuration and `prefixes_of` only."""
    built = save_published(name, tmp_path / "built")
    names = tensors_of(tmp_path / "built")
    loaded = type(built).from_pretrained(tmp_path / "built")
    prefixes = json.loads(json.dumps(prefixes_of(loaded)))
    assert bool(prefixes) == (name == "qwen3_5")
    written(built, tmp_path / "again", prefixes=[(*each,) for each in prefixes])
    assert_equal(tensors_of(tmp_path / "again"), names)


def test_few_weights_are_one_file_without_an_index(tmp_path: Path) -> None:
    model = tiny_llama()
    files = written(model, tmp_path / "one")
    assert files.files == 1
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["model.safetensors"]


def test_an_index_says_where_each_weight_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", SHARD_BYTES)
    model = tiny_llama()
    files = written(model, tmp_path / "many")
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    numel = sum(each.numel() for each in model.parameters())
    assert index["metadata"] == {"total_parameters": numel, "total_size": 4 * numel}
    assert len(set(index["weight_map"].values())) == files.files
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "many" / file)


@pytest.mark.slow
def test_the_export_of_shards_is_what_deepspeed_gathers_and_transformers_saves(
    tmp_path: Path,
) -> None:
    """On two ranks under ZeRO-3, after a step: tied weights, converted experts, a head of another
    name, prefixes, biases and adapters; rank 0 holds a file and a weight, rank 1 nothing."""
    models: dict[str, dict[str, Any]] = {}
    for name in ("llama", "gemma2", "gemma3_multimodal", "gpt2", "gpt_neox", "mixtral", "qwen3_5"):
        CASES[name].build().save_pretrained(tmp_path / "models" / name)
        models[name] = {
            "name_or_path": str(tmp_path / "models" / name),
            "dtype": "float32",
            "attn_implementation": "eager",
        }
    models["adapters"] = {**models["llama"], "lora": {"r": 2}}
    first, second = run_ranks(
        "exports", 2, tmp_path / "ranks", models=models, shard_bytes=SHARD_BYTES
    )
    for name in models:
        ours, theirs = (tmp_path / "ranks" / name / whose for whose in ("ours", "theirs"))
        assert_equal(tensors_of(ours), tensors_of(theirs))
        settings = [
            {path.name: path.read_text() for path in folder.glob("*.json")}
            for folder in (ours, theirs)
        ]
        for files in settings:
            files.pop("model.safetensors.index.json", None)
        assert settings[0] == settings[1]
        assert (ours / "model.safetensors.index.json").exists() == (name != "adapters")
        assert 0 < first[name]["peak"] <= SHARD_BYTES + first[name]["largest"], name
        assert first[name]["left"] == 0
        assert second[name]["peak"] == 0
