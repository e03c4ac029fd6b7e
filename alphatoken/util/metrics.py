"""The metrics of a run: each is declared once, in the `metrics.py` of the package that computes it.

A name may hold choices, `{mean,std}`, and stands for a metric of each; or the user's own name of
something, `<source>`. docs/metrics.md is made from this table.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

Metrics = dict[str, float | int]
"""Numbers of one optimizer step or evaluation, by name."""


@dataclass(frozen=True)
class Metric:
    """What a number means."""

    name: str
    sentence: str
    unit: str
    """Empty for a number without one."""

    def matches(self, name: str) -> bool:
        """Whether `name` is this metric, or one that its choices or names stand for."""
        own = re.sub(r"<\w+>", ".+", self.name)
        pattern = re.sub(r"\{([\w,]+)\}", lambda each: f"({each[1].replace(',', '|')})", own)
        return re.fullmatch(pattern, name) is not None


METRICS: dict[str, Metric] = {}


def declare(name: str, sentence: str, unit: str = "") -> str:
    """Enters a metric into the table and returns its name. Raises ValueError if it is there
    already."""
    if name in METRICS:
        raise ValueError(f"metric {name} is declared twice")
    METRICS[name] = Metric(name, sentence, unit)
    return name


def metric_of(name: str) -> Metric | None:
    """What a number of a run means; None if no metric of that name was declared."""
    return next((each for each in METRICS.values() if each.matches(name)), None)


def as_markdown() -> str:
    """The whole table as Markdown, sorted by name."""
    rows = [
        f"| `{each.name}` | {each.unit} | {each.sentence.replace('|', chr(92) + '|')} |"
        for each in sorted(METRICS.values(), key=lambda each: each.name)
    ]
    return "\n".join(["| metric | unit | meaning |", "|---|---|---|", *rows]) + "\n"
