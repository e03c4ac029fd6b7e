"""What differs between two runs on the responses that both have kept."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import correlation

from alphatoken.report.reading import RunRecord
from alphatoken.report.responses import LOSS, VALUE, ValuedResponse
from alphatoken.util.resampling import Estimate, mean_interval


@dataclass(frozen=True)
class Difference:
    """A mean over responses, with the interval that bootstrap over them gives."""

    name: str
    unit: str
    estimate: Estimate


@dataclass(frozen=True)
class Pairing:
    """A run beside the first one, response by response."""

    run: str
    baseline: str
    responses: int
    tokens: int
    differences: Sequence[Difference]


Measure = Callable[[ValuedResponse, ValuedResponse], float | None]


def pairings_of(runs: Sequence[RunRecord]) -> list[Pairing]:
    """Every further run beside the first, of those that have kept responses in common: the same
    tokens of the same row in the same step."""
    baseline, *others = runs
    own = {each.key: each for each in baseline.responses}
    found = []
    for run in others:
        pairs = [
            (own[each.key], each)
            for each in run.responses
            if each.tokens and each.key in own and own[each.key].tokens == each.tokens
        ]
        if pairs:
            found.append(_pairing(run.name, baseline.name, pairs))
    return found


def _pairing(
    run: str, baseline: str, pairs: Sequence[tuple[ValuedResponse, ValuedResponse]]
) -> Pairing:
    differences = []
    for name, unit, measure in MEASURES:
        values = [value for first, second in pairs if (value := measure(first, second)) is not None]
        if values:
            differences.append(Difference(name, unit, mean_interval(values)))
    tokens = sum(len(second.tokens) for _, second in pairs)
    return Pairing(run, baseline, len(pairs), tokens, differences)


def _loss(first: ValuedResponse, second: ValuedResponse) -> float:
    losses = [math.fsum(each.columns[LOSS]) for each in (first, second)]
    return (losses[1] - losses[0]) / len(first.tokens)


def _kept(first: ValuedResponse, second: ValuedResponse) -> float:
    kept = [sum(weight > 0 for weight in each.weights) for each in (first, second)]
    return 100 * (kept[1] - kept[0]) / len(first.weights)


def _agreement(first: ValuedResponse, second: ValuedResponse) -> float:
    weights = zip(first.weights, second.weights, strict=True)
    return 100 * sum((a > 0) == (b > 0) for a, b in weights) / len(first.weights)


def _rank_correlation(first: ValuedResponse, second: ValuedResponse) -> float | None:
    """Spearman's; None where one run has no values, or all values of one are equal."""
    columns = [each.columns.get(VALUE) for each in (first, second)]
    pairs = [
        pair
        for pair in zip(columns[0] or (), columns[1] or (), strict=False)
        if all(map(math.isfinite, pair))
    ]
    ranks = [_ranks(column) for column in zip(*pairs, strict=True)]
    return correlation(*ranks) if ranks and all(len(set(each)) > 1 for each in ranks) else None


def _ranks(values: Sequence[float]) -> list[float]:
    """The rank of each, equal ones with the mean of theirs."""
    ordered = sorted(values)
    return [(bisect_left(ordered, each) + bisect_right(ordered, each) - 1) / 2 for each in values]


MEASURES: Sequence[tuple[str, str, Measure]] = (
    ("loss, this run minus the first", "nats", _loss),
    ("share kept, this run minus the first", "percentage points", _kept),
    ("tokens that both keep or both drop", "%", _agreement),
    ("rank correlation of values", "", _rank_correlation),
)
