"""The scoring tower: the last K decoder layers, the final norm and the head, re-run apart from the
training graph.

From the hidden state that entered the scored layers it computes token losses and, in a backward
pass of its own, the signals (h, d) of every scored linear, which it hands to a sink as they arise.

`resident` keeps the tower's weights and one chunk's activations. `streamed` holds one layer at a
time and needs every state between the layers; every rank must then run it together.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from alphatoken.models.decoder import Decoder
from alphatoken.models.scored import ScoredLinear
from alphatoken.passes.attention import AttentionCall
from alphatoken.passes.capture import Entry, SignalCapture
from alphatoken.passes.chunks import Chunk, chunks_of, top_backward
from alphatoken.passes.streamer import LayerStreamer


class SignalSink(Protocol):
    """Receives the signals of a tower pass; `rows` are the sequences of the batch that a chunk
    consists of."""

    def layer(self, layer: int) -> AbstractContextManager[None]:
        """Entered before the first and left after the last signal of a layer; only by a streamed
        tower."""
        ...

    def attention(self, rows: slice, layer: int, call: AttentionCall) -> None:
        """An attention layer ran forward; its signals come later."""
        ...

    def signal(self, rows: slice, name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
        """Input and output gradient of one scored linear; last layer first."""
        ...


class Tower:
    """`refresh` must be called before the first use and after every optimizer step, on every
    rank."""

    def __init__(
        self,
        decoder: Decoder,
        depth: int,
        device: torch.device,
        *,
        resident: bool = True,
        chunk_tokens: int = 16384,
    ) -> None:
        first = len(decoder.layers) - depth
        self.scored: list[ScoredLinear] = decoder.scored_linears(depth)
        self.streamer = LayerStreamer(decoder, first, device, resident=resident)
        self._softcap = decoder.logit_softcap
        self._resident = resident
        self._chunk_tokens = chunk_tokens

    @property
    def layers(self) -> range:
        return self.streamer.indices

    def weight(self, layer: int, path: str) -> Tensor:
        """The tower's own copy of a linear's weight; without values while the layer is not in
        memory."""
        weight: Tensor = self.streamer.module(layer).get_parameter(f"{path}.weight")
        return weight

    def run(self, entry: Entry, labels_BT: Tensor, sink: SignalSink) -> Tensor:
        """Forward and backward through the scored layers; returns the token losses, (B, T) float32,
        0 off the response.

        The signals are those of the summed response losses. The batch runs in chunks of whole
        sequences of at most `chunk_tokens` tokens, padding included; one without response positions
        yields no signals.
        """
        run = self._run_resident if self._resident else self._run_streamed
        return torch.cat(run(chunks_of(entry, labels_BT, self._chunk_tokens), sink))

    def _run_resident(self, chunks: list[Chunk], sink: SignalSink) -> list[Tensor]:
        losses = []
        for chunk in chunks:
            with torch.enable_grad(), self._capture(self.layers, chunk, sink):
                hidden_BTH = chunk.entry.states[0]
                if chunk.has_response:
                    for index in self.layers:
                        hidden_BTH = self._forward(
                            index, self.streamer.module(index), hidden_BTH, chunk, sink
                        )
                with self.streamer.top() as top:
                    nll_BT, outgrad_BTH = top_backward(
                        *top, hidden_BTH.detach(), chunk, self._softcap
                    )
                if chunk.has_response:
                    hidden_BTH.backward(outgrad_BTH)
            losses.append(nll_BT)
        return losses

    def _run_streamed(self, chunks: list[Chunk], sink: SignalSink) -> list[Tensor]:
        with self.streamer.top() as top:
            heads = [
                top_backward(*top, chunk.entry.states[-1], chunk, self._softcap) for chunk in chunks
            ]
        outgrads = [outgrad_BTH for _, outgrad_BTH in heads]
        for place, index in reversed(list(enumerate(self.layers))):
            with self.streamer.stage(index) as module, sink.layer(index):
                for number, chunk in enumerate(chunks):
                    if not chunk.has_response:
                        continue
                    hidden_BTH = chunk.entry.states[place].detach()
                    with torch.enable_grad(), self._capture([index], chunk, sink):
                        hidden_BTH.requires_grad_(place > 0)
                        self._forward(index, module, hidden_BTH, chunk, sink).backward(
                            outgrads[number]
                        )
                    if hidden_BTH.grad is not None:
                        outgrads[number] = hidden_BTH.grad
        return [nll_BT for nll_BT, _ in heads]

    def _capture(self, layers: Iterable[int], chunk: Chunk, sink: SignalSink) -> SignalCapture:
        linears = {
            scored.name: self.streamer.module(scored.layer).get_submodule(scored.path)
            for scored in self.scored
            if scored.layer in layers
        }
        return SignalCapture(linears, partial(sink.signal, chunk.rows))

    def _forward(
        self,
        index: int,
        module: nn.Module,
        hidden_BTH: Tensor,
        chunk: Chunk,
        sink: SignalSink | None,
    ) -> Tensor:
        watch = None if sink is None else partial(sink.attention, chunk.rows)
        inputs = chunk.entry.layer_inputs[index - self.layers[0]]
        return self.streamer.forward(module, hidden_BTH, inputs, watch)
