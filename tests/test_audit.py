"""What is said of a response mask, by doctor and by every run: nothing where it is right, for every
kind of chat template and row that is known to have been trained wrongly; a complaint with row and
fix where it is not."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.data import audit
from alphatoken.data.chat import Encoder, Tokens
from alphatoken.data.chat_template import ChatRules
from alphatoken.data.layout import Conversation
from alphatoken.data.rows import Chat, as_chat, is_tokenised
from alphatoken.data.splits import read_splits
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.doctor.findings import Finding
from alphatoken.doctor.masks import judge_masks, judge_run
from alphatoken.errors import UserError
from tests.test_turns import (
    ASKED,
    CALLS,
    ENDED,
    FOR_ALL,
    GENERATED,
    TOOL,
    TURN,
    TWO,
    Load,
    Message,
    load,
    said,
    user,
)

__all__ = ["load"]

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = {"function": {"name": "weather", "arguments": {"city": "Rome"}}}
CALLED = [
    user("Ask one"),
    said("", tool_calls=[CALL]),
    {"role": "tool", "content": '{"sky": "blue"}'},
    said("Say two"),
]
THOUGHT = [
    user("Ask one"),
    said("<think>because of it</think>Say one"),
    user("Ask two"),
    said("<think>so it must be</think>Say two"),
]
FORGETFUL = ENDED.replace(
    "{{ m.content }}",
    "{{ m.content if m.role == 'user' or loop.last else m.content.split('</think>')[-1] }}",
)
THINKING = ENDED + "{% if add_generation_prompt %}<think>{% endif %}"
MOVING = (
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{% if loop.last and "
    "m.role == 'user' and messages[0].role == 'system' %}{{ messages[0].content }} {% endif %}"
    "{{ m.content }}<end>{% endfor %}"
)
BEFORE_LAST = (
    "{% set ask = messages | selectattr('role', 'equalto', 'user') | list | last %}"
    "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{% if m == ask and "
    "messages[0].role == 'system' %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}<end>"
    "{% endfor %}"
)
CALLS_ALONE = (
    FOR_ALL
    + "<{{ m.role }}>{% if m.tool_calls %}"
    + CALLS
    + "{% else %}{{ m.content }}{% endif %}<end>{% endfor %}"
    + ASKED
)
NEEDS_QUESTION = (
    "{% if not (messages | selectattr('role', 'equalto', 'user') | list) %}"
    "{{ raise_exception('No user query found') }}{% endif %}" + ENDED
)
MARKED = FOR_ALL + "<{{ m.role }}>" + GENERATED + "{% endfor %}" + ASKED

RIGHT: dict[str, tuple[str, list[Message]]] = {
    "T1 the assistant speaks first": (ENDED, [said("Hello"), *TWO[:2]]),
    "T2 today's date": ("{{ strftime_now('%d %b') }}\n" + ENDED, TWO),
    "T3 the next header ends a turn": (FOR_ALL + TURN + "{% endfor %}" + ASKED, TWO),
    "T4 two ends": (ENDED + "{% if not add_generation_prompt %}<stop>{% endif %}", TWO),
    "T5 marks to the character": (
        FOR_ALL + "{% if m.role == 'user' %}USER: {{ m.content }} ASSISTANT: {% else %}"
        "{% generation %}{{ m.content }}<end>{% endgeneration %}{% endif %}{% endfor %}",
        TWO,
    ),
    "T6 marks around the text": (MARKED, [user("Ask"), said("Say e\u0301"), *TWO]),
    "T7 reasoning in the row": (THINKING, [user("Ask"), said("<think>hm</think>Say")]),
    "T8 earlier reasoning goes": (FORGETFUL, THOUGHT),
    "T9 the system text moves": (BEFORE_LAST + ASKED, [SYSTEM, *TWO]),
    "T9 the system text goes once answered": (MOVING + ASKED, [SYSTEM, *TWO]),
    "T10 a prefix that cannot be rendered": (NEEDS_QUESTION, [SYSTEM, said("Hello"), *TWO]),
    "T11 calls": (ENDED.replace("<end>", CALLS + "<end>"), CALLED),
    "T11 calls in place of text": (CALLS_ALONE, CALLED),
    "T11 what a tool says is written anew": (
        FOR_ALL + "<{{ m.role }}>{% if m.role == 'assistant' and m.content %}<think></think>"
        "{{ m.content }}{% elif m.role == 'assistant' %}" + CALLS + "{% elif m.role == 'tool' %}"
        "{{ m.content | tojson }}{% else %}{{ m.content }}{% endif %}<end>{% endfor %}" + ASKED,
        CALLED,
    ),
    "T12 two tokens end a turn": (FOR_ALL + TURN + "<stop><end>{% endfor %}" + ASKED, TWO),
    "R6 a message that is left out": (ENDED, [user("Ask"), said("BAD", train=False), *TWO]),
    "R11 an empty turn": (ENDED, [user("Ask"), said(" "), *TWO]),
    "R12 parts of text": (
        ENDED,
        [user("Ask"), {"role": "assistant", "content": [{"type": "text", "text": "Say"}]}],
    ),
}


def judged(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: list[dict[str, Any]] | None = None,
    **rules: Any,
) -> Finding:
    stops = tokenizer.convert_tokens_to_ids(["<end>", "<user>"])
    chat = as_chat({"messages": list(messages), "tools": tools}, "rows.jsonl:7")
    encoder = Encoder(tokenizer, 1000, ChatRules(stop_tokens=frozenset(stops), **rules))
    return judge_masks(tokenizer, encoder, [Conversation(chat, 0, "rows.jsonl:7")])


@pytest.mark.parametrize("case", RIGHT)
def test_doctor_passes_what_is_right(load: Load, case: str) -> None:
    template, messages = RIGHT[case]
    found = judged(load(template), messages)
    assert (found.outcome, found.found[-26:]) == ("ok", "1 conversation of the data"), found


@pytest.mark.parametrize("template", [ENDED, THINKING, FORGETFUL, MARKED])
def test_doctor_passes_answers_without_their_reasoning(load: Load, template: str) -> None:
    talk = [user("Ask"), said("<think>because of it</think>Say")]
    found = judged(load(template), talk, train_reasoning=False)
    assert found.outcome == "ok", found
    assert "because of it</think>[[Say<end>]]" in "\n".join(found.details)


IGNORES_ASKING = FOR_ALL + TURN + "<end>{% endfor %}"
HEADER_MARKED = (
    FOR_ALL + "{% if m.role == 'assistant' %}{% generation %}<assistant>{{ m.content }}<end>"
    "{% endgeneration %}{% else %}<user>{{ m.content }}<end>{% endif %}{% endfor %}" + ASKED
)
CALLS_UNMARKED = MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}" + CALLS + "<end>")
WRONG: dict[str, tuple[str, list[Message], str, str]] = {
    "no token ends a turn": (
        FOR_ALL + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        TWO,
        "failed",
        r"the last token trained is no token .*: 'Velvet pigeons .* and 3 more",
    ),
    "T7 what asks is not there": (THINKING, TWO, "failed", "rows.jsonl:7: inference would begin"),
    "T11 a call is left out": (ENDED, CALLED, "failed", "rows.jsonl:7: message 2 calls the tool"),
    "T11 reasoning is left out": (
        ENDED,
        [user("Ask"), said("Say", reasoning_content="because of it")],
        "warning",
        "turns whose reasoning the chat template leaves out: rows.jsonl:7",
    ),
    "T11 reasoning in the text is left out": (
        ENDED.replace("m.content", "m.content.split('</think>')[-1]"),
        THOUGHT,
        "warning",
        "turns whose reasoning the chat template leaves out: rows.jsonl:7",
    ),
    "T14 a header is marked": (
        HEADER_MARKED,
        TWO,
        "failed",
        r"trains on text of the template: '<assistant>' \(the probe\) and 3 more",
    ),
    "what asks is ignored": (
        IGNORES_ASKING,
        TWO,
        "failed",
        r"trains on text of the template: '<assistant>' \(the probe\) and 3 more",
    ),
    "an end is not marked": (
        MARKED.replace("<end>{% endgeneration %}", "{% endgeneration %}<end>"),
        TWO,
        "failed",
        r"the end-of-turn token <end> is not trained: 'Velvet pigeons",
    ),
    "calls are not marked": (
        CALLS_UNMARKED,
        CALLED,
        "failed",
        r"does not train on tool calls of the assistant: 'weather' \(rows.jsonl:7\)",
    ),
    "a system text is left out": (
        ENDED.replace("messages %}", "messages if m.role != 'system' %}"),
        [SYSTEM, *TWO],
        "warning",
        "leaves out a message of others: the probe and 1 more",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_doctor_complains_of_what_is_wrong(load: Load, case: str) -> None:
    template, messages, outcome, complaint = WRONG[case]
    found = judged(load(template), messages)
    assert found.outcome == outcome, found

    assert re.search(complaint, found.found), found.found
    assert found.fix


# In every run.


def asked_of(
    folder: Path, template: str, tiny_model: Path, rows: Sequence[dict[str, Any]], **sections: Any
) -> tuple[RunConfig, PreTrainedTokenizerBase]:
    """A run on rows, and its tokenizer."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jinja").write_text(template)
    values: dict[str, Any] = {
        "model": {"name_or_path": str(tiny_model), "chat_template": str(folder / "chat.jinja")},
        "data": {"train": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")},
        "valuation": {"enabled": False},
        "train": {"output_dir": str(folder / "run"), "global_batch_size": 4},
    }
    kind = PreferenceRunConfig if "preference" in sections else RunConfig
    config: RunConfig = validate(kind, {**values, **sections}, "of the test")
    return config, load_tokenizer(config.model)


CHATML = ENDED.replace("<end>", "<|im_end|>")


def test_a_run_says_by_which_rule_tokens_are_trained(tiny_model: Path, tmp_path: Path) -> None:
    config, tokenizer = asked_of(tmp_path, CHATML, tiny_model, [{"messages": TWO}])
    assert audit.look_at_rows(config, tokenizer) == [
        "what is trained: an answer from behind the text that asks for it (add_generation_prompt) "
        "to the first stop token (<|im_end|>)"
    ]
    rules = {
        "": "without a chat template, a row's response and the EOS token (<|im_end|>)",
        MARKED: "what the chat template's own {% generation %} marks hold of an answer",
    }
    for template, rule in rules.items():
        tokenizer.chat_template = template or None
        assert Encoder(tokenizer, 100).rule == rule
        only = ChatRules(turns="last", train_reasoning=False)
        assert Encoder(tokenizer, 100, only).rule == (
            f"{rule}, of the last turn only, without its reasoning"
        )


@pytest.mark.parametrize("pairs", [False, True])
def test_a_run_warns_of_what_it_learns_wrongly(
    tiny_model: Path, tmp_path: Path, pairs: bool
) -> None:
    endless = FOR_ALL + TURN + "{% endfor %}" + ASKED
    row: dict[str, Any] = {"messages": TWO}
    if pairs:
        row = {"prompt": TWO[:3], "chosen": TWO[3:], "rejected": [said("No")]}
    sections: dict[str, Any] = {"preference": {}} if pairs else {}
    config, tokenizer = asked_of(tmp_path, endless, tiny_model, [row, row], **sections)
    _, warning = audit.look_at_rows(config, tokenizer)
    assert warning == (
        "warning: the last token trained is no token at which generation stops (<|im_end|>): "
        f"'Say {'two' if pairs else 'one'}' ({tmp_path}/rows.jsonl:1) and 3 more places; "
        "without it the model never learns to stop: set model.chat_template to one that writes it "
        "behind every answer, or correct eos_token_id of the model"
    )


def test_a_run_looks_at_few_of_very_long_rows(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, _ = asked_of(tmp_path, CHATML, tiny_model, [{"messages": TWO}] * 9)
    assert len(audit.real_conversations(config)) == 9
    characters = sum(len(message["content"]) for message in TWO)
    monkeypatch.setattr(audit, "MOST_RENDERED", 2 * characters * 3)
    assert len(audit.real_conversations(config)) == 4


def test_a_run_does_not_train_what_others_say(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Encoder.tokens

    def shifted(self: Encoder, chat: Chat, where: str, first: int = 0) -> list[Tokens]:
        return [
            replace(each, mask=[*each.mask[16:], *[False] * 16])
            for each in tokens(self, chat, where)
        ]

    config, tokenizer = asked_of(tmp_path, CHATML, tiny_model, [{"messages": TWO}])
    monkeypatch.setattr(Encoder, "tokens", shifted)
    with pytest.raises(UserError, match=r"trains on text of the user: .*rows.jsonl:1"):
        audit.look_at_rows(config, tokenizer)


# Rows as people have them.

ROWS_RIGHT: dict[str, dict[str, Any]] = {
    "R1 UltraChat": {"prompt": "Hi", "prompt_id": "x", "messages": TWO},
    "R2 Alpaca": {"instruction": "Add", "input": "1", "output": "2", "system": "Be brief."},
    "R2 a system text": {"prompt": "Ask", "response": "Say", "system": "Be brief."},
    "R3 ShareGPT": {
        "conversations": [
            {"from": "human", "value": "Ask"},
            {"from": "function_call", "value": json.dumps(CALL["function"])},
            {"from": "observation", "value": "sun"},
            {"from": "gpt", "value": "Say"},
        ]
    },
    "R4 OpenAI's calls": {
        "tools": [TOOL],
        "messages": [
            user("Ask"),
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"function": {"name": "weather", "arguments": '{"city": "Rome"}'}}],
            },
        ],
    },
    "R5 nulls of a file format": {
        "messages": [{**TWO[0], "tool_calls": None}, {**TWO[1], "tool_calls": None}]
    },
    "R6 a message that is left out": {"messages": [user("Ask"), said("BAD", weight=0), *TWO]},
    "R9 HH-RLHF": {
        "chosen": "\n\nHuman: Ask\n\nAssistant: Yes",
        "rejected": "\n\nHuman: Ask\n\nAssistant: No",
    },
    "R10 a message each": {"prompt": "Ask", "chosen": said("Yes"), "rejected": said("No")},
    "R10 Orca's pairs": {"system": "Be", "question": "Ask", "chosen": "Yes", "rejected": "No"},
    "R11 an empty turn": {"messages": [user("Ask"), said(" "), *TWO]},
    "R12 parts of text": {
        "messages": [user("Ask"), {**said(""), "content": [{"type": "text", "text": "Say"}]}]
    },
}
ROWS_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "R7 half of a character": ({"prompt": "Ask", "response": "Say \ud83d"}, "has half of a char"),
    "R10 answers judged alone": ({"prompt": "A", "completion": "B", "label": True}, "judged alone"),
    "R12 an image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}, said("Say")]},
        "a part of type 'image'",
    ),
    "a pair in a supervised run": ({"prompt": "A", "chosen": "B", "rejected": "C"}, "recipes/pref"),
}
WITH_CALLS = "{% if tools %}{{ tools | tojson }}{% endif %}" + CHATML.replace(
    "<|im", CALLS + "<|im"
)


@pytest.mark.parametrize("case", ROWS_RIGHT)
def test_doctor_passes_rows_as_people_have_them(
    case: str, tiny_model: Path, tmp_path: Path
) -> None:
    row = ROWS_RIGHT[case]
    sections: dict[str, Any] = {"preference": {}} if "chosen" in row else {}
    config, tokenizer = asked_of(tmp_path, WITH_CALLS, tiny_model, [row], **sections)
    found = judge_run(config, tokenizer)
    answers = "2 conversations" if sections else "1 conversation"
    assert (found.outcome, found.found.rpartition("turns and ")[2]) == (
        "ok",
        f"{answers} of the data",
    )
    assert len(audit.look_at_rows(config, tokenizer)) == 1


@pytest.mark.parametrize("case", ROWS_WRONG)
def test_rows_that_cannot_be_trained_are_named(case: str, tiny_model: Path, tmp_path: Path) -> None:
    row, complaint = ROWS_WRONG[case]
    config, tokenizer = asked_of(tmp_path, WITH_CALLS, tiny_model, [row])
    with pytest.raises(UserError, match=f"rows.jsonl:1: .*{complaint}"):
        read_splits(config, tokenizer)


def test_rows_that_are_tokens_are_not_looked_at(tiny_model: Path, tmp_path: Path) -> None:
    row = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
    config, tokenizer = asked_of(tmp_path, CHATML, tiny_model, [row])
    assert len(audit.look_at_rows(config, tokenizer)) == 1
    assert judge_run(config, tokenizer).found.endswith("0 conversations of the data")


def test_a_run_reads_few_of_many_rows_that_are_tokens(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {"input_ids": [5, 6, 7], "loss_mask": [0, 1, 1]}
    config, _ = asked_of(tmp_path, CHATML, tiny_model, [row] * 9)
    read = []

    def counted(fields: dict[str, Any]) -> bool:
        read.append(fields)
        return is_tokenised(fields)

    monkeypatch.setattr(audit, "is_tokenised", counted)
    monkeypatch.setattr(audit, "MOST_READ", 4)
    assert audit.real_conversations(config) == []
    assert len(read) == 4
