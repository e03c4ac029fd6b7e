"""Chat templates of the families that people train: what is trained is what inference would see and
the model's own words, for any conversation, whether the model's own template does or one that
ships in its place.

The templates here are the smallest that behave as those of the families do.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig
from alphatoken.data.chat import Encoded, Encoder, Skipped
from alphatoken.data.chat_template import ChatRules, training_template
from alphatoken.data.layout import Conversation
from alphatoken.data.rows import as_chat
from alphatoken.data.templates import shipped_names, shipped_template, training_names
from alphatoken.data.tokenizer import chat_rules, load_tokenizer
from alphatoken.doctor.masks import judge_masks
from alphatoken.errors import UserError

Message = dict[str, Any]
CHATML_ASKED = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
QWEN_TURN = (
    "{% for m in messages %}{% set parts = m.content.split('</think>') %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% set thoughts = m.reasoning_content or "
    "(parts[0].split('<think>')[-1] if parts | length > 1 else '') %}"
    "{% if loop.last %}<think>\n{{ thoughts | trim }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
FORGETS = "{{ m.content.split('</think>')[-1].lstrip('\n') }}"


def block(thoughts: str) -> str:
    return f"<think>\n{thoughts}\n</think>\n\n"


class Family:
    """How a family's template behaves, and the words that its model says."""

    def __init__(
        self,
        template: str,
        stops: list[str],
        words: Callable[[str, str], str],
        variables: dict[str, Any] | None = None,
        training: str | None = None,
    ) -> None:
        self.template, self.stops, self.words = template, stops, words
        self.variables, self.training = variables or {}, training


FAMILIES: dict[str, Family] = {
    "Qwen3": Family(
        QWEN_TURN + CHATML_ASKED, ["<|im_end|>"], lambda t, say: block(t) + say + "<|im_end|>"
    ),
    "Qwen3.5": Family(
        QWEN_TURN + CHATML_ASKED.replace("assistant\n", "assistant\n<think>\n"),
        ["<|im_end|>"],
        lambda t, say: block(t).removeprefix("<think>\n") + say + "<|im_end|>",
    ),
    "gpt-oss": Family(
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "{% if loop.last and m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
        "<|start|>assistant{% endif %}<|channel|>final<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last else '<|end|>' }}{% else %}<|message|>{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        ["<|return|>", "<|call|>"],
        lambda t, say: (
            (f"<|channel|>analysis<|message|>{t}<|end|><|start|>assistant" if t else "")
            + f"<|channel|>final<|message|>{say}<|return|>"
        ),
    ),
    "GLM-4": Family(
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["<|user|>", "<|observation|>"],
        lambda t, say: (block(t) if t else "") + say + "<|user|>",
    ),
    "GLM-4.5": Family(
        "[gMASK]<sop>{% set last = messages | map(attribute='role') | list %}"
        "{% set ns = namespace(asked=0) %}{% for role in last %}{% if role == 'user' %}"
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{% set parts = m.content.split('</think>') %}<|{{ m.role }}|>\n"
        "{% if m.role == 'assistant' %}{% set thoughts = m.reasoning_content or "
        "(parts[0].split('<think>')[-1] if parts | length > 1 else '') %}<think>"
        "{{ thoughts | trim if loop.index0 > ns.asked }}</think>\n{{ parts[-1] | trim }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        ["<|user|>", "<|observation|>"],
        lambda t, say: f"<think>{t}</think>\n{say}<|user|>",
    ),
    "Gemma 3": Family(
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        ["<end_of_turn>"],
        lambda t, say: (block(t) if t else "") + say + "<end_of_turn>",
    ),
    "Phi": Family(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|end|>"],
        lambda t, say: (block(t) if t else "") + say + "<|end|>",
    ),
    "DeepSeek-R1": Family(
        "{{ bos_token or '' }}{% for m in messages %}{% if m.role == 'user' %}<\uff5cUser\uff5c>"
        "{{ m.content }}{% elif m.role == 'system' %}{{ m.content }}{% else %}"
        "<\uff5cAssistant\uff5c>"
        "{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<\uff5cAssistant\uff5c><think>\n{% endif %}",
        [],
        lambda t, say: block(t).removeprefix("<think>\n") + say + "<|im_end|>",
        training="deepseek_r1",
    ),
    "QwQ": Family(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        + FORGETS
        + "{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
        + CHATML_ASKED.replace("assistant\n", "assistant\n<think>\n"),
        [],
        lambda t, say: block(t).removeprefix("<think>\n") + say + "<|im_end|>",
        training="qwq",
    ),
}
GEMMA4 = (
    "{{ bos_token or '' }}{% set thinks = enable_thinking | default(false) %}"
    "{% set told = messages[0].role == 'system' %}{% if thinks or told %}<|turn>system\n"
    "{% if thinks %}<|think|>{% endif %}{% if told %}{{ messages[0].content | trim }}{% endif %}"
    "<turn|>\n{% endif %}{% for m in messages if m.role != 'system' %}"
    "<|turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<turn|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|turn>model\n"
    "{% if not thinks %}<|channel>thought\n<channel|>{% endif %}{% endif %}"
)
FAMILIES["Gemma 4"] = Family(GEMMA4, ["<turn|>"], lambda t, say: say + "<turn|>")
FAMILIES["Gemma 4, thinking"] = Family(
    GEMMA4,
    ["<turn|>"],
    lambda t, say: (f"<|channel>thought\n{t}\n<channel|>" if t else "") + say + "<turn|>",
    variables={"enable_thinking": True},
    training="gemma4",
)
TOKENS = sorted(
    {
        token
        for name in FAMILIES.values()
        for token in ("<think>", "</think>", "<|channel>", "<channel|>", *name.stops)
    }
    | {"<|assistant|>", "<|message|>", "<|start|>", "<|channel|>", "<\uff5cUser\uff5c>"}
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded = AutoTokenizer.from_pretrained(tiny_model)
    loaded.add_special_tokens({"additional_special_tokens": TOKENS})
    return loaded


def rules_of(family: Family, tokenizer: PreTrainedTokenizerBase) -> ChatRules:
    """How a run renders with a family's template."""
    tokenizer.chat_template = family.template
    stops = frozenset(tokenizer.convert_tokens_to_ids(family.stops))
    rules = ChatRules(stop_tokens=stops, variables=family.variables)
    name = training_template(tokenizer, rules)
    assert name == family.training
    return ChatRules(stop_tokens=stops, variables=family.variables, training_template=name)


WORDS = st.text("ab é中", min_size=1, max_size=8).map(str.strip).filter(bool)
TURN = st.tuples(WORDS, WORDS | st.just(""), WORDS)


@pytest.mark.parametrize("name", FAMILIES)
@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=30
)
@given(talk=st.lists(TURN, min_size=1, max_size=3), is_field=st.booleans())
def test_each_answer_is_trained_behind_what_inference_sees(
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    talk: list[tuple[str, str, str]],
    is_field: bool,
) -> None:
    family = FAMILIES[name]
    # A family that knows no reasoning has it in the text, where any; a field of it is left out.
    is_known = "think" in family.template.replace("thinks", "") or family.training
    in_text = not is_field and name != "Gemma 4"
    messages: list[Message] = []
    for ask, thoughts, say in talk:
        messages.append({"role": "user", "content": ask})
        written = block(thoughts) + say if thoughts and in_text else say
        field = {"reasoning_content": thoughts} if thoughts and not in_text else {}
        messages.append({"role": "assistant", "content": written, **field})
    encoder = Encoder(tokenizer, 10_000, rules_of(family, tokenizer))
    found = encoder.encode({"messages": messages}, "rows.jsonl:7")
    assert not isinstance(found, Skipped)
    trained = [each for row in found for each in answers_of(row)]
    assert len(trained) == len(talk)
    for number, (ids, start, end) in enumerate(trained):
        chat, _ = encoder.as_rendered(as_chat({"messages": messages}, "here"))
        asked = tokenizer.apply_chat_template(
            chat.messages[: 2 * number + 1],
            add_generation_prompt=True,
            tokenize=False,
            **family.variables,
        )
        _, thoughts, say = talk[number]
        thoughts = thoughts if is_known or in_text else ""
        own = tokenizer(asked + family.words(thoughts, say), add_special_tokens=False)["input_ids"]
        assert ids[:end] == own
        assert ids[:start] == tokenizer(asked, add_special_tokens=False)["input_ids"]


def answers_of(row: Encoded) -> list[tuple[list[int], int, int]]:
    """The tokens of a row, with where each of its answers begins and ends."""
    (document,) = row.documents
    mask = [False, *document.response_mask, False]
    edges = [place for place, (a, b) in enumerate(itertools.pairwise(mask)) if a != b]
    return [
        (document.input_ids, start, end) for start, end in zip(edges[::2], edges[1::2], strict=True)
    ]


# Which template a run takes.

THOUGHT = [
    {"role": "user", "content": "Ask"},
    {"role": "assistant", "content": "Say", "reasoning_content": "because of it"},
]


def test_a_shipped_template_takes_the_place_of_one_that_drops_reasoning(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    family = FAMILIES["DeepSeek-R1"]
    rules = rules_of(family, tokenizer)
    encoder = Encoder(tokenizer, 100, rules)
    assert tokenizer.chat_template == family.template, "which is exported"
    assert "rendered with the shipped template deepseek_r1 where a row has no tools" in encoder.rule
    assert encoder.identity != Encoder(tokenizer, 100).identity
    conversation = Conversation(as_chat({"messages": THOUGHT}, "here"), 0, "here")
    found = judge_masks(tokenizer, encoder, [conversation])
    assert found.outcome == "ok", found
    assert "<think>\n[[because of it\n</think>\n\nSay<|im_end|>]]" in "\n".join(found.details)
    called = [*THOUGHT, {"role": "tool", "content": "x"}]
    assert encoder.as_rendered(as_chat({"messages": called}, "here"))[1] == family.template


def test_a_template_that_keeps_reasoning_is_not_replaced(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    family = FAMILIES["QwQ"]
    keeps = family.template.replace(FORGETS, "{{ m.reasoning_content }}{{ m.content }}")
    tokenizer.chat_template = keeps.replace(
        "<|im_start|>{{ m.role }}\n", "<|im_start|>{{ m.role }}\n<think>\n"
    )
    assert training_template(tokenizer, ChatRules()) is None
    marked = family.template.replace(FORGETS, "{% generation %}" + FORGETS + "{% endgeneration %}")
    tokenizer.chat_template = marked
    assert training_template(tokenizer, ChatRules()) is None, "its author said what is trained"
    tokenizer.chat_template = family.template.replace("<|im_start|>", "<|start|>")
    assert training_template(tokenizer, ChatRules()) is None, "it asks in other words"
    tokenizer.chat_template = family.template.replace(FORGETS, "{{ m.content }}")
    assert training_template(tokenizer, ChatRules()) is None, (
        "earlier reasoning stays in its prompts"
    )


def test_reasoning_reaches_the_field_that_a_template_reads(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chat = as_chat({"messages": [THOUGHT[0], {**THOUGHT[1], "content": " Say "}]}, "here")
    in_text = as_chat(
        {"messages": [THOUGHT[0], {"role": "assistant", "content": block("so") + "Say"}]}, "here"
    )
    reads = FAMILIES["gpt-oss"].template
    for template, field in (
        (reads, "thinking"),
        (reads.replace("thinking", "reasoning"), "reasoning"),
    ):
        tokenizer.chat_template = template
        read, _ = Encoder(tokenizer, 100).as_rendered(chat)
        assert read.messages[1] == {**THOUGHT[1], field: "because of it"}
        read, _ = Encoder(tokenizer, 100).as_rendered(in_text)
        assert read.messages[1] == {"role": "assistant", "content": "Say", field: "so"}
    only_named = "{# thinking #}" + FAMILIES["Gemma 3"].template
    for template in (only_named, FAMILIES["Qwen3"].template):
        tokenizer.chat_template = template
        assert Encoder(tokenizer, 100).as_rendered(in_text)[0] == in_text


def test_a_template_that_ships_is_chosen_by_name(tiny_model: Path) -> None:
    def loaded(name: str) -> PreTrainedTokenizerBase:
        values = {"name_or_path": str(tiny_model), "chat_template": name}
        return load_tokenizer(ModelConfig.model_validate(values))

    assert set(training_names()) == {"deepseek_r1", "gemma4", "qwq"}
    assert {"chatml", "gemma", "llama3", *training_names()} == set(shipped_names())
    for name in shipped_names():
        assert loaded(name).chat_template == shipped_template(name)
    with pytest.raises(UserError, match="those that ship are chatml, deepseek_r1, gemma, gemma4"):
        loaded("qwen")


@pytest.mark.parametrize("chosen", [None, "chatml"])
def test_a_template_that_is_configured_is_not_replaced(
    tiny_model: Path, tmp_path: Path, chosen: str | None
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = FAMILIES["QwQ"].template
    tokenizer.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((tiny_model / "config.json").read_text())
    values = {
        "model": {"name_or_path": str(tmp_path), "chat_template": chosen},
        "data": {"train": "x"},
        "valuation": {"enabled": False},
        "train": {"output_dir": "y"},
    }
    config = validate(RunConfig, values, "of the test")
    rules = chat_rules(config, load_tokenizer(config.model))
    assert rules.training_template == (None if chosen else "qwq")
