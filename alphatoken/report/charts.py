"""Which numbers of runs are drawn together, and what is said of each beside its curve."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alphatoken.report.curves import Line, line_chart, swatch
from alphatoken.report.reading import RunRecord
from alphatoken.report.wording import sentence_of
from alphatoken.util.metrics import metric_of

KEPT_SHARE = "kept_tokens / response_tokens"
"""The one curve that metrics.jsonl does not have itself."""
PHASE = "seconds_"

TERMS = tuple(
    f"{path}_{matrix}"
    for matrix in ("target", "contrast", "proxy")
    for path in ("direct", "causal")
)
BRANCHES = ("chosen", "rejected")
GROUPS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Loss", ("loss_kept", "loss_response")),
    ("Objective", ("loss",)),
    ("Evaluation", ("eval_loss",)),
    ("Evaluation of pairs", ("eval_rewards_accuracy", "eval_length_accuracy")),
    ("Evaluation margin", ("eval_rewards_margin",)),
    ("Kept share", (KEPT_SHARE, *(f"kept_share_{branch}" for branch in BRANCHES))),
    ("Dropped share", ("vetoed_share", "below_threshold_share", "harmful_share")),
    ("Value and its terms, mean", ("composite_mean", *(f"{term}_mean" for term in TERMS))),
    (
        "Value and its terms, standard deviation",
        ("composite_std", *(f"{term}_std" for term in TERMS)),
    ),
    ("Share of each term in the value's variance", tuple(f"{term}_share" for term in TERMS)),
    ("Adaptation and stability", ("adaptation_std", "stability_std")),
    ("Adaptation and stability, correlation", ("adaptation_stability_rank_correlation",)),
    ("Drift", ("drift_norm",)),
    ("Drift, weighted by the Fisher", ("fisher_weighted_drift",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm", ("grad_norm",)),
    ("Rewards", tuple(f"rewards_{of}" for of in (*BRANCHES, "margin"))),
    ("Rewards over kept tokens", tuple(f"rewards_{of}_masked" for of in (*BRANCHES, "margin"))),
    ("Reward accuracy", ("rewards_accuracy", "rewards_accuracy_masked")),
    ("Speed", ("tokens_per_second",)),
    ("Memory", ("peak_memory_bytes",)),
)
TOLD_ELSEWHERE = ("step", "kept_tokens", "response_tokens")


@dataclass(frozen=True)
class Curve:
    """A curve and its numbers. `run` is empty where there is one run only."""

    swatch: Markup
    run: str
    metric: str
    unit: str
    sentence: str
    first: tuple[int, float]
    last: tuple[int, float]
    least: float
    most: float


@dataclass(frozen=True)
class Chart:
    """A picture with its numbers."""

    title: str
    svg: Markup
    curves: Sequence[Curve]

    @property
    def unit(self) -> str:
        return self.curves[0].unit

    @property
    def sentences(self) -> dict[str, list[str]]:
        """What the metrics mean: the names of those that one sentence is about."""
        found: dict[str, list[str]] = {}
        for curve in self.curves:
            names = found.setdefault(curve.sentence, [])
            if curve.metric not in names:
                names.append(curve.metric)
        return found


def charts_of(runs: Sequence[RunRecord]) -> list[Chart]:
    """Everything that the runs report by step: of one run metrics that belong together in one
    chart, of several every metric in a chart of its own. What no metric of the runs tells has no
    chart."""
    there = {metric for run in runs for line in run.lines for metric in line}
    grouped = {metric for _, metrics in GROUPS for metric in metrics}
    others = sorted(
        metric
        for metric in there - grouped
        if metric not in TOLD_ELSEWHERE and not metric.startswith(PHASE)
    )
    groups = [*GROUPS, *((metric, (metric,)) for metric in others)]
    if len(runs) > 1:
        groups = [
            (title if len(metrics) == 1 else f"{title}: {metric}", (metric,))
            for title, metrics in groups
            for metric in metrics
        ]
    charts = (_chart(title, metrics, runs) for title, metrics in groups)
    return [chart for chart in charts if chart is not None]


def _chart(title: str, metrics: Sequence[str], runs: Sequence[RunRecord]) -> Chart | None:
    lines, curves, several = [], [], len(runs) > 1
    for number, run in enumerate(runs):
        for place, metric in enumerate(metrics):
            points = points_of(run, metric)
            if points:
                name = f"{run.name} {metric}" if several else metric
                style = number if several else place
                lines.append(Line(name, points, style))
                curves.append(_curve(style, run.name if several else "", metric, points))
    if not curves:
        return None
    return Chart(title, line_chart(title, lines, curves[0].unit), curves)


def points_of(run: RunRecord, metric: str) -> list[tuple[int, float]]:
    """(step, number) of a metric, or of the share that was kept."""
    if metric != KEPT_SHARE:
        return run.curve(metric)
    counts = zip(run.curve("kept_tokens"), run.curve("response_tokens"), strict=False)
    return [(step, kept / of) for (step, kept), (_, of) in counts if of]


def _curve(style: int, run: str, metric: str, points: Sequence[tuple[int, float]]) -> Curve:
    finite = [value for _, value in points if math.isfinite(value)] or [math.nan]
    known = metric_of(metric)
    share = "share of the response tokens that was trained on"
    return Curve(
        swatch=swatch(style),
        run=run,
        metric=metric,
        unit="" if known is None else known.unit,
        sentence=share if metric == KEPT_SHARE else sentence_of(metric),
        first=points[0],
        last=points[-1],
        least=min(finite),
        most=max(finite),
    )
