"""Head-averaged attention probabilities in a band below the diagonal, from queries and keys; never
(T, T) in memory.

Shape legend: B sequences, H query heads, G key/value heads (H a multiple of G), T positions, D head
size, W window.

`band_BTW[b, t, j-1]` is A[t+j, t]: the probability, averaged over query heads, with which position
t+j attends to t.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from alphatoken.util.products import float32_product


@dataclass(frozen=True)
class Visibility:
    """Which keys a query may attend to: an explicit mask, or the causal rule with a window and
    documents.

    explicit: broadcastable to (B, H, T, T), as SDPA takes it: bool (true where allowed) or added to
    the scores; when given it says everything. sliding_window: a query sees itself and the
    `sliding_window` - 1 positions before. documents_BT: int64; positions see their own document
    only, and nothing where it is negative (padding).
    """

    explicit: Tensor | None = None
    sliding_window: int | None = None
    documents_BT: Tensor | None = None

    def bias(self, queries: Tensor, keys: Tensor) -> Tensor:
        """What is added to the scores of (query, key) pairs: 0 or -inf (or an explicit mask's own
        numbers).

        `queries` and `keys` are positions, int64, of one broadcast shape S; returns (B or 1, H or
        1, S) float32.
        """
        if self.explicit is not None:
            chosen = self.explicit[:, :, queries, keys]
            return chosen.float() if chosen.is_floating_point() else _forbid(~chosen)
        allowed = keys <= queries
        if self.sliding_window is not None:
            allowed = allowed & (queries - keys < self.sliding_window)
        allowed = allowed[None]
        if self.documents_BT is not None:
            own, other = self.documents_BT[:, queries], self.documents_BT[:, keys]
            allowed = allowed & (own == other) & (own >= 0)
        return _forbid(~allowed)[:, None]

    @property
    def only_causal(self) -> bool:
        """Whether every position sees all positions before it."""
        given = (self.explicit, self.sliding_window, self.documents_BT)
        return all(each is None for each in given)


def _forbid(forbidden: Tensor) -> Tensor:
    return torch.zeros(forbidden.shape, device=forbidden.device).masked_fill_(
        forbidden, float("-inf")
    )


@dataclass(frozen=True)
class AttentionCall:
    """What one attention layer was called with: query (B, H, T, D) and key (B, G, T, D), after
    rotary embedding.

    The scores are `softcap * tanh(scaling <q, k> / softcap)`, or without the cap `scaling <q, k>`.
    """

    query_BHTD: Tensor
    key_BGTD: Tensor
    scaling: float
    visibility: Visibility
    softcap: float | None = None
    log_sums_BHT: Tensor | None = None
    """Logarithm of every query's softmax denominator, float32, where the kernel gave it; of a query
    that may attend to nothing anything."""

    def scores(self, products: Tensor) -> Tensor:
        """Attention scores from inner products <q, k>, before any mask."""
        return self.capped(products * self.scaling)

    def capped(self, scores: Tensor) -> Tensor:
        """Scores from those without the cap."""
        return scores if self.softcap is None else self.softcap * torch.tanh(scores / self.softcap)


def log_sum_exp(call: AttentionCall, block: int = 128) -> Tensor:
    """Logarithm of every query's softmax denominator, (B, H, T) float32, in blocks of `block`
    queries.

    A query that may attend to nothing (a padding row) gets -inf.
    """
    groups = call.query_BHTD.shape[1] // call.key_BGTD.shape[1]
    key_BHTD = call.key_BGTD.float().repeat_interleave(groups, dim=1)
    length = call.query_BHTD.shape[2]
    positions = torch.arange(length, device=key_BHTD.device)
    blocks = []
    for start in range(0, length, block):
        queries = positions[start : start + block]
        keys = positions if call.visibility.explicit is not None else positions[: start + block]
        products = call.query_BHTD[:, :, queries].float() @ key_BHTD[:, :, keys].transpose(2, 3)
        scores = call.scores(products) + call.visibility.bias(queries[:, None], keys[None, :])
        blocks.append(torch.logsumexp(scores, dim=-1))
    return torch.cat(blocks, dim=-1)


def attention_band(call: AttentionCall, window: int) -> Tensor:
    """Head-averaged attention probabilities of the next `window` positions to each position, (B, T,
    W) float32.

    Entries that reach past the end of the row, or to what may not be attended to, are zero.
    """
    batch, heads, length, _ = call.query_BHTD.shape
    kv_heads = call.key_BGTD.shape[1]
    groups = heads // kv_heads
    lse_BHT = log_sum_exp(call) if call.log_sums_BHT is None else call.log_sums_BHT
    # Scores of a query that sees nothing are -inf, and -inf - -inf would be NaN.
    lse_BHT = torch.where(lse_BHT.isfinite(), lse_BHT, 0.0)
    keys = torch.arange(length, device=lse_BHT.device)[:, None]
    queries = keys + torch.arange(1, window + 1, device=lse_BHT.device)
    within = queries < length
    queries = queries.clamp(max=length - 1)
    bias = call.visibility.bias(queries, keys.expand_as(queries)).masked_fill(
        ~within, float("-inf")
    )
    band_BTW = torch.zeros(batch, length, window, device=lse_BHT.device)
    for kv_head in range(kv_heads):
        own = slice(kv_head * groups, (kv_head + 1) * groups)
        products = _band_products(call.query_BHTD[:, own], call.key_BGTD[:, kv_head], window)
        scores_BHTW = call.scores(products) + (bias if bias.shape[1] == 1 else bias[:, own])
        band_BTW += torch.exp(scores_BHTW - lse_BHT[:, own, queries]).sum(1)
    return band_BTW / heads


def mix_band(band_BTW: Tensor, outgrad_BTO: Tensor, beyond_BKO: Tensor | None = None) -> Tensor:
    """sum_{t<k<=t+W} A[k, t] d_k for every position t, the causal path of Eq. 9. (B, T, O), dtype
    of `outgrad`. `beyond_BKO` are the d of the first K positions behind the last one, where the row
    goes on; without them, and behind them, d is zero."""
    if beyond_BKO is not None:
        further_BTW = F.pad(band_BTW, (0, 0, 0, beyond_BKO.shape[1]))
        together_BTO = torch.cat([outgrad_BTO, beyond_BKO], dim=1)
        return mix_band(further_BTW, together_BTO)[:, : outgrad_BTO.shape[1]]
    batch, length, window = band_BTW.shape
    block = window
    blocks = -(-length // block)
    padded_BTW = F.pad(band_BTW, (0, 0, 0, blocks * block - length)).view(
        batch, blocks, block, window
    )
    # Row i of a block holds A at columns i+1 .. i+W: pad each row to block+window+1 and re-cut
    # the flat buffer, so that every row starts one column further right than the one above it.
    skewed = F.pad(padded_BTW, (1, block)).flatten(2)[..., : block * (block + window)]
    mixing = skewed.view(batch, blocks, block, block + window).to(outgrad_BTO.dtype)
    padded_outgrad = F.pad(outgrad_BTO, (0, 0, 0, blocks * block + window - length))
    reach = padded_outgrad.unfold(1, block + window, block).transpose(2, 3)
    return (mixing @ reach).flatten(1, 2)[:, :length]


def _band_products(query_BHTD: Tensor, key_BTD: Tensor, window: int) -> Tensor:
    """<q_{t+j}, k_t> for j = 1..W, (B, H, T, W) float32, by blocks of W keys against the 2W queries
    that can see them."""
    batch, heads, length, _ = query_BHTD.shape
    block = window
    blocks = -(-length // block)
    padded_key = F.pad(key_BTD, (0, 0, 0, blocks * block - length)).view(
        batch, 1, blocks, block, -1
    )
    padded_query = F.pad(query_BHTD, (0, 0, 0, blocks * block + window - length))
    reach = padded_query.unfold(2, block + window, block)
    products = float32_product(padded_key, reach).contiguous()
    # Element (i, i+j) of each (block, block+window) tile, j = 1..W: a diagonal band read with a
    # longer row stride.
    tile = block * (block + window)
    band = products.as_strided(
        (batch, heads, blocks, block, window),
        (heads * blocks * tile, blocks * tile, tile, block + window + 1, 1),
        storage_offset=1,
    )
    return band.reshape(batch, heads, blocks * block, window)[:, :, :length]
