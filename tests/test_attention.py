"""The band of attention probabilities against explicit (T, T) matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jvp, vmap

from alphatoken.passes.attention import (
    AttentionCall,
    Visibility,
    attention_band,
    log_sum_exp,
    mix_band,
)
from alphatoken.passes.attention_capture import AttentionCapture
from alphatoken.passes.blocked_attention import blocked_attention
from benchmarks.contraction_cost import Traffic
from tests.oracle import relative_error


def explicit_probabilities(call: AttentionCall, mask: Tensor) -> Tensor:
    """(B, H, T, T) float64 probabilities; rows that may attend to nothing are zero."""
    groups = call.query_BHTD.shape[1] // call.key_BGTD.shape[1]
    key = call.key_BGTD.double().repeat_interleave(groups, dim=1)
    scores = call.query_BHTD.double() @ key.transpose(2, 3) * call.scaling
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    return torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1).nan_to_num(0.0)


def padded_causal_mask(lengths: list[int], longest: int, side: str) -> Tensor:
    """(B, 1, T, T) bool, as SDPA wants it."""
    real = torch.zeros(len(lengths), longest, dtype=torch.bool)
    for row, length in enumerate(lengths):
        real[row, slice(0, length) if side == "right" else slice(longest - length, longest)] = True
    causal = torch.ones(longest, longest).tril().bool()
    return (causal & real[:, None, :] & real[:, :, None])[:, None]


shapes = st.tuples(
    st.integers(1, 3),
    st.sampled_from([(1, 1), (4, 2), (3, 3), (4, 1)]),
    st.integers(1, 40),
    st.integers(1, 35),
)
RULES = ["causal", "bool", "additive", "window", "documents", "documents and window"]
rules = st.sampled_from(RULES)


def visibility_and_mask(rule: str, batch: int, length: int, side: str) -> tuple[Visibility, Tensor]:
    """What the code is told, and the same as an explicit (B, 1, T, T) mask."""
    lengths = [1 + (length - 1) * (row + 1) // batch for row in range(batch)]
    causal = torch.ones(length, length).tril().bool().expand(batch, 1, length, length)
    near = torch.ones(length, length).triu(-3).bool()
    documents = (torch.arange(length) // 5).expand(batch, length).clone()
    documents[:, length - length // 4 :] = -1
    own = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]
    padded = padded_causal_mask(lengths, length, side)
    return {
        "causal": (Visibility(), causal),
        "bool": (Visibility(explicit=padded), padded),
        "additive": (
            Visibility(explicit=torch.zeros(padded.shape).masked_fill(~padded, float("-inf"))),
            padded,
        ),
        "window": (Visibility(sliding_window=4), causal & near),
        "documents": (Visibility(documents_BT=documents), causal & own[:, None]),
        "documents and window": (
            Visibility(sliding_window=4, documents_BT=documents),
            causal & near & own[:, None],
        ),
    }[rule]


@settings(deadline=None, max_examples=150)
@given(
    shape=shapes,
    rule=rules,
    side=st.sampled_from(["left", "right"]),
    softcap=st.sampled_from([None, 0.7]),
)
def test_band_and_mixture_match_the_explicit_matrix(
    shape: tuple[int, tuple[int, int], int, int], rule: str, side: str, softcap: float | None
) -> None:
    batch, (heads, kv_heads), length, window = shape
    generator = torch.Generator().manual_seed(length * 100 + window)
    query = torch.randn(batch, heads, length, 8, generator=generator)
    key = torch.randn(batch, kv_heads, length, 8, generator=generator)
    visibility, mask = visibility_and_mask(rule, batch, length, side)
    call = AttentionCall(query, key, 0.4, visibility, softcap)
    every_head = explicit_probabilities(call, mask)
    probabilities = every_head.mean(1)
    band = attention_band(call, window)
    expected_band = torch.zeros(batch, length, window, dtype=torch.float64)
    for t in range(length):
        for offset in range(1, min(window, length - 1 - t) + 1):
            expected_band[:, t, offset - 1] = probabilities[:, t + offset, t]
    assert relative_error(band, expected_band) <= 1e-5

    outgrad = torch.randn(batch, length, 5, generator=generator)
    expected = torch.zeros(batch, length, 5, dtype=torch.float64)
    for t in range(length):
        for k in range(t + 1, min(t + window, length - 1) + 1):
            expected[:, t] += probabilities[:, k, t, None] * outgrad[:, k]
    assert relative_error(mix_band(band, outgrad), expected) <= 1e-5

    value = torch.randn(batch, kv_heads, length, 8, generator=generator)
    seeing = mask.any(-1)[
        ..., None
    ]  # padding queries see nothing: what comes out there does not matter
    attended = every_head @ value.double().repeat_interleave(heads // kv_heads, dim=1)
    assert (
        relative_error(blocked_attention(call, value, block=7) * seeing, attended * seeing) <= 1e-5
    )


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("rule", RULES)
def test_the_derivative_of_blocked_attention_is_that_of_softmax(
    rule: str, softcap: float | None
) -> None:
    """In three directions at once, of which one leaves the keys alone; against the derivative of
    the explicit matrices."""
    torch.manual_seed(0)
    batch, heads, kv_heads, length = 2, 4, 2, 13
    visibility, mask = visibility_and_mask(rule, batch, length, "right")
    seeing = mask.any(-1, keepdim=True)  # elsewhere what comes out does not matter

    def explicit(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call = AttentionCall(query, key, 0.4, visibility, softcap)
        repeated = value.double().repeat_interleave(heads // kv_heads, dim=1)
        return explicit_probabilities(call, mask | ~seeing) @ repeated * seeing

    def blocked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        call = AttentionCall(query, key, 0.4, visibility, softcap)
        return blocked_attention(call, value, block=5) * seeing

    primals = tuple(torch.randn(batch, each, length, 8) for each in (heads, kv_heads, kv_heads))
    moves = tuple(torch.randn(3, *each.shape) for each in primals)
    moves[1][2] = 0.0

    def along(*tangents: Tensor) -> tuple[Tensor, Tensor]:
        output, derivative = jvp(blocked, primals, tangents)[:2]
        return output, derivative

    output, derivatives = vmap(along, out_dims=(None, 0))(*moves)  # type: ignore[arg-type]
    for number, derivative in enumerate(derivatives):
        expected, moved = jvp(explicit, primals, tuple(each[number] for each in moves))[:2]
        assert relative_error(output, expected) <= 1e-5
        assert relative_error(derivative, moved) <= 1e-5


def test_the_derivative_of_attention_moves_few_bytes() -> None:
    """Per pair of a query and a key that it may see, in bfloat16, each direction's share. Before
    the derivative was written by hand it was 385, in any number of directions."""
    heads, kv_heads, length, size = 4, 2, 1024, 64
    primals = tuple(
        torch.randn(1, each, length, size).bfloat16() for each in (heads, kv_heads, kv_heads)
    )

    def blocked(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return blocked_attention(AttentionCall(query, key, 0.125, Visibility()), value)

    def bytes_per_pair(directions: int) -> float:
        moves = [torch.randn(directions, *each.shape).bfloat16() for each in primals]
        with torch.no_grad(), Traffic() as traffic:
            vmap(lambda *tangents: jvp(blocked, primals, tangents)[1])(*moves)
        pairs = heads * length**2 / 2
        return float(traffic.bytes) / pairs / directions

    assert bytes_per_pair(1) <= 110
    assert bytes_per_pair(3) <= 90


@pytest.mark.parametrize("block", [1, 7, 128])
def test_log_sum_exp_does_not_depend_on_its_blocks(block: int) -> None:
    query, key = torch.randn(2, 4, 21, 8), torch.randn(2, 2, 21, 8)
    padded = Visibility(explicit=padded_causal_mask([21, 9], 21, "left"))
    for visibility in (Visibility(), padded):
        call = AttentionCall(query, key, 0.3, visibility)
        torch.testing.assert_close(
            log_sum_exp(call, block=block), log_sum_exp(call, block=64), rtol=1e-6, atol=1e-6
        )
    blind = log_sum_exp(AttentionCall(query, key, 0.3, padded))[1, :, :12]
    assert torch.isneginf(blind).all(), "padding rows attend to nothing"


@pytest.mark.parametrize("sliding_window", [None, 3])
def test_forward_mode_keeps_packed_documents_apart_as_flash_attention_does(
    sliding_window: int | None,
) -> None:
    """Flash attention gets no mask for packed rows, but positions that start anew; forward mode
    reads them alike."""
    query, key, value = torch.randn(1, 4, 12, 8), torch.randn(1, 2, 12, 8), torch.randn(1, 2, 12, 8)
    positions = torch.tensor([[*range(5), *range(7)]])

    def attend(rows: slice, position_ids: Tensor) -> Tensor:
        with AttentionCapture("flash_attention_2", blocked=True) as capture:
            q, k, v = (each[:, :, rows] for each in (query, key, value))
            output, _ = capture.attend(
                torch.nn.Identity(),
                q,
                k,
                v,
                None,
                position_ids=position_ids,
                sliding_window=sliding_window,
            )
        return output

    packed = attend(slice(12), positions)
    apart = [attend(rows, positions[:, rows]) for rows in (slice(5), slice(5, 12))]
    torch.testing.assert_close(packed, torch.cat(apart, dim=1))
    assert not torch.allclose(packed, attend(slice(12), torch.arange(12)[None]))
