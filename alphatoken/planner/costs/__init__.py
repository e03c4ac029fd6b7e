"""What scoring costs, a module per estimator.

A new estimator's cost is a `ScoringCost`; the estimator's entry in `alphatoken.config.estimators`
says where it is. docs/extending.md has an example.
"""

from __future__ import annotations

from alphatoken.config.estimators import ESTIMATORS, resolve
from alphatoken.errors import UserError
from alphatoken.planner.costs.base import ScoringCost


def cost_of(estimator: str) -> ScoringCost:
    """The cost of a registered estimator. Raises UserError where it has none."""
    cost = resolve(ESTIMATORS[estimator].cost)
    if cost is None:
        raise UserError(
            f"valuation.estimator={estimator} cannot be planned: it is registered without a cost"
        )
    assert isinstance(cost, ScoringCost), f"the cost of {estimator} is no ScoringCost"
    return cost
