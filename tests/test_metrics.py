"""The table of metrics: every number of a run is in it, and docs/metrics.md is made from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import alphatoken.training.metrics  # noqa: F401  declares them
from alphatoken.util import metrics
from alphatoken.util.metrics import declare, metric_of

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "metrics.md"
INTRODUCTION = """\
# Metrics

A run writes one JSON object per optimizer step to `metrics.jsonl`, with these numbers. Each is
declared in the `metrics.py` of the package that computes it (`alphatoken.util.metrics.declare`);
`make metrics` writes this page. A name with `{a,b}` stands for one metric of each, one with
`<source>` for one of each source of a mixture (`name` of a source in `data.train`), one with
`<task>` for one of each task of `train.evaluate`. The unit `value` is that of a token's value: how
many nats per token the held-out loss falls, to first order, when the weights take a step of size 1
down the token's gradient (of `ghost`, its position's share of the row's gradient); of stability,
how many nats per completion the penalty falls. With `valuation.balance: std` the composite counts
standard deviations instead.

"""
# Declares all metrics.
MODULE = "alphatoken.training.metrics"


def page() -> str:
    """What docs/metrics.md must say, from a process in which nothing else was declared."""
    script = f"import {MODULE}; from alphatoken.util.metrics import as_markdown"
    table = subprocess.run(
        [sys.executable, "-c", f"{script}; print(as_markdown(), end='')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return INTRODUCTION + table.stdout


def test_the_page_is_made_from_the_table() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make metrics`"


def test_metrics_are_declared_where_nothing_is_loaded() -> None:
    """A console or a page that only names them would miss one that is declared elsewhere."""
    for file in (ROOT / "alphatoken").rglob("*.py"):
        if file.name != "metrics.py":
            called = re.search(r"^(\w+ = )?declare\w*\(", file.read_text("utf-8"), re.MULTILINE)
            assert called is None, f"{file.relative_to(ROOT)} declares a metric"


def test_every_number_of_the_pinned_runs_is_declared() -> None:
    golden = json.loads((ROOT / "tests" / "golden_sft.json").read_text(encoding="utf-8"))
    names = set(names_in(golden))
    assert "loss_kept" in names
    assert {name for name in names if metric_of(name) is None} == set()


def names_in(golden: object) -> list[str]:
    """Keys of all dicts of numbers."""
    if isinstance(golden, list):
        return [name for each in golden for name in names_in(each)]
    if isinstance(golden, dict):
        own = [key for key, value in golden.items() if isinstance(value, int | float)]
        return own + [name for value in golden.values() for name in names_in(value)]
    return []


def test_choices_in_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "METRICS", {})
    declare("speed_{up,down}_{mean,max}", "two by two", "m/s")
    declare("speed_of_light", "a single one", "m/s")
    for name, sentence in (("speed_of_light", "a single one"), ("speed_up_max", "two by two")):
        found = metric_of(name)
        assert found is not None
        assert found.sentence == sentence
    declare("speed/<who>_{up,down}", "of each")
    found = metric_of("speed/a b_c_up")
    assert found is not None
    assert found.sentence == "of each"
    assert metric_of("speed/_up") is None
    for other in ("speed", "speed_up", "speed_up_min", "speed_up,down_mean"):
        assert metric_of(other) is None
    with pytest.raises(ValueError, match="declared twice"):
        declare("speed_of_light", "again")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
