"""Two evaluations of the same items, compared pair by pair.

Shape legend: K tasks, S resamples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from rich.table import Table

from alphatoken.config.evaluation import EvaluationConfig, Part
from alphatoken.errors import UserError
from alphatoken.evaluation.measures import MEASURES, Measure, resampled
from alphatoken.evaluation.results import Evaluation, TaskResult
from alphatoken.util.resampling import Estimate, Floats, estimate


@dataclass(frozen=True)
class Difference:
    """By how much a measure of a task differs: after minus before."""

    task: str
    part: Part
    measure: Measure
    before: float
    after: float
    difference: Estimate
    resamples_S: Floats
    """The difference in each resample, of both evaluations' same items."""

    @property
    def improved_S(self) -> Floats:
        """The resamples counted so that more is better."""
        return self.resamples_S if self.measure.better == "higher" else -self.resamples_S

    @property
    def improvement(self) -> float:
        """The difference counted so that more is better."""
        value = self.difference.value
        return value if self.measure.better == "higher" else -value


@dataclass(frozen=True)
class Comparison:
    """All measures of all tasks that two evaluations have in common."""

    before: str
    after: str
    differences: Sequence[Difference]

    def table(self) -> Table:
        """Every measure before and after, and the difference with its 95 % interval."""
        table = Table("task", "measure", "before", "after", "difference", "95 % interval")
        table.title, table.title_justify = f"{self.before} -> {self.after}", "left"
        for each in self.differences:
            found = each.difference
            table.add_row(
                each.task,
                each.measure.name,
                f"{each.before:.4f}",
                f"{each.after:.4f}",
                f"{found.value:+.4f}",
                f"[{found.low:+.4f}, {found.high:+.4f}]",
            )
        return table

    def sentence(self) -> str:
        """What was learned and what was kept: `target +x [a, b], retention -y [c, d]`.

        Each is the mean improvement of the first measures of its tasks, as far as they have one
        unit (`_of_one_unit`); more is better in all.
        """
        said = []
        for part in get_args(Part):
            main: dict[str, Difference] = {}
            for each in self.differences:
                if each.part == part:
                    main.setdefault(each.task, each)
            if not main:
                continue
            counted = _of_one_unit([*main.values()])
            found = _mean_improvement(counted)
            named = ", ".join(f"{each.task} {each.measure.name}" for each in counted)
            said.append(
                f"{part} {found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}] ({named})"
            )
        return ", ".join(said)


def _of_one_unit(differences: Sequence[Difference]) -> list[Difference]:
    """Those that are shares (0 to 1); where none is, those of the first one's measure."""
    shares = [each for each in differences if each.measure.is_share]
    first = differences[0].measure.name
    return shares or [each for each in differences if each.measure.name == first]


def _mean_improvement(differences: Sequence[Difference]) -> Estimate:
    value = sum(each.improvement for each in differences) / len(differences)
    improved_KS = np.stack([each.improved_S for each in differences])
    return estimate(value, improved_KS.mean(0))


def compare(before: Evaluation, after: Evaluation, config: EvaluationConfig) -> Comparison:
    """The differences of all tasks that both have. Items are resampled together, so what makes an
    item hard for both does not widen the intervals. Raises UserError as `check_comparable` does."""
    differences = []
    for place, name in enumerate(check_comparable(before, after)):
        differences += _differences(
            name, before.tasks[name], after.tasks[name], config.resamples, config.seed + place
        )
    return Comparison(before.model, after.model, differences)


def check_comparable(before: Evaluation, after: Evaluation) -> list[str]:
    """The tasks that both have. Raises UserError where there are none, or one was another one, had
    other settings, or has other items."""
    common = [name for name in before.tasks if name in after.tasks]
    if not common:
        raise UserError(
            f"the evaluations have no task in common: {', '.join(before.tasks) or 'none'} of "
            f"{before.model}, {', '.join(after.tasks) or 'none'} of {after.model}"
        )
    for name in common:
        _check_pairs(name, before.tasks[name], after.tasks[name])
    return common


def _check_pairs(name: str, before: TaskResult, after: TaskResult) -> None:
    if before.task != after.task:
        raise UserError(f"task {name} is {before.task} before and {after.task} after")
    for key in sorted({*before.settings, *after.settings}):
        was, now = before.settings.get(key), after.settings.get(key)
        if was != now:
            raise UserError(
                f"task {name}: {key} was {was!r} before and is {now!r} after, so the numbers are "
                "of different questions; evaluate again with the same"
            )
    ids = [[item["id"] for item in each.items] for each in (before, after)]
    if ids[0] == ids[1]:
        _check_tokens(name, before, after)
        return
    unpaired = next(
        (place for place, (was, now) in enumerate(zip(*ids, strict=False)) if was != now), None
    )
    where = (
        f"{len(ids[0])} items before and {len(ids[1])} after"
        if unpaired is None
        else f"item {unpaired + 1} is {before.items[unpaired]['row']} before and "
        f"{after.items[unpaired]['row']} after, with other content"
    )
    raise UserError(
        f"task {name} has other items in the two evaluations, which cannot be paired: {where}; "
        "evaluate both on the same rows"
    )


def _check_tokens(name: str, before: TaskResult, after: TaskResult) -> None:
    """Raises UserError where no measure is left that does not depend on the number of tokens, and
    that differs."""
    place = _other_tokens(before, after)
    if place is not None and not _measures_of(before, after):
        was, now = (each.items[place].get("tokens") for each in (before, after))
        raise UserError(
            f"task {name}: {before.items[place]['row']} has {was} response tokens before and {now} "
            "after, so the numbers are of different tokens; evaluate both with one tokenizer, chat "
            "template and data.train_reasoning"
        )


def _other_tokens(before: TaskResult, after: TaskResult) -> int | None:
    """The first item that had another number of tokens."""
    pairs = zip(before.items, after.items, strict=True)
    return next(
        (place for place, (was, now) in enumerate(pairs) if was.get("tokens") != now.get("tokens")),
        None,
    )


def _measures_of(before: TaskResult, after: TaskResult) -> list[Measure]:
    """The measures that two results of the same items can be compared by: where texts have other
    tokens, none that is per token."""
    measures = MEASURES[before.task]
    if _other_tokens(before, after) is None:
        return [*measures]
    if before.task == "preference_accuracy":  # of which response is longer, too
        return []
    return [each for each in measures if each.per != "tokens"]


def _differences(
    name: str, before: TaskResult, after: TaskResult, resamples: int, seed: int
) -> list[Difference]:
    measures = _measures_of(before, after)
    before_S, after_S = (
        resampled(measures, each.items, resamples, seed) for each in (before, after)
    )
    found = []
    for measure, was_S, now_S in zip(measures, before_S, after_S, strict=True):
        was, now = measure.value(before.items), measure.value(after.items)
        resamples_S = now_S - was_S
        found.append(
            Difference(
                task=name,
                part=after.part,
                measure=measure,
                before=was,
                after=now,
                difference=estimate(now - was, resamples_S),
                resamples_S=resamples_S,
            )
        )
    return found
