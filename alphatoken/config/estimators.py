"""Every estimator of token values: the one place where an estimator registers.

What configurations, scoring and plans have to know of an estimator stands in its entry. Scorer and
cost are named as "module:name", as entry points are, and imported when they are first needed:
reading a configuration then loads no model library.
"""

from __future__ import annotations

import importlib
from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any

from alphatoken.config.choices import OneOf


@dataclass(frozen=True, kw_only=True)
class Estimator:
    """An entry of `ESTIMATORS`."""

    scorer: Any
    """Its `alphatoken.values.estimator.Scorer`: the class, or where it is."""
    values: str = ""
    """What they are, in a few words for `--help`; those that a program registers are not listed
    there."""
    cost: Any = None
    """Its `alphatoken.planner.costs.base.ScoringCost`: the object, or where it is; None where runs
    with it cannot be planned."""
    keys: tuple[str, ...] = ()
    """Keys of section `valuation` that it reads and not every estimator does. A key that only
    others list is refused with it, unless it has its default."""
    contrast_sources: tuple[str, ...] = ("drawn",)
    """Values of `valuation.contrast_from` that it can take B from. The first is what `auto` means,
    where the rest of the configuration allows it."""
    is_resident: bool = True
    """Whether `valuation.residency: auto` keeps scored weights and directions on every rank."""


CONTRAST_KEYS = ("contrast", "contrast_from", "reliability")

ESTIMATORS: dict[str, Estimator] = {
    "ghost": Estimator(
        values="the paper's contractions of signals of the last layers",
        scorer="alphatoken.values.ghost.scorer:GhostScorer",
        cost="alphatoken.planner.costs.ghost:COST",
        keys=("window", "contraction", "target", *CONTRAST_KEYS, "contrast_memory"),
        contrast_sources=("scored", "drawn"),
    ),
    "exact": Estimator(
        values="the true first-order effect of each token, by forward-mode differentiation",
        scorer="alphatoken.values.exact.scorer:ExactScorer",
        cost="alphatoken.planner.costs.exact:COST",
        keys=("parameters", "preconditioner", "target", *CONTRAST_KEYS),
        contrast_sources=("drawn", "moment"),
        is_resident=False,
    ),
}


EstimatorName = Annotated[str, OneOf(ESTIMATORS)]


def keys_of_some() -> list[str]:
    """Keys of section `valuation` that some estimators read and others do not."""
    return list(dict.fromkeys(key for each in ESTIMATORS.values() for key in each.keys))


def readers_of(keys: Collection[str]) -> list[str]:
    """Estimators that read some of these keys."""
    return [name for name, each in ESTIMATORS.items() if not set(keys).isdisjoint(each.keys)]


def with_contrast_from(source: str) -> list[str]:
    """Estimators that can take B from a source."""
    return [name for name, each in ESTIMATORS.items() if source in each.contrast_sources]


def resolve(reference: Any) -> Any:
    """What "module:name" stands for; anything else is itself."""
    if not isinstance(reference, str):
        return reference
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)
