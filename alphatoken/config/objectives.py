"""Preference objectives by name, with their defaults and what each reads of a run.

Their losses are in `objectives.pair_losses`, whose `register_objective` adds an objective to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from alphatoken.config.choices import OneOf


@dataclass(frozen=True, kw_only=True)
class ObjectiveTraits:
    """What a preference objective needs, and the defaults of keys whose defaults depend on it."""

    loss: str = ""
    """What it is, in a few words for `--help`; those that a program registers are not listed
    there."""
    needs_reference: bool = True
    """Whether it compares with the token losses of a reference model."""
    default_beta: float = 0.1
    default_nll_weight: float = 0.0
    reads: frozenset[str] = frozenset()
    """Those of section `preference`'s keys that only some objectives read (`OPTIONAL_KEYS`)."""


OPTIONAL_KEYS = ("label_smoothing", "margin", "normalisation", "length_decay")

OBJECTIVE_TRAITS: dict[str, ObjectiveTraits] = {
    "alpha_dpo": ObjectiveTraits(
        loss="the paper's masked DPO", reads=frozenset({"normalisation", "length_decay"})
    ),
    "dpo": ObjectiveTraits(loss="DPO", reads=frozenset({"label_smoothing", "length_decay"})),
    "ipo": ObjectiveTraits(loss="IPO", reads=frozenset({"length_decay"})),
    "hinge": ObjectiveTraits(loss="the hinge of SLiC", reads=frozenset({"length_decay"})),
    "simpo": ObjectiveTraits(
        loss="SimPO", needs_reference=False, default_beta=2.0, reads=frozenset({"margin"})
    ),
    "orpo": ObjectiveTraits(loss="ORPO", needs_reference=False, default_nll_weight=1.0),
    "cpo": ObjectiveTraits(loss="CPO", needs_reference=False, default_nll_weight=1.0),
}

ObjectiveName = Annotated[str, OneOf(OBJECTIVE_TRAITS)]
