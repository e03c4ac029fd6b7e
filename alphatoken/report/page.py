"""The HTML page of one run, or of several side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from alphatoken.report import wording
from alphatoken.report.charts import charts_of
from alphatoken.report.reading import RunRecord, read_runs
from alphatoken.report.responses import ValuedResponse
from alphatoken.report.summary import differing_settings, phases_of, summary_of
from alphatoken.report.tokens import (
    FULL_COLOUR,
    Column,
    ShownResponse,
    TokenGroup,
    by_kind,
    by_place,
    by_source,
    chosen_responses,
    columns_of,
    shown,
    standing_out,
)
from alphatoken.util.files import publish_text

if TYPE_CHECKING:
    from alphatoken.report.pairing import Pairing

RESPONSES_OF_ONE = 16
RESPONSES_OF_EACH = 8


@dataclass(frozen=True)
class Heatmaps:
    """Responses of a run to look at."""

    run: str
    columns: Sequence[Column]
    responses: Sequence[ShownResponse]


@dataclass(frozen=True)
class GroupTable:
    """Groups of tokens of every run, by the group's name."""

    title: str
    names: Sequence[str]
    runs: Sequence[Mapping[str, TokenGroup]]
    largest: float
    """The largest mean value by magnitude, which has the longest bar."""


def write_report(folders: Sequence[Path], output: Path) -> None:
    """Writes the page of runs to a file, whole or not at all.

    Names and units are those of the metrics declared so far. Raises UserError for a folder that
    holds no run and for damaged files, OSError when the disk refuses.
    """
    publish_text(output, page_of(read_runs(folders)))


def page_of(runs: Sequence[RunRecord]) -> str:
    """The page as HTML."""
    chosen = chosen_responses(runs, RESPONSES_OF_EACH if len(runs) > 1 else RESPONSES_OF_ONE)
    return page_template().render(
        runs=runs,
        summary=summary_of(runs),
        differing=differing_settings(runs) if len(runs) > 1 else [],
        pairings=_pairings(runs) if len(runs) > 1 else [],
        charts=charts_of(runs),
        times=[phases_of(run) for run in runs],
        heatmaps=[_heatmaps(*each) for each in zip(runs, chosen, strict=True)],
        tables=[
            _group_table("kind of token", by_kind, runs),
            _group_table("place in the response", by_place, runs),
            _group_table("source", by_source, runs),
        ],
        extremes={
            title: [standing_out(run.responses, most=most) for run in runs]
            for title, most in (("Most valued tokens", True), ("Least valued tokens", False))
        },
        full_colour=FULL_COLOUR,
        number=wording.number,
        sentence=wording.sentence,
    )


@cache
def page_template() -> Template:
    """The page's template, compiled once in a process."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_visible,
    )
    return environment.get_template("page.html.jinja")


def _pairings(runs: Sequence[RunRecord]) -> list[Pairing]:
    # NumPy takes longer to load than a page to be written.
    from alphatoken.report.pairing import pairings_of

    return pairings_of(runs)


def _heatmaps(run: RunRecord, chosen: Sequence[ValuedResponse]) -> Heatmaps:
    columns = columns_of(chosen)
    return Heatmaps(run.name, columns, [shown(each, columns) for each in chosen])


def _group_table(
    title: str,
    group: Callable[[Sequence[ValuedResponse]], Mapping[str, TokenGroup]],
    runs: Sequence[RunRecord],
) -> GroupTable:
    groups = [group(run.responses) for run in runs]
    values = [abs(each.value) for of_run in groups for each in of_run.values() if each.value]
    longest = max(groups, key=len)
    names = dict.fromkeys([*longest, *(name for of_run in groups for name in of_run)])
    return GroupTable(title, list(names), groups, max(values, default=0.0))


def _visible(value: object) -> object:
    """Texts of data and configurations without what is invisible; markup as it is."""
    return wording.visible(value) if type(value) is str else value
