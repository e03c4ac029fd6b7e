"""The rules of the field against their formulas, written out token by token in Python's own
numbers."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from alphatoken.config.file import load_config
from alphatoken.config.policies import Need
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.weights import WEIGHT_TRAITS
from alphatoken.selection import rules
from alphatoken.selection.facts import TokenFacts
from alphatoken.selection.weights import WEIGHT_RULES, WeightRule
from tests.tiny import with_index

# Numbers by sequence; a sequence may have no token.
losses = st.lists(
    st.lists(st.integers(0, 800).map(lambda n: n / 64), max_size=6), min_size=1, max_size=5
)
scores = st.lists(
    st.lists(st.integers(-300, 300).map(lambda n: n / 64), max_size=6), min_size=1, max_size=5
)


def flat(rows: Sequence[Sequence[float]]) -> tuple[Tensor, Tensor]:
    """The numbers of all sequences, shuffled, and which sequence each is of."""
    numbers = [number for row in rows for number in row]
    sequence = [place for place, row in enumerate(rows) for _ in row]
    order = torch.randperm(len(numbers), generator=torch.Generator().manual_seed(len(numbers)))
    number_R = torch.tensor(numbers, dtype=torch.float64)[order]
    return number_R, torch.tensor(sequence, dtype=torch.int64)[order]


def by_token(
    expected: dict[tuple[int, float], float], numbers: Tensor, sequences: Tensor
) -> Tensor:
    """The expected weight of each token, where equal numbers of a sequence have equal weights."""
    pairs = zip(sequences.tolist(), numbers.tolist(), strict=True)
    return torch.tensor([expected[pair] for pair in pairs], dtype=torch.float64)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_power_weights_are_powers_of_the_probability(power: float) -> None:
    probability = torch.tensor([1.0, 0.5, 0.1, 1e-6], dtype=torch.float64)
    weight = rules.power_weights(-probability.log(), power)
    assert torch.allclose(weight, torch.tensor([p**power for p in probability.tolist()]).double())


@settings(deadline=None)
@given(rows=losses, parted=st.booleans())
def test_talr_takes_the_median_over_the_sequences_of_a_group(
    rows: list[list[float]], parted: bool
) -> None:
    """With all sequences in one group, and with every other one in a second."""
    number, sequence = flat(rows)
    group = sequence % 2 if parted else torch.zeros_like(sequence)
    expected = {}
    for member in (0, 1) if parted else (0,):
        own = [row for row in range(len(rows)) if not parted or row % 2 == member]
        means = [statistics.fmean(rows[row]) for row in own if rows[row]]
        tau = statistics.median(means) if means else 0.0
        for row in own:
            for loss in rows[row]:
                if tau > 0:
                    weight = math.exp(-loss) ** (1 / tau) if tau > 1e-2 else math.exp(-loss / tau)
                else:
                    weight = float(loss == 0)
                expected[row, loss] = max(weight, 0.01)
    actual = rules.talr_weights(number, sequence, group)
    assert torch.allclose(actual, by_token(expected, number, sequence), atol=1e-9)


def test_talr_by_hand() -> None:
    """Means 1, 2 and 9: tau is 2."""
    nll = torch.tensor([0.5, 1.5, 2.0, 9.0, 100.0])
    sequence = torch.tensor([0, 0, 1, 2, 1])
    means = torch.tensor([0.5, 1.5, 2.0, 9.0]), torch.tensor([0, 0, 1, 2])
    weight = rules.talr_weights(*means, torch.zeros(4, dtype=torch.int64))
    assert weight.tolist() == pytest.approx(
        [math.exp(-x / 2) for x in (0.5, 1.5, 2)] + [math.exp(-4.5)]
    )
    apart = rules.talr_weights(nll, sequence, sequence)
    assert apart[:2].tolist() == pytest.approx([math.exp(-0.5), math.exp(-1.5)])
    assert float(apart[4]) == pytest.approx(max(math.exp(-100 / 51), 0.01))


@pytest.mark.parametrize("temperature", [0.05, 1.0, 30.0])
@settings(deadline=None)
@given(rows=scores)
def test_gibbs_weights_are_the_closed_form(temperature: float, rows: list[list[float]]) -> None:
    number, sequence = flat(rows)
    expected: dict[tuple[int, float], float] = {}
    for place, row in enumerate(rows):
        spread = statistics.pstdev(row) if row else 0.0
        if row and spread <= 1e-8 * abs(statistics.fmean(row)):
            expected |= {(place, value): 1.0 for value in row}
            continue
        unit = [value / spread for value in row]
        parts = [math.exp((each - max(unit)) / temperature) for each in unit]
        share = [part / sum(parts) for part in parts]
        uniform = statistics.pvariance([each / len(row) for each in unit]) if row else 0.0
        weighed = (
            statistics.pvariance([q * each for q, each in zip(share, unit, strict=True)])
            if row
            else 0.0
        )
        control = min(1.0, math.sqrt(uniform / weighed)) if weighed > 0 else 1.0
        for value, q in zip(row, share, strict=True):
            expected[place, value] = control * len(row) * q
    actual = rules.gibbs_weights(number, sequence, temperature)
    assert torch.allclose(actual, by_token(expected, number, sequence), rtol=1e-6, atol=1e-9)
    for place, row in enumerate(rows):
        assert float(actual[sequence == place].sum()) <= len(row) * (1 + 1e-9)


def test_confpo_keeps_what_is_strictly_below_the_mean_probability() -> None:
    probability = [[0.9, 0.1, 0.5], [0.25, 0.25], [0.7]]
    number, sequence = flat([[-math.log(p) for p in row] for row in probability])
    key = rules.below_mean_probability(number, sequence)
    for row, values in enumerate(probability):
        for nll, actual in zip(number[sequence == row], key[sequence == row], strict=True):
            below = statistics.fmean(values) - math.exp(-float(nll))
            if below > 1e-12:
                assert float(actual) == pytest.approx(below)
            else:
                assert float(actual) == -math.inf


def test_excess_losses_have_opposite_signs() -> None:
    nll, reference = torch.tensor([3.0, 1.0]), torch.tensor([1.0, 2.0])
    assert rules.excess_loss(nll, reference).tolist() == [2.0, -1.0]
    assert rules.retrospective_excess_loss(nll, reference).tolist() == [-2.0, 1.0]


def test_entropy_weights_are_about_one_where_twenty_tokens_are_equally_likely() -> None:
    assert float(rules.entropy_weights(torch.tensor(math.log(20)))) == pytest.approx(
        0.99858, abs=1e-5
    )


def test_rules_of_no_token() -> None:
    none, nowhere = torch.zeros(0), torch.zeros(0, dtype=torch.int64)
    assert rules.talr_weights(none, nowhere, nowhere).shape == (0,)
    assert rules.gibbs_weights(none, nowhere, 1.0).shape == (0,)
    assert rules.below_mean_probability(none, nowhere).shape == (0,)


def test_weight_rules_state_what_they_need() -> None:
    """What a rule reads is there with all its needs, and not without one of them."""
    ones = torch.ones(2, 3)
    given: dict[Need, dict[str, Any]] = {
        "values": {"values": {"composite": ones}},
        "entropy": {"entropy": ones},
    }
    batch = with_index({"response": ones.bool()})

    def read(rule: WeightRule, needs: Iterable[Need]) -> None:
        known = {"values": {}, **{key: each for need in needs for key, each in given[need].items()}}
        facts = TokenFacts(batch=batch, nll_BT=ones, protected_BT=ones.bool(), **known)
        for column in rule.reads.values():
            assert column(facts).equal(ones)

    for name, rule in WEIGHT_RULES.items():
        needs = WEIGHT_TRAITS[name].needs
        read(rule, needs)
        for need in needs:
            with pytest.raises(LookupError, match=f"must state need '{need}'"):
                read(rule, needs - {need})


PAGE = Path(__file__).parent.parent / "docs" / "rules.md"
RULES = (
    *("dft", "talr", "eaft", "gibbs"),
    *("excess_loss", "retrospective_excess_loss", "below_mean_probability"),
    *("probability", "reference_probability"),
)
"""Weight rules and sort keys by their names."""


def recipes() -> list[tuple[str, str]]:
    """The rules of the page's tables, and the settings each is switched on with."""
    found = []
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 5 and "=" in cells[3]:
            found.append((cells[0].removeprefix("| "), cells[3].strip("`")))
    return found


def test_every_rule_is_on_the_page() -> None:
    """Those with a name of their own, however they are switched on."""
    settings = " ".join(each for _, each in recipes())
    for name in RULES:
        assert re.search(rf"[=: ]{name}\b", settings), (
            f"docs/rules.md does not say how to use {name}"
        )
    assert len(recipes()) == 12


@pytest.mark.parametrize(("rule", "settings"), recipes())
def test_recipes_of_the_page_are_valid_configurations(
    rule: str, settings: str, tmp_path: Path
) -> None:
    """With the sections that any run needs, and without values unless the recipe asks for them."""
    overrides = re.findall(r"(\S+?=(?:\{[^}]*\}|\S+))", settings)
    assert " ".join(overrides) == settings
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {name_or_path: m}\ndata: {train: t, validation: v}\ntrain: {output_dir: o}\n"
        "valuation: {enabled: false}\n" + ("preference: {}\n" if "preference." in settings else "")
    )
    config = load_config(
        RunConfig, file, overrides, with_section={"preference": PreferenceRunConfig}
    )
    assert config.valuation.enabled == ("valuation.enabled=true" in settings)
