"""The scoring tower: the last K decoder layers, the final norm and the head, re-run apart from the training graph.

From the hidden state that entered the scored layers it computes token losses and, in a backward pass of its own, the
signals (h, d) of every scored linear, which it hands to a sink as they arise.

`resident` keeps the tower's weights and one chunk's activations. `streamed` holds one layer at a time and the K entry
states of all chunks, and runs each layer forward twice; every rank must then run it together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Protocol

import torch
from torch import Tensor, nn

from alphatoken.architectures import Decoder, ScoredLinear
from alphatoken.attention import AttentionCall
from alphatoken.capture import Entry, SignalCapture
from alphatoken.losses import head_loss, loss_positions
from alphatoken.streamer import LayerStreamer

Coefficients = Callable[[Tensor, Tensor], Tensor]


class SignalSink(Protocol):
    """Receives the signals of a tower pass; `rows` are the sequences of the batch that a chunk consists of."""

    def layer(self, layer: int) -> AbstractContextManager[None]:
        """Entered before the first and left after the last signal of a layer; only by a streamed tower."""
        ...

    def attention(self, rows: slice, layer: int, call: AttentionCall) -> None:
        """An attention layer ran forward; its signals come later."""
        ...

    def signal(self, rows: slice, name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
        """Input and output gradient of one scored linear; last layer first."""
        ...


class Tower:
    """`refresh` must be called before the first use and after every optimizer step, on every rank."""

    def __init__(
        self, decoder: Decoder, depth: int, device: torch.device, *, resident: bool = True, chunk_tokens: int = 16384
    ) -> None:
        first = len(decoder.layers) - depth
        self.scored: list[ScoredLinear] = decoder.scored_linears(depth)
        self.streamer = LayerStreamer(decoder, first, device, resident)
        self._softcap = decoder.logit_softcap
        self._resident = resident
        self._chunk_tokens = chunk_tokens

    @property
    def layers(self) -> range:
        return self.streamer.indices

    def weight(self, layer: int, path: str) -> Tensor:
        """The tower's own copy of a linear's weight; without values while the layer is not in memory."""
        weight: Tensor = self.streamer.module(layer).get_parameter(f"{path}.weight")
        return weight

    def run(
        self, entry: Entry, labels_BT: Tensor, sink: SignalSink, coefficients: Coefficients | None = None
    ) -> Tensor:
        """Forward and backward through the scored layers; returns the token losses, (B, T) float32, 0 off the response.

        The signals are those of the summed response losses, each sequence's multiplied by
        `coefficients(nll_BT, response_BT)` (B, T) if given. The batch runs in chunks of whole sequences of at most
        `chunk_tokens` tokens, padding included; one without response positions yields no signals.
        """
        batch, length = labels_BT.shape
        size = max(1, self._chunk_tokens // length)
        chunks = [
            _Chunk(rows, entry.rows(rows), labels_BT[rows])
            for rows in (slice(start, min(start + size, batch)) for start in range(0, batch, size))
        ]
        run = self._run_resident if self._resident else self._run_streamed
        return torch.cat(run(chunks, sink, coefficients))

    def _run_resident(self, chunks: list[_Chunk], sink: SignalSink, coefficients: Coefficients | None) -> list[Tensor]:
        losses = []
        for chunk in chunks:
            with torch.enable_grad(), self._capture(self.layers, chunk, sink):
                hidden_BTH = chunk.entry.hidden_BTH
                if chunk.has_response:
                    for index in self.layers:
                        hidden_BTH = self._forward(index, self.streamer.module(index), hidden_BTH, chunk, sink)
                with self.streamer.top() as top:
                    nll_BT, outgrad_BTH = self._head(*top, hidden_BTH.detach(), chunk, coefficients)
                if chunk.has_response:
                    hidden_BTH.backward(outgrad_BTH)
            losses.append(nll_BT)
        return losses

    def _run_streamed(self, chunks: list[_Chunk], sink: SignalSink, coefficients: Coefficients | None) -> list[Tensor]:
        states = [[chunk.entry.hidden_BTH] for chunk in chunks]
        with torch.no_grad():
            for index in self.layers:
                with self.streamer.layer(index) as module:
                    for chunk, state in zip(chunks, states, strict=True):
                        state.append(self._forward(index, module, state[-1], chunk, None))
        with self.streamer.top() as top:
            heads = [
                self._head(*top, state.pop(), chunk, coefficients) for chunk, state in zip(chunks, states, strict=True)
            ]
        outgrads = [outgrad_BTH for _, outgrad_BTH in heads]
        for index in reversed(self.layers):
            with self.streamer.layer(index) as module, sink.layer(index):
                for number, (chunk, state) in enumerate(zip(chunks, states, strict=True)):
                    hidden_BTH = state.pop()
                    if not chunk.has_response:
                        continue
                    with torch.enable_grad(), self._capture([index], chunk, sink):
                        hidden_BTH.requires_grad_(index != self.layers[0])
                        self._forward(index, module, hidden_BTH, chunk, sink).backward(outgrads[number])
                    if hidden_BTH.grad is not None:
                        outgrads[number] = hidden_BTH.grad
        return [nll_BT for nll_BT, _ in heads]

    def _capture(self, layers: Iterable[int], chunk: _Chunk, sink: SignalSink) -> SignalCapture:
        linears = {
            scored.name: self.streamer.module(scored.layer).get_submodule(scored.path)
            for scored in self.scored
            if scored.layer in layers
        }
        return SignalCapture(linears, partial(sink.signal, chunk.rows))

    def _forward(
        self, index: int, module: nn.Module, hidden_BTH: Tensor, chunk: _Chunk, sink: SignalSink | None
    ) -> Tensor:
        watch = None if sink is None else partial(sink.attention, chunk.rows)
        inputs = chunk.entry.layer_inputs[index - self.layers[0]]
        return self.streamer.forward(module, hidden_BTH, inputs, watch)

    def _head(
        self, norm: nn.Module, head: nn.Linear, hidden_BTH: Tensor, chunk: _Chunk, coefficients: Coefficients | None
    ) -> tuple[Tensor, Tensor]:
        """Token losses (B, T) and the gradient of their (scaled) sum at the last layer's output (B, T, H)."""
        response_BT, targets_BT = loss_positions(chunk.labels_BT)
        with torch.enable_grad():
            hidden_RH = hidden_BTH[response_BT].requires_grad_()
            normed_RH = norm(hidden_RH)
        nll_R, outgrad_RH = head_loss(normed_RH.detach(), head, targets_BT[response_BT], self._softcap)
        nll_BT = torch.zeros(response_BT.shape, device=nll_R.device)
        nll_BT[response_BT] = nll_R
        if coefficients is not None:
            scale_R = coefficients(nll_BT, response_BT)[response_BT]
            outgrad_RH = outgrad_RH * scale_R[:, None].to(outgrad_RH.dtype)
        outgrad_BTH = torch.zeros_like(hidden_BTH)
        (outgrad_BTH[response_BT],) = torch.autograd.grad(normed_RH, hidden_RH, outgrad_RH)
        return nll_BT, outgrad_BTH


@dataclass(frozen=True)
class _Chunk:
    """Some sequences of the batch."""

    rows: slice
    entry: Entry
    labels_BT: Tensor

    @cached_property
    def has_response(self) -> bool:
        return bool(loss_positions(self.labels_BT)[0].any())
