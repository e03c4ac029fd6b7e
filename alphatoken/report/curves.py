"""Curves as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from alphatoken.report.wording import number, visible

WIDTH, HEIGHT = 380, 200
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 10, 24  # what is left free for the axes
STYLES = 8
"""Colours and dashes in the style sheet; further lines begin again."""
MOST_POINTS = 240
MOST_DOTS = 40
TICKS = 4

Points = Sequence[tuple[int, float]]
Scale = Callable[[float], float]


@dataclass(frozen=True)
class Line:
    """A curve with its name; `points` are (step, number), in order of steps."""

    name: str
    points: Points
    style: int = 0
    """Lines of one style look alike, on the whole page."""


def line_chart(title: str, lines: Sequence[Line], unit: str) -> Markup:
    """An SVG that scales to its place; the exact numbers of curves with few points show on hover.

    Numbers that are not finite are left out. Of more than MOST_POINTS points the least and the most
    of every so many are drawn.
    """
    finite = [[point for point in line.points if math.isfinite(point[1])] for line in lines]
    every = [point for points in finite for point in points]
    if not every:
        return Markup("")
    steps, values = [step for step, _ in every], [value for _, value in every]
    ticks = nice_ticks(min(values), max(values))
    across = _scale(min(steps), max(steps), LEFT, WIDTH - RIGHT)
    up = _scale(min(*ticks, *values), max(*ticks, *values), HEIGHT - BOTTOM, TOP)
    labels = {
        up(tick): number(tick, "bytes") if unit == "bytes" else f"{tick:.4g}" for tick in ticks
    }
    parts = [_axes(labels, {across(step): f"step {step}" for step in (min(steps), max(steps))})]
    for line, points in zip(lines, finite, strict=True):
        places = " ".join(
            f"{across(step):.1f},{up(value):.1f}" for step, value in _thinned(points, MOST_POINTS)
        )
        style = f"l{line.style % STYLES}"
        parts.append(Markup('<polyline class="{}" points="{}"/>').format(style, places))
        if len(points) <= MOST_DOTS:
            parts += [
                Markup(
                    '<circle class="{}" cx="{}" cy="{}" r="2.5"><title>{}</title></circle>'
                ).format(
                    style,
                    f"{across(step):.1f}",
                    f"{up(value):.1f}",
                    visible(f"{line.name}, step {step}: {number(value, unit)}"),
                )
                for step, value in points
            ]
    return Markup(
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}" class="chart">{}</svg>'
    ).format(WIDTH, HEIGHT, visible(title), Markup("").join(parts))


def nice_ticks(low: float, high: float) -> list[float]:
    """About TICKS round numbers that lie between two, or around a single one."""
    if not high > low:
        return [low]
    rough = (high - low) / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(each * power for each in (1, 2, 2.5, 5, 10) if each * power >= rough * 0.999)
    first, last = math.ceil(low / step), math.floor(high / step)
    return [index * step for index in range(first, last + 1)]


def _scale(low: float, high: float, begin: float, end: float) -> Scale:
    """From a range of numbers to one of places."""

    def place(value: float) -> float:
        share = (value - low) / (high - low) if high > low else 0.5
        return begin + share * (end - begin)

    return place


def _axes(rows: Mapping[float, str], columns: Mapping[float, str]) -> Markup:
    """Lines and labels, by their places from the top and from the left."""
    parts = [
        Markup(
            '<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" class="left">{}</text>'
        ).format(LEFT, f"{place:.1f}", WIDTH - RIGHT, LEFT - 5, f"{place + 4:.1f}", label)
        for place, label in rows.items()
    ]
    anchors = ("start", "end") if len(columns) > 1 else ("middle",)
    for (place, label), anchor in zip(columns.items(), anchors, strict=True):
        parts.append(
            Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(
                f"{place:.1f}", HEIGHT - 7, anchor, label
            )
        )
    return Markup("").join(parts)


def _thinned(points: Points, most: int) -> Points:
    """The points themselves, or the least and the most of each of `most` / 2 stretches."""
    if len(points) <= most:
        return points
    stretch = math.ceil(2 * len(points) / most)
    kept: list[tuple[int, float]] = []
    for begin in range(0, len(points), stretch):
        part = points[begin : begin + stretch]
        ends = {min(part, key=lambda each: each[1]), max(part, key=lambda each: each[1])}
        kept += sorted(ends)
    return kept


def swatch(style: int) -> Markup:
    """A short piece of a curve of a style, for a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 28 8" aria-hidden="true">'
        '<path class="{}" d="M1 4H27"/></svg>'
    ).format(f"l{style % STYLES}")
