"""Pairs of responses: from rows to tokens and masks, what is cut, skipped and refused, and how
batches hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.config.file import validate
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.sections import Source
from alphatoken.data.batches import Layout, Order, micro_batches
from alphatoken.data.cache import TokenDataset, tokenise
from alphatoken.data.chat import Encoded, Encoder, Skipped
from alphatoken.data.pairs import ChosenEncoder, PairEncoder
from alphatoken.data.splits import load_prompts, load_splits
from alphatoken.errors import UserError
from recipes.transcripts import convert, hold_out, messages_of
from tests.test_data import MARKED_TEMPLATE, only


@pytest.fixture
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_model)
    return loaded


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def encode(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], prompt: int = 200, response: int = 200
) -> Encoded:
    return only(PairEncoder(tokenizer, prompt, response).encode(row, "here"))


def trained_texts(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """What the model is taught to say in each document."""
    return [
        tokenizer.decode(np.array(document.input_ids)[np.array(document.response_mask)])
        for document in encoded.documents
    ]


PROMPT = [user("Hi"), assistant("Yes?"), user("A colour.")]


@pytest.mark.parametrize("template", ["by difference", "marked"])
@pytest.mark.parametrize(
    "row",
    [
        {"prompt": PROMPT, "chosen": "red", "rejected": "seven"},
        {"prompt": PROMPT, "chosen": [assistant("red")], "rejected": [assistant("seven")]},
        {
            "prompt": PROMPT,
            "chosen": [*PROMPT, assistant("red")],
            "rejected": [*PROMPT, assistant("seven")],
        },
        {"chosen": [*PROMPT, assistant("red")], "rejected": [*PROMPT, assistant("seven")]},
    ],
    ids=["texts", "messages", "whole conversations", "without prompt"],
)
def test_every_form_of_a_pair_trains_on_the_two_answers_alone(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], template: str
) -> None:
    if template == "marked":
        tokenizer.chat_template = MARKED_TEMPLATE
    encoded = encode(tokenizer, row)
    assert trained_texts(tokenizer, encoded) == ["red<|im_end|>", "seven<|im_end|>"]
    for document, answer in zip(encoded.documents, ("red", "seven"), strict=True):
        whole = tokenizer.apply_chat_template([*PROMPT, assistant(answer)])["input_ids"]
        assert document.input_ids == whole
    assert len(encoded.asked) == 1
    messages = [*PROMPT, assistant("x")]
    supervised = only(Encoder(tokenizer, 200).encode({"messages": messages}, "here"))
    assert encoded.asked[0] == supervised.asked[-1], (
        "the same prompt is recognised in other kinds of rows"
    )


THINKING = MARKED_TEMPLATE.replace(
    "assistant\n' }}{% endif %}", "assistant\n<think>\n' }}{% endif %}"
)
FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and loop.last %}{% generation %}{{ message['content'] }}<|im_end|>"  # noqa: E501
    "{% endgeneration %}{% elif message['role'] == 'assistant' %}(left out)<|im_end|>{% else %}{{ "
    "message['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
)


def test_a_template_may_ask_with_more_than_it_writes_before_an_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    assert THINKING != MARKED_TEMPLATE
    tokenizer.chat_template = THINKING
    encoded = encode(tokenizer, {"prompt": PROMPT, "chosen": "red and blue", "rejected": "7"})
    assert trained_texts(tokenizer, encoded) == ["red and blue<|im_end|>", "7<|im_end|>"]


def test_a_template_may_rewrite_earlier_answers_of_the_prompt(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    tokenizer.chat_template = FORGETFUL
    row = {"prompt": PROMPT, "chosen": "red", "rejected": "7"}
    assert trained_texts(tokenizer, encode(tokenizer, row)) == ["red<|im_end|>", "7<|im_end|>"]
    chosen = [assistant("red"), user("And?"), assistant("blue")]
    with pytest.raises(UserError, match="writes earlier turns of the answer differently"):
        encode(tokenizer, {"prompt": PROMPT, "chosen": chosen, "rejected": "7"})


def test_an_answer_of_several_turns_trains_on_what_the_assistant_says(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    chosen = [assistant("red"), user("And?"), assistant("blue")]
    encoded = encode(tokenizer, {"prompt": "A colour.", "chosen": chosen, "rejected": "seven"})
    assert trained_texts(tokenizer, encoded) == ["red<|im_end|>blue<|im_end|>", "seven<|im_end|>"]


def test_a_plain_pair_needs_no_template(tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = None
    encoded = encode(tokenizer, {"prompt": "A colour: ", "chosen": "red", "rejected": "seven"})
    assert trained_texts(tokenizer, encoded) == ["red<|im_end|>", "seven<|im_end|>"]
    with pytest.raises(UserError, match="conversations need a chat template"):
        encode(tokenizer, {"prompt": PROMPT, "chosen": "red", "rejected": "seven"})


def test_prompts_lose_their_start_and_responses_their_end(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    row = {"prompt": "word " * 40 + "A colour.", "chosen": "red and blue", "rejected": "7"}
    begins = tokenizer.bos_token
    tokenizer.bos_token = None
    whole, cut = encode(tokenizer, row), encode(tokenizer, row, prompt=30, response=6)
    whole_chosen, cut_chosen = whole.documents[0], cut.documents[0]
    start = whole_chosen.response_mask.index(True)
    assert cut_chosen.input_ids[:30] == whole_chosen.input_ids[start - 30 : start]
    assert trained_texts(tokenizer, cut) == ["red an", "7<|im_end|>"]
    assert cut.cut == ("prompts cut on the left", "responses cut on the right")
    assert len(cut_chosen.input_ids) == 36
    tokenizer.bos_token = begins
    with_bos = encode(tokenizer, row, prompt=30, response=6).documents[0]
    kept = whole_chosen.input_ids[start - 29 : start]
    assert with_bos.input_ids[:30] == [tokenizer.bos_token_id, *kept]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": " ", "chosen": "red", "rejected": "7"}, "empty prompt"),
        ({"prompt": "Hi", "chosen": "\n", "rejected": "7"}, "empty chosen response"),
        ({"prompt": "Hi", "chosen": "red", "rejected": ""}, "empty rejected response"),
        ({"prompt": "Hi", "chosen": "red", "rejected": "red"}, "chosen and rejected are the same"),
        (
            {"prompt": "Hi", "chosen": "red or blue", "rejected": "red or green"},
            "chosen and rejected are the same within 7 tokens",
        ),
    ],
)
def test_pairs_without_a_difference_are_skipped_with_the_reason(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], reason: str
) -> None:
    assert PairEncoder(tokenizer, 64, 7).encode(row, "here") == Skipped(reason)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Hi", "chosen": "red"}, "a row needs 'prompt', 'chosen' and 'rejected'"),
        ({"chosen": "red", "rejected": "7"}, "a row needs 'prompt', 'chosen' and 'rejected'"),
        ({"prompt": "Hi", "response": "red"}, "this one has prompt, response"),
        (
            {"prompt": 3, "chosen": "red", "rejected": "7"},
            "'prompt' must be text or a list of messages, but is 3",
        ),
        (
            {"prompt": "Hi", "chosen": [{"role": "assistant"}], "rejected": "7"},
            "message 1 of 'chosen' needs a text",
        ),
        ({"prompt": "Hi", "chosen": "red", "rejected": []}, "'rejected' must be a non-empty list"),
        (
            {"prompt": [*PROMPT, assistant("red")], "chosen": "red", "rejected": "7"},
            "are fields swapped?",
        ),
        (
            {"prompt": PROMPT, "chosen": [user("Hi")], "rejected": "7"},
            "begins with role 'user'; are fields swapped?",
        ),
        (
            {"prompt": PROMPT, "chosen": PROMPT, "rejected": "7"},
            "'chosen' must be the assistant's answer",
        ),
        ({"chosen": [assistant("a")], "rejected": [assistant("b")]}, "the prompt is empty"),
    ],
)
def test_a_malformed_pair_is_named(
    tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as error:
        PairEncoder(tokenizer, 64, 64).encode(row, "pairs.jsonl:3")
    assert str(error.value).startswith("pairs.jsonl:3: ")
    assert message in str(error.value)


def test_data_whose_pairs_are_all_alike_is_refused(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(3 * (json.dumps({"prompt": "Hi", "chosen": "red", "rejected": "red"}) + "\n"))
    with pytest.raises(
        UserError, match=r"no usable row \(3 skipped: chosen and rejected are the same"
    ):
        tokenise([Source(path=str(file))], PairEncoder(tokenizer, 64, 64), tmp_path / "cache")


def config_of(values: dict[str, Any], **sections: dict[str, Any]) -> PreferenceRunConfig:
    merged = {
        **values,
        **{key: {**values.get(key, {}), **content} for key, content in sections.items()},
    }
    return validate(PreferenceRunConfig, merged, "of the test")


def test_pairs_in_a_supervised_run_are_pointed_to_the_recipe(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    with pytest.raises(UserError, match=r"pairs are for recipes/preference.py"):
        Encoder(tokenizer, 64).encode({"prompt": "Hi", "chosen": "red", "rejected": "7"}, "here")


def test_held_out_rows_are_chosen_responses_or_supervised_rows(
    pair_values: dict[str, Any], tiny_data: dict[str, str], tokenizer: PreTrainedTokenizerBase
) -> None:
    splits = load_splits(config_of(pair_values), tokenizer)
    assert len(splits.train[0]) == len(splits.eval[0] if splits.eval else []) == 2
    assert splits.validation is not None
    rows = [
        json.loads(line)
        for line in Path(pair_values["data"]["validation"]).read_text().splitlines()
    ]
    for index, row in enumerate(rows):
        ((ids, mask),) = splits.validation[index]
        assert tokenizer.decode(ids[mask]) == row["chosen"] + "<|im_end|>"
    supervised = load_splits(
        config_of(pair_values, data={"validation": tiny_data["validation"]}), tokenizer
    )
    assert supervised.validation is not None
    assert len(supervised.validation[0]) == 1


@pytest.mark.parametrize("sampling", ["rollout", "teacher_forced"])
def test_the_fishers_prompts_are_those_of_the_held_out_pairs(
    pair_values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sampling: str
) -> None:
    config = config_of(pair_values, fisher={"sampling": sampling})
    prompts = load_prompts(config, tokenizer, load_splits(config, tokenizer).train)
    assert len(prompts.rows) == 4
    ((ids, mask),) = prompts.dataset[0]
    assert tokenizer.decode(ids).count("validation 0?") == 1
    assert mask.any() == (sampling == "teacher_forced")


@pytest.mark.parametrize("part", ["validation", "eval"])
def test_an_answer_that_is_trained_on_is_not_held_out(
    pair_values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, part: str
) -> None:
    """Also where only one answer of a pair is shared."""
    first = json.loads(Path(pair_values["data"]["train"]).read_text().splitlines()[3])
    leaked = tmp_path / "leaked.jsonl"
    rows = Path(pair_values["data"][part]).read_text()
    leaked.write_text(rows + json.dumps({**first, "rejected": "something else"}) + "\n")
    with pytest.raises(
        UserError, match=rf"data.{part} must be held out, but .*leaked.jsonl:\d+ is also in .*:4"
    ):
        load_splits(config_of(pair_values, data={part: str(leaked)}), tokenizer)


class Numbers:
    """A made-up reference: row r has losses 100 r, 100 r + 1, ..."""

    def __init__(self, dataset: TokenDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, row: int) -> Any:
        count = sum(int(mask[1:].sum()) for _, mask in self._dataset[row])
        return np.arange(100 * row, 100 * row + count, dtype=np.float32)


@pytest.mark.parametrize("row_tokens", [None, 150, 10_000])
def test_a_pair_stays_together_and_every_token_has_its_reference(
    pair_data: dict[str, str],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    row_tokens: int | None,
) -> None:
    dataset = tokenise(
        [Source(path=pair_data["train"])], PairEncoder(tokenizer, 200, 200), tmp_path / "cache"
    )
    rows = Order(dataset.sizes, None, (0, 0)).step(0, 12)
    layout = Layout(
        3, tokenizer.pad_token_id, row_tokens, by_row={"reference_nll": Numbers(dataset)}
    )
    seen = []
    for rank in range(3):
        for batch in micro_batches(dataset, rows, layout, rank, 3):
            numbers = batch["rows"].tolist()
            assert numbers[::2] == numbers[1::2]
            seen += numbers[::2]
            for pair, row in enumerate(numbers[::2]):
                found = []
                for side, (ids, mask) in enumerate(dataset[row]):
                    inside = batch["document_ids"] == 2 * pair + side
                    assert batch["input_ids"][inside].tolist() == ids.tolist()
                    response = np.append(mask[1:], False)
                    assert not batch["reference_nll"][inside][~response].any()
                    found += batch["reference_nll"][inside][response].tolist()
                assert found == list(range(100 * row, 100 * row + len(found)))
    assert sorted(seen) == sorted(rows.tolist())


def test_transcripts_become_messages(tmp_path: Path) -> None:
    transcript = "Human: Hi\n\nAssistant: Yes?\n\nHuman: A colour.\n\nOr two.\n\nAssistant:"
    expected = [user("Hi"), assistant("Yes?"), user("A colour.\n\nOr two.")]
    assert messages_of(transcript, "here") == messages_of("\n\n" + transcript, "here") == expected
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"prompt": transcript, "chosen": "red", "rejected": "7"}) + "\n"
    )
    assert convert(tmp_path / "in.jsonl") == [
        {"prompt": expected, "chosen": "red", "rejected": "7"}
    ]
    for wrong, message in (
        ("A colour.", "must begin with"),
        ("Human: Hi", "must end with 'Assistant:'"),
    ):
        with pytest.raises(UserError, match=message):
            messages_of(wrong, "here")


def test_conversations_that_begin_alike_are_held_out_together() -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": [user(start), user(str(number))]} for number, start in enumerate("abacbad")
    ]
    train, held_out = hold_out(rows, 4)
    starts = [{row["prompt"][0]["content"] for row in part} for part in (train, held_out)]
    assert starts == [{"c", "d"}, {"a", "b"}]
    assert len(train) + len(held_out) == len(rows)


def test_examples_of_both_kinds_have_caches_of_their_own(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    encoders = [PairEncoder(tokenizer, *lengths) for lengths in ((64, 64), (32, 96))]
    identities = {each.identity for each in encoders}
    identities |= {ChosenEncoder(each, Encoder(tokenizer, 64)).identity for each in encoders}
    assert len(identities) == 4
