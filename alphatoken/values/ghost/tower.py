"""The scoring tower: the last K decoder layers, the final norm and the head, re-run apart from the
training graph.

It starts from the states that the decoder's own forward pass left before each scored layer and
behind the last. From the last of them norm and head give the token losses and the gradient at the
output of the last layer. Then each layer is run again, the last one first, in a graph of its own:
forward from the state before it, backward from the gradient behind it. Meanwhile it hands on the
signals (h, d) of every scored linear, so that they can be contracted and dropped, and one layer's
activations of one chunk are held. `resident` keeps the
weights; `streamed` gathers them layer by layer, and every rank must then run the tower together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor

from alphatoken.batch import Batch
from alphatoken.distributed.mesh import mesh
from alphatoken.models.decoder import Decoder
from alphatoken.models.scored import ScoredLinear
from alphatoken.objectives.base import ResponseLosses
from alphatoken.passes.capture import Entry, EntryCapture, SignalCapture
from alphatoken.passes.chunks import Chunk, chunks_of, top_backward
from alphatoken.passes.divided_attention import NeighbourParts
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.values.estimator import Coefficients
from alphatoken.values.ghost.signals import ChunkSignals, SignalConsumer

ConsumerOf = Callable[[int], AbstractContextManager[SignalConsumer]]
"""For the index of a layer, a context around its backward passes, which yields what takes the
signals of its linears. Entered for one layer at a time, the last layer first."""


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
        self._chunk_tokens = chunk_tokens

    @property
    def layers(self) -> range:
        """Indices of the scored layers."""
        return self._streamer.indices

    def refresh(self) -> None:
        """Takes over the model's current weights. One all-gather per layer, norm and head, where
        they are kept."""
        self._streamer.refresh()

    @property
    def _others(self) -> NeighbourParts:
        return NeighbourParts(mesh().sequence, self._decoder.config.num_attention_heads)

    def capture(self) -> EntryCapture:
        """Wrap the model's forward pass in this, then hand its `.entry` to `run`."""
        return EntryCapture(self._decoder, self.layers.start, keep="every")

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
        with self._streamer.top() as top:
            tops = [
                top_backward(*top, chunk.entry.out, chunk, self._decoder.logit_softcap)
                for chunk in chunks
            ]
        nll_BT = torch.cat([own_BT for own_BT, _ in tops])
        # d (sum of response losses) / d (output of the last layer), per chunk.
        outgrads = [outgrad_BTH for _, outgrad_BTH in tops]
        if coefficients is not None:
            # Those of a chunk depend on the losses of others, too.
            coefficient_BT = coefficients(ResponseLosses(batch=batch, nll_BT=nll_BT))
            outgrads = [
                (coefficient_BT[chunk.rows, :, None] * outgrad_BTH).to(outgrad_BTH.dtype)
                for chunk, outgrad_BTH in zip(chunks, outgrads, strict=True)
            ]
        chunk_signals_of = partial(
            ChunkSignals,
            window=window,
            weight_of=self.weight,
            others=self._others if "whole_rows" in batch else None,
        )
        for place in reversed(range(len(self.layers))):
            self._layer(place, chunks, outgrads, consumer_of, chunk_signals_of)
        return nll_BT

    def _layer(
        self,
        place: int,
        chunks: list[Chunk],
        outgrads: list[Tensor],
        consumer_of: ConsumerOf,
        chunk_signals_of: Callable[[Chunk], ChunkSignals],
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
                signals = chunk_signals_of(chunk)
                on_attention = signals.on_attention if signals.window else None
                hidden_BTH = chunk.entry.into(place).detach()
                with torch.enable_grad(), self._capture(index, signals, consume):
                    # The lowest layer's input needs no gradient: there the hooks let the outputs of
                    # its scored linears need one, where the graph then begins.
                    hidden_BTH.requires_grad_(place > 0)
                    # Calls `on_attention` with queries and keys meanwhile.
                    output_BTH = self._streamer.forward(
                        module, hidden_BTH, chunk.entry.layer_inputs[place], on_attention
                    )
                    output_BTH.backward(outgrads[number])
                if hidden_BTH.grad is not None:
                    outgrads[number] = hidden_BTH.grad

    def _capture(self, layer: int, signals: ChunkSignals, consume: SignalConsumer) -> SignalCapture:
        """Hooks on the scored linears of a layer: each hands over h and d once the backward pass
        has reached its output."""

        def on_backward(name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
            consume(signals.of_linear(self.linears[name], act_BTI, outgrad_BTO))

        module = self._streamer.module(layer)
        modules = {
            name: module.get_submodule(linear.path)
            for name, linear in self.linears.items()
            if linear.layer == layer
        }
        return SignalCapture(modules, on_backward)
