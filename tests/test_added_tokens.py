"""A tokenizer with more tokens than the model has embeddings: refused where a row needs one, or
grown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.data.splits import load_prompts, load_splits
from alphatoken.data.tokenizer import load_tokenizer, tokens_of, vocabulary_note
from alphatoken.doctor import refusals
from alphatoken.errors import UserError
from alphatoken.models.loading import load_model, model_without_weights
from tests.ranks import run_program, run_ranks
from tests.runs import changed
from tests.tiny import CASES

EMBEDDINGS = 259


@pytest.fixture
def with_token(tiny_model: Path, tmp_path: Path) -> Path:
    """The tiny model with a tokenizer that has one token more, and one more for padding."""
    folder = tmp_path / "with tokens"
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert len(tokenizer) == EMBEDDINGS
    tokenizer.add_tokens(["<tool>"], special_tokens=True)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def values(run_values: dict[str, Any], with_token: Path) -> dict[str, Any]:
    return changed(run_values, model={"name_or_path": str(with_token)})


def rows_with(word: str, tmp_path: Path) -> str:
    """Training rows of which the third has a word."""
    rows = [
        {"prompt": f"Ask {number}", "response": word if number == 2 else "Fine."}
        for number in range(24)
    ]
    file = tmp_path / "added.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.mark.slow
def test_a_row_with_a_token_that_has_no_embedding_is_refused_before_weights_are_read(
    values: dict[str, Any], with_token: Path, tmp_path: Path
) -> None:
    (with_token / "model.safetensors").unlink()
    for word, token in (("Use <tool> now", 259), ("[PAD]", 260)):
        wrong = changed(values, data={"train": rows_with(word, tmp_path)})
        (messages,) = run_ranks("run_trainers", 1, tmp_path / word, configs={"": wrong})
        assert f"added.jsonl:3 has the token '{word.split()[-2:][0]}' of id {token}" in messages[""]
        assert f"{EMBEDDINGS} embeddings, and its tokenizer 261 tokens" in messages[""]
        assert "model.resize_embeddings=true" in messages[""]


def test_prompts_of_the_fisher_and_a_reference_need_embeddings_too(
    values: dict[str, Any], tiny_model: Path, with_token: Path, tmp_path: Path
) -> None:
    config = validate(
        RunConfig, changed(values, fisher={"prompts": rows_with("a <tool>", tmp_path)}), "test"
    )
    tokenizer = load_tokenizer(config.model)
    train = load_splits(config, tokenizer).train
    with pytest.raises(UserError, match=r"^fisher.prompts: .*added.jsonl:3 has the token '<tool>'"):
        load_prompts(config, tokenizer, train)
    model = AutoModelForCausalLM.from_pretrained(with_token)
    model.resize_token_embeddings(261, mean_resizing=False)
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    compared = changed(
        values,
        model={"name_or_path": str(tmp_path / "grown")},
        data={"train": rows_with("a <tool>", tmp_path)},
        selection={"policy": "excess_loss"},
        reference={"model": str(with_token)},
    )
    with pytest.raises(UserError, match=r"but reference.model=.* has 259 embeddings"):
        load_splits(validate(RunConfig, compared, "test"), tokenizer)


def test_tokens_that_no_row_uses_may_have_no_embedding(
    values: dict[str, Any], with_token: Path, tmp_path: Path
) -> None:
    """As published with Gemma 3 1B. Rows are then padded with EOS, as nothing else can be looked
    up."""
    lengths = changed(values, data={"train": rows_with("Much longer than others.", tmp_path)})
    command = json.dumps(changed(lengths, valuation={"enabled": False}))
    (tmp_path / "run.yaml").write_text(command)
    (run,) = run_program("recipes/sft.py", "--config", str(tmp_path / "run.yaml"))
    assert run.returncode == 0, run.stderr
    said = " ".join(run.stdout.split())
    assert "261 tokens, the model 259 embeddings: no row uses the others, and padding is" in said
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "export").pad_token == "<|im_end|>"


@pytest.mark.slow
def test_embeddings_that_grow_are_the_same_under_zero_3(
    tmp_path: Path, run_values: dict[str, Any], values: dict[str, Any], with_token: Path
) -> None:
    """Tied and untied, of a decoder inside another model; then a run on the new tokens is saved,
    continued, exported and read again."""
    models = {}
    for name in ("llama", "gemma3_multimodal", "gpt2"):
        CASES[name].build().save_pretrained(tmp_path / "models" / name)
        models[name] = {
            "name_or_path": str(tmp_path / "models" / name),
            "dtype": "float32",
            "attn_implementation": "eager",
            "resize_embeddings": True,
        }
    found, _ = run_ranks("grown", 2, tmp_path / "grown", models=models, tokens=64)
    for name, settings in models.items():
        whole = load_model(validate(ModelConfig, settings, "test"), {}, 0, tokens=64)
        old = CASES[name].build()
        new_tables, old_tables = (
            [each.get_input_embeddings().weight, each.get_output_embeddings().weight]
            for each in (whole, old)
        )
        for new, before in zip(new_tables, old_tables, strict=True):
            assert torch.equal(new[:61], before)
            assert torch.allclose(new[61:], before.mean(0).expand(3, -1), atol=1e-6)
        assert found[name]["tied"] == (new_tables[0] is new_tables[1])
        assert found[name]["tied"] == (old_tables[0] is old_tables[1]) == (name != "llama")
        state = dict(whole.named_parameters())
        assert state.keys() == found[name]["weights"].keys()
        for key, weight in state.items():
            assert torch.equal(weight, found[name]["weights"][key]), (name, key)
        assert whole.config.get_text_config().vocab_size == 64

    grown = changed(
        values,
        model={"resize_embeddings": True},
        data={"train": rows_with("Use <tool> now", tmp_path)},
        valuation={"parameters": "all", "layers": "all", "estimator": "exact", "window": 32},
        fisher={"num_prompts": 2},
        train={"max_steps": 2, "save_every": 1},
    )
    straight = changed(grown, train={"output_dir": str(tmp_path / "straight")})
    first = changed(grown, train={"max_steps": 1})
    second = changed(grown, train={"resume": "auto", "resume_allow": ["train.max_steps"]})
    configs = {"straight": straight, "first": first, "second": second}
    messages, _ = run_ranks("run_trainers", 2, tmp_path / "runs", configs=configs)
    assert not any(messages.values()), messages
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "export").state_dict()
        for name in ("straight", "run")
    )
    assert one["model.embed_tokens.weight"].shape[0] == 261
    assert all(torch.equal(weight, other[key]) for key, weight in one.items())
    (done,) = run_program("-m", "alphatoken", "export", tmp_path / "run", str(tmp_path / "new"))
    assert done.returncode == 0, done.stderr
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "new").state_dict()
    assert all(torch.equal(weight, again[key]) for key, weight in one.items())


def test_doctor_and_plan_know_the_embeddings_that_a_run_will_have(values: dict[str, Any]) -> None:
    config = validate(RunConfig, changed(values, model={"resize_embeddings": True}), "test")
    embeddings = model_without_weights(config.model, "eager").get_input_embeddings()
    assert embeddings.weight.shape[0] == 261
    tokenizer = refusals.tokenizer(config)
    assert tokenizer.pad_token == "[PAD]"
    note = vocabulary_note(config.model, tokenizer)
    assert note is not None
    assert "grow from 259 to 261, new ones are the mean" in note


def test_new_embeddings_that_adapters_would_not_train_are_refused(values: dict[str, Any]) -> None:
    wrong = changed(values, model={"resize_embeddings": True, "lora": {"r": 2}})
    with pytest.raises(UserError, match=r"model.resize_embeddings=true, but model.lora trains no"):
        validate(RunConfig, wrong, "test")


def test_a_model_that_has_them_all_is_left_as_it_is(tiny_model: Path) -> None:
    config = ModelConfig(
        name_or_path=str(tiny_model), attn_implementation="eager", resize_embeddings=True
    )
    tokenizer = load_tokenizer(config)
    model = load_model(config, {}, 0, tokens_of(tokenizer))
    assert model.get_input_embeddings().weight.shape[0] == EMBEDDINGS
    note = vocabulary_note(config, tokenizer)
    assert note is not None
    assert "by none" in note
