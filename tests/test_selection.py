"""How many tokens are kept, which ones, and that the count follows from labels alone."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.config.policies import POLICY_TRAITS
from alphatoken.data.noise import uniform_noise
from alphatoken.selection.facts import TokenFacts
from alphatoken.selection.policy import SORT_KEYS
from alphatoken.selection.select import (
    Selection,
    among_first,
    lexsort,
    scheduled_ratio,
    sort_keys,
)

counts_of_rows = st.lists(st.integers(0, 12), min_size=1, max_size=5)
selections = st.builds(
    Selection,
    policy=st.sampled_from(["top_value", "all"]),
    keep_ratio=st.sampled_from(["0.01", "0.3", "0.5", "0.55", "0.9", "1.0"]).map(Fraction),
    scope=st.sampled_from(["sequence", "micro_batch"]),
    protect_eos=st.booleans(),
    min_keep=st.integers(0, 3),
)


def expected_keep(
    selection: Selection, key: Tensor, sequence: Tensor, protected: Tensor
) -> set[int]:
    """The definition, token by token."""

    def order(token: int) -> tuple[bool, float, int]:
        unprotected = not (selection.protect_eos and bool(protected[token]))
        return unprotected, math.inf if key[token].isnan() else -float(key[token]), token

    kept: set[int] = set()
    tokens = list(range(len(key)))
    sequences = [
        [token for token in tokens if sequence[token] == number] for number in sequence.unique()
    ]
    forced = {
        token for tokens in sequences for token in sorted(tokens, key=order)[: selection.min_keep]
    }
    for group in sequences if selection.scope == "sequence" else [tokens]:
        budget = max(math.ceil(selection.keep_ratio * len(group)), len(forced & set(group)))
        budget = len(group) if selection.policy == "all" else budget
        kept |= set(sorted(group, key=lambda token: (token not in forced, *order(token)))[:budget])
    return kept


@settings(deadline=None, max_examples=300)
@given(
    selection=selections,
    counts=counts_of_rows,
    seed=st.integers(0, 99),
    levels=st.sampled_from([2, 1000]),
    shuffled=st.booleans(),
    extremes=st.booleans(),
)
def test_the_kept_tokens_are_the_best_ones(
    selection: Selection, counts: list[int], seed: int, levels: int, shuffled: bool, extremes: bool
) -> None:
    """Also where keys tie, are infinite or not a number, and where sequences are empty or lie in
    another order than their numbers."""
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    if shuffled:
        sequence = sequence[torch.randperm(len(sequence), generator=generator)]
    key = torch.randint(0, levels, sequence.shape, generator=generator).float()  # 2 levels tie
    if extremes:
        extreme = torch.rand(sequence.shape, generator=generator)
        key[extreme < 0.1], key[extreme > 0.8], key[extreme > 0.9] = math.nan, math.inf, -math.inf
    protected = torch.rand(sequence.shape, generator=generator) < 0.2
    weight = selection.weigh(key_R=key, sequence_R=sequence, protected_R=protected)
    assert set(weight.tolist()) <= {0.0, 1.0}
    assert set(weight.nonzero()[:, 0].tolist()) == expected_keep(
        selection, key, sequence, protected
    )
    assert int(weight.sum()) == selection.kept_count(counts)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 2)), min_size=1))
def test_lexsort_sorts_by_the_first_key_first(rows: list[tuple[int, int, int]]) -> None:
    order = lexsort(*torch.tensor(rows).unbind(1))
    assert order.tolist() == sorted(range(len(rows)), key=lambda position: rows[position])


def test_among_first_counts_in_each_group() -> None:
    group, order = torch.tensor([1, 0, 1, 0, 1]), torch.tensor([3, 1, 4, 0, 2])
    limit = torch.tensor([2, 1, 2, 1, 2])  # 2 of group 1, 1 of group 0
    assert among_first(group, order, limit).tolist() == [True, False, False, True, True]


@pytest.mark.parametrize(
    ("ratio", "count", "kept"), [(0.55, 100, 55), (0.1, 30, 3), (0.07, 100, 7), (0.5, 3, 2)]
)
def test_the_ratio_is_the_decimal_that_was_written(ratio: float, count: int, kept: int) -> None:
    """In binary 0.55 * 100 is a little more than 55, and its ceiling 56."""
    exact = scheduled_ratio("constant", None, ratio, step=0, steps=10)
    assert Selection("top_value", exact).kept_count([count]) == kept


def test_schedules_go_from_start_to_end() -> None:
    linear = [float(scheduled_ratio("linear", 1.0, 0.5, step, 4)) for step in range(6)]
    assert linear == [1.0, 0.875, 0.75, 0.625, 0.5, 0.5]
    cosine = [float(scheduled_ratio("cosine", 1.0, 0.5, step, 4)) for step in range(6)]
    assert cosine == pytest.approx(
        [1.0, 1 - 0.5 * (1 - math.cos(math.pi / 4)) / 2, 0.75, 0.5732233, 0.5, 0.5]
    )


def test_not_a_number_is_kept_last() -> None:
    key = torch.tensor([torch.nan, -5.0, -5.0])
    weight = Selection("top_value", Fraction("0.6")).weigh(
        key_R=key, sequence_R=torch.zeros(3, dtype=torch.int64), protected_R=key > 0
    )
    assert weight.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_soft_weights_are_sigmoids_of_standardised_values(scope: str) -> None:
    key = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0])
    sequence = torch.tensor([0, 0, 0, 1, 1])
    protected = torch.tensor([False, False, False, True, False])
    selection = Selection("top_value", Fraction(1), scope, protect_eos=True, soft=True)  # type: ignore[arg-type]
    groups = [key[:3], key[3:]] if scope == "sequence" else [key]
    standard = torch.cat(
        [(part - part.mean()) / part.std(correction=0).clamp_min(1e-9) for part in groups]
    )
    expected = torch.where(protected, 1.0, torch.sigmoid(standard))
    weight = selection.weigh(key_R=key, sequence_R=sequence, protected_R=protected)
    assert torch.allclose(weight, expected)
    assert selection.kept_count([3, 2]) == 5


def facts(values: dict[str, Tensor], nll: Tensor, columns: dict[str, Tensor]) -> TokenFacts:
    """What policies see of a micro-batch with these columns, where no token ends a turn."""
    protected = torch.zeros_like(nll, dtype=torch.bool)
    batch = cast(Batch, columns)
    return TokenFacts(batch=batch, nll_BT=nll, protected_BT=protected, values=values)


def test_policies_sort_by_what_they_say() -> None:
    value, loss, noise, reference = torch.rand(4, 2, 4)
    known = facts({"composite": value}, loss, {"noise": noise, "reference_nll": reference})
    expected = {
        "top_value": value,
        "random": noise,
        "loss": loss,
        "low_perplexity": -loss,
        "excess_loss": loss - reference,
        "all": loss,
    }
    assert expected.keys() == SORT_KEYS.keys()
    for policy, key in expected.items():
        assert SORT_KEYS[policy](known).equal(key), policy
    assert Selection("all", Fraction("0.1")).kept_count([4, 6]) == 10


def test_a_policy_gets_what_it_states_it_needs_and_nothing_else() -> None:
    """Of every policy with one of its needs not stated: the fact is missing, and the error names
    it."""
    given = {
        "values": ({"composite": torch.rand(2, 3)}, {}),
        "noise": ({}, {"noise": torch.rand(2, 3)}),
        "reference": ({}, {"reference_nll": torch.rand(2, 3)}),
    }
    assert SORT_KEYS.keys() == POLICY_TRAITS.keys()
    for policy, traits in POLICY_TRAITS.items():
        values: dict[str, Tensor] = {}
        batch: dict[str, Tensor] = {}
        for need in traits.needs:
            values |= given[need][0]
            batch |= given[need][1]
        SORT_KEYS[policy](facts(values, torch.rand(2, 3), batch))
        for need in traits.needs:
            with pytest.raises(LookupError, match=f"must state need '{need}'"):
                SORT_KEYS[policy](facts({}, torch.rand(2, 3), {}))


def test_each_branch_is_sorted_by_its_own_policy() -> None:
    loss = torch.rand(2, 3)
    known = facts({}, loss, {"document_ids": torch.tensor([[0, 1, 1], [2, 2, 3]])})
    selections = (Selection("loss", Fraction(1)), Selection("low_perplexity", Fraction(1)))
    sign = torch.tensor([[1, -1, -1], [1, 1, -1]])
    assert sort_keys(selections, known).equal(sign * loss)


def test_noise_depends_on_seed_step_and_row_only() -> None:
    noise = uniform_noise(3, 5, 9, 6)
    assert uniform_noise(3, 5, 9, 4).equal(noise[:4])
    assert not any(uniform_noise(*key, 6).equal(noise) for key in ((4, 5, 9), (3, 6, 9), (3, 5, 8)))
