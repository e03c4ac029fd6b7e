"""Rows as others publish them become ours; what is not read is named, what is ambiguous refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from transformers import AutoTokenizer

from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import FORMATS as NAMES
from alphatoken.config.sections import Source
from alphatoken.data.cache import tokenise
from alphatoken.data.chat import Encoded, Encoder, PromptEncoder, RowEncoder, Skipped
from alphatoken.data.formats import FORMATS, converted, format_of
from alphatoken.data.pairs import PairEncoder
from alphatoken.data.rows import as_chat, as_pair, as_prompt, is_trained
from alphatoken.data.sources import OpenSource
from alphatoken.errors import UserError


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
ONE = [user("Ask"), said("Say")]
CALL = {"name": "weather", "arguments": {"city": "Rome"}}

SUPERVISED: dict[str, tuple[str, dict[str, Any], list[Any]]] = {
    "ours": ("prompt_response", {"prompt": "Ask", "response": "Say"}, ONE),
    "ours, asked in messages": (
        "prompt_response",
        {"prompt": [SYSTEM, user("Ask")], "response": "Say"},
        [SYSTEM, *ONE],
    ),
    "UltraChat": ("messages", {"prompt": "Ask", "prompt_id": "x", "messages": ONE}, ONE),
    "Alpaca": ("alpaca", {"instruction": "Ask", "input": "", "output": "Say"}, ONE),
    "Alpaca with all": (
        "alpaca",
        {
            "instruction": "Add",
            "input": "1 1",
            "output": "2",
            "system": "Be brief.",
            "history": [["Ask", "Say"]],
        },
        [SYSTEM, *ONE, user("Add\n\n1 1"), said("2")],
    ),
    "ShareGPT": (
        "sharegpt",
        {
            "system": "Be brief.",
            "conversations": [{"from": "human", "value": "Ask"}, {"from": "gpt", "value": "Say"}],
        },
        [SYSTEM, *ONE],
    ),
    "ShareGPT with calls": (
        "sharegpt",
        {
            "conversations": [
                {"from": "human", "value": "Ask"},
                {"from": "function_call", "value": json.dumps(CALL)},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "Say"},
            ]
        },
        [
            user("Ask"),
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": CALL}],
            },
            {"role": "tool", "content": "sun"},
            said("Say"),
        ],
    ),
    "ShareGPT's column, OpenAI's messages": (
        "sharegpt",
        {"system": "Be brief.", "conversations": ONE},
        [SYSTEM, *ONE],
    ),
    "TRL": ("completion", {"prompt": [user("Ask")], "completion": [said("Say")]}, ONE),
    "TRL as text": ("completion", {"prompt": "Ask", "completion": "Say"}, ONE),
    "Orca": (
        "orca",
        {"system_prompt": "Be brief.", "question": "Ask", "response": "Say"},
        [SYSTEM, *ONE],
    ),
    "Magicoder": ("problem_solution", {"problem": "Ask", "solution": "Say"}, ONE),
    "Evol-Instruct": ("instruction_response", {"instruction": "Ask", "response": "Say"}, ONE),
    "GSM8K": ("question_answer", {"question": "Ask", "answer": "Say"}, ONE),
}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "Orca": ("orca_pair", {"question": "Ask", "chosen": "Yes", "rejected": "No"}),
    "texts": ("pair", {"prompt": "Ask", "chosen": "Yes", "rejected": "No"}),
    "a message each": ("pair", {"prompt": "Ask", "chosen": said("Yes"), "rejected": said("No")}),
    "UltraFeedback": (
        "pair",
        {
            "prompt": "Ask",
            "chosen": [user("Ask"), said("Yes")],
            "rejected": [user("Ask"), said("No")],
            "score_chosen": 8.0,
            "messages": [user("Ask"), said("Yes")],
        },
    ),
    "HH-RLHF": (
        "pair",
        {
            "chosen": "\n\nHuman: Ask\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Ask\n\nAssistant: No",
        },
    ),
    "HH-RLHF with its prompt": (
        "pair",
        {
            "prompt": "\n\nHuman: Ask\n\nAssistant:",
            "chosen": "\n\nHuman: Ask\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Ask\n\nAssistant: No",
        },
    ),
    "a transcript asks": (
        "pair",
        {"prompt": "\n\nHuman: Ask\n\nAssistant:", "chosen": "Yes", "rejected": "No"},
    ),
    "ShareGPT": (
        "sharegpt_pair",
        {
            "conversations": [{"from": "human", "value": "Ask"}],
            "chosen": {"from": "gpt", "value": "Yes"},
            "rejected": {"from": "gpt", "value": "No"},
        },
    ),
    "PKU": (
        "two_responses",
        {"prompt": "Ask", "response_0": "No", "response_1": "Yes", "better_response_id": 1},
    ),
    "UltraFeedback, ranked": (
        "ranked",
        {
            "instruction": "Ask",
            "completions": [
                {"response": "Well", "overall_score": 5.0},
                {"response": "No", "overall_score": 2.0},
                {"response": "Yes", "overall_score": 9.0},
            ],
        },
    ),
}


@pytest.mark.parametrize("name", SUPERVISED)
def test_supervised_rows(name: str) -> None:
    expected, fields, messages = SUPERVISED[name]
    assert format_of(fields) == expected
    ours, _ = converted(fields, "auto", "here")
    assert as_chat(ours, "here").messages == messages
    assert converted(fields, expected, "here")[0] == ours
    assert as_prompt(ours, "here").messages == messages[:-1], "what the Fisher asks"


@pytest.mark.parametrize("name", PAIRS)
def test_pairs(name: str) -> None:
    expected, fields = PAIRS[name]
    assert format_of(fields) == expected
    pair = as_pair(converted(fields, "auto", "here")[0], "here")
    assert pair.prompt.messages == [user("Ask")]
    assert (pair.chosen, pair.rejected) == ([said("Yes")], [said("No")])


def test_a_turn_of_sharegpt_may_be_left_out() -> None:
    turns = [
        {"from": "human", "value": "Ask"},
        {"from": "gpt", "value": "BAD", "weight": 0},
        {"from": "gpt", "value": "BAD", "train": False},
    ]
    chat = as_chat(converted({"conversations": turns}, "auto", "here")[0], "here")
    assert [is_trained(message) for message in chat.messages] == [True, False, False]


def test_tools_of_a_pair_are_read() -> None:
    row = {**PAIRS["ShareGPT"][1], "tools": json.dumps([{"name": "weather"}])}
    ours, unread = converted(row, "auto", "here")
    assert (as_pair(ours, "here").prompt.tools, unread) == ([{"name": "weather"}], frozenset())


@pytest.mark.parametrize("name", ["texts", "a message each", "UltraFeedback", "HH-RLHF", "Orca"])
def test_a_column_of_the_systems_text_is_read(name: str) -> None:
    ours, unread = converted({**PAIRS[name][1], "system": "Be brief."}, "auto", "here")
    pair = as_pair(ours, "here")
    assert pair.prompt.messages == [SYSTEM, user("Ask")]
    assert (pair.chosen, pair.rejected) == ([said("Yes")], [said("No")])
    assert "system" not in unread


@pytest.mark.parametrize("name", ["ours", "TRL", "TRL as text"])
def test_a_column_of_the_systems_text_is_read_of_one_answer(name: str) -> None:
    ours, unread = converted({**SUPERVISED[name][1], "system": "Be brief."}, "auto", "here")
    assert (as_chat(ours, "here").messages, unread) == ([SYSTEM, *ONE], frozenset())
    twice = {"prompt": [SYSTEM, user("Ask")], "response": "Say", "system": "Be brief."}
    assert as_chat(converted(twice, "auto", "here")[0], "here").messages == [SYSTEM, *ONE]
    with pytest.raises(UserError, match="here: the column of the system's text and the first"):
        converted({**twice, "system": "Be long."}, "auto", "here")


READY = {"input_ids": [5, 6, 7, 8, 9, 10], "loss_mask": [0, 0, 1, 1, 0, 1]}


def test_a_mask_may_come_with_the_rows(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    encoder = Encoder(tokenizer, 5)
    labels = {"input_ids": READY["input_ids"], "labels": [-100, -100, 7, 8, -100, 10]}
    for row in (READY, labels):
        assert converted({**row, "attention_mask": []}, "auto", "here") == (
            row,
            frozenset({"attention_mask"}),
        )
        (found,) = encoded(encoder, row)
        assert found.documents[0].input_ids == [5, 6, 7, 8, 9]
        assert found.documents[0].response_mask == [False, False, True, True, False]
        assert found.cut == ("rows truncated",)
        (prompt,) = encoded(PromptEncoder(tokenizer, 100), row)
        assert prompt.documents[0].input_ids == [5, 6, 7, 8, 9]
        assert prompt.asked == found.asked[-1:]
    nothing = {**READY, "loss_mask": [0] * 6}
    assert encoder.encode(nothing, "here") == Skipped("no answer to train")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**READY, "loss_mask": [1]}, "here: 'loss_mask' needs a value for each of 6 tokens"),
        ({**READY, "loss_mask": [0, 0, 1, 1, 0, 0.5]}, "here: value 6 of 'loss_mask' is 0.5, not"),
        (
            {"input_ids": [5, 6, 7], "labels": [6, 7, -100]},
            r"here: label 1 is 6, but must be the token there \(5\) or -100: .* own place",
        ),
        ({**READY, "input_ids": "5 6"}, "here: 'input_ids' must be a list of tokens below"),
        ({**READY, "input_ids": [5, 6, 7, 8, 9, 10**6]}, "'input_ids' must be a list of tokens"),
    ],
)
def test_a_ready_mask_is_checked(row: dict[str, Any], message: str, tiny_model: Path) -> None:
    with pytest.raises(UserError, match=message):
        Encoder(AutoTokenizer.from_pretrained(tiny_model), 100).encode(row, "here")


def encoded(encoder: RowEncoder, row: dict[str, Any]) -> list[Encoded]:
    found = encoder.encode(row, "here")
    assert not isinstance(found, Skipped)
    return found


def test_scores_may_be_text() -> None:
    answers = [{"response": "No", "overall_score": "9"}, {"response": "Yes", "overall_score": "10"}]
    ours, _ = converted({"instruction": "Ask", "completions": answers}, "auto", "here")
    assert (ours["chosen"], ours["rejected"]) == ("Yes", "No")


def test_the_number_of_the_better_response_may_be_a_float() -> None:
    """As columns with missing values have it."""
    row = {"prompt": "Ask", "response_0": "a", "response_1": "b", "better_response_id": 1.0}
    ours, _ = converted(row, "auto", "here")
    assert (ours["chosen"], ours["rejected"]) == ("b", "a")


def test_several_calls_at_once() -> None:
    value = json.dumps([CALL, {"name": "read", "arguments": {}}])
    turns = [{"from": "human", "value": "Ask"}, {"from": "function_call", "value": value}]
    chat = as_chat(converted({"conversations": turns}, "auto", "here")[0], "here")
    calls = chat.messages[1]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["weather", "read"]


def test_answers_that_look_like_transcripts_keep_their_prompt() -> None:
    talk = "Human: Hi\n\nAssistant: {}"
    row = {"prompt": "Write a talk", "chosen": talk.format("Yes"), "rejected": talk.format("No")}
    pair = as_pair(converted(row, "auto", "here")[0], "here")
    assert (pair.prompt.messages, pair.chosen) == ([user("Write a talk")], [said(row["chosen"])])
    pair = as_pair(converted({**row, "prompt": "Hi"}, "auto", "here")[0], "here")
    assert (pair.prompt.messages, pair.chosen) == ([user("Hi")], [said("Yes")])


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"train": "false"}, "message 2 of 'messages' has train='false': .* trained .true. or not"),
        ({"reasoning_content": 3}, "message 2 of 'messages' has reasoning_content=3, which must"),
        ({"tool_calls": 5}, "message 2 of 'messages' has tool_calls=5, which must be a list"),
        ({"tool_calls": True}, "message 2 of 'messages' has tool_calls=True, which must be a list"),
        (
            {"tool_calls": [{"function": {"name": "f", "arguments": "1" + "0" * 5000}}]},
            "message 2 of 'messages' calls 'f' with arguments that are no JSON: Exceeds the limit",
        ),
    ],
)
def test_what_a_message_says_of_itself_is_checked(more: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        as_chat({"messages": [user("Ask"), {**said("Say"), **more}]}, "here")


def test_every_format_is_shown_here() -> None:
    shown = {each[0] for each in (*SUPERVISED.values(), *PAIRS.values())}
    assert shown == set(FORMATS) - {"unpaired", "labels", "loss_mask"}
    assert ["auto", *FORMATS] == list(NAMES), "the configuration names them in the same order"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"prompt": "Ask", "completion": "Say", "label": True},
            r"here: 'completion' with 'label' is .* judged alone \(KTO\)",
        ),
        (
            {"prompt": "Ask", "response_0": "a", "response_1": "b"},
            "'better_response_id' must be 0 or 1, but is None",
        ),
        (
            {"prompt": "Ask", "response_0": "a", "response_1": "b", "better_response_id": True},
            "'better_response_id' must be 0 or 1, but is True",
        ),
        (
            {"instruction": "Ask", "completions": [{"response": "a", "overall_score": 1}]},
            "at least two answers with different 'overall_score', but has 1",
        ),
        (
            {"instruction": "Ask", "completions": "x"},
            "at least two answers with different 'overall_score', but has 0",
        ),
        (
            {"instruction": "Ask", "completions": [{"response": "a", "overall_score": "N/A"}] * 2},
            "at least two answers with different 'overall_score', but has 0",
        ),
        (
            {"instruction": "Ask", "output": "Say", "history": [user("Ask")]},
            r"'history' must be a list of \[question, answer\], but is \[\{'role'",
        ),
        (
            {"instruction": "Ask", "output": "Say", "history": "Ask"},
            r"'history' must be a list of \[question, answer\], but is Ask",
        ),
        (
            {"instruction": "Ask", "output": "Say", "history": 5},
            r"'history' must be a list of \[question, answer\], but is 5",
        ),
        (
            {"instruction": "Ask", "output": "Say", "input": ["x"]},
            r"'input' must be text, but is \['x'\]",
        ),
        ({"prompt": [user("Ask")], "completion": 3}, "'completion' must be text or a list"),
        ({"conversations": 3}, "'conversations' must be a list, but is 3"),
        ({"conversations": [{"from": ["gpt"], "value": "x"}]}, "turn 1 of 'conversations' needs"),
        (
            {"conversations": [{"from": "alien", "value": "x"}]},
            "turn 1 of 'conversations' needs 'value' and 'from', one of system, human",
        ),
        (
            {"conversations": [{"from": "function_call", "value": "{x"}]},
            "turn 1 is a function call that is no JSON",
        ),
    ],
)
def test_what_is_ambiguous_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        converted(fields, "auto", "here")


def test_a_named_format_must_fit() -> None:
    with pytest.raises(UserError, match=r"format=alpaca needs a column 'instruction'; .* prompt"):
        converted({"prompt": "Ask", "response": "Say"}, "alpaca", "here")
    with pytest.raises(ValidationError, match=r"format\n.*'auto', .*'alpaca', .* or 'question_ans"):
        Source.model_validate({"path": "x", "format": "alpacca"})
    values = {"data": {"train": {"path": "x", "format": "alpacca"}}}
    with pytest.raises(UserError, match=r"data.train.format: input should be 'auto'.* 'alpacca'"):
        validate(RunConfig, values, "of the test")
    fields = {"question": "Ask", "answer": "Say"}
    assert converted({"text": "x"}, "auto", "here") == ({"text": "x"}, frozenset({"text"}))
    assert converted({"prompt": "x", "id": 3}, "auto", "here")[1] == {"id"}, "asked by the Fisher"
    assert converted(fields, "question_answer", "here")[0]["messages"] == ONE


def test_columns_that_are_not_read_are_named(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [
        {"instruction": "Ask", "output": "Say", "source": "x"},
        {"instruction": "Ask two", "output": "Say two", "language": "en"},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = Encoder(AutoTokenizer.from_pretrained(tiny_model), 200)
    dataset = tokenise([Source(path=str(file))], encoder, tmp_path / "cache")
    assert dataset.reports[0].unread == ["language", "source"]
    assert str(dataset.reports[0]).endswith("; columns not read: language, source")
    assert len(dataset) == 2


def test_what_a_file_format_adds_is_not_trained(tmp_path: Path) -> None:
    rows = [
        {"messages": [user("Ask"), {"role": "assistant", "tool_calls": [{"function": call}]}]}
        for call in (CALL, {"name": "read", "arguments": {"path": "x"}})
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    assert "None" in str(pq.read_table(tmp_path / "rows.parquet").to_pylist())
    found = OpenSource(Source(path=str(tmp_path / "rows.parquet"))).read()
    read = [as_chat(row.fields, "here").messages[1]["tool_calls"][0]["function"] for row in found]
    assert read == [CALL, {"name": "read", "arguments": {"path": "x"}}]


def test_published_pairs_are_tokenised_as_pairs(tiny_model: Path, tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(PAIRS[name][1]) + "\n" for name in PAIRS))
    encoder = PairEncoder(AutoTokenizer.from_pretrained(tiny_model), 100, 100)
    dataset = tokenise([Source(path=str(file))], encoder, tmp_path / "cache")
    first = [ids.tolist() for ids, _ in dataset[0]]
    assert all([ids.tolist() for ids, _ in dataset[row]] == first for row in range(len(PAIRS)))
