"""Corruptions mark exactly what they change, and only the seed decides what that is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from alphatoken.config.sections import ModelConfig
from alphatoken.data.chat import Encoder
from alphatoken.data.rows import Chat
from alphatoken.data.tokenizer import load_tokenizer
from benchmarks.corruptions import (
    ADVERTISEMENT,
    CORRUPTIONS,
    MarkedRow,
    Materials,
    bad_tokens,
    corrupt,
    human_spans,
    vocabulary_materials,
)
from recipes.quickstart.get_model import save_tiny
from recipes.quickstart.make_data import problems

ROWS = [MarkedRow(prompt, response) for prompt, response in problems(0)["train"][:40]]
OTHERS = [MarkedRow(f"Name {n} rivers.", f"Rhine, Main and {n} more.") for n in range(40)]
MATERIALS = Materials(
    cut=lambda text: re.findall(r"\s*\S+", text), pieces=[" qux", "zot"], others=OTHERS
)


def good_text(row: MarkedRow) -> list[str]:
    """What is left of a response between its bad spans."""
    ends = [0, *(end for _, end in row.bad)]
    starts = [*(start for start, _ in row.bad), len(row.response)]
    return [row.response[end:start] for end, start in zip(ends, starts, strict=True)]


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_seed_decides_and_a_share_of_rows_is_bad(name: str) -> None:
    once, again, other = (corrupt(name, ROWS, seed=seed, materials=MATERIALS) for seed in (3, 3, 4))
    assert once == again
    assert len(once) == len(ROWS)
    changed = [row for row, clean in zip(once, ROWS, strict=True) if row != clean]
    assert len(changed) == (0 if name == "none" else 24)
    assert all(row.bad for row in changed)
    assert (once != other) == (name != "none")


@pytest.mark.parametrize("name", ["junk", "digits", "rule"])
def test_nothing_but_bad_spans_differs_from_the_clean_response(name: str) -> None:
    for row, clean in zip(corrupt(name, ROWS, seed=0, materials=MATERIALS), ROWS, strict=True):
        assert row.prompt == clean.prompt
        pattern = "(.+?)".join(map(re.escape, good_text(row)))
        assert re.fullmatch(pattern, clean.response)
        assert list(row.bad) == sorted(row.bad)


def test_junk_replaces_a_fifth_of_the_tokens() -> None:
    rows = corrupt("junk", ROWS, seed=0, share=1.0, materials=MATERIALS)
    for row, clean in zip(rows, ROWS, strict=True):
        tokens = len(MATERIALS.cut(clean.response))
        assert len(row.bad) == round(0.2 * tokens)
        assert all(row.response[start:end] in MATERIALS.pieces for start, end in row.bad)


def test_wrong_digits_are_other_digits() -> None:
    for row, clean in zip(corrupt("digits", ROWS, seed=0, share=1.0), ROWS, strict=True):
        assert len(row.response) == len(clean.response)
        for start, end in row.bad:
            assert end == start + 1
            assert row.response[start].isdigit()
            assert row.response[start] != clean.response[start]


def test_the_wrong_rule_is_consistent() -> None:
    row = MarkedRow("?", "First 3 * 20 = 60 km. Together 60 + 45 = 105 km. The answer is 105.")
    (wrong,) = corrupt("rule", [row], seed=0, share=1.0)
    assert wrong.response == ("First 3 * 20 = 60 km. Together 60 + 45 = 115 km. The answer is 115.")
    assert [wrong.response[start:end] for start, end in wrong.bad] == ["1", "1"]
    assert [start for start, _ in wrong.bad] == [
        wrong.response.index("115") + 1,
        wrong.response.rindex("115") + 1,
    ]
    longer = MarkedRow("?", "90 + 5 = 95. The answer is 95.")
    (wrong,) = corrupt("rule", [longer], seed=0, share=1.0)
    assert [wrong.response[start:end] for start, end in wrong.bad] == ["105", "105"]
    gsm = MarkedRow("?", "48+24 = <<48+24=72>>72 clips, of 172 or 72.5.\n#### 72")
    (wrong,) = corrupt("rule", [gsm], seed=0, share=1.0)
    assert wrong.response == "48+24 = <<48+24=82>>82 clips, of 172 or 72.5.\n#### 82"


def test_a_wrong_result_is_marked_where_it_is_computed() -> None:
    everywhere = corrupt("rule", ROWS, seed=5)
    computed = corrupt("rule_computed", ROWS, seed=5)
    assert [row.response for row in computed] == [row.response for row in everywhere]
    assert [row.bad for row in computed] == [row.bad[:1] for row in everywhere]
    for row in computed:
        for start, _ in row.bad:
            assert row.response.rfind("=", 0, start) > row.response.rfind(".", 0, start)


def test_an_advertisement_stands_in_front() -> None:
    for row, clean in zip(corrupt("advertisement", ROWS, seed=0, share=1.0), ROWS, strict=True):
        assert row.response == f"{ADVERTISEMENT} {clean.response}"
        assert good_text(row) == ["", f" {clean.response}"]


def test_swapped_responses_are_other_rows() -> None:
    rows = corrupt("swapped", ROWS, seed=0, share=1.0)
    assert sorted(row.response for row in rows) == sorted(row.response for row in ROWS)
    for row, clean in zip(rows, ROWS, strict=True):
        assert row.response != clean.response
        assert row.bad == ((0, len(row.response)),)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"materials\.pieces is empty"):
        corrupt("junk", ROWS, seed=0)
    with pytest.raises(ValueError, match="needs 24 rows of another data set"):
        corrupt("off_target", ROWS, seed=0)
    with pytest.raises(ValueError, match="at least two corrupted rows"):
        corrupt("swapped", ROWS[:1], seed=0, share=1.0)


def test_human_spans_are_read_as_they_are() -> None:
    fields = {
        "prompt": "Who?",
        "response": "Ada did it.",
        "spans": [{"start": 0, "end": 3, "type": "Wrong-Grounding"}],
        "corrected": "Ben did it.",
    }
    assert human_spans(fields) == MarkedRow("Who?", "Ada did it.", ((0, 3),))


def test_spans_become_a_mask_over_the_tokens_that_are_trained_on(tmp_path: Path) -> None:
    """Against the response mask of the library's own encoder; a token of this model is a byte."""
    save_tiny(tmp_path / "tiny")
    tokenizer = load_tokenizer(ModelConfig(name_or_path=str(tmp_path / "tiny")))
    materials = vocabulary_materials(tokenizer)
    assert "".join(materials.cut("Each gets 5.")) == "Each gets 5."
    encoder = Encoder(tokenizer, 4096)
    for row in corrupt("junk", ROWS[:10], seed=0, materials=materials):
        marks = bad_tokens(tokenizer, row)
        messages = [
            {"role": "user", "content": row.prompt},
            {"role": "assistant", "content": row.response},
        ]
        (tokens,) = encoder.tokens(Chat(messages), "here")
        ids, response = tokens.ids, tokens.mask
        assert len(marks) == len(ids)
        assert all(spoken for spoken, mark in zip(response, marks, strict=True) if mark)
        of_bad = [token for token, mark in zip(ids, marks, strict=True) if mark]
        assert tokenizer.decode(of_bad) == "".join(
            row.response[start:end] for start, end in row.bad
        )


def test_a_row_survives_its_file() -> None:
    row = MarkedRow("p", "response", ((0, 3), (5, 6)))
    assert MarkedRow.from_json(row.as_json()) == row
    assert MarkedRow.from_json({"prompt": "p", "response": "r"}).bad == ()
