"""How many tokens are kept, which ones, and that the count follows from labels alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, cast, get_args

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphatoken.batch import part_of
from alphatoken.config.policies import POLICY_TRAITS, Need
from alphatoken.config.selection import Scope
from alphatoken.config.weights import WEIGHT_TRAITS
from alphatoken.data.batches import Layout, micro_batches
from alphatoken.data.noise import uniform_noise
from alphatoken.errors import NonFiniteError
from alphatoken.selection.facts import TokenFacts
from alphatoken.selection.policy import SORT_KEYS
from alphatoken.selection.select import (
    Cut,
    ResponseTokens,
    Selection,
    among_first,
    lexsort,
    response_tokens,
    scheduled_ratio,
    select,
)
from alphatoken.selection.step import weigh, weigh_globally
from alphatoken.selection.weights import WEIGHT_RULES
from alphatoken.training.dropped import DroppedTokens, counts_of
from alphatoken.training.metrics import RESPONSE_MEANS
from alphatoken.training.statistics import StepStatistics
from alphatoken.training.valued_model import StepOutput
from alphatoken.values.algebra import TERMS
from tests.tiny import with_index

counts_of_rows = st.lists(st.integers(0, 12), min_size=1, max_size=5)
cuts = st.builds(
    Cut,
    by=st.just("loss"),
    threshold=st.one_of(st.none(), st.sampled_from([-0.5, 0.0, 1.0, 1.7])),
    in_noise=st.booleans(),
    share=st.sampled_from(["0.1", "0.3", "0.5", "0.9"]).map(Fraction),
)
selections = st.builds(
    Selection,
    policy=st.sampled_from(["top_value", "all"]),
    keep_ratio=st.sampled_from(["0.01", "0.3", "0.5", "0.55", "0.9", "1.0"]).map(Fraction),
    scope=st.sampled_from(["sequence", "micro_batch"]),
    protect_eos=st.booleans(),
    min_keep=st.integers(0, 3),
    veto=st.one_of(st.none(), cuts),
    floor=st.one_of(st.none(), cuts.filter(lambda cut: cut.threshold is not None)),
)


@dataclass
class Expected:
    """What becomes of the tokens of one group, token by token."""

    kept: set[int]
    vetoed: set[int]
    below: set[int]


def expected_cut(
    cut: Cut | None, key: Tensor, spread: Tensor, group: list[int], exempt: set[int]
) -> set[int]:
    """The definition. NaN is lowest; of equal keys the later is lower."""
    if cut is None:
        return set()
    known = {token: -math.inf if key[token].isnan() else float(key[token]) for token in group}
    ranked = [token for token in group if token not in exempt]
    if cut.threshold is None:  # a share of the group, taken from those that are not exempt
        worst_first = sorted(ranked, key=lambda token: (known[token], -token))
        return set(worst_first[: math.floor(cut.share * len(group))])
    scale = math.sqrt(sum(float(spread[token]) ** 2 for token in group) / max(len(group), 1))
    limit = cut.threshold * (scale if cut.in_noise else 1)
    return {token for token in ranked if known[token] < limit}


def expected_choice(selection: Selection, tokens: ResponseTokens) -> Expected:
    """The definition, group by group."""
    key, sequence = tokens.columns["key"], tokens.sequence_R
    everything = Expected(kept=set(), vetoed=set(), below=set())

    def is_exempt(token: int) -> bool:
        return selection.protect_eos and bool(tokens.protected_R[token])

    def order(token: int) -> tuple[bool, float, int]:
        return not is_exempt(token), math.inf if key[token].isnan() else -float(key[token]), token

    every = list(range(len(key)))
    sequences = [[token for token in every if sequence[token] == n] for n in sequence.unique()]
    for group in sequences if selection.scope == "sequence" else [every]:
        exempt = {token for token in group if is_exempt(token)}
        vetoed = expected_cut(
            selection.veto, tokens.columns["veto"], tokens.columns["spread"], group, exempt
        )
        forced = {
            token
            for own in sequences
            for token in sorted(set(own) & set(group) - vetoed, key=order)[: selection.min_keep]
        }
        below = expected_cut(
            selection.floor, tokens.columns["floor"], tokens.columns["spread"], group, exempt
        )
        below -= forced | vetoed
        left = [token for token in group if token not in vetoed | below]
        budget = max(math.ceil(selection.keep_ratio * len(group)), len(forced))
        budget = len(group) if selection.policy == "all" else budget
        best = sorted(left, key=lambda token: (token not in forced, *order(token)))
        everything.kept |= set(best[:budget])
        everything.vetoed |= vetoed
        everything.below |= below
    return everything


def marked(mask_R: Tensor) -> set[int]:
    return set(mask_R.nonzero()[:, 0].tolist())


@settings(deadline=None, max_examples=400)
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

    def column() -> Tensor:
        key = torch.randint(-1, levels, sequence.shape, generator=generator).double()  # 2 tie
        if extremes:
            extreme = torch.rand(sequence.shape, generator=generator)
            key[extreme < 0.1], key[extreme > 0.8] = math.nan, math.inf
            key[extreme > 0.9] = -math.inf
        return key

    tokens = ResponseTokens(
        sequence_R=sequence,
        protected_R=torch.rand(sequence.shape, generator=generator) < 0.2,
        columns={
            **{name: column() for name in ("key", "veto", "floor")},
            "spread": torch.randn(sequence.shape, generator=generator).double(),
        },
    )
    choice, expected = selection.choose(tokens), expected_choice(selection, tokens)
    assert choice.weight_R.equal(choice.kept_R.float())
    assert marked(choice.kept_R) == expected.kept
    assert marked(choice.vetoed_R) == expected.vetoed
    assert marked(choice.below_R) == expected.below
    if selection.veto is None and selection.floor is None:
        assert len(expected.kept) == selection.kept_count(counts)
    else:
        assert len(expected.kept) <= selection.kept_count(counts)


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


def tokens_of(
    key: Tensor, sequence: Tensor | None = None, protected: Tensor | None = None, **columns: Tensor
) -> ResponseTokens:
    """Response tokens with these sort keys; of one response, and none protected, unless given."""
    return ResponseTokens(
        sequence_R=torch.zeros(len(key), dtype=torch.int64) if sequence is None else sequence,
        protected_R=torch.zeros(len(key), dtype=torch.bool) if protected is None else protected,
        columns={"key": key.double(), **{name: each.double() for name, each in columns.items()}},
    )


def test_not_a_number_is_kept_last() -> None:
    key = torch.tensor([torch.nan, -5.0, -5.0])
    choice = Selection("top_value", Fraction("0.6")).choose(tokens_of(key))
    assert choice.weight_R.tolist() == [0.0, 1.0, 1.0]


@pytest.mark.parametrize("scope", ["sequence", "micro_batch"])
def test_soft_weights_are_sigmoids_of_standardised_values(scope: str) -> None:
    key = torch.tensor([1.0, 2.0, 6.0, 4.0, 4.0])
    sequence = torch.tensor([0, 0, 0, 1, 1])
    protected = torch.tensor([False, False, False, True, False])
    selection = Selection("top_value", Fraction(1), scope, protect_eos=True, weights="sigmoid")  # type: ignore[arg-type]
    groups = [key[:3], key[3:]] if scope == "sequence" else [key]
    standard = torch.cat(
        [(part - part.mean()) / part.std(correction=0).clamp_min(1e-9) for part in groups]
    )
    expected = torch.where(protected, 1.0, torch.sigmoid(standard))
    weight = selection.choose(tokens_of(key, sequence, protected)).weight_R
    assert torch.allclose(weight, expected)
    assert selection.kept_count([3, 2]) == 5


@pytest.mark.parametrize("seed", range(20))
def test_softmax_weights_have_mean_1_and_none_is_above_the_cap(seed: int) -> None:
    """By bisection: the scale at which the capped weights add up to the number of kept tokens."""
    generator = torch.Generator().manual_seed(seed)
    key = torch.randn(30, generator=generator)
    sequence = torch.repeat_interleave(torch.arange(3), 10)
    protected = torch.rand(30, generator=generator) < 0.1
    temperature, cap = [(1.0, 2.0), (0.1, 3.0), (0.01, 1.0), (5.0, 1.1)][seed % 4]
    selection = Selection(
        "top_value",
        Fraction("0.7"),
        scope="sequence",
        protect_eos=seed % 2 == 0,
        weights="softmax",
        parameters={"temperature": temperature, "cap": cap},
    )
    choice = selection.choose(tokens_of(key, sequence, protected))
    assert int(choice.kept_R.sum()) == selection.kept_count([10, 10, 10])
    for number in range(3):
        kept = choice.kept_R & (sequence == number)
        standard = (key[kept] - key[kept].mean()) / key[kept].std(correction=0)
        exempt = protected[kept] & selection.protect_eos
        logit = (standard.double() / temperature)[~exempt]
        low, high = -1000.0, 1000.0
        for _ in range(200):
            middle = (low + high) / 2
            total = float((logit + middle).clamp_max(math.log(cap)).exp().sum())
            low, high = (middle, high) if total < len(logit) else (low, middle)
        weight = choice.weight_R[kept]
        assert weight[exempt].equal(torch.ones(int(exempt.sum())))
        expected = (logit + high).clamp_max(math.log(cap)).exp().float()
        assert torch.allclose(weight[~exempt], expected, atol=1e-5)
        assert float(weight.sum()) == pytest.approx(int(kept.sum()), rel=1e-5)
        assert float(weight.max()) <= cap + 1e-6


def test_reliability_drops_what_both_halves_call_harmful_beyond_the_noise() -> None:
    """`keep_ratio: auto` as equations: value + |spread| < -z rms(spread) is dropped."""
    value, spread = torch.tensor([3.0, -1.0, -3.0, -4.0, -9.0]), torch.tensor([1.0, 2, -2, 0, 1])
    noise = math.sqrt((1 + 4 + 4 + 0 + 1) / 5)
    floor = Cut(by="agreement", threshold=-1.0, in_noise=True)
    tokens = tokens_of(value, floor=value + spread.abs(), spread=spread)
    choice = Selection("top_value", Fraction(1), floor=floor).choose(tokens)
    kept = [float(v + abs(s)) >= -noise for v, s in zip(value, spread, strict=True)]
    assert kept == [True, True, True, False, False]
    assert choice.kept_R.tolist() == kept
    # Two tokens of every response are kept all the same, and a protected one as well.
    forced = Selection("top_value", Fraction(1), floor=floor, min_keep=4).choose(tokens)
    assert forced.kept_R.tolist() == [True, True, True, True, False]
    last = torch.tensor([False] * 4 + [True])
    protected = tokens_of(value, protected=last, floor=value + spread.abs(), spread=spread)
    choice = Selection("top_value", Fraction(1), floor=floor, protect_eos=True).choose(protected)
    assert choice.kept_R.tolist() == [True, True, True, False, True]
    # Nothing is dropped where nothing is harmful.
    harmless = tokens_of(value.abs(), floor=value.abs() + spread.abs(), spread=spread)
    assert Selection("top_value", Fraction(1), floor=floor).choose(harmless).kept_R.all()


@pytest.mark.parametrize("fault", ["composite", "spread"])
def test_a_value_or_spread_that_is_not_finite_stops_the_step(fault: str) -> None:
    values = {name: torch.zeros(1, 3) for name in (*TERMS, "composite", "spread")}
    documents = torch.zeros(1, 3, dtype=torch.int64)
    columns = {
        "document_ids": documents,
        "response": documents == 0,
        "rows": torch.tensor([4]),
        "labels": documents,
    }

    def reduced(known: TokenFacts) -> None:
        statistics = StepStatistics(
            device=torch.device("cpu"), part_weights=(1.0, 0.0), has_drift=False, selections=()
        )
        choice = select([Selection("all", Fraction(1))], known).choice
        weight = torch.ones(1, 3)
        output = StepOutput(
            total=torch.tensor(3.0),
            weight_BT=weight,
            kept_index_R=torch.arange(3),
            kept_nll_R=weight[0],
            metrics={},
            facts=known,
            choice=choice,
        )
        statistics.add(known.batch, output)
        statistics.reduce(denominator=3)

    reduced(facts(values, torch.ones(1, 3), columns))
    values[fault] = torch.tensor([[0.0, torch.nan, 0.0]])
    with pytest.raises(NonFiniteError):
        reduced(facts(values, torch.ones(1, 3), columns))


@pytest.mark.parametrize("name", ["counts", "faults", "gram"])
def test_a_declared_mean_may_have_any_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of the statistics themselves have such names, too."""
    monkeypatch.setitem(RESPONSE_MEANS, name, lambda facts: 2.0 * facts.nll_BT)
    response = torch.ones(1, 3, dtype=torch.bool)
    batch = with_index({"response": response}) | {
        "document_ids": torch.zeros(1, 3, dtype=torch.int64),
        "rows": torch.tensor([4]),
    }
    known = TokenFacts(batch=batch, nll_BT=torch.ones(1, 3), protected_BT=~response, values={})
    selections = [Selection("all", Fraction(1))]
    statistics = StepStatistics(
        device=torch.device("cpu"), part_weights=(1.0, 0.0), has_drift=False, selections=selections
    )
    output = StepOutput(
        total=torch.tensor(3.0),
        weight_BT=torch.ones(1, 3),
        kept_index_R=torch.arange(3),
        kept_nll_R=torch.ones(3),
        metrics={},
        facts=known,
        choice=select(selections, known).choice,
    )
    statistics.add(known.batch, output)
    assert statistics.reduce(denominator=3).metrics[name] == 2.0
    monkeypatch.setitem(RESPONSE_MEANS, "entropy", lambda facts: facts.entropy_BT)
    statistics.add(known.batch, output)
    assert "entropy" not in statistics.reduce(denominator=3).metrics, "nothing of the run needs it"
    monkeypatch.setitem(RESPONSE_MEANS, "typo", lambda facts: facts.values["compsite"])
    with pytest.raises(KeyError, match="compsite"):
        statistics.add(known.batch, output)


def test_what_a_cut_says_of_itself() -> None:
    said = {
        "the lowest 10.0% by loss": Cut(by="loss", share=Fraction("0.1")),
        "probability below 0.1": Cut(by="probability", threshold=0.1),
        "agreement below -2 times the noise of values": Cut(
            by="agreement", threshold=-2.0, in_noise=True
        ),
        "agreement below 0": Cut(by="agreement", threshold=-0.0, in_noise=True),
    }
    assert [str(cut) for cut in said.values()] == list(said)


def test_branches_with_different_cuts_and_rules_are_weighed_each_by_its_own() -> None:
    loss = torch.tensor([[0.1, 2.0, 0.5, 3.0, 0.2, 1.0]])
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    known = facts({}, loss, {"document_ids": documents, "response": documents >= 0})
    chosen = Selection("low_perplexity", Fraction("0.7"), veto=Cut(by="probability", threshold=0.2))
    rejected = Selection("loss", Fraction(1), weights="sigmoid")
    choice = select([chosen, rejected], known).choice
    standard = (loss[0, 3:] - loss[0, 3:].mean()) / loss[0, 3:].std(correction=0)
    assert choice.weight_R[:3].tolist() == [1.0, 0.0, 1.0]
    assert choice.vetoed_R.tolist() == [False, True, False, False, False, False]
    assert torch.allclose(choice.weight_R[3:], torch.sigmoid(standard))


def facts(values: dict[str, Tensor], nll: Tensor, columns: dict[str, Tensor]) -> TokenFacts:
    """What policies see of a micro-batch with these columns, where no token ends a turn."""
    protected = torch.zeros_like(nll, dtype=torch.bool)
    batch = with_index(columns)
    return TokenFacts(batch=batch, nll_BT=nll, protected_BT=protected, values=values)


def test_policies_sort_by_what_they_say() -> None:
    value, loss, noise, reference = torch.rand(4, 2, 4)
    direct, causal, contrast, spread = torch.randn(4, 2, 4)
    values = {"composite": value, "direct_target": direct, "causal_target": causal}
    values |= {"direct_contrast": contrast, "causal_contrast": 2 * contrast, "spread": spread}
    everywhere = torch.ones(2, 4, dtype=torch.bool)
    columns = {"noise": noise, "reference_nll": reference, "response": everywhere}
    columns["stored_value"] = torch.rand(2, 4)
    columns["document_ids"] = torch.arange(2)[:, None].expand(2, 4)
    probability = torch.exp(-loss.double())
    below = (probability.mean(1, keepdim=True) - probability).float()
    agreement = value.double().mean(1) + spread.double().mean(1).abs()
    known = replace(facts(values, loss, columns), contrast=0.5)
    expected = {
        "top_value": value,
        "adaptation": direct + causal - 0.5 * 3 * contrast,
        "agreement": torch.maximum(value + spread, value - spread),
        "response_agreement": agreement[:, None].expand(2, 4).float(),
        "stored": columns["stored_value"],
        "random": noise,
        "loss": loss,
        "low_perplexity": -loss,
        "probability": torch.exp(-loss),
        "reference_probability": torch.exp(-reference),
        "excess_loss": loss - reference,
        "retrospective_excess_loss": reference - loss,
        "below_mean_probability": torch.where(below > 0, below, -torch.inf),
        "all": loss,
    }
    assert expected.keys() == SORT_KEYS.keys()
    for policy, key in expected.items():
        assert torch.allclose(SORT_KEYS[policy](known), key), policy
    assert Selection("all", Fraction("0.1")).kept_count([4, 6]) == 10


def test_a_policy_gets_what_it_states_it_needs_and_nothing_else() -> None:
    """Of every policy with one of its needs not stated: the fact is missing, and the error names
    it."""
    given: dict[Need, tuple[dict[str, Tensor], dict[str, Tensor]]] = {
        "values": ({"composite": torch.rand(2, 3)}, {}),
        "terms": (dict.fromkeys(("direct_target", "causal_target"), torch.rand(2, 3)), {}),
        "spread": ({"spread": torch.rand(2, 3)}, {}),
        "noise": ({}, {"noise": torch.rand(2, 3)}),
        "reference": ({}, {"reference_nll": torch.rand(2, 3)}),
        "start": ({}, {"reference_nll": torch.rand(2, 3)}),
        "store": ({}, {"stored_value": torch.rand(2, 3)}),
        "entropy": ({}, {}),  # no column: below
    }
    assert given.keys() == set(get_args(Need))
    assert SORT_KEYS.keys() == POLICY_TRAITS.keys()
    assert all(traits.keeps for traits in POLICY_TRAITS.values())
    for policy, traits in POLICY_TRAITS.items():

        def sort_key(needs: Iterable[Need], policy: str = policy) -> Tensor:
            values: dict[str, Tensor] = {}
            ones = torch.ones(2, 3, dtype=torch.int64)
            batch: dict[str, Tensor] = {"response": ones.bool(), "document_ids": ones}
            for need in needs:
                values |= given[need][0]
                batch |= given[need][1]
            known = facts(values, torch.rand(2, 3), batch)
            entropy_BT = torch.rand(2, 3) if "entropy" in needs else None
            return SORT_KEYS[policy](replace(known, entropy=entropy_BT))

        sort_key(traits.needs)
        for need in traits.needs:
            with pytest.raises(LookupError, match=f"must state need .*'{need}'"):
                sort_key(traits.needs - {need})


class Responses:
    """Rows of one document, or of a pair, each of a prompt of one token and so many of a
    response."""

    def __init__(self, rows: Sequence[tuple[int, ...]]) -> None:
        self._rows = rows
        self.lengths = np.array([len(row) + sum(row) for row in rows])

    def __getitem__(self, index: int) -> list[tuple[Any, Any]]:
        return [(np.full(n + 1, 7), np.arange(n + 1) > 0) for n in self._rows[index]]


def of_rows(
    rows: Sequence[tuple[int, ...]], *, packed: bool, seed: int, parts: int = 1
) -> list[TokenFacts]:
    """Each part's facts of these rows, with numbers everywhere, so also where there is no
    response."""
    layout = Layout(len(rows), pad_token=0, row_tokens=20 if packed else None, parts=parts)
    dataset = cast("Any", Responses(rows))
    (batch,) = micro_batches(dataset, np.arange(len(rows)), layout, 0, 1)
    shape = (3, *batch["response"].shape)
    nll, value, spread = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    columns: dict[str, Any] = {**batch, "nll": nll.abs(), "composite": value, "spread": spread}
    found = []
    for part in range(parts):
        own: dict[str, Any] = columns
        if parts > 1:
            own = dict(part_of(cast("Any", columns), part, parts))
        values = {name: own[name] for name in ("composite", "spread")}
        found.append(facts(values, own["nll"], own))
    return found


def keys_of_parts(policy: str, known: list[TokenFacts]) -> Tensor:
    """A policy's sort keys of rows whose parts are added up, put together again."""

    def keeping(own: list[Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda each: (own.append(each), each)[1]  # type: ignore[func-returns-value]

    def giving(totals: list[Tensor]) -> Callable[[Tensor], Tensor]:
        left = iter(totals)
        return lambda _: next(left)

    given: list[list[Tensor]] = [[] for _ in known]
    for own, part in zip(given, known, strict=True):
        SORT_KEYS[policy](replace(part, total=keeping(own)))
    totals = [torch.stack(each).sum(0) for each in zip(*given, strict=True)]
    return torch.cat([SORT_KEYS[policy](replace(each, total=giving(totals))) for each in known], 1)


def below_mean(nll: list[float], _value: list[float], _spread: list[float]) -> list[float]:
    probability = [math.exp(-each) for each in nll]
    below = [sum(probability) / len(nll) - each for each in probability]
    return [each if each > 1e-12 else -math.inf for each in below]


def mean_in_the_kinder_half(
    _nll: list[float], value: list[float], spread: list[float]
) -> list[float]:
    return [(sum(value) + abs(sum(spread))) / len(value) for _ in value]


OF_RESPONSES: dict[str, tuple[float, Callable[..., list[float]]]] = {
    "below_mean_probability": (-math.inf, below_mean),
    "response_agreement": (0.0, mean_in_the_kinder_half),
}
"""Policies whose key compares or joins the tokens of a response: the key off the response, and
those of a response from its losses, values and spreads."""
uneven = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5)


@pytest.mark.parametrize("policy", OF_RESPONSES)
@settings(deadline=None)
@given(pairs=uneven, packed=st.booleans(), paired=st.booleans(), seed=st.integers(0, 99))
def test_keys_of_responses_are_the_definition_on_any_number_of_parts(
    policy: str, pairs: list[tuple[int, int]], packed: bool, paired: bool, seed: int
) -> None:
    rows = [pair if paired else pair[:1] for pair in pairs]
    off, definition = OF_RESPONSES[policy]
    for parts in (1, 2, 3):
        known = of_rows(rows, packed=packed, seed=seed, parts=parts)
        keys = keys_of_parts(policy, known)
        of_parts = [(each.nll_BT, each.composite_BT, each.spread_BT) for each in known]
        numbers = [torch.cat(each, 1) for each in zip(*of_parts, strict=True)]
        document = torch.cat([each.batch["document_ids"] for each in known], 1)
        response = torch.cat([each.response_BT for each in known], 1)
        assert keys[~response].eq(off).all()
        for number in range(sum(map(len, rows))):
            own = response & (document == number)
            expected = definition(*(each[own].double().tolist() for each in numbers))
            assert keys[own].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("branches", [1, 2])
@settings(deadline=None)
@given(pairs=uneven, packed=st.booleans(), seed=st.integers(0, 99))
def test_a_veto_by_response_agreement_drops_whole_responses_that_both_halves_call_harmful(
    branches: int, pairs: list[tuple[int, int]], packed: bool, seed: int
) -> None:
    """In pairs only rejected ones, where only these have the veto."""
    (known,) = of_rows([pair[:branches] for pair in pairs], packed=packed, seed=seed)
    veto = Cut(by="response_agreement", threshold=0.0)
    selections = [Selection("all", Fraction(1)), Selection("all", Fraction(1), veto=veto)]
    choice = select(selections[-branches:], known).choice
    vetoed = known.response_index.put(choice.vetoed_R)
    document = known.batch["document_ids"]
    harmful = torch.zeros_like(vetoed)
    for number in range(branches * len(pairs)):
        own = known.response_BT & (document == number)
        value, spread = (known.values[name][own].double() for name in ("composite", "spread"))
        if number % branches == branches - 1 and own.any():
            harmful |= own & ((value + spread).mean() < 0) & ((value - spread).mean() < 0)
    assert vetoed.equal(harmful)
    assert choice.kept_R.equal(~choice.vetoed_R)


def test_what_was_dropped_is_counted_by_branch_and_said() -> None:
    value, spread = torch.randn(2, 2, 5, generator=torch.Generator().manual_seed(0)).unbind(0)
    documents = torch.tensor([[0, 0, 0, 1, 1], [2, 2, 3, 3, -1]])
    response = documents >= 0
    columns = {"document_ids": documents, "response": response}
    known = facts({"composite": value, "spread": spread}, torch.rand(2, 5), columns)
    chosen = Selection("top_value", Fraction(1), floor=Cut(by="top_value", threshold=0.0))
    share = Fraction("0.5")
    rejected = Selection("top_value", share, veto=Cut(by="probability", share=share))
    selections = [chosen, rejected]
    choice = select(selections, known).choice
    counts = counts_of(known, choice, branches=2)
    dropped = DroppedTokens(counts, selections, ("chosen", "rejected"), has_spread=True)

    values, spreads = value[response].tolist(), spread[response].tolist()
    branches = (documents[response] % 2).tolist()
    below = [v < 0 and branch == 0 for v, branch in zip(values, branches, strict=True)]
    harmful = [v + abs(s) < 0 for v, s in zip(values, spreads, strict=True)]
    kept = 5 - sum(below) + 2  # of 4 rejected tokens 2 are vetoed, and the other 2 are kept
    assert dropped.metrics() == pytest.approx(
        {
            "kept_tokens": kept,
            "vetoed_tokens": 2,
            "vetoed_share": 2 / 9,
            "vetoed_share_chosen": 0,
            "vetoed_share_rejected": 2 / 4,
            "below_threshold_share": sum(below) / 9,
            "below_threshold_share_chosen": sum(below) / 5,
            "below_threshold_share_rejected": 0,
            "noise_scale": math.sqrt(sum(each**2 for each in spreads) / 9),
            "harmful_share": sum(harmful) / 9,
            **{
                f"harmful_share_{name}": sum(
                    each for each, own in zip(harmful, branches, strict=True) if own == branch
                )
                / branches.count(branch)
                for branch, name in enumerate(("chosen", "rejected"))
            },
        }
    )
    reasons = dropped.reasons()
    assert reasons["vetoed"] == "vetoed 2 of 9 response tokens: the lowest 50.0% by probability"
    assert reasons["below"] == f"dropped {sum(below)} of 9 response tokens: top_value below 0"


def test_weight_rules_are_there_twice() -> None:
    assert WEIGHT_RULES.keys() == WEIGHT_TRAITS.keys()


def test_each_branch_is_sorted_by_its_own_policy() -> None:
    loss = torch.rand(2, 3)
    documents = torch.tensor([[0, 1, 1], [2, 2, 3]])
    known = facts({}, loss, {"document_ids": documents, "response": documents >= 0})
    selections = (Selection("loss", Fraction(1)), Selection("low_perplexity", Fraction(1)))
    sign = torch.tensor([1, -1, -1, 1, 1, -1])
    tokens = response_tokens(selections, known)
    assert tokens.columns["key"].equal((sign * loss.flatten()).double())


def test_noise_depends_on_seed_step_and_row_only() -> None:
    noise = uniform_noise(3, 5, 9, 6)
    assert uniform_noise(3, 5, 9, 4).equal(noise[:4])
    assert not any(uniform_noise(*key, 6).equal(noise) for key in ((4, 5, 9), (3, 6, 9), (3, 5, 8)))


class Documents:
    """Documents of so many tokens, all but the first of which are of the response."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def __getitem__(self, index: int) -> list[tuple[Any, Any]]:
        length = int(self.lengths[index])
        return [(np.full(length, index + 1), np.arange(length) > 0)]


def weights_by_document(
    lengths: list[int], row_tokens: int | None, scope: Scope, *, divided: bool
) -> list[list[float]]:
    """What the half of the tokens of highest loss weighs, in the order of documents; losses are
    drawn by document."""
    layout = Layout(size=len(lengths), pad_token=0, row_tokens=row_tokens)
    order = np.arange(len(lengths))
    (batch,) = micro_batches(cast("Any", Documents(lengths)), order, layout, 0, 1)
    batch = part_of(batch, 0, 1) if divided else batch
    response_BT, document_BT = batch["response"], batch["document_ids"]
    nll_BT = torch.zeros(response_BT.shape)
    numbers = batch["rows"].tolist()
    places = [response_BT & (document_BT == document) for document in range(len(numbers))]
    for number, place_BT in zip(numbers, places, strict=True):
        generator = torch.Generator().manual_seed(number)
        nll_BT[place_BT] = torch.rand(int(place_BT.sum()), generator=generator)
    facts = TokenFacts(
        batch=batch, nll_BT=nll_BT, protected_BT=torch.zeros_like(response_BT), values={}
    )
    selections = [Selection("loss", Fraction(1, 2), scope=scope)]
    if scope == "global_batch":
        (weighed,) = weigh_globally(selections, [facts]).micro_batches
    else:
        weighed = weigh(selections, facts)
    weight_BT = batch["response_index"].put(weighed.choice.weight_R)
    found = {
        number: weight_BT[place_BT].tolist()
        for number, place_BT in zip(numbers, places, strict=True)
    }
    return [found[number] for number in range(len(lengths))]


@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("scope", get_args(Scope))
@given(lengths=st.lists(st.integers(2, 9), min_size=1, max_size=7))
@example(
    lengths=[7, 6, 3]
)  # the last fits into the first row, so documents do not lie in their order
def test_packing_changes_no_choice(scope: Scope, *, divided: bool, lengths: list[int]) -> None:
    expected = weights_by_document(lengths, None, scope, divided=False)
    assert weights_by_document(lengths, 10, scope, divided=divided) == expected


@pytest.mark.parametrize(
    ("selection", "expected"),
    [
        (
            Selection("top_value", Fraction(1, 2)),
            "0.5 of the response tokens of each micro-batch, by top_value",
        ),
        (
            Selection("loss", Fraction(1, 4), scope="global_batch", weights="softmax"),
            "0.25 of the response tokens of each step, by loss, weighed by softmax",
        ),
        (
            Selection("all", Fraction(1), veto=Cut(by="agreement", share=Fraction(1, 10))),
            "all response tokens but those of the lowest 10.0% by agreement",
        ),
        (
            Selection(
                "top_value",
                Fraction(1),
                veto=Cut(by="probability", threshold=1e-4),
                floor=Cut(by="agreement", threshold=-1.0, in_noise=True),
            ),
            "all response tokens but those of probability below 0.0001 and of agreement below -1 "
            "times the noise of values",
        ),
    ],
)
def test_a_selection_says_what_it_keeps(selection: Selection, expected: str) -> None:
    assert str(selection) == expected
