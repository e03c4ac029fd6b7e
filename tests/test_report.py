"""The HTML report: what it shows is what the run wrote, and nothing of a run's texts is taken for
markup."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import AutoTokenizer
from typer.testing import CliRunner

import alphatoken.training.metrics  # noqa: F401  declares them
from alphatoken import UserError
from alphatoken.cli import app
from alphatoken.report.charts import KEPT_SHARE
from alphatoken.report.curves import MOST_POINTS, Line, line_chart, nice_ticks
from alphatoken.report.kinds import kinds_of, place
from alphatoken.report.page import write_report
from alphatoken.report.responses import ValuedResponse, append_responses, read_responses
from alphatoken.report.tokens import TITLES
from alphatoken.report.wording import sentence_of, visible
from alphatoken.training.valued_responses import texts_of
from tests.ranks import run_ranks
from tests.runs import changed, metrics_of

HOSTILE = (
    "<script>alert(1)</script>",
    "\u202etxt.exe",
    "\U0001f469\u200d\U0001f680",
    "a\nb\r\x00",
    "\u2028",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "\\xf0\\x9f",
)
VOID = {"meta", "input", "br", "img", "link"}


class Element:
    """A piece of a page."""

    def __init__(self, tag: str, attributes: dict[str, str | None], parent: Element | None) -> None:
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Element | str] = []

    def all(self, tag: str = "", **attributes: str) -> list[Element]:
        """Those below it of a tag and with attributes (`data_x` is data-x), in order."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
                own = {name: child.attributes.get(name) for name in wanted}
                if tag in ("", child.tag) and own == wanted:
                    found.append(child)
                found += child.all(tag, **attributes)
        return found

    @property
    def text(self) -> str:
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    @property
    def numbers(self) -> list[float]:
        """What its `data` elements stand for."""
        return [float(str(each.attributes["value"])) for each in self.all("data")]


class Reader(HTMLParser):
    """Reads a page into elements; every one must be closed where it was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.root = self.at = Element("", {}, None)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, dict(attrs), self.at)
        self.at.children.append(element)
        if tag not in VOID:
            self.at = element

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.at.children.append(Element(tag, dict(attrs), self.at))

    def handle_endtag(self, tag: str) -> None:
        assert self.at.tag == tag, f"</{tag}> closes <{self.at.tag}>"
        assert self.at.parent is not None
        self.at = self.at.parent

    def handle_data(self, data: str) -> None:
        self.at.children.append(data)


def page(*folders: Path) -> Element:
    """The report of runs, read back."""
    output = folders[0] / "report.html"
    write_report(folders, output)
    return read_page(output)


def read_page(file: Path) -> Element:
    reader = Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    reader.close()
    assert reader.at is reader.root
    return reader.root


def made_run(folder: Path, responses: Sequence[ValuedResponse] = (), **changes: Any) -> Path:
    """A run folder with the files that a report is made of."""
    folder.mkdir(parents=True)
    config = {
        "model": {"name_or_path": "some/model"},
        "data": {"train": [{"path": "train.jsonl", "skip": 0}]},
        "optim": {"lr": 1e-4},
        "train": {"max_steps": 3, "seed": 1},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(changed(config, **changes)))
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 2.5}]
    for step in (1, 2, 3):
        lines.append(
            {
                "step": step,
                "loss_kept": 2 / step + 1e-9,
                "loss_response": 2.25 / step,
                "kept_tokens": 7 * step,
                "response_tokens": 15 * step,
                "composite_mean": -0.125 * step,
                "lr": 1e-4 / step,
                "seconds_forward": 0.5 * step,
                "seconds_backward": 0.25,
                "seconds_step": 1.0 * step,
                "tokens_per_second": 100.0,
                "peak_memory_bytes": 3 * 2**30,
                "brand_new_metric": step / 3,
            }
        )
    lines[-1]["eval_loss"] = 1.25
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    append_responses(folder / "valued_tokens.jsonl", responses)
    return folder


def told(tokens: Sequence[str], step: int = 1, **changes: Any) -> ValuedResponse:
    """A response whose numbers all differ; every third token is dropped, the last ends the turn."""
    count = len(tokens)
    values: dict[str, Any] = {
        "step": step,
        "where": "train.jsonl:1",
        "length": count,
        "given": ((0, "What is it?"),),
        "tokens": tuple(tokens),
        "ends_turn": tuple(index == count - 1 for index in range(count)),
        "weights": tuple(float(index % 3 > 0) for index in range(count)),
        "columns": {
            "loss": tuple(0.5 + index for index in range(count)),
            "direct_target": tuple((-1) ** index * (index + 0.123456) for index in range(count)),
            "composite": tuple((-1) ** index * (index + 0.654321) for index in range(count)),
        },
    }
    return ValuedResponse(**{**values, **changes})


def check_curves(root: Element, folders: Sequence[Path]) -> None:
    """Every metric of every run has its first, last, least and greatest number on the page."""
    bodies = {
        (body.attributes["data-run"], body.attributes["data-metric"]): body.numbers
        for body in root.all("tbody")
        if "data-metric" in body.attributes
    }
    expected: dict[tuple[str, str], list[float]] = defaultdict(list)
    for folder in folders:
        run = folder.name if len(folders) > 1 else ""
        for line in (json.loads(text) for text in (folder / "metrics.jsonl").open()):
            for name, number in line.items():
                if name not in ("step", "kept_tokens", "response_tokens"):
                    expected[run, name].append(number)
            if "kept_tokens" in line:
                expected[run, KEPT_SHARE].append(line["kept_tokens"] / line["response_tokens"])
    drawn = {key: numbers for key, numbers in expected.items() if "seconds_" not in key[1]}
    assert bodies == {
        key: [numbers[0], numbers[-1], min(numbers), max(numbers)] for key, numbers in drawn.items()
    }
    for (_, name), _ in drawn.items():
        assert sentence_of(name).replace("`", "") in root.text


def check_tokens(root: Element, folder: Path, run: str = "") -> int:
    """Every response shown is one that was kept, number by number; how many there are."""
    kept = {
        (each.step, each.where, each.branch): each
        for each in read_responses(folder / "valued_tokens.jsonl")
    }
    found = 0
    for panel in root.all("section", class_="panel switch") or root.all("section"):
        if panel.attributes.get("class") != "panel switch" or panel.attributes["data-run"] not in (
            run,
            folder.name,
        ):
            continue
        for article in panel.all("article"):
            own = article.attributes
            key = (int(own["data-step"] or 0), own["data-where"] or "", own["data-branch"] or "")
            check_response(article, kept[key])
            found += 1
    return found


def check_response(article: Element, response: ValuedResponse) -> None:
    (text,) = article.all("p")
    marked = [each for each in text.all() if each.attributes.get("class") == "t"]
    assert [each.text for each in marked] == [
        visible(token.replace("\n", "↵\n")) for token in response.tokens
    ]
    assert [each.tag for each in marked] == [
        "span" if weight > 0 else "s" for weight in response.weights
    ]
    (table,) = article.all("table")
    titles = [cell.text.removesuffix(", nats").removesuffix(", value") for cell in table.all("th")]
    names = {title: name for name, title in TITLES.items()}
    columns = [response.columns[names[title]] for title in titles[3:]]
    left_out = response.columns.keys() - {names[title] for title in titles[3:]}
    assert not any(number for name in left_out for number in response.columns[name])
    rows = list(zip(*columns, strict=True))
    cells = [[cell.text for cell in row.all("td")] for row in table.all("tr")[1:]]
    assert [tuple(map(float, row[3:])) for row in cells] == rows
    for element, numbers, weight in zip(marked, rows, response.weights, strict=True):
        title = str(element.attributes["title"])
        assert tuple(
            map(float, re.findall(r"^[^:\n]+: (-?[\d.e+-]+|nan)", title, re.MULTILINE))
        ) == (
            *numbers,
            weight,
        )


def test_every_number_is_that_of_the_files(tmp_path: Path) -> None:
    responses = [told(["One", " two", " 3", "!", "\n", "<end>"], step=step) for step in (1, 2, 3)]
    folder = made_run(tmp_path / "run", responses)
    root = page(folder)
    check_curves(root, [folder])
    assert check_tokens(root, folder) == 3
    assert "1.25" in root.all("table", **{"class": "facts summary"})[0].text
    assert "42 of 90 (46.7%)" in root.text
    phases = {
        row.attributes["data-phase"]: row.numbers
        for row in root.all("tr")
        if "data-phase" in row.attributes
    }
    assert phases == {
        "forward": [3.0, 1.0],
        "backward": [0.75, 0.25],
        "rest of the step": [2.25, 0.75],
    }
    (script,) = root.all("script")  # that searches
    assert "src" not in script.attributes


def test_means_by_kind_and_by_place(tmp_path: Path) -> None:
    response = told(["One", " two", " 3", "!", "\n", "<end>"])
    root = page(made_run(tmp_path / "run", [response, response.model_copy(update={"step": 2})]))
    groups = {
        row.attributes["data-group"]: row.numbers
        for row in root.all("tr")
        if "data-group" in row.attributes
    }
    value, loss = response.columns["composite"], response.columns["loss"]
    assert groups["words"] == [4, (value[0] + value[1]) / 2, 0.5, (loss[0] + loss[1]) / 2]
    assert groups["digits"] == [2, value[2], 1.0, loss[2]]
    assert groups["end of turn"] == [2, value[5], 1.0, loss[5]]
    assert groups["1"] == [2, value[0], 0.0, loss[0]]
    assert groups["3-4"] == [4, (value[2] + value[3]) / 2, 0.5, (loss[2] + loss[3]) / 2]
    assert (
        sum(
            groups[kind][0]
            for kind in ("words", "digits", "punctuation", "white space", "end of turn")
        )
        == 12
    )
    most, least = (
        section.numbers for section in root.all("section") if "data-extremes" in section.attributes
    )
    ranked = sorted(2 * value)
    assert (most, least) == (ranked[::-1], ranked)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(text: str, tmp_path: Path) -> None:
    """In tokens, prompts, places, names of runs and settings."""
    response = told([text, " b", text], given=((0, text),), where=f"{text}:1", branch=text, step=2)
    folder = made_run(
        tmp_path / re.sub(r"[/\x00\n\r]", "", text), [response], model={"name_or_path": text}
    )
    root = page(folder)
    check_response(root.all("article")[0], response)
    assert len(root.all("script")) == 1  # the report's own
    assert not root.all("img")
    given = next(each for each in root.all("span") if each.attributes.get("class") == "given")
    assert given.text == visible(text)
    raw = (folder / "report.html").read_text(encoding="utf-8")
    assert not re.search(
        "[\u202a-\u202e\u2066-\u2069\x00-\x09\x0b-\x1f\u2028]", raw.replace("\n", "")
    )
    assert "onerror=alert(1)>" not in raw
    assert "49" not in root.all("h1")[0].text


def test_half_a_character_is_shown_by_its_bytes(tiny_model: Path) -> None:
    """The tiny model's tokenizer has a token a byte."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer("aé b", add_special_tokens=False)["input_ids"]
    texts = texts_of(tokenizer, ids, range(len(ids)))
    assert texts == ["a", "\\xc3", "\\xa9", " ", "b"]


def test_kinds() -> None:
    tokens = [
        "<think>",
        "12",
        "</think>",
        "Say",
        " 12",
        " !",
        "```",
        "x",
        "```",
        "<tool_call>",
        "{",
        "</tool_call>",
        "<e>",
    ]
    assert kinds_of(told(tokens)) == [
        *["reasoning"] * 3,
        *("words", "digits", "punctuation"),
        *["code"] * 3,
        *["tool call"] * 3,
        "end of turn",
    ]
    opened = told(["so", "</think>", "Yes", "<e>"], given=((0, "Why?<think>\n"),))
    assert kinds_of(opened) == ["reasoning", "reasoning", "words", "end of turn"]
    assert [place(number) for number in (1, 2, 3, 4, 5, 8, 9)] == [
        *("1", "2", "3-4", "3-4", "5-8", "5-8", "9-16"),
    ]


def test_runs_side_by_side(tmp_path: Path) -> None:
    """What they share and what they differ in; a run without values beside one with them."""
    loss_only = {"loss": (0.25, 0.5)}
    first = made_run(tmp_path / "a", [told(["x", "y"], step=step) for step in (1, 2)])
    second = made_run(
        tmp_path / "b",
        [told(["x", "y"], step=step, columns=loss_only) for step in (2, 3)],
        optim={"lr": 0.5},
        valuation={"enabled": False},
    )
    lines = (second / "metrics.jsonl").read_text().splitlines()
    (second / "metrics.jsonl").write_text("\n".join(lines[:3]) + "\n")
    with (second / "metrics.jsonl").open("a") as added:
        added.write('{"step": 3, "grad_norm": 1.5}\n')  # which the other run has not
    root = page(first, second)
    check_curves(root, [first, second])
    looks = defaultdict(set)
    for body in root.all("tbody"):
        if "data-metric" in body.attributes:
            looks[body.attributes["data-run"]].add(body.all("path")[0].attributes["class"])
    assert looks == {"a": {"l0"}, "b": {"l1"}}
    # Step 2 is what both have kept.
    assert check_tokens(root, first) == check_tokens(root, second) == 1
    (differing,) = root.all("table", **{"class": "facts differing"})
    rows = {
        row.all("th")[0].text: [cell.text for cell in row.all("td")]
        for row in differing.all("tr")[1:]
    }
    assert rows == {"optim.lr": ["0.0001", "0.5"], "valuation.enabled": ["null", "false"]}


def test_runs_are_compared_on_the_responses_that_both_have(tmp_path: Path) -> None:
    """Not on those of one run alone, nor where the same row has become other tokens."""
    words = ["a", "b", "c", "d"]

    def kept(losses: Sequence[float], values: Sequence[float], **changes: Any) -> ValuedResponse:
        columns = {"loss": tuple(losses), "composite": tuple(values)}
        return told(words, columns=columns, **changes)

    first = [
        kept([1, 2, 3, 4], [4, 3, 2, 1], weights=(1, 1, 0, 0)),
        kept([1, 1, 1, 1], [1, 2, 3, 4], weights=(1, 1, 1, 1), step=2),
        kept([9, 9, 9, 9], [1, 2, 3, 4], step=3),
        told(["x", "y"], step=4),
    ]
    second = [
        kept([0, 2, 3, 3], [8, 6, 4, 2], weights=(1, 0, 0, 0)),
        kept([1, 2, 2, 1], [9, 3, 3, 1], weights=(1, 1, 1, 0.5), step=2),
        told(["y", "x"], step=4),
        told(["y", "x"], step=5),
    ]
    root = page(made_run(tmp_path / "a", first), made_run(tmp_path / "b", second))
    (panel,) = root.all("section", data_pairing="b")
    assert "(2 responses, 8 tokens)" in panel.text
    rows = {row.all("th")[0].text: row.numbers for row in panel.all("tr")[1:]}
    # Spearman by hand: 1, and ranks (1, 2, 3, 4) against (4, 2.5, 2.5, 1), which is -0.9487.
    ranked = -0.9486832980505138
    assert rows == {
        "loss, this run minus the first (nats)": [0, -0.5, 0.5],
        "share kept, this run minus the first (percentage points)": [-12.5, -25, 0],
        "tokens that both keep or both drop (%)": [87.5, 75, 100],
        "rank correlation of values": pytest.approx([(1 + ranked) / 2, ranked, 1]),
    }
    assert not page(made_run(tmp_path / "c", first[2:]), tmp_path / "b").all("h2", id="pairs")


def test_means_by_source(tmp_path: Path) -> None:
    """Only where rows are of several files."""
    words = told(["a", "b"])
    root = page(made_run(tmp_path / "one", [words]))
    assert "By source" not in root.text
    other = told(["c"], where="more: of it.jsonl:7")
    root = page(made_run(tmp_path / "two", [words, other]))
    (table,) = [each for each in root.all("section") if "By source" in each.text]
    rows = {row.attributes["data-group"]: row.numbers for row in table.all("tr")[1:]}
    assert {name: numbers[0] for name, numbers in rows.items()} == {
        "more: of it.jsonl": 1,
        "train.jsonl": 2,
    }
    assert rows["more: of it.jsonl"][1:] == [0.654321, 0.0, 0.5]


def test_the_same_run_twice_and_runs_of_one_name(tmp_path: Path) -> None:
    first, second = made_run(tmp_path / "a" / "run"), made_run(tmp_path / "b" / "run")
    with pytest.raises(UserError, match="given twice"):
        page(first, first)
    with pytest.raises(UserError, match="given twice"):
        page(first, second / ".." / ".." / "a" / "run")
    root = page(first, second)
    assert {each.text for each in root.all("th", scope="col")} == {str(first), str(second)}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("metrics.jsonl", "", "is empty: the run has not finished its first step"),
        (
            "metrics.jsonl",
            '{"step": 1, "loss_kept": 2.0}\n{"step": 2, "lo',
            ":2 is no line of metrics",
        ),
        ("metrics.jsonl", "[1]\n", ":1 is no line of metrics"),
        ("metrics.jsonl", None, "does not exist, so"),
        ("config.yaml", None, "does not exist, so"),
        ("config.yaml", "a: [", "cannot be read"),
        ("valued_tokens.jsonl", '{"step": 1, "whe', ":1 is no response of a run"),
        ("valued_tokens.jsonl", "\n", ":1 is no response of a run"),
    ],
)
def test_a_damaged_folder_is_refused_by_file(
    file: str, content: str | None, message: str, tmp_path: Path
) -> None:
    folder = made_run(tmp_path / "run")
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(UserError, match=re.escape(f"{folder / file}")) as raised:
        page(folder)
    assert message in str(raised.value)
    assert not (folder / "report.html").exists()


def test_a_file_that_cannot_be_read_is_not_taken_for_the_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = made_run(tmp_path / "a")
    read = Path.read_text

    def refuse(file: Path, **named: Any) -> str:
        if file.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied", str(file))
        return read(file, **named)

    monkeypatch.setattr(Path, "read_text", refuse)
    result = CliRunner().invoke(app, ["report", str(run)])
    assert isinstance(result.exception, UserError)
    assert str(result.exception) == f"cannot read {run / 'metrics.jsonl'}: Permission denied"


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = made_run(tmp_path / "a"), made_run(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    for arguments, output in (
        ([str(first)], first / "report.html"),
        ([str(first), str(second)], Path("comparison.html")),
        ([str(first), "--output", "other.html"], Path("other.html")),
    ):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.output == f"{output}\n"
        assert read_page(output).all("h1")
    nowhere = CliRunner().invoke(app, ["report", str(first), "--output", "no/where.html"])
    assert isinstance(nowhere.exception, UserError)
    assert "cannot write no/where.html: No such file" in str(nowhere.exception)
    folder = CliRunner().invoke(app, ["report", str(first), "--output", "."])
    assert isinstance(folder.exception, UserError)
    assert "cannot write .: " in str(folder.exception)
    assert not list(tmp_path.glob("*.partial"))


def test_numbers_that_are_not_finite_leave_a_gap(tmp_path: Path) -> None:
    folder = made_run(tmp_path / "run", [told(["x", "y"], columns={"loss": (1.0, math.nan)})])
    with (folder / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 4, "loss_kept": NaN, "grad_norm": Infinity}\n')
    root = page(folder)
    (body,) = root.all("tbody", data_metric="loss_kept")
    assert math.isnan(body.numbers[1])
    assert body.numbers[2:] == [2 / 3 + 1e-9, 2 + 1e-9]
    assert "nan" not in "".join(str(line.attributes["points"]) for line in root.all("polyline"))


def test_a_run_that_diverged_is_compared(tmp_path: Path) -> None:
    """Infinities of both signs have no sum, and nan no place among others."""
    words_3 = ["x", "y", "z"]
    columns = {"loss": (math.inf, 1.0, 1.0), "composite": (math.inf, -math.inf, 0.0)}
    sound = made_run(tmp_path / "sound", [told(words_3, step) for step in range(1, 9)])
    broken = [told(words_3, step) for step in range(1, 8)]
    broken.append(told(words_3, 8, columns=columns))
    root = page(sound, made_run(tmp_path / "broken", broken))
    (words,) = root.all("tr", data_group="words")[1:]
    assert math.isnan(words.numbers[1]), "the mean value"
    (pairing,) = root.all("section", data_pairing="broken")
    loss, *ends = pairing.all("tr")[1].numbers
    assert loss == math.inf
    assert all(map(math.isnan, ends)), "an interval would mean nothing"
    both = made_run(tmp_path / "both", [*broken, told(["z"], 9, columns={"loss": (math.nan,)})])
    other = made_run(tmp_path / "other", [*broken, told(["z"], 9, columns={"loss": (1.0,)})])
    (pairing,) = page(both, other).all("section", data_pairing="other")
    assert all(map(math.isnan, pairing.all("tr")[1].numbers))


def test_long_curves_keep_their_extremes() -> None:
    points = [(step, math.sin(step)) for step in range(10_000)]
    points[4321] = (4321, 50.0)
    svg = str(line_chart("a <b>", [Line("sine", points)], ""))
    (drawn,) = re.findall(r'points="([^"]+)"', svg)
    heights = [float(place.split(",")[1]) for place in drawn.split()]
    assert len(heights) <= MOST_POINTS + 2
    assert min(heights) == 10.0  # the top of the picture
    assert "a &lt;b&gt;" in svg


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0, 0.25, 0.5, 0.75, 1]), (3.0, 3.0, [3]), (-1.0, 9.0, [0, 2.5, 5, 7.5])],
)
def test_ticks(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


@pytest.mark.slow
def test_runs_of_every_kind_write_it(
    run_values: dict[str, Any], pair_values: dict[str, Any], tmp_path: Path
) -> None:
    """A valued run that dies after a checkpoint and goes on, one without values, one of pairs, and
    one whose disk refuses the page."""
    blocked = tmp_path / "blocked"
    (blocked / "report.html").mkdir(parents=True)

    def run(name: str, values: dict[str, Any] = run_values, **sections: Any) -> dict[str, Any]:
        train = {"max_steps": 4, "output_dir": str(tmp_path / name)}
        return changed(changed(values, train=train), **sections)

    plain = {"enabled": False}
    first = run("resumed", train={"save_every": 2}, logging={"responses": 3})
    configs = {
        "resumed": first,
        "plain": run("plain", valuation=plain, selection={"policy": "random"}),
        "pairs": run("pairs", pair_values, valuation={"stability_weight": 0.0}),
        "none": run("none", valuation=plain, train={"max_steps": 1}, logging={"responses": 0}),
        "blocked": run("blocked", valuation=plain, train={"max_steps": 1, "resume": "auto"}),
    }
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "ranks", configs=configs)
    assert messages == dict.fromkeys(configs, "")
    log = (tmp_path / "ranks" / "rank-0.log").read_text()
    assert len(re.findall(r"warning: no \S+blocked/report\.html: ", log)) == 1

    for name, branches in (("resumed", {""}), ("plain", {""}), ("pairs", {"chosen", "rejected"})):
        folder = tmp_path / name
        root = read_page(folder / "report.html")
        check_curves(root, [folder])
        assert check_tokens(root, folder) > 0
        kept = read_responses(folder / "valued_tokens.jsonl")
        assert {each.step for each in kept} == {1, 2, 3, 4}
        assert {each.branch for each in kept} == branches
        assert all(each.is_valued == (name != "plain") for each in kept)
        assert all(re.fullmatch(r"\S+\.jsonl:\d+", each.where) for each in kept)
    assert not (tmp_path / "none" / "valued_tokens.jsonl").exists()
    assert "No tokens were kept" in read_page(tmp_path / "none" / "report.html").text
    assert (
        "No token that was kept has a value" in read_page(tmp_path / "plain" / "report.html").text
    )

    straight = (tmp_path / "resumed" / "valued_tokens.jsonl").read_text()
    shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "step-4")
    (tmp_path / "resumed" / "checkpoints" / "latest").write_text("step-2")
    with (tmp_path / "resumed" / "valued_tokens.jsonl").open("a") as lines:
        lines.write('{"step": 5, "whe')
    again = changed(first, train={"resume": "auto"})
    (messages,) = run_ranks("run_trainers", 1, tmp_path / "again", configs={"resumed": again})
    assert messages == {"resumed": ""}
    assert (tmp_path / "resumed" / "valued_tokens.jsonl").read_text() == straight
    assert [line["step"] for line in metrics_of(tmp_path / "resumed")] == [0, 1, 2, 3, 4]
    check_curves(read_page(tmp_path / "resumed" / "report.html"), [tmp_path / "resumed"])


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or ""


def browser(page: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Chromium without a window, once. Its complaints about a page are on standard error."""
    quiet = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
    logged = ("--enable-logging=stderr", "--log-level=0")
    profile = f"--user-data-dir={page.parent / 'profile'}"
    return subprocess.run(
        [CHROMIUM, *quiet, *logged, profile, *options, page.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.skipif(not CHROMIUM, reason="there is no chromium (Debian's package) to render with")
def test_a_browser_draws_it_without_complaints(tmp_path: Path) -> None:
    """On a desk and on a phone, in light and dark, and never wider than the window."""
    long = told([f"word{'y' * 40}{index}" for index in range(30)])
    folder = made_run(tmp_path / "run", [long, told(list(HOSTILE), step=2)])
    page(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    # This script searches the report and measures it, in a frame as wide as a phone: a window
    # cannot be that narrow.
    probe = """
        const field = document.querySelector("#search input");
        const hidden = wanted => {
            field.value = wanted;
            field.dispatchEvent(new Event("input"));
            return [...document.querySelectorAll("article")].filter(each => each.hidden).length;
        };
        const searched = ["WORDY", "<script>", "nowhere", ""].map(hidden);
        const sizes = [document.documentElement.scrollWidth, innerWidth];
        parent.postMessage([...sizes, ...searched].join("/"), "*");
    """
    (folder / "probe.html").write_text(html.replace("</body>", f"<script>{probe}</script></body>"))
    pictures = set()
    for width, scheme in ((1200, 0), (1200, 1), (360, 0), (360, 1)):
        frame = folder / "frame.html"
        frame.write_text(
            f'<iframe src="probe.html" style="width:{width}px; height:2000px; border:0"></iframe>'
            "<script>addEventListener('message', e => document.title = e.data)</script>"
        )
        picture = folder / f"{width}-{scheme}.png"
        drawn = browser(
            frame,
            *(f"--screenshot={picture}", "--dump-dom", "--window-size=1280,2000"),
            f"--blink-settings=preferredColorScheme={scheme}",
        )
        assert "CONSOLE" not in drawn.stderr
        (told_back,) = re.findall(r"<title>([\d/]+)</title>", drawn.stdout)
        needed, there, *hidden = map(int, told_back.split("/"))
        assert needed <= there == width
        assert hidden == [1, 1, 2, 0]
        pictures.add(picture.read_bytes())
    assert len(pictures) == 4
