"""Reading, tokenising, masking, caching, ordering and collating, and what is said about bad
data."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alphatoken.batch import RowIndex
from alphatoken.config.file import validate
from alphatoken.config.run import RunConfig
from alphatoken.config.sections import ModelConfig, Source
from alphatoken.data.batches import Layout, Order, micro_batches
from alphatoken.data.cache import TokenDataset, tokenise
from alphatoken.data.chat import Encoded, Encoder, PromptEncoder, Skipped
from alphatoken.data.rows import Chat
from alphatoken.data.sources import OpenSource
from alphatoken.data.splits import Prompts, load_prompts, load_splits
from alphatoken.data.tokenizer import load_tokenizer
from alphatoken.errors import UserError

TEMPLATES = Path(__file__).parent.parent / "configs" / "chat_templates"

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]
MARKED_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"  # noqa: E501
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' "
    "}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


@pytest.fixture
def marked(tiny_model: Path) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = MARKED_TEMPLATE
    return tokenizer


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.jinja")), ids=lambda file: file.stem)
def test_shipped_chat_templates_mark_what_the_assistant_says(tiny_model: Path, file: Path) -> None:
    config = ModelConfig.model_validate(
        {"name_or_path": str(tiny_model), "chat_template": str(file)}
    )
    tokenizer = load_tokenizer(config)
    encoded = only(Encoder(tokenizer, 1000).encode({"messages": CHAT}, "here"))
    assert spoken(tokenizer, encoded) == ["Hello.<|im_end|>", "So long.<|im_end|>"]
    start = Encoder(tokenizer, 1000).encode_prompt(Chat(CHAT[:-1]), "here").documents[0].input_ids
    assert encoded.documents[0].input_ids[: len(start)] == start
    missing = config.model_copy(update={"chat_template": file.with_name("missing.jinja")})
    with pytest.raises(
        UserError, match=r"cannot read model.chat_template=.*missing.jinja: No such file"
    ):
        load_tokenizer(missing)


def test_a_chat_template_of_nothing_is_not_taken_for_none(tiny_model: Path, tmp_path: Path) -> None:
    """Rows would be joined as plain text, without a word."""
    template, folder = tmp_path / "mine.jinja", tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    config = ModelConfig(name_or_path=str(folder), chat_template=template)
    for text in ("", " \n"):
        template.write_text(text)
        with pytest.raises(UserError, match=rf"model.chat_template={template} is empty"):
            load_tokenizer(config)
        (folder / "chat_template.jinja").write_text(text)
        with pytest.raises(
            UserError, match=rf"{folder}: its chat template, {folder}/chat_template.jinja, is empty"
        ):
            load_tokenizer(ModelConfig(name_or_path=str(folder)))
    template.write_text(MARKED_TEMPLATE)
    assert load_tokenizer(config).chat_template == MARKED_TEMPLATE
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(MARKED_TEMPLATE)
    with pytest.raises(UserError, match=rf"{folder}/chat_template.jinja, is empty"):
        load_tokenizer(ModelConfig(name_or_path=str(folder)))
    chosen = ModelConfig(name_or_path=str(folder), chat_template=Path("tools"))
    assert load_tokenizer(chosen).chat_template == MARKED_TEMPLATE


def test_a_chat_template_in_another_encoding_is_named(tiny_model: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_bytes("{{ 'Käse' }}".encode("latin-1"))
    with pytest.raises(UserError, match=rf"model.chat_template={template} is not text in UTF-8"):
        load_tokenizer(ModelConfig(name_or_path=str(tiny_model), chat_template=template))


def write_rows(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def only(found: list[Encoded] | Skipped) -> Encoded:
    """The one row that a raw row became."""
    assert isinstance(found, list), found
    (encoded,) = found
    return encoded


def spoken(tokenizer: PreTrainedTokenizerBase, encoded: Encoded) -> list[str]:
    """The runs of response tokens, decoded."""
    runs: list[list[int]] = []
    before = False
    (document,) = encoded.documents
    for token, marked in zip(document.input_ids, document.response_mask, strict=True):
        if marked and not before:
            runs.append([])
        if marked:
            runs[-1].append(token)
        before = marked
    return [tokenizer.decode(run) for run in runs]


# The response mask.


def test_the_mask_is_the_assistants_turns_with_and_without_generation_marks(
    tokenizer: PreTrainedTokenizerBase, marked: PreTrainedTokenizerBase
) -> None:
    plain_row = only(Encoder(tokenizer, 512).encode({"messages": CHAT}, "here"))
    marked_row = only(Encoder(marked, 512).encode({"messages": CHAT}, "here"))
    assert spoken(tokenizer, plain_row) == ["Hello.<|im_end|>", "So long.<|im_end|>"]
    assert plain_row == marked_row


def test_prompt_and_response_are_a_conversation(tokenizer: PreTrainedTokenizerBase) -> None:
    encoder = Encoder(tokenizer, 512)
    row = only(encoder.encode({"prompt": "Hi", "response": "Hello."}, "here"))
    assert row == only(encoder.encode({"messages": [CHAT[1], CHAT[2]]}, "here"))
    assert spoken(tokenizer, row) == ["Hello.<|im_end|>"]


def test_without_a_template_the_response_ends_with_eos(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = None
    row = only(Encoder(tokenizer, 512).encode({"prompt": "1+1=", "response": "2"}, "here"))
    assert spoken(tokenizer, row) == ["2<|im_end|>"]
    with pytest.raises(UserError, match=r"here: conversations need a chat template"):
        Encoder(tokenizer, 512).encode({"messages": CHAT}, "here")


def test_eos_keeps_its_label_though_it_is_also_the_padding(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = [
        {"prompt": "Hi", "response": "Hello."},
        {"prompt": "Hi", "response": "A longer answer, so there is padding."},
    ]
    dataset = read(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path)
    (batch,) = micro_batches(
        dataset, np.arange(2), Layout(2, tokenizer.pad_token_id), rank=0, world_size=1
    )
    for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
        trained = labels[labels != -100]
        assert trained[-1] == tokenizer.eos_token_id, "the model would not learn to stop"
        assert (ids[labels != -100] == trained).all()
        assert (labels == tokenizer.eos_token_id).sum() == 1, "padding must have no label"


@pytest.mark.parametrize(
    ("template", "row", "found"),
    [
        (
            "{% for message in messages %}{{ message['content'] }}{% endfor %}",
            {"prompt": "", "response": "x"},
            "every",
        ),
        (
            "{% for m in messages %}{{ m['content'] }}{% generation %}{% endgeneration %}{% endfor %}",  # noqa: E501
            None,
            "no",
        ),
    ],
)
def test_a_mask_of_all_ones_or_all_zeros_is_an_error(
    marked: PreTrainedTokenizerBase, template: str, row: dict[str, str] | None, found: str
) -> None:
    marked.chat_template = template
    with pytest.raises(UserError, match=f"rows.jsonl:7: the response mask marks {found} token"):
        Encoder(marked, 512).encode(row or {"messages": CHAT}, "rows.jsonl:7")


# Truncation, skips and schema.


def test_truncation_and_skips_are_counted(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [
        {"prompt": "Hi", "response": "Hello."},
        {"prompt": "Hi", "response": "  "},
        {"prompt": "Hi", "response": "word " * 50},
        {"prompt": "word " * 50, "response": "Hello."},
    ]
    dataset = read(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path, max_length=64)
    (report,) = dataset.reports
    assert (report.rows, report.cut) == (2, {"rows truncated": 1})
    assert report.skipped == {"empty response": 1, "response cut away by truncation": 1}
    assert dataset.lengths.tolist() == [len(dataset[0][0][0]), 64]
    assert "1 skipped: empty response" in str(report)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "Hi", "response": ', "not valid JSON"),
        ('["Hi"]', "must be a JSON object, not a list"),
        (
            '{"ask": "Hi", "answer": "x"}',
            "needs either 'prompt' and 'response', or 'messages'; this one has answer, ask",
        ),
        ('{"prompt": "Hi", "response": 3}', "'response' must be text, but is 3"),
        (
            '{"prompt": "Hi", "response": "x", "response": "y"}',
            "the key 'response' is there twice in an object",
        ),
        (
            '{"messages": [{"role": "user", "content": "Hi", "content": "Bye"}]}',
            "the key 'content' is there twice in an object",
        ),
        ('{"messages": []}', "'messages' must be a non-empty list"),
        ('{"messages": [{"role": "user", "content": "Hi"}]}', "no message with role 'assistant'"),
        ('{"messages": [{"role": "user"}]}', "message 1 of 'messages' needs a text 'content'"),
        ('{"messages": ["Hi"]}', "message 1 of 'messages' needs a text 'role'"),
        pytest.param(
            f'{{"prompt": "Hi", "response": "x", "id": 1{"0" * 5000}}}',
            "the row cannot be used (Exceeds the limit (4300 digits)",
            id="many digits",
        ),
        pytest.param(
            f'{{"prompt": "Hi", "response": "x", "id": {"[" * 100000}{"]" * 100000}}}',
            "the row cannot be used (it is nested too deeply): correct what is odd in it",
            id="deep",
        ),
        pytest.param(
            json.dumps(
                {
                    "instruction": "Hi",
                    "completions": [
                        {"response": "x", "overall_score": 10**400},
                        {"response": "y", "overall_score": 1},
                    ],
                }
            ),
            "the row cannot be used (int too large to convert to float)",
            id="large score",
        ),
        pytest.param(
            json.dumps({"messages": CHAT, "tools": [{"function": "x"}]}),
            "'tools' must be a list of schemas, but is [{'function': 'x'}]",
            id="tools",
        ),
    ],
)
def test_a_malformed_row_is_named_by_file_and_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, line: str, message: str
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"prompt": "Hi", "response": "Hello."}\n\n' + line + "\n")
    with pytest.raises(UserError, match=r"rows\.jsonl:3: ") as failure:
        read(str(file), tokenizer, tmp_path)
    assert message in str(failure.value)


def test_a_row_that_fails_in_a_way_nobody_has_thought_of_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Encoder, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        return fields["nothing"]  # type: ignore[no-any-return]

    monkeypatch.setattr(Encoder, "encode", fails)
    path = write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi", "response": "Hello."}])
    with pytest.raises(UserError, match=rf"^{path}:1: the row .*\(KeyError: 'nothing'\): correct"):
        read(path, tokenizer, tmp_path)


def test_a_template_that_divides_by_zero_is_named(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.chat_template = "{{ 1 / (messages | length - 2) }}"
    message = r"^here: the chat template refuses .* ZeroDivisionError: division by zero"
    with pytest.raises(UserError, match=message):
        Encoder(tokenizer, 512).encode({"prompt": "Hi", "response": "Hello."}, "here")


def test_a_text_of_a_table_that_is_not_utf8_is_named(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Also in a column that is not read."""
    texts = pa.array([b"a", b"b", b"caf\xe9"]).view(pa.string())
    table = pa.table({"prompt": ["Hi"] * 3, "response": ["Hello."] * 3, "note": texts})
    file = tmp_path / "rows.parquet"
    pq.write_table(table, file)
    message = rf"^{file} row 3: the row .*column 'note' has text that is not UTF-8: .* byte 0xe9"
    with pytest.raises(UserError, match=message):
        read(str(file), tokenizer, tmp_path)
    rows = tokenise([Source(path=str(file), first=2)], Encoder(tokenizer, 512), tmp_path / "cache")
    assert len(rows) == 2


@pytest.mark.parametrize("ending", ["jsonl", "jsonl.gz"])
def test_a_byte_that_is_not_utf8_is_named_by_its_line(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, ending: str
) -> None:
    """Far enough behind the start that the decoder has not read it at once."""
    lines = [json.dumps({"prompt": f"{number}?", "response": "é"}) for number in range(2000)]
    content = [line.encode() for line in lines]
    content[1234] = '{"prompt": "Über", "response": "caf'.encode() + b'\xe9"}'
    text = b"\n".join(content)
    file = tmp_path / f"rows.{ending}"
    file.write_bytes(gzip.compress(text) if ending.endswith("gz") else text)
    message = rf"{file}:1235: the byte 0xe9 at 37, behind .*caf', is not UTF-8: convert"
    with pytest.raises(UserError, match=message):
        read(str(file), tokenizer, tmp_path)
    rows = tokenise([Source(path=str(file), first=9)], Encoder(tokenizer, 512), tmp_path / "cache")
    assert len(rows) == 9


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.jsonl", "data file .*missing.jsonl does not exist"),
        ("${NO_SUCH_VARIABLE}/rows.jsonl", "environment variable NO_SUCH_VARIABLE is not set"),
        ("no/such/name", "neither a file .* nor a dataset"),
    ],
)
def test_missing_data_is_named(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    message: str,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
        read(path, tokenizer, tmp_path)


def test_a_source_without_usable_rows_is_an_error(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(
        UserError, match=r"rows.jsonl has no usable row \(1 skipped: empty response\)"
    ):
        read(
            write_rows(tmp_path / "rows.jsonl", [{"prompt": "Hi", "response": ""}]),
            tokenizer,
            tmp_path,
        )


# Sources and cache.


@pytest.mark.parametrize(
    "name", ["rows.json", "rows.ndjson", "marked.jsonl", "rows.csv", "rows.tsv", "part-*.jsonl"]
)
def test_other_files_are_read_as_well(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    rows = [{"prompt": f"{number}?", "response": "yes, " * number} for number in range(1, 6)]
    plain = write_rows(tmp_path / "plain.jsonl", rows)
    text = Path(plain).read_text()
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    (tmp_path / "rows.ndjson").write_text(text)
    (tmp_path / "marked.jsonl").write_text(text, encoding="utf-8-sig")  # as some editors write
    for separator, file in ((",", "rows.csv"), ("\t", "rows.tsv")):
        with (tmp_path / file).open("w", newline="") as lines:
            writer = csv.DictWriter(lines, ["prompt", "response"], delimiter=separator)
            writer.writeheader()
            writer.writerows(rows)
    for number, part in enumerate((rows[:2], rows[2:])):
        write_rows(tmp_path / f"part-{number}.jsonl", part)
    expected, found = (read(path, tokenizer, tmp_path) for path in (plain, str(tmp_path / name)))
    for row in range(5):
        assert np.array_equal(expected[row][0][0], found[row][0][0])
    is_lines = name.endswith((".ndjson", ".jsonl")) and "*" not in name
    assert found.location(2) == f"{tmp_path / name}" + (":3" if is_lines else " row 3")


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("rows.csv", "prompt,response\nq1,a1,x1\nq2,a2,x2\n", "2 fields .*first row has 3"),
        ("rows.csv", "prompt,response,id\nq1,a1,7,\nq2,a2,8,\n", "3 fields .*first row has 4"),
        ("rows.tsv", "prompt\tresponse\nq1\ta1\tx1\ty1\n", "2 fields .*first row has 4"),
        ("part-*.csv", "prompt,response\nq1,a1,x1\n", "2 fields .*first row has 3"),
    ],
)
def test_rows_of_more_fields_than_the_header_are_refused(
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    text: str,
    found: str,
) -> None:
    """Columns would be read as those before them."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    file = tmp_path / name.replace("*", "1")
    file.write_text(text)
    with pytest.raises(UserError, match=rf"^{file}: the header has {found}: name every column"):
        read(str(tmp_path / name), tokenizer, tmp_path)


@pytest.mark.parametrize(("name", "separator"), [("rows.csv", ","), ("rows.tsv", "\t")])
def test_words_of_a_table_in_text_are_not_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, separator: str
) -> None:
    """None and null are answers; what is empty is missing."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    words = ["None", "NA", "null", "nan", "N/A", ""]
    rows = [["prompt", "response"], *([f"{word}?", word] for word in words)]
    file = tmp_path / name
    file.write_text("".join(separator.join(row) + "\n" for row in rows))
    found = [row.fields for row in OpenSource(Source(path=str(file))).raw()]
    expected = [{"prompt": f"{word}?", "response": word} for word in words[:-1]]
    assert found == [*expected, {"prompt": "?"}]


def test_a_header_may_name_a_column_as_pandas_does(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    file = tmp_path / "rows.csv"
    file.write_text("prompt,response,__index_level_0__\nq1,a1,7\n")
    (report,) = read(str(file), tokenizer, tmp_path).reports
    assert report.unread == ["__index_level_0__"]


def test_every_source_format_gives_the_same_rows(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    import datasets

    rows = [{"prompt": f"{number}?", "response": "yes " * number} for number in range(1, 6)]
    plain = write_rows(tmp_path / "rows.jsonl", rows)
    (tmp_path / "zipped.jsonl.gz").write_bytes(gzip.compress(Path(plain).read_bytes()))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / "saved"))
    expected = read(plain, tokenizer, tmp_path)
    for name in ("zipped.jsonl.gz", "rows.parquet", "saved"):
        dataset = read(str(tmp_path / name), tokenizer, tmp_path)
        assert np.array_equal(dataset.digests(), expected.digests()), name
    assert expected.location(2) == f"{plain}:3"
    assert (
        read(str(tmp_path / "rows.parquet"), tokenizer, tmp_path)
        .location(2)
        .endswith("rows.parquet row 3")
    )


def test_a_slice_of_a_source(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    rows = [{"prompt": f"{number}?", "response": "yes"} for number in range(10)]
    source = Source(path=write_rows(tmp_path / "rows.jsonl", rows), skip=3, first=4)
    dataset = tokenise([source], Encoder(tokenizer, 512), tmp_path / "cache")
    assert [dataset.location(index).rsplit(":")[-1] for index in range(len(dataset))] == [
        "4",
        "5",
        "6",
        "7",
    ]


def test_a_source_with_other_field_names(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = [{"prompt": f"{number}?", "response": "yes"} for number in range(3)]
    other = [
        {"problem": row["prompt"], "solution": row["response"], "prompt": "not this"}
        for row in rows
    ]
    path, columns = (
        write_rows(tmp_path / "other.jsonl", other),
        {"prompt": "problem", "response": "solution"},
    )
    encoder, cache = Encoder(tokenizer, 512), tmp_path / "cache"
    found = tokenise([Source(path=path, columns=columns)], encoder, cache)
    expected = read(write_rows(tmp_path / "rows.jsonl", rows), tokenizer, tmp_path)
    assert np.array_equal(found.digests(), expected.digests())
    message = r"other.jsonl:1: no field 'answer', which data columns=.* name; it has problem, solution, prompt"  # noqa: E501
    with pytest.raises(UserError, match=message):
        tokenise([Source(path=path, columns={"response": "answer"})], encoder, cache)


def test_a_writer_of_the_cache_leaves_the_files_of_another_alone(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Where the disk has no locks two may write the same rows at once."""
    file, cache = tmp_path / "rows.jsonl", tmp_path / "cache"
    file.write_text(json.dumps({"prompt": "Hi", "response": "there"}) + "\n")
    tokenise([Source(path=str(file))], Encoder(tokenizer, 64), cache)
    (made,) = cache.glob("*.arrow")
    content = made.read_bytes()
    made.unlink()
    others = made.with_suffix(".partial")
    others.write_text("half of a row")
    tokenise([Source(path=str(file))], Encoder(tokenizer, 64), cache)
    assert made.read_bytes() == content
    assert others.read_text() == "half of a row"
    assert list(cache.glob("*.partial")) == [others]


def test_the_cache_is_used_again_and_only_for_the_same_content(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "rows.jsonl"
    write_rows(file, [{"prompt": "Hi", "response": "Hello."}])
    read(str(file), tokenizer, tmp_path)
    encode = Encoder.encode
    calls: list[str] = []

    def counted(self: Encoder, fields: dict[str, Any], where: str) -> list[Encoded] | Skipped:
        calls.append(where)
        return encode(self, fields, where)

    monkeypatch.setattr(Encoder, "encode", counted)
    read(str(file), tokenizer, tmp_path)
    assert calls == []
    read(str(file), tokenizer, tmp_path, max_length=100)
    write_rows(file, [{"prompt": "Hi", "response": "Hello!"}])
    read(str(file), tokenizer, tmp_path)
    assert len(calls) == 2


def test_rows_of_the_cache_are_called_by_the_place_that_was_asked_for(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """Also where the same rows were tokenised from another place before."""
    for folder in ("before", "now"):
        file = tmp_path / folder / "rows.jsonl"
        file.parent.mkdir()
        write_rows(file, [{"prompt": "Hi", "response": "Hello."}])
        (report,) = read(str(file), tokenizer, tmp_path).reports
        assert report.path == str(file)
    assert len(list((tmp_path / "cache").glob("*.arrow"))) == 1


# Prompts.


@pytest.mark.parametrize("template", [True, False])
def test_a_prompt_is_what_precedes_the_response(tiny_model: Path, template: bool) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    if not template:
        tokenizer.chat_template = None
    row = {"prompt": "What is red?", "response": "A colour."}
    (whole,) = only(Encoder(tokenizer, 200).encode(row, "here")).documents
    for fields in (row, {"prompt": row["prompt"], "chosen": "x", "rejected": "y"}):
        (prompt,) = only(PromptEncoder(tokenizer, 200).encode(fields, "here")).documents
        assert prompt.input_ids == whole.input_ids[: whole.response_mask.index(True)]
        assert not any(prompt.response_mask)


def test_a_conversation_is_asked_without_its_final_answer(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    asked = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "Bye"},
    ]
    encoder = PromptEncoder(tokenizer, 200)
    answered = encoder.encode(
        {"messages": [*asked, {"role": "assistant", "content": "Farewell"}]}, "here"
    )
    assert answered == encoder.encode({"messages": asked}, "here")
    (document,) = only(answered).documents
    assert "Bye" in tokenizer.decode(document.input_ids)
    assert "Farewell" not in tokenizer.decode(document.input_ids)
    assert PromptEncoder(tokenizer, 9).encode({"prompt": "long " * 9}, "here") == Skipped(
        "prompt over 9 tokens"
    )
    assert encoder.encode({"prompt": " "}, "here") == Skipped("empty prompt")
    with pytest.raises(UserError, match="here: a row needs a 'prompt', or 'messages'"):
        encoder.encode({"question": "?"}, "here")


@pytest.mark.parametrize("sampling", ["rollout", "teacher_forced"])
def test_prompts_of_the_fisher_are_not_trained_on(
    run_values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, sampling: str, tmp_path: Path
) -> None:
    rows = [json.loads(line) for line in Path(run_values["data"]["train"]).read_text().splitlines()]
    own = [{"prompt": f"own {index}", "response": "x"} for index in range(5)]
    trained = [{**row, "response": "another"} for row in rows[:3]]

    def prompts(rows: list[dict[str, str]], **fisher: Any) -> Prompts:
        file = tmp_path / "prompts.jsonl"
        write_rows(file, rows)
        values = {**run_values, "fisher": {"prompts": str(file), "sampling": sampling, **fisher}}
        config = validate(RunConfig, values, "of the test")
        return load_prompts(config, tokenizer, load_splits(config, tokenizer).train)

    found = prompts([*own, *trained])
    assert (sorted(found.rows), found.trained_on) == (list(range(5)), 3)
    assert "(3 left out: trained on)" in str(found)
    assert len(prompts([*own, *trained], num_prompts=2).rows) == 2
    assert list(found.rows) != list(prompts([*own, *trained], seed=1).rows)
    with pytest.raises(UserError, match="prompts that are not trained on"):
        prompts(trained)


@pytest.mark.parametrize("template", [True, False])
def test_a_prompt_is_recognised_where_it_was_trained_on(
    run_values: dict[str, Any], tiny_model: Path, tmp_path: Path, template: bool
) -> None:
    """In an earlier turn of a conversation too, and without a template."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    turns = [
        {"role": role, "content": f"{role} {turn}"}
        for turn in range(2)
        for role in ("user", "assistant")
    ]
    train: list[dict[str, Any]] = [{"messages": turns}, {"prompt": "single", "response": "x"}]
    asked: list[dict[str, Any]] = [
        {"prompt": "user 0"},
        {"messages": turns[:3]},
        {"prompt": "single"},
    ]
    if not template:
        tokenizer.chat_template = None
        train, asked = train[1:], asked[2:]
    asked.append({"prompt": "new"})
    for name, rows in (("train", train * 12), ("asked", asked)):
        write_rows(tmp_path / f"{name}.jsonl", rows)
    values = {
        **run_values,
        "data": {**run_values["data"], "train": str(tmp_path / "train.jsonl")},
        "fisher": {"prompts": str(tmp_path / "asked.jsonl")},
    }
    config = validate(RunConfig, values, "of the test")
    found = load_prompts(config, tokenizer, load_splits(config, tokenizer).train)
    assert (list(found.rows), found.trained_on) == ([len(asked) - 1], len(asked) - 1)


def test_a_mixture_of_prompts_has_none_twice(
    run_values: dict[str, Any], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    for name, size in (("small", 2), ("large", 20)):
        write_rows(tmp_path / f"{name}.jsonl", [{"prompt": f"{name} {row}"} for row in range(size)])
    sources = [
        {"path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in ("small", "large")
    ]
    config = validate(RunConfig, {**run_values, "fisher": {"prompts": sources}}, "of the test")
    rows = load_prompts(config, tokenizer, load_splits(config, tokenizer).train).rows.tolist()
    assert len(rows) == len(set(rows))
    assert {0, 1} < set(rows)


# Splits.


def test_the_three_parts_must_not_share_rows(
    run_values: dict[str, Any], tokenizer: PreTrainedTokenizerBase
) -> None:
    train = Path(run_values["data"]["train"]).read_text().splitlines()
    for part in ("validation", "eval"):
        values = {**run_values, "data": dict(run_values["data"])}
        file = Path(run_values["train"]["output_dir"]).with_name(f"{part}.jsonl")
        file.write_text(Path(run_values["data"][part]).read_text() + train[3] + "\n")
        values["data"][part] = str(file)
        number = len(file.read_text().splitlines())
        message = rf"data.{part} must be held out, but .*{part}.jsonl:{number} is also in data.train: .*train.jsonl:4"  # noqa: E501
        with pytest.raises(UserError, match=message):
            load_splits(validate(RunConfig, values, "of the test"), tokenizer)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        (
            "train",
            "global_batch_size",
            32,
            "data.train has 30 usable rows, fewer than train.global_batch_size=32",
        ),
        (
            "valuation",
            "validation_sequences",
            8,
            "data.validation has 7 usable rows, fewer than valuation.validation",
        ),
    ],
)
def test_too_few_rows(
    run_values: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    section: str,
    key: str,
    value: int,
    message: str,
) -> None:
    values = {**run_values, section: {**run_values[section], key: value}}
    with pytest.raises(UserError, match=message):
        load_splits(validate(RunConfig, values, "of the test"), tokenizer)


def test_a_mixture_needs_all_weights_or_none(
    tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"either all data sources .* b.jsonl has none"):
        tokenise(
            [Source(path="a.jsonl", weight=1.0), Source(path="b.jsonl")],
            Encoder(tokenizer, 64),
            tmp_path,
        )


# Order and micro-batches.


@settings(deadline=None, max_examples=50)
@given(
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    batch=st.integers(1, 9),
    seed=st.integers(0, 3),
)
def test_every_epoch_has_every_row_once(sizes: list[int], batch: int, seed: int) -> None:
    total = sum(sizes)
    order = Order(sizes, None, (seed, 0))
    rows = np.concatenate([order.step(step, batch) for step in range(-(-2 * total // batch))])
    assert sorted(rows[:total]) == list(range(total))
    assert sorted(rows[total : 2 * total]) == list(range(total))
    # A step is the same whatever was asked for before it: resuming needs no history.
    assert np.array_equal(Order(sizes, None, (seed, 0)).step(3, batch), order.step(3, batch))


def test_seeds_and_streams_give_different_orders() -> None:
    orders = {tuple(Order([50], None, key).step(0, 50)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}
    assert len(orders) == 4


@settings(deadline=None, max_examples=50)
@given(
    sources=st.lists(st.tuples(st.integers(1, 20), st.floats(0.1, 5.0)), min_size=2, max_size=4),
    seed=st.integers(0, 3),
)
def test_a_weighted_epoch_has_the_shares_asked_for(
    sources: list[tuple[int, float]], seed: int
) -> None:
    sizes, weights = [size for size, _ in sources], [weight for _, weight in sources]
    total, starts = sum(sizes), np.cumsum([0, *sizes])
    order = Order(sizes, weights, (seed, 0))
    epochs = [order.step(step, total) for step in range(4)]
    for epoch in epochs:
        counts = np.histogram(epoch, bins=[*starts[:-1], total])[0]
        assert np.abs(counts - np.array(weights) / sum(weights) * total).max() < 1
    # No row of a source comes again before all the others of that source have come.
    for source, size in enumerate(sizes):
        draws = [0] * size
        for row in np.concatenate(epochs):
            if starts[source] <= row < starts[source] + size:
                draws[row - starts[source]] += 1
        assert max(draws) - min(draws) <= 1


def test_micro_batches_do_not_depend_on_the_number_of_ranks(
    tiny_data: dict[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    dataset = read(tiny_data["train"], tokenizer, tmp_path)
    rows = Order(dataset.sizes, None, (0, 0)).step(0, 12)
    alone = micro_batches(dataset, rows, Layout(2, 0), 0, 1)
    for ranks in (2, 3):
        dealt = [micro_batches(dataset, rows, Layout(2, 0), rank, ranks) for rank in range(ranks)]
        together = [dealt[number % ranks][number // ranks] for number in range(len(alone))]
        for one, other in zip(alone, together, strict=True):
            assert one.keys() == other.keys()
            for column, twin in zip(one.values(), other.values(), strict=True):
                if isinstance(column, RowIndex):
                    assert isinstance(twin, RowIndex)
                    assert column.index_R.equal(twin.index_R)
                    assert (column.counts, column.starts) == (twin.counts, twin.starts)
                else:
                    assert torch.equal(cast(torch.Tensor, column), cast(torch.Tensor, twin))
    lengths = [batch["input_ids"].shape[1] for batch in alone]
    assert lengths == sorted(lengths, reverse=True)
    assert sum(lengths) < 6 * max(lengths), "rows of like length belong together"


def test_a_row_that_is_drawn_twice_is_in_one_half(
    tiny_data: dict[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    """The end of an epoch lies within a draw: halves that share a row would agree too well."""
    dataset = read(tiny_data["train"], tokenizer, tmp_path)
    rows = np.array([3, 5, 7, 5, 3, 2])
    batches = micro_batches(dataset, rows, Layout(2, 0, halves=True), 0, 1)
    signs: dict[int, set[float]] = {row: set() for row in rows.tolist()}
    for batch in batches:
        for number, row in enumerate(batch["rows"].tolist()):
            signs[row] |= set(batch["half_sign"][batch["document_ids"] == number].tolist())
    assert signs == {3: {1.0}, 5: {-1.0}, 7: {1.0}, 2: {-1.0}}


def test_ranks_get_equally_many_micro_batches(
    tiny_data: dict[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    dataset = read(tiny_data["eval"], tokenizer, tmp_path)
    parts = [micro_batches(dataset, np.arange(5), Layout(2, 0), rank, 2) for rank in range(2)]
    assert [len(part) for part in parts] == [2, 2]
    placeholder = parts[1][1]
    assert placeholder["rows"].numel() == 0
    assert (placeholder["labels"] == -100).all()


@pytest.mark.parametrize("row_tokens", [150, 10_000])
def test_packed_rows_hold_the_same_documents(
    tiny_data: dict[str, str], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, row_tokens: int
) -> None:
    dataset = read(tiny_data["train"], tokenizer, tmp_path)
    rows = Order(dataset.sizes, None, (0, 0)).step(0, 12)
    plain = micro_batches(dataset, rows, Layout(6, 0, noise_key=(1, 2)), 0, 1)
    packed = micro_batches(dataset, rows, Layout(6, 0, row_tokens, noise_key=(1, 2)), 0, 1)
    for one, other in zip(plain, packed, strict=True):
        assert sorted(one["rows"].tolist()) == sorted(other["rows"].tolist())
        assert other["input_ids"].shape[1] <= row_tokens
        assert other["input_ids"].shape[0] < 6
        for number, row in enumerate(other["rows"].tolist()):
            inside, alone = other["document_ids"] == number, one["rows"].tolist().index(row)
            length = int(inside.sum())
            assert other["position_ids"][inside].tolist() == list(range(length))
            for key in ("input_ids", "labels", "noise"):
                assert other[key][inside].equal(one[key][alone, :length]), key


def read(
    path: str, tokenizer: PreTrainedTokenizerBase, tmp_path: Path, max_length: int = 512
) -> TokenDataset:
    return tokenise([Source(path=path)], Encoder(tokenizer, max_length), tmp_path / "cache")
