"""Selection policies by name, with what each needs of a run.

What they sort tokens by is in `selection.policy`, whose `register_policy` adds a policy to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from alphatoken.config.choices import OneOf

Need = Literal["values", "noise", "reference"]
"""Token values (`valuation.enabled`), reproducible noise, or the losses of `reference.model`."""


@dataclass(frozen=True, kw_only=True)
class PolicyTraits:
    """What a run has to provide for a policy, and how its sort keys may be used."""

    needs: frozenset[Need] = frozenset()
    keeps_all: bool = False
    """Whether every token is kept, whatever the keep ratio and the sort keys are."""
    grades: bool = True
    """Whether sort keys say by how much one token is better than another, so that soft weights can
    be made of them."""


POLICY_TRAITS: dict[str, PolicyTraits] = {
    "top_value": PolicyTraits(needs=frozenset({"values"})),
    "random": PolicyTraits(needs=frozenset({"noise"}), grades=False),
    "loss": PolicyTraits(),
    "low_perplexity": PolicyTraits(),
    "excess_loss": PolicyTraits(needs=frozenset({"reference"})),
    "all": PolicyTraits(keeps_all=True, grades=False),
}

PolicyName = Annotated[str, OneOf(POLICY_TRAITS)]
