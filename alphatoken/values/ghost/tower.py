"""The scoring tower: the last K decoder layers, the final norm and the head, re-run apart from the
training graph.

From the hidden state that entered the scored layers it computes token losses and, in a backward
pass of its own, the signals (h, d) of every scored linear, which it hands on as they arise, so that
they can be contracted and dropped.

`resident` keeps the tower's weights and one chunk's activations. `streamed` holds one layer at a
time and needs every state between the layers; every rank must then run it together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack

import torch
from torch import Tensor, nn

from alphatoken.batch import Batch
from alphatoken.models.decoder import Decoder
from alphatoken.models.scored import ScoredLinear
from alphatoken.objectives.base import ResponseLosses
from alphatoken.passes.capture import Entry, EntryCapture, SignalCapture
from alphatoken.passes.chunks import Chunk, chunks_of, top_backward
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.values.estimator import Coefficients
from alphatoken.values.ghost.signals import ChunkSignals, SignalConsumer

ConsumerOf = Callable[[int], AbstractContextManager[SignalConsumer]]
"""For the index of a layer, a context around its backward passes, which yields what takes the
signals of its linears. A streamed tower, and one that weighs losses, enters it for one layer at a
time, the last layer first; otherwise all layers' are entered before the first chunk."""


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
        self.linears: dict[str, ScoredLinear] = {
            linear.name: linear for linear in decoder.scored_linears(depth)
        }
        """The scored linears by their parameter's name, in order of the forward pass."""
        self._decoder = decoder
        self._streamer = LayerStreamer(decoder, first, device, resident=resident)
        self._resident = resident
        self._chunk_tokens = chunk_tokens

    @property
    def layers(self) -> range:
        """Indices of the scored layers."""
        return self._streamer.indices

    def refresh(self) -> None:
        """Takes over the model's current weights. One all-gather per layer, norm and head, where
        they are kept."""
        self._streamer.refresh()

    def capture(self, *, weighted: bool = False) -> EntryCapture:
        """Wrap the model's forward pass in this, then hand its `.entry` to `run`.

        weighted: whether `run` will be told to weigh the losses, which needs more states.
        """
        keeps_first = self._resident and not weighted
        return EntryCapture(
            self._decoder, self.layers.start, keep="first" if keeps_first else "every"
        )

    def weight(self, layer: int, path: str) -> Tensor:
        """The tower's own copy of a linear's weight; without values while the layer is not in
        memory."""
        weight: Tensor = self._streamer.module(layer).get_parameter(f"{path}.weight")
        return weight

    def run(
        self,
        entry: Entry,
        batch: Batch,
        consumer_of: ConsumerOf,
        *,
        window: int = 0,
        coefficients: Coefficients | None = None,
    ) -> Tensor:
        """Runs the scored layers forward and backward and hands the signals of the summed response
        losses to their layer's consumer. Returns the token losses, (B, T) float32, 0 off the
        response.

        The batch runs in chunks of whole sequences of at most `chunk_tokens` tokens, padding
        included; one without response positions yields no signals. window: how many later
        positions the causal path reaches; 0 follows none. coefficients: what each loss is
        multiplied by in that sum, from those of the whole batch; the losses returned are not.
        """
        chunks = chunks_of(entry, batch, self._chunk_tokens)
        if self._resident and coefficients is None:
            return self._run_by_chunk(chunks, consumer_of, window)
        with self._streamer.top() as top:
            tops = [
                top_backward(*top, chunk.entry.out, chunk, self._decoder.logit_softcap)
                for chunk in chunks
            ]
        nll_BT = torch.cat([own_BT for own_BT, _ in tops])
        outgrads = [outgrad_BTH for _, outgrad_BTH in tops]
        if coefficients is not None:
            # Those of a chunk depend on the losses of others, too.
            coefficient_BT = coefficients(ResponseLosses(batch=batch, nll_BT=nll_BT))
            outgrads = [
                (coefficient_BT[chunk.rows, :, None] * outgrad_BTH).to(outgrad_BTH.dtype)
                for chunk, outgrad_BTH in zip(chunks, outgrads, strict=True)
            ]
        for place in reversed(range(len(self.layers))):
            self._layer(place, chunks, outgrads, consumer_of, window)
        return nll_BT

    def _run_by_chunk(self, chunks: list[Chunk], consumer_of: ConsumerOf, window: int) -> Tensor:
        with ExitStack() as contexts:
            consumers = {index: contexts.enter_context(consumer_of(index)) for index in self.layers}
            return torch.cat([self._whole(chunk, consumers, window) for chunk in chunks])

    def _whole(self, chunk: Chunk, consumers: Mapping[int, SignalConsumer], window: int) -> Tensor:
        """Runs one chunk forward through all layers and back. Returns its token losses, (B, T)."""
        signals = ChunkSignals(chunk, window, self.weight)
        with torch.enable_grad(), self._capture(signals, consumers):
            hidden_BTH = chunk.entry.first_BTH
            if chunk.has_response:
                for place, index in enumerate(self.layers):
                    module = self._streamer.module(index)
                    hidden_BTH = self._forward(module, place, hidden_BTH, chunk, signals)
            nll_BT, outgrad_BTH = self._top(chunk, hidden_BTH.detach())
            if chunk.has_response:
                hidden_BTH.backward(outgrad_BTH)
        return nll_BT

    def _layer(
        self,
        place: int,
        chunks: list[Chunk],
        outgrads: list[Tensor],
        consumer_of: ConsumerOf,
        window: int,
    ) -> None:
        """Runs one layer forward and backward for all chunks, and replaces the gradients at its
        output by those at its input, (B, T, H) per chunk, in place.

        A function of its own, so that nothing of a layer is held when the next is gathered.
        """
        index = self.layers[place]
        with self._streamer.segment(index) as module, consumer_of(index) as consume:
            for number, chunk in enumerate(chunks):
                if not chunk.has_response:
                    continue
                signals = ChunkSignals(chunk, window, self.weight)
                hidden_BTH = chunk.entry.into(place).detach()
                with torch.enable_grad(), self._capture(signals, {index: consume}):
                    hidden_BTH.requires_grad_(place > 0)
                    output_BTH = self._forward(module, place, hidden_BTH, chunk, signals)
                    output_BTH.backward(outgrads[number])
                if hidden_BTH.grad is not None:
                    outgrads[number] = hidden_BTH.grad

    def _capture(
        self, signals: ChunkSignals, consumers: Mapping[int, SignalConsumer]
    ) -> SignalCapture:
        """Hooks on the scored linears of the layers that have a consumer."""

        def on_backward(name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
            linear = self.linears[name]
            consumers[linear.layer](signals.signals_of(linear, act_BTI, outgrad_BTO))

        modules = {
            name: self._streamer.module(linear.layer).get_submodule(linear.path)
            for name, linear in self.linears.items()
            if linear.layer in consumers
        }
        return SignalCapture(modules, on_backward)

    def _forward(
        self,
        module: nn.Module,
        place: int,
        hidden_BTH: Tensor,
        chunk: Chunk,
        signals: ChunkSignals,
    ) -> Tensor:
        inputs = chunk.entry.layer_inputs[place]
        return self._streamer.forward(module, hidden_BTH, inputs, signals.on_attention)

    def _top(self, chunk: Chunk, hidden_BTH: Tensor) -> tuple[Tensor, Tensor]:
        with self._streamer.top() as top:
            return top_backward(*top, hidden_BTH, chunk, self._decoder.logit_softcap)
