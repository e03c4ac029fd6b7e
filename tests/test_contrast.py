"""Contrast and reliability: u = G - c B + lambda V and D, against the float64 oracles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from alphatoken import TokenValues, UserError, ValuationConfig, score_tokens
from alphatoken.config.estimators import ESTIMATORS
from tests.exact_oracle import exact_values
from tests.oracle import (
    Sequences,
    half_differences,
    mean_gradients,
    oracle_copy,
    relative_error,
    token_values,
)
from tests.test_valuation import LENGTHS, VALIDATION_LENGTHS, scored_set, stability
from tests.tiny import CASES, collate, pack, random_sequences, unpack, unpad

CONTRAST_LENGTHS = [(3, 5), (6, 8), (2, 2), (4, 7), (5, 1)]
C, WEIGHT, WINDOW = 0.7, 1.5, 4
TERMS = (
    "direct_target",
    "causal_target",
    "direct_contrast",
    "causal_contrast",
    "direct_proxy",
    "causal_proxy",
)


class Case:
    """One model with its rows, its stability tensors and what the oracles say."""

    def __init__(self, name: str) -> None:
        self.case = CASES[name]
        self.model = self.case.build()
        self.scored = scored_set(self.case, self.model, depth=2)
        self.fisher, self.reference = stability(self.model, list(self.scored.linears))
        self.sequences = random_sequences(LENGTHS, seed=1)
        self.validation = random_sequences(VALIDATION_LENGTHS, seed=2)
        self.contrast = random_sequences(CONTRAST_LENGTHS, seed=3)

    def score(
        self,
        rows: dict[str, dict[str, Tensor]],
        *,
        stable: bool = True,
        **config: Any,
    ) -> TokenValues:
        settings = {"layers": 2, "contrast": C, "reliability": True, **config}
        if settings.get("estimator") != "exact":
            settings["window"] = WINDOW
        parts = {"fisher": self.fisher, "reference": self.reference} if stable else {}
        return score_tokens(
            self.model, **rows, **parts, config=ValuationConfig.model_validate(settings)
        )

    def padded(self, side: str = "right") -> dict[str, dict[str, Tensor]]:
        return {
            "batch": collate(self.sequences, side),
            "validation": collate(self.validation, side),
            "contrast": collate(self.contrast, side),
        }

    def packed(self) -> dict[str, dict[str, Tensor]]:
        return {
            "batch": pack(self.sequences, 2),
            "validation": pack(self.validation, 1),
            "contrast": pack(self.contrast, 1),
        }

    def ghost_expected(self) -> list[dict[str, Tensor]]:
        twin = oracle_copy(self.model)
        halves = [
            half_differences(twin, self.scored, rows[::2], rows[1::2]) for rows in self.steering
        ]
        return token_values(
            self.model,
            self.sequences,
            self.validation,
            scored=self.scored,
            window=WINDOW,
            stability_weight=WEIGHT,
            fisher=self.fisher,
            reference=self.reference,
            contrast_weight=C,
            contrast=mean_gradients(twin, self.scored, self.contrast),
            spread={name: halves[0][name] - C * halves[1][name] for name in self.scored.linears},
        )

    @property
    def steering(self) -> list[Sequences]:
        return [self.validation, self.contrast]

    def exact_expected(self) -> list[dict[str, Tensor]]:
        expected = exact_values(
            self.model,
            self.sequences,
            self.validation,
            list(self.scored.linears),
            fisher=self.fisher,
            reference=self.reference,
            contrast=self.contrast,
            contrast_weight=C,
        )
        for row in expected:
            adaptation = row["direct_target"] - C * row["direct_contrast"]
            row["composite"] = adaptation + WEIGHT * row["direct_proxy"]
        return expected


def check(
    rows: dict[str, list[Tensor]], expected: list[dict[str, Tensor]], terms: tuple[str, ...]
) -> None:
    for term in terms:
        wanted = torch.cat([row[term] for row in expected])
        assert wanted.any(), term
        error = relative_error(torch.cat(rows[term]), wanted)
        assert error <= 1e-4, f"{term} is off by {error:.1e}"


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3"])
@pytest.mark.parametrize("contraction", ["ghost", "materialised"])
def test_ghost_matches_the_oracle(name: str, contraction: str) -> None:
    case = Case(name)
    expected = case.ghost_expected()
    terms = (*TERMS, "composite", "spread")
    for side in ("right", "left"):
        for residency in ("resident", "streamed"):
            values = case.score(case.padded(side), contraction=contraction, residency=residency)
            found = {term: unpad(getattr(values, term), case.sequences, side) for term in terms}
            check(found, expected, terms)
    if case.case.packable:
        values = case.score(case.packed(), contraction=contraction, chunk_tokens=20)
        found = {term: unpack(getattr(values, term), case.sequences, 2) for term in terms}
        check(found, expected, terms)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_exact_matches_the_oracle(name: str) -> None:
    case = Case(name)
    expected = case.exact_expected()
    terms = ("direct_target", "direct_contrast", "direct_proxy", "composite", "spread")
    for residency in ("resident", "streamed"):
        values = case.score(case.padded(), estimator="exact", residency=residency)
        found = {term: unpad(getattr(values, term), case.sequences) for term in terms}
        check(found, expected, terms)
        assert not values.causal_contrast.any()
    if case.case.packable:
        values = case.score(case.packed(), estimator="exact", chunk_tokens=20)
        found = {term: unpack(getattr(values, term), case.sequences, 2) for term in terms}
        check(found, expected, terms)


def test_without_a_fisher_the_composite_is_adaptation_alone() -> None:
    case = Case("llama")
    for estimator in ("ghost", "exact"):
        values = case.score(case.padded(), stable=False, estimator=estimator)
        target = values.direct_target + values.causal_target
        contrast = values.direct_contrast + values.causal_contrast
        assert not values.direct_proxy.any()
        torch.testing.assert_close(values.composite, target - C * contrast)


def test_a_spread_is_half_the_difference_of_values_under_each_half() -> None:
    """Each half alone, its sums multiplied by 2/N: value_a = composite + spread, value_b =
    composite - spread. Halves with equally many response tokens have them as their means."""
    case = Case("llama")
    case.validation = random_sequences([(4, 6), (2, 5), (3, 2), (5, 3)], seed=4)
    case.contrast = random_sequences([(3, 4), (2, 4)], seed=5)
    for estimator in ("ghost", "exact"):
        values = case.score(case.padded(), estimator=estimator)
        assert values.spread is not None
        for half, sign in ((0, 1), (1, -1)):
            rows = {
                "batch": collate(case.sequences),
                "validation": collate(case.validation[half::2]),
                "contrast": collate(case.contrast[half::2]),
            }
            alone = case.score(rows, estimator=estimator, reliability=False)
            error = relative_error(values.composite + sign * values.spread, alone.composite)
            assert error <= 1e-4, (estimator, half)
            assert alone.spread is None


def test_std_balance_scales_adaptation_with_contrast_in_it() -> None:
    case = Case("llama")
    plain = case.score(case.padded())
    scaled = case.score(case.padded(), balance="std")
    response = collate(case.sequences)["labels"][:, 1:] != -100
    adaptation = plain.composite - WEIGHT * (plain.direct_proxy + plain.causal_proxy)
    parts = [adaptation, plain.direct_proxy + plain.causal_proxy]
    deviations = [part[:, :-1][response].double().std(correction=0).float() for part in parts]
    expected = parts[0] / deviations[0] + WEIGHT * parts[1] / deviations[1]
    torch.testing.assert_close(scaled.composite, expected, rtol=1e-4, atol=1e-5)
    assert plain.spread is not None
    assert scaled.spread is not None
    torch.testing.assert_close(scaled.spread, plain.spread / deviations[0], rtol=1e-4, atol=1e-5)


def test_rows_and_weight_go_together() -> None:
    case = Case("llama")
    rows = case.padded()
    with pytest.raises(UserError, match=r"contrast=0.7\) needs `contrast`: training rows other"):
        case.score({key: rows[key] for key in ("batch", "validation")})
    with pytest.raises(UserError, match=r"set contrast=1\.0, or leave the rows out"):
        case.score(rows, contrast=0.0)
    empty = {**rows["contrast"], "labels": torch.full_like(rows["contrast"]["labels"], -100)}
    with pytest.raises(UserError, match="contrast has no response token"):
        case.score({**rows, "contrast": empty})
    one = {name: column[:1] for name, column in rows["validation"].items()}
    with pytest.raises(UserError, match="only one of them has response tokens: give more rows"):
        case.score({**rows, "validation": one})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"contrast_from": "drawn"}, "are read with contrast only"),
        ({"contrast_memory": 0.5}, "are read with contrast only"),
        (
            {"contrast": 1.0, "contrast_from": "scored", "estimator": "exact"},
            r"contrast_from=scored needs valuation\.estimator=ghost",
        ),
        (
            {"contrast": 1.0, "contrast_from": "moment"},
            r"contrast_from=moment needs valuation\.estimator=exact",
        ),
        (
            {"contrast": 1.0, "contrast_from": "drawn", "contrast_memory": 0.5},
            "is read with contrast_from=scored only",
        ),
        ({"contrast": -1.0}, "greater than or equal to 0"),
    ],
)
def test_keys_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ValuationConfig.model_validate(settings)


def test_where_b_comes_from_by_default() -> None:
    assert ValuationConfig().contrast_source is None
    assert ValuationConfig(contrast=1.0).contrast_source == "scored"
    assert ValuationConfig(contrast=1.0, estimator="exact").contrast_source == "drawn"
    pairs = ValuationConfig(contrast=1.0, target="preference")
    assert pairs.contrast_source == "drawn"


def test_another_estimator_states_where_it_takes_b_from(monkeypatch: pytest.MonkeyPatch) -> None:
    ghost = ESTIMATORS["ghost"]
    monkeypatch.setitem(ESTIMATORS, "third", replace(ghost, contrast_sources=("scored", "moment")))
    monkeypatch.setitem(ESTIMATORS, "fourth", replace(ghost, contrast_sources=("drawn",)))
    assert ValuationConfig(contrast=1.0, estimator="third").contrast_source == "scored"
    third = ValuationConfig(contrast=1.0, estimator="third", contrast_memory=0.5)
    assert third.contrast_source == "scored"
    with pytest.raises(ValueError, match=r"estimator=ghost or third; with fourth use drawn"):
        ValuationConfig(contrast=1.0, estimator="fourth", contrast_from="scored")
