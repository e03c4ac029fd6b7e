"""A study's finished runs as a Markdown table and as a picture; both are made from its JSON alone.

Intervals are 95 %, by Student's t over seeds; differences are paired, seed by seed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any
from xml.sax.saxutils import escape

QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % of Student's t with 1, 2, ... degrees of freedom."""
NORMAL = 1.96


@dataclass(frozen=True)
class Shown:
    """How a metric is shown."""

    title: str
    digits: int = 3
    recovers: bool = False
    """Whether the share of the distance to the oracle mask is given."""


METRICS: dict[str, Shown] = {
    "exact_match": Shown("exact match", recovers=True),
    "right_number": Shown("right number"),
    "eval_loss": Shown("held-out loss", recovers=True),
    "eval_rewards_margin": Shown("held-out margin", 4),
    "eval_rewards_accuracy": Shown("held-out accuracy"),
    "general_loss": Shown("general text"),
    "kl_to_start": Shown("KL to start", 4),
    "hellaswag_margin": Shown("HellaSwag margin", 4),
    "hellaswag_accuracy": Shown("HellaSwag"),
    "arc_margin": Shown("ARC margin", 4),
    "arc_accuracy": Shown("ARC"),
    "fisher_weighted_drift": Shown("weighted drift", 6),
    "trained_share": Shown("tokens trained on"),
    "bad_trained": Shown("bad tokens trained on"),
    "bad_of_trained": Shown("bad among trained"),
    "wrong_rule": Shown("follows the wrong rule"),
    "advertised": Shown("advertises"),
}
PLOTTED = ("exact_match", "eval_rewards_margin", "eval_loss", "general_loss")


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds; `half` is half the width of its interval, None with one seed."""

    mean: float
    half: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        count = len(values)
        if count < 2:
            return cls(values[0], None)
        quantile = QUANTILES[count - 2] if count - 2 < len(QUANTILES) else NORMAL
        return cls(fmean(values), quantile * stdev(values) / math.sqrt(count))

    def shown(self, digits: int, *, signed: bool = False) -> str:
        sign = "+" if signed else ""
        half = "" if self.half is None else f" ± {self.half:.{digits}f}"
        return f"{self.mean:{sign}.{digits}f}{half}"


class Outcome:
    """The runs of one condition."""

    def __init__(self, results: Mapping[str, Any], condition: str) -> None:
        study = results["study"]
        self.arms: list[str] = list(study["arms"])
        self._baseline: str = study["baseline"]
        oracles = [name for name, arm in study["arms"].items() if arm["kind"] == "oracle"]
        self._oracle = oracles[0] if oracles else None
        self._runs: dict[str, dict[int, dict[str, float]]] = {}
        for run in results["runs"]:
            if run["condition"] == condition:
                self._runs.setdefault(run["arm"], {})[run["seed"]] = run["metrics"]

    def seeds(self, arm: str) -> int:
        return len(self._runs.get(arm, {}))

    def metrics(self) -> list[str]:
        """Those that any run has, in the order of METRICS."""
        found = {name for runs in self._runs.values() for run in runs.values() for name in run}
        return [name for name in METRICS if name in found]

    def estimate(self, arm: str, metric: str) -> Estimate | None:
        values = list(self._of(arm, metric).values())
        return Estimate.of(values) if values else None

    def difference(self, arm: str, metric: str) -> Estimate | None:
        """To the baseline, over the seeds that both have; None for the baseline itself."""
        own, other = self._of(arm, metric), self._of(self._baseline, metric)
        shared = [own[seed] - other[seed] for seed in own if seed in other]
        return Estimate.of(shared) if shared and arm != self._baseline else None

    def recovered(self, arm: str, metric: str) -> float | None:
        """The share of the distance between baseline and oracle mask that the arm covers, of
        means; None where there is no oracle, or no distance beyond its interval."""
        if self._oracle is None or arm in (self._baseline, self._oracle):
            return None
        whole, own = self.difference(self._oracle, metric), self.difference(arm, metric)
        if whole is None or own is None or abs(whole.mean) <= (whole.half or 0):
            return None
        return own.mean / whole.mean

    def frontier(self, first: str, second: str) -> list[str]:
        """The arms that no other arm is as good as in both of two losses and better in one, of
        means."""
        both = {
            arm: (one.mean, other.mean)
            for arm in self.arms
            if (one := self.estimate(arm, first)) and (other := self.estimate(arm, second))
        }
        return [
            arm
            for arm, (one, other) in both.items()
            if not any(a <= one and b <= other and (a, b) != (one, other) for a, b in both.values())
        ]

    def _of(self, arm: str, metric: str) -> dict[int, float]:
        runs = self._runs.get(arm, {})
        return {seed: metrics[metric] for seed, metrics in runs.items() if metric in metrics}


def markdown(results: Mapping[str, Any]) -> str:
    """A table per condition: means over seeds with intervals, in brackets the paired difference to
    the baseline and the share of its distance to the oracle mask."""
    study = results["study"]
    lines = [f"# {study['title']}", ""]
    lines += [f"Differences are to `{study['baseline']}`. Command: `{results['command']}`.", ""]
    for condition in study["conditions"]:
        outcome = Outcome(results, condition)
        metrics = outcome.metrics()
        titles = ["arm", "seeds", *(METRICS[metric].title for metric in metrics)]
        lines += [f"## {condition}", "", _row(titles), _row(["---"] * len(titles))]
        for arm in outcome.arms:
            if outcome.seeds(arm):
                cells = [_cell(outcome, arm, metric) for metric in metrics]
                lines.append(_row([arm, str(outcome.seeds(arm)), *cells]))
        lines.append("")
        best = outcome.frontier("eval_loss", "general_loss")
        if best:
            lines += [
                f"Not beaten in held-out loss and general text at once: {'; '.join(best)}.",
                "",
            ]
    return "\n".join(lines)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(outcome: Outcome, arm: str, metric: str) -> str:
    shown = METRICS[metric]
    estimate = outcome.estimate(arm, metric)
    if estimate is None:
        return "-"
    notes = []
    difference = outcome.difference(arm, metric)
    if difference is not None:
        notes.append(difference.shown(shown.digits, signed=True))
    recovered = outcome.recovered(arm, metric) if shown.recovers else None
    if recovered is not None:
        notes.append(f"{100 * recovered:.0f} %")
    return estimate.shown(shown.digits) + (f" ({'; '.join(notes)})" if notes else "")


LINE, LABEL, PANEL, MARGIN = 18, 190, 260, 30
"""Pixels: height of an arm, width of names and of a panel, space around panels."""


def picture(results: Mapping[str, Any]) -> str:
    """An SVG: a row of panels per condition, in each a dot with its interval per arm."""
    study = results["study"]
    height, body = MARGIN, list[str]()
    width = LABEL
    for condition in study["conditions"]:
        outcome = Outcome(results, condition)
        arms = [arm for arm in outcome.arms if outcome.seeds(arm)]
        metrics = [metric for metric in PLOTTED if metric in outcome.metrics()]
        body.append(_text(4, height - 8, condition, weight="bold"))
        for place, arm in enumerate(arms):
            body.append(_text(4, height + LINE * (place + 1), arm))
        for number, metric in enumerate(metrics):
            left = LABEL + number * (PANEL + MARGIN)
            width = max(width, left + PANEL + MARGIN)
            body += _panel(outcome, arms, metric, left=left, top=height)
        height += LINE * (len(arms) + 1) + 2 * MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _panel(
    outcome: Outcome, arms: Sequence[str], metric: str, *, left: float, top: float
) -> list[str]:
    found = {arm: outcome.estimate(arm, metric) for arm in arms}
    estimates = {arm: estimate for arm, estimate in found.items() if estimate is not None}
    ends = [
        estimate.mean + sign * (estimate.half or 0)
        for estimate in estimates.values()
        for sign in (-1, 1)
    ]
    low, high = min(ends), max(ends)
    scale = PANEL / ((high - low) or 1)
    bottom = top + LINE * (len(arms) + 1)
    parts = [
        _text(left, top - 8, METRICS[metric].title),
        f'<rect x="{left}" y="{top}" width="{PANEL}" height="{bottom - top}" fill="none" '
        'stroke="#bbb"/>',
        _text(left, bottom + 14, f"{low:.3f}"),
        _text(left + PANEL, bottom + 14, f"{high:.3f}", anchor="end"),
    ]
    for place, arm in enumerate(arms):
        if arm in estimates:
            x = left + (estimates[arm].mean - low) * scale
            y = top + LINE * (place + 1) - 4
            reach = (estimates[arm].half or 0) * scale
            parts.append(
                f'<path d="M{x - reach:.1f} {y}H{x + reach:.1f}" stroke="#357"/>'
                f'<circle cx="{x:.1f}" cy="{y}" r="4" fill="#357"/>'
            )
    return parts


def _text(x: float, y: float, text: str, *, anchor: str = "start", weight: str = "normal") -> str:
    return (
        f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-weight="{weight}">{escape(text)}</text>'
    )
