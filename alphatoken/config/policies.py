"""Selection policies by name, with what each needs of a run.

What they sort tokens by is in `selection.policy`, whose `register_policy` adds a policy to both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from alphatoken.config.choices import OneOf

Need = Literal["values", "terms", "spread", "noise", "reference", "start", "entropy", "store"]
"""Token values (`valuation.enabled`), the terms they are made of (`valuation.split_terms`), how
reliable they are (`valuation.reliability`), reproducible noise, the losses of `reference.model`,
those of the starting model where no `reference.model` is given, the entropy of the model's
predictions, at the price of the head once more, or values that were made before
(`selection.store`)."""


@dataclass(frozen=True, kw_only=True)
class PolicyTraits:
    """What a run has to provide for a policy, and how its sort keys may be used."""

    needs: frozenset[Need] = frozenset()
    keeps_all: bool = False
    """Whether every token is kept, whatever the keep ratio and the sort keys are."""
    grades: bool = True
    """Whether sort keys say by how much one token is better than another, so that soft weights can
    be made of them."""
    in_value: bool = False
    """Whether sort keys are values, so that thresholds can be in units of the values' noise."""
    keeps: str = ""
    """What it keeps, for the help of `selection.policy`."""


POLICY_TRAITS: dict[str, PolicyTraits] = {
    "top_value": PolicyTraits(
        needs=frozenset({"values"}), in_value=True, keeps="the highest values"
    ),
    "adaptation": PolicyTraits(
        needs=frozenset({"terms"}), in_value=True, keeps="the highest adaptation part of the value"
    ),
    "agreement": PolicyTraits(
        needs=frozenset({"values", "spread"}),
        in_value=True,
        keeps="the highest values in the kinder half of the held-out rows",
    ),
    # A mean over a response has less noise than the values of its tokens, so no `in_value`.
    "response_agreement": PolicyTraits(
        needs=frozenset({"values", "spread"}),
        keeps="the responses of highest mean value in the kinder half of the held-out rows",
    ),
    "stored": PolicyTraits(
        needs=frozenset({"store"}),
        keeps="the highest values that recipes/value_tokens.py has stored",
    ),
    "random": PolicyTraits(needs=frozenset({"noise"}), grades=False, keeps="a random choice"),
    "loss": PolicyTraits(keeps="the highest losses"),
    "low_perplexity": PolicyTraits(keeps="the lowest losses"),
    "probability": PolicyTraits(keeps="the highest probabilities under the model"),
    "reference_probability": PolicyTraits(
        needs=frozenset({"start"}), keeps="the highest under reference.model or the start"
    ),
    "excess_loss": PolicyTraits(
        needs=frozenset({"reference"}), keeps="the highest losses above reference.model's (Rho-1)"
    ),
    "retrospective_excess_loss": PolicyTraits(
        needs=frozenset({"start"}), keeps="the highest below those of reference.model or the start"
    ),
    # Minus infinity has no standard deviation.
    "below_mean_probability": PolicyTraits(
        grades=False, keeps="the lowest probabilities below their response's mean (ConfPO)"
    ),
    "all": PolicyTraits(keeps_all=True, grades=False, keeps="everything"),
}

PolicyName = Annotated[str, OneOf(POLICY_TRAITS)]
