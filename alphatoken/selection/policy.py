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
    "response_agreement": lambda facts: _response_agreement(facts),
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
    nll_R = facts.response_index.take(facts.nll_BT)
    document_R, documents, total = _responses(facts)
    key_R = rules.below_mean_probability(nll_R, document_R, sequences=documents, total=total)
    key_BT[facts.response_BT] = key_R.float()
    return key_BT


def _response_agreement(facts: TokenFacts) -> Tensor:
    """Mean value + abs(mean spread) of each token's response: negative only where both halves of
    the held-out rows call the response as a whole harmful."""
    index = facts.response_index
    value_R, spread_R = index.take(facts.composite_BT), index.take(facts.spread_BT)
    document_R, documents, total = _responses(facts)
    value_S = rules.sequence_means(value_R, document_R, documents, total)
    spread_S = rules.sequence_means(spread_R, document_R, documents, total)
    return index.put((value_S + spread_S.abs())[document_R].float())


def _responses(facts: TokenFacts) -> tuple[Tensor, int, Callable[[Tensor], Tensor] | None]:
    """Number of each token's response, (R,), and what `rules.sequence_means` needs where the rest
    of a response is on other ranks."""
    batch = facts.batch
    document_R = facts.response_index.take(batch["document_ids"])
    if "whole_rows" in batch:
        return document_R, len(batch["rows"]), facts.total
    return document_R, 0, None


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
