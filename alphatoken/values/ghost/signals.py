"""The signals of scored linears: what the value of a token is made of.

A linear y = W h has two signals at position t: its input h_t, and d_t, the gradient of the summed
response losses at its output y_t. Their outer product d_t h_t^T is what position t adds to the
gradient of W; d_t already holds what the losses of later tokens send back, below this layer's
attention through that too. On value projections the paper adds a causal term, one hop further: the
mixed signal sum_{t<k<=t+w} A[k, t] d_k in place of d_t, with A the attention averaged over heads
and w the window.

Shape legend: B sequences of one chunk, T positions, R response positions, I and O the features of a
linear, W the window.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from alphatoken.models.scored import ScoredLinear
from alphatoken.passes.attention import AttentionCall, attention_band, mix_band
from alphatoken.passes.chunks import Chunk


@dataclass(frozen=True)
class LinearSignals:
    """The signals of one linear on one chunk of a batch."""

    linear: ScoredLinear
    chunk: Chunk
    act_BTI: Tensor
    """h_t, the linear's input."""
    outgrad_BTO: Tensor
    """d_t, the gradient of the chunk's summed response losses at the linear's output."""
    mixed_BTO: Tensor | None
    """sum_{t<k<=t+w} A[k, t] d_k; None where no causal path is followed through this linear."""

    @cached_property
    def act_RI(self) -> Tensor:
        """h_t of the response positions."""
        return self.chunk.index.take(self.act_BTI)

    @cached_property
    def outgrad_RO(self) -> Tensor:
        """d_t of the response positions."""
        return self.chunk.index.take(self.outgrad_BTO)

    @cached_property
    def mixed_RO(self) -> Tensor | None:
        """The mixed signal of the response positions."""
        return None if self.mixed_BTO is None else self.chunk.index.take(self.mixed_BTO)


SignalConsumer = Callable[[LinearSignals], None]


class OtherParts(Protocol):
    """What ranks have that divide the rows of a chunk: every one a part of each row, and attention
    on whole rows in a share of the heads."""

    def own_band(self, band_BTW: Tensor) -> Tensor:
        """From the band of whole rows, averaged over each rank's heads, that of this rank's part,
        averaged over all heads."""
        ...

    def beyond(self, outgrad_BTO: Tensor, window: int) -> Tensor:
        """From each rank's part of d, what follows this rank's part, (B, K, O): up to `window`
        positions, fewer where the row ends."""
        ...


class ChunkSignals:
    """Makes the `LinearSignals` of one layer on one chunk from what hooks report, in the order of
    the passes.

    The forward pass reports the layer's attention call, of which the band stays; the backward pass
    then reports h and d of each linear, the last one first. window: 0 follows no causal path.
    weight_of: the weight of the linear at a path of a layer, as stored. others: where the rows are
    divided over ranks, which then must all do the same.
    """

    def __init__(
        self,
        chunk: Chunk,
        window: int,
        weight_of: Callable[[int, str], Tensor],
        others: OtherParts | None = None,
    ) -> None:
        self._chunk = chunk
        self._others = others
        self.window = window
        self._weight_of = weight_of
        self._band_BTW: Tensor | None = None
        self._mixed_BTO: Tensor | None = None

    def on_attention(self, _layer: int, call: AttentionCall) -> None:
        """Takes the layer's queries and keys; keeps its band, (B, T, W): the probabilities with
        which the next W positions attend to each, as the softmax over all keys makes them, averaged
        over heads."""
        band_BTW = attention_band(call, self.window)
        self._band_BTW = band_BTW if self._others is None else self._others.own_band(band_BTW)

    def of_linear(
        self, linear: ScoredLinear, act_BTI: Tensor, outgrad_BTO: Tensor
    ) -> LinearSignals:
        """Takes h and d of a linear, once the backward pass has reached its output."""
        follows = linear.is_value and self.window > 0
        mixed_BTO = self._mix(linear, outgrad_BTO) if follows else None
        return LinearSignals(linear, self._chunk, act_BTI, outgrad_BTO, mixed_BTO)

    def _mix(self, linear: ScoredLinear, outgrad_BTO: Tensor) -> Tensor:
        """sum_k A[k, t] d_k for every position, (B, T, O); zero in output rows that are no
        values."""
        if linear.feeds is not None:
            # What flows back into an adapter's A came through its B, which the backward pass
            # has met before, and of that only the value rows count.
            assert self._mixed_BTO is not None, "the backward pass meets B before A"
            return self._mixed_BTO @ self._weight_of(linear.layer, linear.feeds)
        value_rows = linear.value_rows
        if value_rows is None:
            mixed_BTO = self._mix_values(outgrad_BTO)
        else:  # queries, keys and values come from one linear
            mixed_BTO = torch.zeros_like(outgrad_BTO)
            mixed_BTO[..., value_rows] = self._mix_values(outgrad_BTO[..., value_rows])
        self._mixed_BTO = mixed_BTO
        return mixed_BTO

    def _mix_values(self, outgrad_BTO: Tensor) -> Tensor:
        """sum_k A[k, t] d_k of the output rows that are values, (B, T, O)."""
        assert self._band_BTW is not None, "the forward pass has met the attention call"
        beyond_BKO = None
        if self._others is not None:
            beyond_BKO = self._others.beyond(outgrad_BTO, self.window)
        return mix_band(self._band_BTW, outgrad_BTO, beyond_BKO)
