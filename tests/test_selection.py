"""How many tokens are kept, which ones, and that the count follows from labels alone."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphatoken.data.noise import uniform_noise
from alphatoken.selection.policy import ranking
from alphatoken.selection.select import Selection, scheduled_ratio

counts_of_rows = st.lists(st.integers(0, 12), min_size=1, max_size=5)
selections = st.builds(
    Selection,
    policy=st.just("top_value"),
    keep_ratio=st.sampled_from(["0.01", "0.3", "0.5", "0.55", "0.9", "1.0"]).map(Fraction),
    scope=st.sampled_from(["sequence", "micro_batch"]),
    protect_eos=st.booleans(),
    min_keep=st.integers(0, 3),
)


def expected_keep(
    selection: Selection, rank: Tensor, sequence: Tensor, protected: Tensor
) -> set[int]:
    """The definition, token by token."""

    def order(token: int) -> tuple[bool, float, int]:
        return (not (selection.protect_eos and bool(protected[token])), -float(rank[token]), token)

    kept: set[int] = set()
    tokens = list(range(len(rank)))
    sequences = [
        [token for token in tokens if sequence[token] == number] for number in sequence.unique()
    ]
    forced = {
        token for tokens in sequences for token in sorted(tokens, key=order)[: selection.min_keep]
    }
    for group in sequences if selection.scope == "sequence" else [tokens]:
        budget = max(math.ceil(selection.keep_ratio * len(group)), len(forced & set(group)))
        kept |= set(sorted(group, key=lambda token: (token not in forced, *order(token)))[:budget])
    return kept


@settings(deadline=None, max_examples=200)
@given(
    selection=selections,
    counts=counts_of_rows,
    seed=st.integers(0, 99),
    levels=st.sampled_from([2, 1000]),
)
def test_the_kept_tokens_are_the_best_ones(
    selection: Selection, counts: list[int], seed: int, levels: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    sequence = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    rank = torch.randint(
        0, levels, sequence.shape, generator=generator
    ).float()  # two levels make ties
    protected = torch.rand(sequence.shape, generator=generator) < 0.2
    weight = selection.weigh(rank, sequence, protected)
    assert set(weight.tolist()) <= {0.0, 1.0}
    assert set(weight.nonzero()[:, 0].tolist()) == expected_keep(
        selection, rank, sequence, protected
    )
    assert int(weight.sum()) == selection.kept_count(counts)


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
    rank = torch.tensor([torch.nan, -5.0, -5.0])
    weight = Selection("top_value", Fraction("0.6")).weigh(
        rank, torch.zeros(3, dtype=torch.int64), rank > 0
    )
    assert weight.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_soft_weights_are_sigmoids_of_standardised_values(scope: str) -> None:
    rank = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0])
    sequence = torch.tensor([0, 0, 0, 1, 1])
    protected = torch.tensor([False, False, False, True, False])
    selection = Selection("top_value", Fraction(1), scope, protect_eos=True, soft=True)  # type: ignore[arg-type]
    groups = [rank[:3], rank[3:]] if scope == "sequence" else [rank]
    standard = torch.cat(
        [(part - part.mean()) / part.std(correction=0).clamp_min(1e-9) for part in groups]
    )
    expected = torch.where(protected, 1.0, torch.sigmoid(standard))
    assert torch.allclose(selection.weigh(rank, sequence, protected), expected)
    assert selection.kept_count([3, 2]) == 5


def test_policies_rank_by_what_they_say() -> None:
    value, loss, noise = torch.rand(3, 2, 4)
    assert ranking("top_value", value, loss, None).equal(value)
    assert ranking("random", None, loss, noise).equal(noise)
    assert ranking("loss", None, loss, None).equal(loss)
    assert ranking("low_perplexity", None, loss, None).equal(-loss)
    assert Selection("all", Fraction("0.1")).kept_count([4, 6]) == 10


def test_noise_depends_on_seed_step_and_row_only() -> None:
    noise = uniform_noise(3, 5, 9, 6)
    assert uniform_noise(3, 5, 9, 4).equal(noise[:4])
    assert not any(uniform_noise(*key, 6).equal(noise) for key in ((4, 5, 9), (3, 6, 9), (3, 5, 8)))
