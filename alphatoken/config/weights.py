"""Weight rules by name, with what each needs of a run.

How they weigh tokens is in `selection.weights`, whose `register_weight_rule` adds a rule to both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

from alphatoken.config.choices import OneOf
from alphatoken.config.policies import Need


@dataclass(frozen=True, kw_only=True)
class WeightTraits:
    """What a run has to provide for a weight rule, and what the rule lets a user set."""

    needs: frozenset[Need] = frozenset()
    parameters: Mapping[str, float] = field(default_factory=dict)
    """Names that `selection.weight_parameters` may hold, with their defaults."""
    at_least: Mapping[str, float] = field(default_factory=dict)
    """The smallest value of some of them."""
    grades: bool = False
    """Whether weights are made of the policy's sort keys, which must then say by how much one token
    is better than another."""
    weighs_all: bool = False
    """Whether a keep ratio below 1 contradicts the rule."""


WEIGHT_TRAITS: dict[str, WeightTraits] = {
    "hard": WeightTraits(),
    "sigmoid": WeightTraits(grades=True, weighs_all=True),
    "softmax": WeightTraits(
        grades=True,
        parameters={"temperature": 1.0, "cap": 2.0},
        at_least={"temperature": 0.01, "cap": 1.0},
    ),
    "dft": WeightTraits(parameters={"power": 1.0}, at_least={"power": 0.0}),
    "talr": WeightTraits(),
    "eaft": WeightTraits(needs=frozenset({"entropy"})),
    "gibbs": WeightTraits(
        needs=frozenset({"values"}),
        parameters={"temperature": 1.0},
        at_least={"temperature": 0.01},
    ),
}

WeightsName = Annotated[str, OneOf(WEIGHT_TRAITS)]
