"""What of a conversation is trained, for every kind of chat template that is known to have been
trained wrongly; `[[ ]]` marks it.

The templates are the smallest of their kind; a token of the tokenizer is a byte, or one of the
marks below.
"""

from __future__ import annotations

import datetime
import itertools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import normalizers
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from typer.testing import CliRunner

from alphatoken.cli import app
from alphatoken.config.sections import ModelConfig
from alphatoken.data.chat import Encoded, Encoder, Skipped
from alphatoken.data.chat_template import ChatRules
from alphatoken.data.pairs import PairEncoder
from alphatoken.data.rows import Chat
from alphatoken.data.said import UNSAID_REASONING, UNSAID_TEXT
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.data.turns import (
    APART,
    EMPTY,
    OTHER_OPENING,
    UNASKED,
    UNSAID_TOOLS,
)
from alphatoken.errors import UserError

MARKS = ["<system>", "<user>", "<assistant>", "<end>", "<stop>", "<think>", "</think>", "<call>"]

Message = dict[str, Any]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def said(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


TWO = [user("Ask one"), said("Say one"), user("Ask two"), said("Say two")]
TURN = "<{{ m.role }}>{{ m.content }}"
FOR_ALL = "{% for m in messages %}"
ASKED = "{% if add_generation_prompt %}<assistant>{% endif %}"
ENDED = FOR_ALL + TURN + "<end>\n{% endfor %}" + ASKED


@pytest.fixture
def load(tiny_model: Path) -> Callable[[str], PreTrainedTokenizerBase]:
    """A tokenizer with a template."""

    def loaded(template: str) -> PreTrainedTokenizerBase:
        tokenizer = AutoTokenizer.from_pretrained(tiny_model)
        tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
        tokenizer.chat_template = template
        return tokenizer

    return loaded


def shown(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> str:
    """The text of a row with [[ ]] around what is trained."""
    (document,) = encoded.documents
    pairs = zip(document.input_ids, document.response_mask, strict=True)
    parts = []
    for trained, group in itertools.groupby(pairs, key=lambda pair: pair[1]):
        text = tokenizer.decode([token for token, _ in group])
        parts.append(f"[[{text}]]" if trained else text)
    return "".join(parts)


def rows(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message] = TWO,
    *,
    stops: Sequence[str] = (),
    more: dict[str, Any] | None = None,
    **rules: Any,
) -> list[Encoded]:
    stop_tokens = frozenset(tokenizer.convert_tokens_to_ids(list(stops)))
    encoder = Encoder(tokenizer, 1000, ChatRules(stop_tokens=stop_tokens, **rules))
    found = encoder.encode({"messages": list(messages), **(more or {})}, "rows.jsonl:7")
    assert not isinstance(found, Skipped), found
    return found


Load = Callable[[str], PreTrainedTokenizerBase]


# Where a turn ends.


@pytest.mark.parametrize("stops", [[], ["<end>"], ["<stop>"], ["<end>", "<stop>"]])
def test_a_turn_ends_with_its_first_stop_token(load: Load, stops: list[str]) -> None:
    tokenizer = load(ENDED + "{% if not add_generation_prompt %}<stop>{% endif %}")
    (row,) = rows(tokenizer, stops=stops)
    assert shown(tokenizer, row) == (
        "<user>Ask one<end>\n<assistant>[[Say one<end>]]\n"
        "<user>Ask two<end>\n<assistant>[[Say two<end>]]\n<stop>"
    )


def test_the_next_header_may_be_what_ends_a_turn(load: Load) -> None:
    tokenizer = load(FOR_ALL + TURN + "{% endfor %}" + ASKED)
    (row,) = rows(tokenizer, stops=["<user>"])
    assert (
        shown(tokenizer, row)
        == "<user>Ask one<assistant>[[Say one<user>]]Ask two<assistant>[[Say two<user>]]"
    )
    (row,) = rows(tokenizer, stops=["<user>"], turns="last")
    assert shown(tokenizer, row).endswith("Say one<user>Ask two<assistant>[[Say two<user>]]")
    (row,) = rows(tokenizer, [*TWO, user("Ask on")], stops=["<user>"])
    assert shown(tokenizer, row).endswith("<assistant>[[Say two<user>]]Ask on")
    (row,) = rows(tokenizer)
    assert (
        shown(tokenizer, row)
        == "<user>Ask one<assistant>[[Say one]]<user>Ask two<assistant>[[Say two]]"
    )


@pytest.mark.parametrize("stops", [["<stop>"], []])
def test_two_tokens_may_end_a_turn_together(load: Load, stops: list[str]) -> None:
    tokenizer = load(FOR_ALL + TURN + "<end><stop>{% endfor %}" + ASKED)
    (row,) = rows(tokenizer, TWO[:2], stops=stops)
    assert shown(tokenizer, row) == "<user>Ask one<end><stop><assistant>[[Say one<end><stop>]]"


def test_an_answer_may_have_stop_tokens_and_marks_of_its_own(load: Load) -> None:
    tokenizer = load(ENDED)
    (row,) = rows(tokenizer, [user("Ask"), said("<think>x</think>A <end> b")], stops=["<end>"])
    assert (
        shown(tokenizer, row) == "<user>Ask<end>\n<assistant>[[<think>x</think>A <end> b<end>]]\n"
    )


def test_white_space_before_a_stop_token_is_generated(load: Load) -> None:
    tokenizer = load(FOR_ALL + TURN + " <stop>{% endfor %}" + ASKED)
    (row,) = rows(tokenizer, TWO[:2], stops=["<stop>"])
    assert shown(tokenizer, row) == "<user>Ask one <stop><assistant>[[Say one <stop>]]"


def test_without_any_stop_token_the_whole_turn_is_trained(load: Load) -> None:
    tokenizer = load(
        FOR_ALL + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    (row,) = rows(tokenizer, TWO[:2])
    assert shown(tokenizer, row) == "user: Ask one\nassistant: [[Say one\n]]"


# The template's own marks.

GENERATED = (
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<end>{% endgeneration %}"
    "{% else %}{{ m.content }}<end>{% endif %}"
)


def test_marks_are_followed_to_the_character(load: Load) -> None:
    tokenizer = load(
        "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: "
        "{% else %}{% generation %}{{ m.content + ' ' }}{% endgeneration %}{% endif %}{% endfor %}"
    )
    vocabulary = tokenizer.get_vocab()
    tokenizer.add_tokens([" US"])  # a token across the mark's edge
    assert len(tokenizer.get_vocab()) == len(vocabulary) + 1
    (row,) = rows(tokenizer)
    assert (
        shown(tokenizer, row)
        == "USER: Ask one ASSISTANT: [[Say one]] USER: Ask two ASSISTANT: [[Say two ]]"
    )


@pytest.mark.parametrize("end", ["e\u0301", "x\u200b", "\U0001f600", "\u4e2d\u6587", "no  "])
def test_marks_around_the_text_hold_whatever_it_ends_in(load: Load, end: str) -> None:
    template = (
        FOR_ALL + "<{{ m.role }}>"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}<end>{% endfor %}" + ASKED
    )
    tokenizer = load(template)
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    (row,) = rows(tokenizer, [user("Ask"), said(f"Say {end}"), user("Ask two"), said("Say two")])
    normal = normalizers.NFC().normalize_str(end)
    assert shown(tokenizer, row) == (
        f"<user>Ask<end><assistant>[[Say {normal}]]<end>"
        f"<user>Ask two<end><assistant>[[Say two]]<end>"
    )


def test_a_header_that_is_marked_is_trained(load: Load) -> None:
    tokenizer = load(
        FOR_ALL + "{% if m.role == 'assistant' %}{% generation %}<assistant>{{ m.content }}<end>"
        "{% endgeneration %}{% else %}<user>{{ m.content }}<end>{% endif %}{% endfor %}" + ASKED
    )
    (row,) = rows(tokenizer)
    assert (
        shown(tokenizer, row) == "<user>Ask one<end>[[<assistant>Say one<end>]]"
        "<user>Ask two<end>[[<assistant>Say two<end>]]"
    )


MARKED_TEXT = (
    FOR_ALL + "<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}" + ASKED
)


def test_marks_that_leave_an_answer_out_are_an_error(load: Load) -> None:
    tokenizer = load(
        FOR_ALL + "<{{ m.role }}>{% if loop.first %}{% generation %}{% endgeneration %}"
        "{% endif %}{{ m.content }}<end>{% endfor %}" + ASKED
    )
    with pytest.raises(UserError, match=r"rows.jsonl:7: .* marks leave out message 2"):
        rows(tokenizer)


# What inference sees before an answer.


@pytest.mark.parametrize("marked", [False, True])
def test_a_template_that_forgets_reasoning_makes_a_row_of_every_turn(
    load: Load, marked: bool
) -> None:
    answer = "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<end>"
    if marked:
        answer = "{% generation %}" + answer + "{% endgeneration %}"
    tokenizer = load(
        FOR_ALL
        + "<{{ m.role }}>{% if m.role == 'assistant' %}"
        + answer
        + "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
        + ASKED
    )
    talk = [
        user("Ask one"),
        said("<think>a</think>one"),
        user("Ask two"),
        said("<think>b</think>two"),
    ]
    first, second = rows(tokenizer, talk)
    assert shown(tokenizer, first) == "<user>Ask one<end><assistant>[[<think>a</think>one<end>]]"
    assert shown(tokenizer, second) == (
        "<user>Ask one<end><assistant>one<end>"
        "<user>Ask two<end><assistant>[[<think>b</think>two<end>]]"
    )
    assert (first.notes, second.notes) == ((APART,), ())
    assert first.asked != second.asked
    (last,) = rows(tokenizer, talk, turns="last")
    assert shown(tokenizer, last) == shown(tokenizer, second)
    pair = PairEncoder(tokenizer, 100, 100).encode(
        {"prompt": talk[:3], "chosen": talk[3:], "rejected": [said("no")]}, "here"
    )
    assert isinstance(pair, list)
    chosen = Encoded(pair[0].documents[:1], ())
    assert shown(tokenizer, chosen) == shown(tokenizer, second)


def test_only_the_last_turn(load: Load) -> None:
    tokenizer = load(ENDED)
    (row,) = rows(tokenizer, turns="last")
    assert shown(tokenizer, row) == (
        "<user>Ask one<end>\n<assistant>Say one<end>\n"
        "<user>Ask two<end>\n<assistant>[[Say two<end>]]\n"
    )


def test_a_system_text_may_stand_before_the_last_question(load: Load) -> None:
    tokenizer = load(
        "{% set system = messages[0].content %}{% set talk = messages[1:] %}"
        "{% for m in talk %}{% if m.role == 'user' %}<user>"
        "{% if loop.index0 >= talk|length - (1 if add_generation_prompt else 2) %}"
        "{{ system }} {% endif %}"
        "{{ m.content }}{% else %}<assistant>{{ m.content }}<end>{% endif %}{% endfor %}" + ASKED
    )
    found = rows(tokenizer, [{"role": "system", "content": "Be brief."}, *TWO])
    assert [shown(tokenizer, row) for row in found] == [
        "<user>Be brief. Ask one<assistant>[[Say one<end>]]",
        "<user>Ask one<assistant>Say one<end><user>Be brief. Ask two<assistant>[[Say two<end>]]",
    ]


def test_what_asks_for_an_answer_must_stand_before_it(load: Load) -> None:
    thinking = (
        FOR_ALL + "<{{ m.role }}>{{ m.content }}<end>{% endfor %}{% if add_generation_prompt %}"
        "<assistant>{% if enable_thinking is not defined or enable_thinking %}"
        "<think>\n{% endif %}{% endif %}"
    )
    tokenizer = load(thinking)
    complaint = (
        r"rows.jsonl:7: inference would begin message 2 behind '<think>\\n', but the chat template "
        r"writes 'Say one<end>' there; set model.chat_template_kwargs.*enable_thinking"
    )
    with pytest.raises(UserError, match=complaint):
        rows(tokenizer)
    (row,) = rows(tokenizer, variables={"enable_thinking": False})
    assert (
        shown(tokenizer, row) == "<user>Ask one<end><assistant>[[Say one<end>]]"
        "<user>Ask two<end><assistant>[[Say two<end>]]"
    )
    (row,) = rows(tokenizer, [user("Ask"), said("<think>\nhm</think>Say")])
    assert shown(tokenizer, row) == "<user>Ask<end><assistant><think>\n[[hm</think>Say<end>]]"
    drops = load(thinking.replace("m.content", "m.content.split('</think>')[-1]"))
    with pytest.raises(UserError, match=r"it does not write the row's reasoning so: set model.cha"):
        rows(drops, [user("Ask"), said("<think>\nhm</think>Say")])
    marked = load(thinking.replace("{{ m.content }}<end>", GENERATED))
    (row,) = rows(marked, TWO[:2])
    assert shown(marked, row) == "<user>Ask one<end><assistant>[[Say one<end>]]"
    assert row.notes == (OTHER_OPENING,)


@pytest.mark.parametrize("ask", ["Ask one", "a", "S", "<think>", "Sum. Ask two", "Ask two"])
def test_what_stands_far_before_may_go_once_an_answer_follows(load: Load, ask: str) -> None:
    """A system text before the last message alone, where that asks (Mistral)."""
    tokenizer = load(
        "{% for m in messages[1:] %}<{{ m.role }}>{% if loop.last and m.role == 'user' %}"
        "{{ messages[0].content }} {% endif %}{{ m.content }}!<end>{% endfor %}" + ASKED
    )
    system = {"role": "system", "content": "Sum."}
    first, second = rows(tokenizer, [system, user(ask), said("Say one"), *TWO[2:]])
    assert shown(tokenizer, first) == f"<user>Sum. {ask}!<end><assistant>[[Say one!<end>]]"
    assert shown(tokenizer, second) == (
        f"<user>{ask}!<end><assistant>Say one!<end>"
        "<user>Sum. Ask two!<end><assistant>[[Say two!<end>]]"
    )
    assert first.notes == (APART,)
    pairs = PairEncoder(tokenizer, 100, 100).encode(
        {"prompt": [system, user(ask)], "chosen": "Yes", "rejected": "No"}, "here"
    )
    assert isinstance(pairs, list)
    assert shown(tokenizer, Encoded(pairs[0].documents[:1], ())) == (
        f"<user>Sum. {ask}!<end><assistant>[[Yes!<end>]]"
    )


def test_an_answer_that_cannot_be_placed_is_refused(load: Load) -> None:
    thinking = (
        FOR_ALL
        + TURN
        + "<end>{% endfor %}{% if add_generation_prompt %}"
        + ("<assistant><think>\n{% endif %}")
    )
    for ask in ("a", "n", "<think>", "<assistant>"):
        with pytest.raises(UserError, match="inference would begin message 2 behind"):
            rows(load(thinking), [user(ask), said("x <think>\n y")])


def test_only_the_last_turn_must_be_what_inference_sees(load: Load) -> None:
    tokenizer = load(
        FOR_ALL + TURN + "<end>{% endfor %}{% if add_generation_prompt %}<assistant><think>"
        "{% endif %}"
    )
    talk = [*TWO[:3], said("<think>hm</think>two")]
    (row,) = rows(tokenizer, talk, turns="last")
    assert shown(tokenizer, row).endswith("<assistant><think>[[hm</think>two<end>]]")
    with pytest.raises(UserError, match="inference would begin message 2"):
        rows(tokenizer, talk)


def test_turns_that_are_cut_away_are_counted(load: Load) -> None:
    tokenizer = load(
        FOR_ALL + "<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '-' }}<end>"
        "{% endfor %}" + ASKED
    )
    found = Encoder(tokenizer, 20).encode({"messages": TWO}, "here")
    assert isinstance(found, list)
    (row,) = found
    assert shown(tokenizer, row) == "<user>Ask one<end><assistant>[[Say one<end>]]"
    assert row.cut == ("turns cut away by truncation",)


# Turns that are not trained.


@pytest.mark.parametrize("marked", [False, True])
def test_what_answers_nothing_is_not_trained(load: Load, marked: bool) -> None:
    by_marks = FOR_ALL + "<{{ m.role }}>" + GENERATED + "{{ '\n' }}{% endfor %}" + ASKED
    tokenizer = load(by_marks if marked else ENDED)
    (row,) = rows(tokenizer, [said("Hello"), *TWO[:2]])
    assert (
        shown(tokenizer, row)
        == "<assistant>Hello<end>\n<user>Ask one<end>\n<assistant>[[Say one<end>]]\n"
    )
    assert row.notes == (UNASKED,)
    alone = Encoder(tokenizer, 100).encode({"messages": [said("Hello"), user("Bye")]}, "here")
    assert alone == Skipped("no answer to train")


def test_a_prefix_that_asks_nothing_is_not_rendered(load: Load) -> None:
    tokenizer = load(
        "{% if not (messages | selectattr('role', 'equalto', 'user') | list) %}"
        "{{ raise_exception('No user query found') }}{% endif %}" + ENDED
    )
    talk = [{"role": "system", "content": "S"}, said("Hello"), *TWO[:2]]
    (row,) = rows(tokenizer, talk)
    assert shown(tokenizer, row).endswith(
        "<assistant>Hello<end>\n<user>Ask one<end>\n<assistant>[[Say one<end>]]\n"
    )
    assert row.notes == (UNASKED,)
    (row,) = rows(load(ENDED), talk)
    assert shown(tokenizer, row).count("[[") == 1
    assert row.notes == (UNASKED,)
    with pytest.raises(
        UserError, match="the chat template refuses this conversation: No user query"
    ):
        Encoder(tokenizer, 100).encode_prompt(Chat([{"role": "system", "content": "S"}]), "here")


@pytest.mark.parametrize("empty", ["", "  \n"])
def test_an_empty_turn_is_not_trained(load: Load, empty: str) -> None:
    tokenizer = load(ENDED)
    (row,) = rows(tokenizer, [user("Ask one"), said(empty), *TWO[2:]])
    assert shown(tokenizer, row).count("[[") == 1
    assert "[[Say two<end>]]" in shown(tokenizer, row)
    assert row.notes == (EMPTY,)


@pytest.mark.parametrize("flag", [{"weight": 0}, {"weight": 0.0}, {"train": False}])
def test_a_message_may_be_left_out(load: Load, flag: dict[str, Any]) -> None:
    tokenizer = load(ENDED)
    (row,) = rows(tokenizer, [user("Ask one"), said("BAD", **flag), *TWO[2:]])
    assert shown(tokenizer, row).count("[[") == 1
    assert "[[Say two<end>]]" in shown(tokenizer, row)
    with pytest.raises(
        UserError, match=r"message 2 of 'messages' has weight=0.5: .* \(1\) or not \(0\)"
    ):
        rows(tokenizer, [user("Ask one"), said("x", weight=0.5)])


# What a template leaves out.

CALLS = "{% for c in m.tool_calls or [] %}<call>{{ c.function | tojson }}{% endfor %}"
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


@pytest.mark.parametrize("arguments", [{"city": "Rome"}, '{"city": "Rome"}'])
def test_a_call_is_an_answer(load: Load, arguments: Any) -> None:
    tokenizer = load("{{ tools | tojson }}" + FOR_ALL + TURN + CALLS + "<end>{% endfor %}" + ASKED)
    call = {"function": {"name": "weather", "arguments": arguments}}
    talk = [user("Ask"), {"role": "assistant", "content": None, "tool_calls": [call]}]
    (row,) = rows(tokenizer, talk, more={"tools": [TOOL]}, stops=["<end>"])
    assert '[{"type": "function"' in shown(tokenizer, row)
    assert shown(tokenizer, row).endswith(
        '<assistant>[[<call>{"name": "weather", "arguments": {"city": "Rome"}}<end>]]'
    )
    forgetful = load(ENDED)
    with pytest.raises(
        UserError, match=r"rows.jsonl:7: message 2 calls the tool 'weather' .* does not write"
    ):
        rows(forgetful, talk)


def test_a_call_that_is_only_spoken_of_is_an_error(load: Load) -> None:
    call = {"function": {"name": "weather", "arguments": {}}}
    complaint = r"rows.jsonl:7: message 2 calls the tool 'weather' .* not write all tool calls"
    for fields in ({"content": "I ask weather."}, {"content": "I", "reasoning": "weather?"}):
        speech = {"role": "assistant", "tool_calls": [call], **fields}
        with pytest.raises(UserError, match=complaint):
            rows(load(ENDED.replace("m.content", "m.reasoning ~ m.content")), [user("Ask"), speech])
    first = FOR_ALL + TURN + CALLS.replace("or []", "and m.tool_calls[:1]") + "<end>{% endfor %}"
    assert rows(load(first + ASKED), [user("Ask"), said("", tool_calls=[call])])
    with pytest.raises(UserError, match=complaint):
        rows(load(first + ASKED), [user("Ask"), said("", tool_calls=[call, call])])


def test_arguments_must_be_json(load: Load) -> None:
    call = {"function": {"name": "weather", "arguments": "{city"}}
    with pytest.raises(UserError, match=r"message 2 of 'messages' calls 'weather' with .* no JSON"):
        rows(load(ENDED), [user("Ask"), said("", tool_calls=[call])])


def test_an_answer_that_disappears_is_an_error(load: Load) -> None:
    tokenizer = load(ENDED.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}"))
    complaint = r"rows.jsonl:7: message 2 has a 'content' of which nothing is in"
    with pytest.raises(UserError, match=complaint):
        rows(tokenizer)


def test_reasoning_that_disappears_is_counted(load: Load) -> None:
    for name in ("reasoning_content", "reasoning", "thinking"):
        (row,) = rows(load(ENDED), [user("Ask"), said("Say", **{name: "because"})])
        assert row.notes == (UNSAID_REASONING,)


def test_a_text_that_disappears_beside_a_call_is_counted(load: Load) -> None:
    """As the templates of Llama 3, Mistral and GLM-4 write calls."""
    body = "{% if m.tool_calls %}" + CALLS + "{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    tokenizer = load(FOR_ALL + "<{{ m.role }}>" + body + ASKED)
    call = {"function": {"name": "weather", "arguments": {}}}
    (row,) = rows(tokenizer, [user("Ask"), said("I look.", tool_calls=[call])], stops=["<end>"])
    assert row.notes == (UNSAID_TEXT,)
    assert shown(tokenizer, row) == (
        '<user>Ask<end><assistant>[[<call>{"name": "weather", "arguments": {}}<end>]]'
    )


def test_tools_that_disappear_are_counted(load: Load) -> None:
    (row,) = rows(load(ENDED), more={"tools": [TOOL]})
    assert row.notes == (UNSAID_TOOLS,)
    (row,) = rows(load("{{ tools | tojson }}" + ENDED), more={"tools": [TOOL]})
    assert row.notes == ()


@pytest.mark.parametrize(
    ("answer", "message", "trained"),
    [
        ("", said("<think>\nhm</think>\n\nSay"), "Say"),
        ("<think>{{ m.reasoning }}</think>\n", said("Say", reasoning="hm Say"), "Say"),
        ("<think>{{ m.thinking }}</think>", said("", thinking="hm", tool_calls=[]), None),
        ("<think></think>", said("Say"), "Say"),
        ("", said("Say hm"), "Say hm"),
        ("", said("hm Say", reasoning="hm"), "hm Say"),
    ],
)
@pytest.mark.parametrize("marked", [False, True])
def test_reasoning_may_be_left_out(
    load: Load, answer: str, message: Message, trained: str | None, marked: bool
) -> None:
    body = answer + "{{ m.content }}" + CALLS + "<end>"
    if marked:
        body = "{% generation %}" + body + "{% endgeneration %}"
    template = (
        FOR_ALL
        + "<{{ m.role }}>{% if m.role == 'assistant' %}"
        + body
        + "{% else %}{{ m.content }}<end>{% endif %}{% endfor %}"
    )
    tokenizer = load(template + ASKED)
    if trained is None:
        message = {**message, "tool_calls": [{"function": {"name": "weather", "arguments": {}}}]}
        trained = '<call>{"name": "weather", "arguments": {}}'
    (row,) = rows(tokenizer, [user("Ask"), message], stops=["<end>"], train_reasoning=False)
    assert shown(tokenizer, row).endswith(f"[[{trained}<end>]]")
    assert shown(tokenizer, row).count("[[") == 1
    (row,) = rows(tokenizer, [user("Ask"), message], stops=["<end>"])
    assert shown(tokenizer, row).partition("[[")[0] == "<user>Ask<end><assistant>"


def test_reasoning_alone_is_no_answer(load: Load) -> None:
    tokenizer = load(MARKED_TEXT)
    talk = [user("Ask"), said("<think>hm</think>"), *TWO[:2]]
    (row,) = rows(tokenizer, talk, stops=["<end>"], train_reasoning=False)
    assert row.notes == (EMPTY,)
    assert shown(tokenizer, row).count("[[") == 1


def test_reasoning_may_be_left_out_without_a_template(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    row = {"prompt": "Ask ", "response": "<think>hm</think>Say"}
    encoders = [Encoder(tokenizer, 99, ChatRules(train_reasoning=each)) for each in (True, False)]
    assert encoders[0].identity != encoders[1].identity
    found = encoders[1].encode(row, "here")
    assert isinstance(found, list)
    assert shown(tokenizer, found[0]) == "Ask <think>hm</think>[[Say<|im_end|>]]"


def test_parts_of_text_are_joined_and_others_refused(load: Load) -> None:
    tokenizer = load(ENDED)
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "one"}]
    (row,) = rows(tokenizer, [user("Ask one"), {"role": "assistant", "content": parts}])
    assert "[[Say one<end>]]" in shown(tokenizer, row)
    with pytest.raises(UserError, match="message 1 of 'messages' has a part of type 'image'"):
        rows(tokenizer, [{"role": "user", "content": [{"type": "image"}]}, said("x")])


def test_half_a_character_is_named(load: Load) -> None:
    with pytest.raises(
        UserError, match=r"rows.jsonl:7: content of message 2 .* surrogate '\\ud83d'\) at 5"
    ):
        rows(load(ENDED), [user("Ask"), said("Say \ud83d")])


def test_what_a_template_cannot_render_is_named(load: Load) -> None:
    call = {"function": {"name": "weather", "arguments": {"city": "\ud83d"}}}
    talk = [user("Ask"), said("", tool_calls=[call])]
    with pytest.raises(UserError, match=r"rows.jsonl:7: .* refuses .* UnicodeEncodeError: .*ud83d"):
        rows(load(FOR_ALL + TURN + CALLS + "<end>{% endfor %}" + ASKED), talk)
    with pytest.raises(UserError, match=r"rows.jsonl:7: .* refuses .* TypeError: can only concat"):
        rows(load(FOR_ALL + "{{ m.content + 1 }}{% endfor %}"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tools", [], "sets tools, which each row gives"),
        ("date_string", datetime.date(2024, 7, 26), "not a valid JSON value"),
    ],
)
def test_variables_that_no_template_can_get(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ModelConfig(name_or_path="x", chat_template_kwargs={name: value})


# Templates of a tokenizer.


def test_one_of_several_templates_is_chosen_by_name(
    load: Load, tiny_model: Path, tmp_path: Path
) -> None:
    tokenizer = load(ENDED)
    tokenizer.chat_template = {"tool_use": ENDED, "rag": "x"}
    with pytest.raises(
        UserError, match=r"several chat templates .* model.chat_template to one of rag, tool_use"
    ):
        Encoder(tokenizer, 100)
    tokenizer.save_pretrained(tmp_path)
    shutil.copy(tiny_model / "config.json", tmp_path)
    values = {"name_or_path": str(tmp_path), "chat_template": "tool_use"}
    chosen = load_tokenizer(ModelConfig.model_validate(values))
    assert chosen.chat_template == ENDED
    with pytest.raises(
        UserError, match=r"chat_template=other: .*; the tokenizer's own are rag, tool_use"
    ):
        load_tokenizer(ModelConfig.model_validate({**values, "chat_template": "other"}))


def test_a_template_for_tools_is_not_passed_over(load: Load) -> None:
    tokenizer = load(ENDED)
    tokenizer.chat_template = {"default": ENDED, "tool_use": "{{ tools | tojson }}" + ENDED}
    assert rows(tokenizer)
    with pytest.raises(UserError, match=r"rows.jsonl:7: the row has tools.* to tool_use, or"):
        rows(tokenizer, more={"tools": [TOOL]})


def test_all_that_decides_is_in_the_identity(load: Load) -> None:
    tokenizer = load(ENDED)
    rules = [
        ChatRules(),
        ChatRules(turns="last"),
        ChatRules(train_reasoning=False),
        ChatRules(variables={"x": 1}),
        ChatRules(stop_tokens=frozenset([5])),
    ]
    assert len({Encoder(tokenizer, 100, each).identity for each in rules}) == len(rules)
    other = load(ENDED)
    other.bos_token = "<user>"
    assert Encoder(other, 100).identity != Encoder(tokenizer, 100).identity


def test_a_template_that_writes_the_date_writes_one_date(load: Load) -> None:
    dated = "Today is {{ strftime_now('%d %b %Y') }}, {{ strftime_now(format=\"%A\") }}.\n" + ENDED
    tokenizer = load(dated)
    (row,) = rows(tokenizer, TWO[:2])
    assert shown(tokenizer, row).startswith("Today is 01 Jan 2026, Thursday.\n<user>Ask one<end>")
    (other,) = rows(tokenizer, TWO[:2], today=datetime.date(2025, 2, 3))
    assert shown(tokenizer, other).startswith("Today is 03 Feb 2025, Monday.")
    identities = {
        Encoder(tokenizer, 100, ChatRules(today=datetime.date(2025, 2, day))).identity
        for day in (3, 4)
    }
    assert len(identities) == 2


def test_a_date_that_cannot_be_fixed_is_refused(load: Load) -> None:
    with pytest.raises(UserError, match="strftime_now with something else than a text"):
        Encoder(load("{% set form = '%Y' %}{{ strftime_now(form) }}" + ENDED), 100)


def test_a_preview_shows_what_is_trained(
    tiny_model: Path, tiny_data: dict[str, str], pair_data: dict[str, str], tmp_path: Path
) -> None:
    values: dict[str, Any] = {
        "model": {"name_or_path": str(tiny_model)},
        "data": {**tiny_data, "cache_dir": str(tmp_path / "cache")},
        "train": {"output_dir": str(tmp_path / "run"), "global_batch_size": 4},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(values))
    page = tmp_path / "page.html"
    command = ["preview", "--config", str(tmp_path / "run.yaml"), "-n", "2", "--html", str(page)]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0, shown.output
    first = json.loads(Path(tiny_data["train"]).read_text().splitlines()[0])
    assert f"[[{first['response']}<|im_end|>]]" in shown.output
    assert shown.output.count("[[") == 2
    assert f"{tiny_data['train']}:1" in shown.output
    assert first["response"] in page.read_text()
    nowhere = CliRunner().invoke(app, [*command[:-1], str(tmp_path / "no" / "page.html")])
    assert isinstance(nowhere.exception, UserError)
    assert "page.html: No such file" in str(nowhere.exception)
    pairs = {
        **values,
        "data": {**pair_data, "cache_dir": str(tmp_path / "cache")},
        "preference": {},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(pairs))
    shown = CliRunner().invoke(app, command[:5])
    first = json.loads(Path(pair_data["train"]).read_text().splitlines()[0])
    assert all(f"[[{first[key]}<|im_end|>]]" in shown.output for key in ("chosen", "rejected"))


# Any conversation, any template: what is trained is what the model would have said.

WORDS = st.text("ab <>\u00e9\u4e2d\n", min_size=1, max_size=8).filter(lambda text: text.strip())
TEMPLATES = {
    "ended": ENDED,
    "ended, marked": FOR_ALL + "<{{ m.role }}>" + GENERATED + "{% endfor %}" + ASKED,
    "forgetful": FOR_ALL
    + "<{{ m.role }}>{{ m.content if loop.last or m.role == 'user' else '-' }}<end>{% endfor %}"
    + ASKED,
    "last question marked": FOR_ALL
    + "<{{ m.role }}>{{ 'a ' if loop.last and m.role == 'user' }}{{ m.content }}<end>\n{% endfor %}"
    + ASKED,
    "first turn only numbered": FOR_ALL
    + "{% if loop.first %}1{% endif %}"
    + TURN
    + "<end>\n{% endfor %}"
    + ASKED,
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(talk=st.lists(st.tuples(WORDS, WORDS), min_size=1, max_size=4))
def test_each_answer_is_trained_behind_what_inference_sees(
    load: Load, template: str, talk: list[tuple[str, str]]
) -> None:
    tokenizer = load(template)
    messages = [message for ask, answer in talk for message in (user(ask), said(answer))]
    found = rows(tokenizer, messages, stops=["<end>"])
    trained = []
    for row in found:
        (document,) = row.documents
        starts = [
            place
            for place, (before, mark) in enumerate(
                itertools.pairwise([False, *document.response_mask])
            )
            if mark and not before
        ]
        trained += [(document, start) for start in starts]
    assert len(trained) == len(talk)
    for number, (document, start) in enumerate(trained):
        asked = tokenizer.apply_chat_template(
            messages[: 2 * number + 1], add_generation_prompt=True, tokenize=False
        )
        own = tokenizer(asked + talk[number][1] + "<end>", add_special_tokens=False)["input_ids"]
        assert document.input_ids[: len(own)] == own
        assert tokenizer(asked, add_special_tokens=False)["input_ids"] == own[:start]
        assert all(document.response_mask[start : len(own)])
        assert not any(document.response_mask[len(own) : len(own) + 1])
