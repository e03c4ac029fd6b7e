"""What is told of single tokens: heatmaps, values by kind, place and source, and those that stand
out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from alphatoken.report.kinds import KINDS, kinds_of, places_of
from alphatoken.report.reading import RunRecord
from alphatoken.report.responses import LOSS, VALUE, ValuedResponse
from alphatoken.report.wording import unit_of
from alphatoken.util.means import mean

KeyT = TypeVar("KeyT")

FULL_COLOUR = 0.95
"""Quantile of the numbers of a column, by magnitude, that has the full colour."""
AROUND = 30  # characters that are shown before and behind a token that stands out
STANDING_OUT = 12
TITLES = {
    LOSS: "loss",
    VALUE: "value",
    "spread": "spread of the value",
    **{
        f"{path}_{matrix}": f"{path} {matrix}"
        for path in ("direct", "causal")
        for matrix in ("target", "contrast", "proxy")
    },
}


@dataclass(frozen=True)
class Column:
    """A number that every token has."""

    name: str
    title: str
    unit: str
    full: float
    """From which magnitude on a token has the full colour."""


@dataclass(frozen=True)
class ShownToken:
    """A token with its numbers, in order of the columns."""

    given: str
    """What stands before it that is no response."""
    text: str
    kind: str
    weight: float
    numbers: tuple[float, ...]
    colours: tuple[float, ...]
    """From -1 to 1."""


@dataclass(frozen=True)
class ShownResponse:
    """A response to look at."""

    response: ValuedResponse
    tokens: Sequence[ShownToken]


@dataclass(frozen=True)
class TokenGroup:
    """Tokens of one kind, or at one place. Without a token it has no means."""

    name: str
    count: int
    value: float | None
    """Mean value; None where tokens are not valued."""
    kept: float
    """Share that has a weight in the loss."""
    loss: float
    """Mean, in nats."""


@dataclass(frozen=True)
class StandingOut:
    """A token with an extreme value, and the text around it."""

    before: str
    text: str
    behind: str
    value: float
    weight: float
    response: ValuedResponse


def columns_of(responses: Sequence[ValuedResponse]) -> list[Column]:
    """The columns that any of the responses has: the value and its terms, then the loss. Terms that
    are zero everywhere are left out, such as the contrast of a run without any."""
    names = dict.fromkeys(
        name
        for each in responses
        for name, numbers in each.columns.items()
        if name in (LOSS, VALUE) or any(numbers)
    )
    order = sorted(names, key=lambda name: (name == LOSS, name != VALUE))
    return [
        Column(
            name,
            TITLES.get(name, name),
            unit_of("loss_response" if name == LOSS else f"{VALUE}_mean"),
            _full_colour(
                [number for each in responses for number in each.columns.get(name, ())],
            ),
        )
        for name in order
    ]


def shown(response: ValuedResponse, columns: Sequence[Column]) -> ShownResponse:
    """A response with the colours of its tokens."""
    given = dict(response.given)
    unknown = (math.nan,) * len(response.tokens)
    rows = zip(*(response.columns.get(column.name, unknown) for column in columns), strict=True)
    tokens = zip(response.tokens, kinds_of(response), response.weights, rows, strict=True)
    return ShownResponse(
        response,
        [
            ShownToken(
                given=given.get(index, ""),
                text=text,
                kind=kind,
                weight=weight,
                numbers=numbers,
                colours=tuple(
                    _colour(number, column.full)
                    for number, column in zip(numbers, columns, strict=True)
                ),
            )
            for index, (text, kind, weight, numbers) in enumerate(tokens)
        ],
    )


def chosen_responses(runs: Sequence[RunRecord], most: int) -> list[list[ValuedResponse]]:
    """At most so many responses of each run, spread over its steps; of several runs, before
    others, those that all have kept."""
    by_key = [{each.key: each for each in run.responses} for run in runs]
    shared = [key for key in by_key[0] if all(key in other for other in by_key)]
    if len(runs) > 1 and shared:
        return [[own[key] for key in _spread(shared, most)] for own in by_key]
    return [[own[key] for key in _spread(list(own), most)] for own in by_key]


def by_kind(responses: Sequence[ValuedResponse]) -> dict[str, TokenGroup]:
    """Groups by kind; kinds that do not occur are left out."""
    return _grouped(responses, kinds_of, KINDS)


def by_place(responses: Sequence[ValuedResponse]) -> dict[str, TokenGroup]:
    """Groups by the place in the response."""
    longest = max(responses, key=lambda each: len(each.tokens), default=None)
    order = dict.fromkeys(() if longest is None else places_of(longest))
    return _grouped(responses, places_of, tuple(order))


def by_source(responses: Sequence[ValuedResponse]) -> dict[str, TokenGroup]:
    """Groups by the file that the row is of, in the order of their names; none of a single one."""
    files = sorted({source_of(each) for each in responses})
    if len(files) < 2:
        return {}
    return _grouped(responses, lambda each: [source_of(each)] * len(each.tokens), files)


def source_of(response: ValuedResponse) -> str:
    """The file that a response's row is of."""
    return response.where.rpartition(":")[0]


def standing_out(responses: Sequence[ValuedResponse], *, most: bool) -> list[StandingOut]:
    """The most, or the least, valued tokens; none where tokens are not valued."""
    every = [
        (value, each, index)
        for each in responses
        for index, value in enumerate(each.columns.get(VALUE, ()))
        if math.isfinite(value)
    ]
    every.sort(key=lambda found: -found[0] if most else found[0])
    return [
        StandingOut(
            before="".join(each.tokens[:index])[-AROUND:],
            text=each.tokens[index],
            behind="".join(each.tokens[index + 1 :])[:AROUND],
            value=value,
            weight=each.weights[index],
            response=each,
        )
        for value, each, index in every[:STANDING_OUT]
    ]


def _grouped(
    responses: Sequence[ValuedResponse],
    name_tokens: Callable[[ValuedResponse], Sequence[str]],
    order: Sequence[str],
) -> dict[str, TokenGroup]:
    members: Mapping[str, list[tuple[float | None, float, float]]] = {name: [] for name in order}
    for each in responses:
        values: Sequence[float | None] = each.columns.get(VALUE, (None,) * len(each.tokens))
        names, losses = name_tokens(each), each.columns[LOSS]
        for name, value, weight, loss in zip(names, values, each.weights, losses, strict=True):
            members[name].append((value, weight, loss))
    return {name: _group(name, tokens) for name, tokens in members.items() if tokens}


def _group(name: str, tokens: Sequence[tuple[float | None, float, float]]) -> TokenGroup:
    values = [value for value, _, _ in tokens if value is not None]
    return TokenGroup(
        name=name,
        count=len(tokens),
        value=mean(values) if values else None,
        kept=sum(weight > 0 for _, weight, _ in tokens) / len(tokens),
        loss=mean([loss for _, _, loss in tokens]),
    )


def _full_colour(numbers: Sequence[float]) -> float:
    ranked = sorted(abs(number) for number in numbers if math.isfinite(number))
    return ranked[int(FULL_COLOUR * (len(ranked) - 1))] if ranked else 0.0


def _colour(number: float, full: float) -> float:
    if not math.isfinite(number) or full == 0:
        return 0.0
    return max(-1.0, min(1.0, number / full))


def _spread(keys: Sequence[KeyT], most: int) -> list[KeyT]:
    """`most` of them at equal distances, the first and the last among them."""
    if len(keys) <= most:
        return list(keys)
    if most == 1:
        return [keys[-1]]
    return [keys[round(index * (len(keys) - 1) / (most - 1))] for index in range(most)]
