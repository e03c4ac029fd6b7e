"""What selection policies sort tokens by.

A policy is an entry here and one in `config.policies`, or one call of `register_policy`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from alphatoken.config.choices import register
from alphatoken.config.policies import POLICY_TRAITS, Need, PolicyTraits
from alphatoken.selection import rules
from alphatoken.selection.facts import TokenFacts

SortKey = Callable[[TokenFacts], Tensor]
"""Gives what tokens are sorted by, (B, T): the highest are kept first, NaN last. Of rows that are
divided over ranks it is called with this rank's part, on every rank of the data group; a key that
compares a token with others of its response needs theirs from `TokenFacts.total`."""

SORT_KEYS: dict[str, SortKey] = {
    "top_value": lambda facts: facts.composite_BT,
    # The part of the value that says what a token does for the held-out rows.
    "adaptation": lambda facts: facts.adaptation_BT,
    # Negative only where both halves of the held-out rows call the token harmful.
    "agreement": lambda facts: facts.composite_BT + facts.spread_BT.abs(),
    "stored": lambda facts: facts.stored_value_BT,
    "random": lambda facts: facts.noise_BT,
    "loss": lambda facts: facts.nll_BT,
    "low_perplexity": lambda facts: -facts.nll_BT,
    # Thresholds read better in these than in losses.
    "probability": lambda facts: (-facts.nll_BT).exp(),
    "reference_probability": lambda facts: (-facts.reference_nll_BT).exp(),
    "excess_loss": lambda facts: rules.excess_loss(facts.nll_BT, facts.reference_nll_BT),
    "retrospective_excess_loss": lambda facts: rules.retrospective_excess_loss(
        facts.nll_BT, facts.reference_nll_BT
    ),
    "below_mean_probability": lambda facts: _below_mean_probability(facts),
    "all": lambda facts: facts.nll_BT,
}


def _below_mean_probability(facts: TokenFacts) -> Tensor:
    key_BT = torch.full_like(facts.nll_BT, -torch.inf)
    response_BT, batch = facts.response_BT, facts.batch
    nll_R, document_R = facts.nll_BT[response_BT], batch["document_ids"][response_BT]
    if "whole_rows" in batch:  # the rest of a response is on other ranks
        key_R = rules.below_mean_probability(
            nll_R, document_R, sequences=len(batch["rows"]), total=facts.total
        )
    else:
        key_R = rules.below_mean_probability(nll_R, document_R)
    key_BT[response_BT] = key_R.float()
    return key_BT


def register_policy(
    name: str,
    sort_key: SortKey,
    *,
    needs: Iterable[Need] = (),
    keeps_all: bool = False,
    grades: bool = True,
    in_value: bool = False,
    keeps: str = "",
) -> None:
    """Makes a policy known as `selection.policy: name`, in this process.

    The other arguments are as in `PolicyTraits`. Every rank must register it before
    the configuration is read. Raises ValueError where the name is taken.
    """
    traits = PolicyTraits(
        needs=frozenset(needs), keeps_all=keeps_all, grades=grades, in_value=in_value, keeps=keeps
    )
    register(POLICY_TRAITS, name, traits, notion="policy")
    SORT_KEYS[name] = sort_key
