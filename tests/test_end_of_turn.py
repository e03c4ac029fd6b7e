"""The token that ends a turn where that is not the model's EOS: found or configured, protected, and
written where the exported model stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.data.splits import read_splits
from alphatoken.data.tokenizer import (
    end_of_turn,
    load_tokenizer,
    stop_at_end_of_turn,
    stop_tokens,
)
from alphatoken.doctor.rows import check_endings
from alphatoken.errors import UserError
from recipes.quickstart.get_model import save_tiny
from tests.ranks import run_ranks
from tests.runs import changed

EOS, START, END = 0, 1, 2
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% else %}{{ m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CLOSED = "<|im_end|>\n{% endfor %}{% if not add_generation_prompt %}<|endoftext|>{% endif %}"
TEXT = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}" + (
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A base model: its EOS ends texts, and its template ends turns with another token."""
    folder = tmp_path / "base"
    save_tiny(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    GenerationConfig(eos_token_id=EOS, bos_token_id=START).save_pretrained(folder)
    return folder


def with_template(folder: Path, template: str | None) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    if template is None:
        (folder / "chat_template.jinja").unlink(missing_ok=True)


@pytest.mark.parametrize(
    ("template", "token"),
    [
        (CHATML, END),
        (MARKED, END),
        (CHATML.replace("<|im_end|>\n{% endfor %}", CLOSED), END),
        (CHATML.replace("<|im_end|>", "<|endoftext|>"), EOS),
        (CHATML.replace("<|im_end|>", "{{ eos_token }}"), EOS),
        (TEXT, None),
        ("{{ raise_exception('tools only') }}", None),
        (None, EOS),
    ],
)
def test_it_is_what_the_template_ends_an_answer_with(
    base: Path, template: str | None, token: int | None
) -> None:
    with_template(base, template)
    config = ModelConfig(name_or_path=str(base))
    tokenizer = load_tokenizer(config)
    assert end_of_turn(config, tokenizer) == token
    assert stop_tokens(config, tokenizer) == ([EOS, END] if token == END else [EOS])
    generation = GenerationConfig(eos_token_id=EOS)
    note = stop_at_end_of_turn(generation, config, tokenizer)
    if token != END:
        assert note is None
        assert generation.eos_token_id == EOS
    else:
        assert note is not None
        assert note.startswith("turns end with <|im_end|>, as rows are rendered (EOS is <|endof")
        assert generation.eos_token_id == [EOS, END]


def test_an_eos_at_which_generation_does_not_stop_is_written_too(base: Path) -> None:
    with_template(base, CHATML.replace("<|im_end|>", "{{ eos_token }}"))
    config = ModelConfig(name_or_path=str(base))
    generation = GenerationConfig(eos_token_id=[START])
    note = stop_at_end_of_turn(generation, config, load_tokenizer(config))
    assert note is not None
    assert "as published, generation stops at <|im_start|>)" in note
    assert generation.eos_token_id == [START, EOS]


def test_it_may_be_named(base: Path) -> None:
    config = ModelConfig(name_or_path=str(base), end_of_turn="<|im_end|>")
    tokenizer = load_tokenizer(config)
    assert end_of_turn(config, tokenizer) == END
    generation = GenerationConfig(eos_token_id=EOS)
    note = stop_at_end_of_turn(generation, config, tokenizer)
    assert note is not None
    assert "<|im_end|>, as model.end_of_turn says" in note
    # As a model that was exported so: said all the same, and not written twice.
    assert stop_at_end_of_turn(generation, config, tokenizer) is not None
    assert generation.eos_token_id == [EOS, END]


@pytest.mark.parametrize(
    ("template", "named", "message"),
    [
        (CHATML, "<eot>", "model.end_of_turn=<eot> is no token of"),
        (CHATML, "<|im_start|>", "but the chat template ends turns with <|im_end|>"),
        (None, "<|im_end|>", "but rows end with <|endoftext|>"),
    ],
)
def test_a_name_that_ends_no_turn_is_refused(
    base: Path, template: str | None, named: str, message: str
) -> None:
    with_template(base, template)
    config = ModelConfig(name_or_path=str(base), end_of_turn=named)
    with pytest.raises(UserError, match=message.replace("|", r"\|")):
        stop_tokens(config, load_tokenizer(config))


@pytest.mark.slow
def test_a_run_protects_it_and_its_export_stops_at_it(
    base: Path, run_values: dict[str, Any], tmp_path: Path
) -> None:
    values = changed(
        run_values,
        model={"name_or_path": str(base)},
        fisher={"sampling": "rollout", "max_new_tokens": 4, "num_prompts": 2},
        selection={"protect_eos": True, "keep_ratio": 0.1},
    )
    config = validate(RunConfig, values, "test")
    tokenizer = load_tokenizer(config.model)
    found = check_endings(read_splits(config, tokenizer).train, tokenizer, config)
    assert found.outcome == "ok"
    (protected,) = run_ranks("protected", 1, tmp_path / "ranks", values=values)
    assert protected == {END}
    for folder in ("export", "model"):
        written = json.loads((tmp_path / "run" / folder / "generation_config.json").read_text())
        assert written["eos_token_id"] == [EOS, END]
