"""Softmax denominators that attention kernels give are those of the block code, which then does not
run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphatoken.passes import attention
from alphatoken.passes.attention import AttentionCall, Visibility, attention_band, log_sum_exp
from alphatoken.passes.kernel_sums import by_head, kernel_sums
from alphatoken.values.ghost import signals
from tests import test_valuation
from tests.flash_attention import stand_in
from tests.tiny import CASES, collate, pack

LAYOUTS = ("right", "left", "packed")
GIVEN = {
    "sdpa": LAYOUTS,
    "sdpa, math kernel": (),
    "eager": (),
    # Padding on the left is cut out, and with it the places of what is given.
    "flash_attention_2": ("right", "packed"),
    "flash_attention_3": ("right", "packed"),
}
"""Layouts of rows for which kernels give them."""


def entered(name: str) -> AbstractContextManager[Any]:
    if name.startswith("flash"):
        return stand_in(int(name[-1]))
    return sdpa_kernel(SDPBackend.MATH) if "math" in name else nullcontext()


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[AttentionCall]:
    """Attention calls whose band was made."""
    seen: list[AttentionCall] = []

    def spy(call: AttentionCall, window: int) -> Tensor:
        seen.append(call)
        return attention_band(call, window)

    monkeypatch.setattr(signals, "attention_band", spy)
    return seen


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", GIVEN)
@pytest.mark.parametrize("case", ["llama", "gemma3"])
def test_kernels_give_what_the_block_code_computes(
    case: str, name: str, layout: str, calls: list[AttentionCall], monkeypatch: pytest.MonkeyPatch
) -> None:
    setting = test_valuation.Setting(CASES[case], window=4)
    is_given = layout in GIVEN[name]

    def refuse(call: AttentionCall) -> NoReturn:
        raise AssertionError("the block code runs although the kernel gave the sums")

    if is_given:
        monkeypatch.setattr(attention, "log_sum_exp", refuse)
    with entered(name):
        setting.model.set_attn_implementation(name.partition(",")[0])
        rows, held_out = (
            pack(each, 2) if layout == "packed" else collate(each, layout)
            for each in (setting.sequences, setting.validation)
        )
        setting.score(rows, held_out)
    assert calls
    for call in calls:
        assert (call.log_sums_BHT is not None) == is_given
        if call.log_sums_BHT is not None:
            expected_BHT = log_sum_exp(call)
            sees = expected_BHT.isfinite()
            torch.testing.assert_close(call.log_sums_BHT[sees], expected_BHT[sees])


@pytest.mark.parametrize("given", [torch.inf, -torch.inf, 0.0, torch.nan])
def test_a_query_that_sees_nothing_has_no_part_in_the_band(given: float) -> None:
    """Kernels differ in what they give for it."""
    query, key = torch.randn(1, 2, 6, 4), torch.randn(1, 2, 6, 4)
    visibility = Visibility(documents_BT=torch.tensor([[-1, -1, 0, 0, 0, 0]]))
    call = AttentionCall(query, key, 0.5, visibility)
    expected = attention_band(call, 3)
    sums_BHT = log_sum_exp(call)
    sums_BHT[..., :2] = given
    found = attention_band(AttentionCall(query, key, 0.5, visibility, None, sums_BHT), 3)
    assert torch.equal(found, expected)


def test_only_sums_of_every_query_are_taken() -> None:
    query, sums = torch.zeros(2, 4, 5, 8), torch.rand(2, 4, 5)
    flat = sums.transpose(0, 1).reshape(4, 10)
    for given in (sums, sums[..., None], torch.cat([sums, sums], dim=-1), flat):
        found = by_head([given], query)
        assert found is not None
        assert torch.equal(found, sums)
    for others in ([], [sums, sums], [sums[..., :4]], [flat[:, :9]], [sums[:, :2]]):
        assert by_head(others, query) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("backend", ["FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION"])
def test_kernels_of_a_gpu_give_what_the_block_code_computes(backend: str, masked: bool) -> None:
    query, key, value = torch.randn(3, 2, 4, 77, 64, device="cuda", dtype=torch.bfloat16)
    mask = torch.ones(77, 77, dtype=torch.bool, device="cuda").tril()[None, None]
    call = AttentionCall(query, key, 0.125, Visibility(explicit=mask if masked else None))
    try:
        with sdpa_kernel(SDPBackend.__members__[backend]), kernel_sums("sdpa") as sums:
            torch.nn.functional.scaled_dot_product_attention(
                query.requires_grad_(),
                key,
                value,
                attn_mask=mask if masked else None,
                is_causal=not masked,
                scale=0.125,
            )
    except RuntimeError as error:
        pytest.skip(f"{backend} is not possible here: {error}")
    found = by_head(sums, query)
    assert found is not None
    torch.testing.assert_close(found, log_sum_exp(call), rtol=1e-3, atol=1e-3)
