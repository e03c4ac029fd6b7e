"""One linear's contraction against the equation, written out with explicit outer products."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from alphatoken.batch import RowIndex
from alphatoken.models.scored import ScoredLinear
from alphatoken.passes.capture import Entry
from alphatoken.passes.chunks import Chunk
from alphatoken.values.algebra import FromMatrix
from alphatoken.values.ghost.contract import Contractions, TermSums, contract, contract_at_once
from alphatoken.values.ghost.signals import LinearSignals

ROWS, LENGTH, INPUTS, OUTPUTS = 2, 5, 3, 4
LAMBDA = 1.5


def random_signals(*, causal: bool) -> LinearSignals:
    """Signals of the last two of three rows, in float64."""
    targets_BT = torch.tensor([[-1, 7, 7, -1, -1], [7, -1, 7, 7, -1]])
    chunk = Chunk(
        rows=slice(1, 3),
        entry=Entry(
            layer_inputs=(), first_BTH=torch.zeros(ROWS, LENGTH, 1), between=None, last_BTH=None
        ),
        index=RowIndex.of_mask(targets_BT == 7),
        span=slice(1, 6),
        halves=None,
        targets_BT=targets_BT,
        has_response=True,
    )
    return LinearSignals(
        linear=ScoredLinear("v_proj", is_value=causal),
        chunk=chunk,
        act_BTI=torch.randn(ROWS, LENGTH, INPUTS, dtype=torch.float64),
        outgrad_BTO=torch.randn(ROWS, LENGTH, OUTPUTS, dtype=torch.float64),
        mixed_BTO=torch.randn(ROWS, LENGTH, OUTPUTS, dtype=torch.float64) if causal else None,
    )


def frobenius(outgrad_BTO: Tensor, matrix_OI: Tensor, act_BTI: Tensor) -> Tensor:
    """<d_t h_t^T, M> of every position, (B, T)."""
    return (torch.einsum("bto,bti->btoi", outgrad_BTO, act_BTI) * matrix_OI).sum((2, 3))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("with_drift", [True, False])
def test_the_terms_are_those_of_the_equation(causal: bool, with_drift: bool) -> None:
    signals = random_signals(causal=causal)
    g_OI, v_OI = (torch.randn(OUTPUTS, INPUTS, dtype=torch.float64) for _ in range(2))
    contractions = Contractions(
        target=FromMatrix(g_OI), proxy=FromMatrix(v_OI) if with_drift else None
    )
    expected = {"direct_target": frobenius(signals.outgrad_BTO, g_OI, signals.act_BTI)}
    if with_drift:
        expected["direct_proxy"] = frobenius(signals.outgrad_BTO, v_OI, signals.act_BTI)
    if signals.mixed_BTO is not None:
        expected["causal_target"] = frobenius(signals.mixed_BTO, g_OI, signals.act_BTI)
        if with_drift:
            expected["causal_proxy"] = frobenius(signals.mixed_BTO, v_OI, signals.act_BTI)

    response_BT = signals.chunk.targets_BT == 7
    terms = contract(signals, contractions)
    assert terms.keys() == expected.keys()
    for term, value_BT in expected.items():
        assert torch.allclose(terms[term].double(), value_BT[response_BT], rtol=1e-5), term
    weighted = [
        (LAMBDA if term.endswith("proxy") else 1.0) * value_BT
        for term, value_BT in expected.items()
    ]
    at_once_R = contract_at_once(signals, contractions, LAMBDA)
    assert torch.allclose(at_once_R.double(), torch.stack(weighted).sum(0)[response_BT], rtol=1e-4)


@pytest.mark.parametrize("split", [True, False])
def test_sums_land_on_the_response_of_their_rows(split: bool) -> None:
    signals = random_signals(causal=True)
    contractions = Contractions(
        target=FromMatrix(torch.ones(OUTPUTS, INPUTS, dtype=torch.float64)), proxy=None
    )
    response_BT = torch.zeros(3, LENGTH, dtype=torch.bool)
    response_BT[0, 3] = True
    response_BT[1:] = signals.chunk.targets_BT == 7
    sums = TermSums(RowIndex.of_mask(response_BT), split=split)
    for _ in range(2):  # two linears
        assert sums.add(signals, contractions, LAMBDA)
    values = sums.values((1.0, LAMBDA))
    expected_BT = torch.zeros(3, LENGTH)
    expected_BT[1:][response_BT[1:]] = 2 * contract_at_once(signals, contractions, LAMBDA)
    assert torch.allclose(values.composite, expected_BT, rtol=1e-4)
    assert values.direct_target.isnan().equal(response_BT & (not split))


def test_what_is_not_finite_is_noticed() -> None:
    signals = random_signals(causal=False)
    contractions = Contractions(
        target=FromMatrix(torch.full((OUTPUTS, INPUTS), torch.inf).double()), proxy=None
    )
    every_BT = torch.ones(3, LENGTH, dtype=torch.bool)
    assert not TermSums(RowIndex.of_mask(every_BT), split=True).add(signals, contractions, 1.0)
