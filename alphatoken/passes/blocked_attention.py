"""Attention in blocks of queries, with a forward derivative, which fused kernels lack.

Shape legend: B sequences, H query heads, G key/value heads (H a multiple of G), T positions, D head
size; Q queries of a block, K keys that they may see, R the queries of all heads that share a key
head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from alphatoken.passes.attention import AttentionCall


def blocked_attention(call: AttentionCall, value_BGTD: Tensor, block: int = 128) -> Tensor:
    """softmax(scores) v, (B, H, T, D) in the dtype of the values, in blocks of `block` queries;
    without a backward.

    Where query, key or value are dual numbers of `torch.autograd.forward_ad`, so is the output.
    Under `torch.vmap` over tangents the softmax is computed once for all of them.
    """
    given = (call.query_BHTD, call.key_BGTD, value_BGTD)
    primals, moving = zip(*(forward_ad.unpack_dual(each) for each in given), strict=True)
    tangents = None
    if any(each is not None for each in moving):
        pairs = zip(primals, moving, strict=True)
        tangents = [torch.zeros_like(at) if move is None else move for at, move in pairs]
    length = primals[0].shape[2]
    blocks = [
        _block(call, primals, tangents, slice(start, min(start + block, length)))
        for start in range(0, length, block)
    ]
    outputs, derivatives = zip(*blocks, strict=True)
    output_BHTD = torch.cat(outputs, dim=2)
    if tangents is None:
        return output_BHTD
    dual_BHTD: Tensor = forward_ad.make_dual(output_BHTD, torch.cat(derivatives, dim=2))
    return dual_BHTD


def _block(
    call: AttentionCall,
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor] | None,
    queries: slice,
) -> tuple[Tensor, Tensor | None]:
    """Output of some queries, (B, H, Q, D), and its derivative, if query, key and value move.

    P = softmax(s) moves by dP = P ds - P sum_K(P ds). As s are the products of queries and keys
    times the scaling, that may wait until dP has met the values, which are fewer numbers.
    """
    heads, key_heads = primals[0].shape[1], primals[1].shape[1]
    keys = slice(None) if call.visibility.explicit is not None else slice(queries.stop)

    def of_block(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows_BGRD = _by_key_head(query[:, :, queries], key_heads)
        return rows_BGRD, key[:, :, keys], value[:, :, keys]

    q_BGRD, k_BGKD, v_BGKD = of_block(*primals)
    # With one dimension it makes the products float32 as it scales them.
    scaling = torch.full((1,), call.scaling, device=q_BGRD.device)
    scores_BHQK = call.capped(_by_head(q_BGRD @ k_BGKD.mT, heads) * scaling)
    cap_slopes = None if call.softcap is None else 1 - (scores_BHQK / call.softcap).square()
    p_BHQK = torch.softmax(_masked(call, scores_BHQK, queries, keys), dim=-1)
    p_BGRK = _by_key_head(p_BHQK, key_heads).to(v_BGKD.dtype)
    output_BHQD = _by_head(p_BGRK @ v_BGKD, heads)
    if tangents is None:
        return output_BHQD, None

    dq_BGRD, dk_BGKD, dv_BGKD = of_block(*tangents)
    left, right = torch.cat([dq_BGRD, q_BGRD], dim=-1), torch.cat([k_BGKD, dk_BGKD], dim=-1)
    sloped_BHQK = p_BHQK if cap_slopes is None else p_BHQK * cap_slopes
    dp_BHQK = sloped_BHQK * _by_head(left @ right.mT, heads)
    dp_BHQK = torch.addcmul(dp_BHQK, p_BHQK, dp_BHQK.sum(-1, keepdim=True), value=-1)
    dp_BGRK = _by_key_head(dp_BHQK, key_heads).to(v_BGKD.dtype)
    return output_BHQD, _by_head(call.scaling * (dp_BGRK @ v_BGKD) + p_BGRK @ dv_BGKD, heads)


def _masked(call: AttentionCall, scores_BHQK: Tensor, queries: slice, keys: slice) -> Tensor:
    """The scores, in place, with a very low number where a query may not look: not -inf, as a query
    that sees nothing must not become NaN."""
    first = queries.start if call.visibility.only_causal else 0
    positions = torch.arange(call.query_BHTD.shape[2], device=scores_BHQK.device)
    bias = call.visibility.bias(positions[queries, None], positions[None, keys][:, first:])
    scores_BHQK[..., first:] += bias.clamp_min(torch.finfo(torch.float32).min)
    return scores_BHQK


def _by_key_head(numbers: Tensor, key_heads: int) -> Tensor:
    """(B, H, Q, X) as (B, G, R, X)."""
    grouped: Tensor = numbers.unflatten(1, (key_heads, -1))
    return grouped.flatten(2, 3)


def _by_head(numbers: Tensor, heads: int) -> Tensor:
    """(B, G, R, X) as (B, H, Q, X)."""
    grouped: Tensor = numbers.unflatten(2, (heads // numbers.shape[1], -1))
    return grouped.flatten(1, 2)
