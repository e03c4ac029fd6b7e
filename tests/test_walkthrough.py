"""The walkthrough's numbers are those its command prints, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recipes import trace

PAGE = Path(__file__).parent.parent / "docs" / "walkthrough.md"
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?(?:e[-+]\d+)?")


def test_the_page_shows_what_the_trace_prints(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```text\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    shown = "".join(blocks).splitlines()
    trace.main()
    printed = capsys.readouterr().out.splitlines()
    printed = printed[printed.index("ROW") :]  # libraries print lines of their own before
    assert [NUMBER.sub("#", line) for line in shown] == [NUMBER.sub("#", line) for line in printed]
    for ours, theirs in zip(shown, printed, strict=True):
        expected = [float(number) for number in NUMBER.findall(theirs)]
        # Another processor adds in another order.
        assert [float(number) for number in NUMBER.findall(ours)] == pytest.approx(
            expected, rel=1e-2
        ), f"{ours!r} is printed as {theirs!r}"


def test_the_links_of_the_page_lead_to_files_that_define_their_names() -> None:
    links = re.findall(r"\[([^\]]+)\]\(([^)]+)\)", PAGE.read_text(encoding="utf-8"))
    assert links
    for text, target in links:
        file = PAGE.parent / target
        assert file.is_file(), target
        name = text.strip("`").rpartition(".")[2]
        if text.startswith("`"):
            assert re.search(rf"(?:def|class) {name}\b", file.read_text(encoding="utf-8")), text
