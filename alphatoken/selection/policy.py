"""What selection policies sort tokens by.

A policy is an entry here and one in `config.policies`, or one call of `register_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from alphatoken.config.choices import register
from alphatoken.config.policies import POLICY_TRAITS, Need, PolicyTraits
from alphatoken.selection.facts import TokenFacts

SortKey = Callable[[TokenFacts], Tensor]
"""Gives what tokens are sorted by, (B, T): the highest are kept first, NaN last."""

SORT_KEYS: dict[str, SortKey] = {
    "top_value": lambda facts: facts.composite_BT,
    # The part of the value that says what a token does for the held-out rows.
    "adaptation": lambda facts: facts.adaptation_BT,
    # Negative only where both halves of the held-out rows call the token harmful.
    "agreement": lambda facts: facts.composite_BT + facts.spread_BT.abs(),
    "random": lambda facts: facts.noise_BT,
    "loss": lambda facts: facts.nll_BT,
    "low_perplexity": lambda facts: -facts.nll_BT,
    # Thresholds read better in these than in losses.
    "probability": lambda facts: (-facts.nll_BT).exp(),
    "reference_probability": lambda facts: (-facts.reference_nll_BT).exp(),
    # Rho-1, Lin et al., arXiv 2404.07965, Eq. 3.
    "excess_loss": lambda facts: facts.nll_BT - facts.reference_nll_BT,
    "all": lambda facts: facts.nll_BT,
}


def register_policy(
    name: str,
    sort_key: SortKey,
    *,
    needs: Iterable[Need] = (),
    keeps_all: bool = False,
    grades: bool = True,
    in_value: bool = False,
) -> None:
    """Makes a policy known as `selection.policy: name`, in this process.

    The other arguments are as in `PolicyTraits`. Every rank must register it before
    the configuration is read. Raises ValueError where the name is taken.
    """
    traits = PolicyTraits(
        needs=frozenset(needs), keeps_all=keeps_all, grades=grades, in_value=in_value
    )
    register(POLICY_TRAITS, name, traits, notion="policy")
    SORT_KEYS[name] = sort_key
