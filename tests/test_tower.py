"""The tower against one backward pass through all scored layers at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from alphatoken.batch import Batch, make_batch
from alphatoken.models.decoder import Decoder, decoder_of
from alphatoken.passes.capture import Entry, EntryCapture, SignalCapture
from alphatoken.passes.chunks import chunks_of, top_backward
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.values.ghost.signals import LinearSignals
from alphatoken.values.ghost.tower import Tower
from tests.test_valuation import LENGTHS
from tests.tiny import CASES, by_architecture, collate, random_sequences

CPU = torch.device("cpu")
DEPTH = 4
Signals = dict[str, tuple[Tensor, Tensor]]
"""(h, d) of every scored linear by name, of all positions."""


class SavedForBackward:
    """Bytes that graphs built inside keep for their backward passes: now, and the most so far."""

    def __init__(self) -> None:
        self.held = 0
        self.most = 0

    @contextmanager
    def counted(self) -> Iterator[None]:
        with saved_tensors_hooks(lambda tensor: _Saved(tensor, self), lambda saved: saved.tensor):
            yield


class _Saved:
    def __init__(self, tensor: Tensor, counter: SavedForBackward) -> None:
        self.tensor, self._counter = tensor, counter
        counter.held += tensor.nbytes
        counter.most = max(counter.most, counter.held)

    def __del__(self) -> None:
        self._counter.held -= self.tensor.nbytes


def at_once(decoder: Decoder, entry: Entry, batch: Batch) -> tuple[Signals, list[int]]:
    """The signals by one graph of all layers, and the bytes that each layer's part of it holds."""
    streamer = LayerStreamer(decoder, 0, CPU, resident=True)
    streamer.refresh()
    (chunk,) = chunks_of(entry, batch, 10**6)
    linears = {
        linear.name: streamer.module(linear.layer).get_submodule(linear.path)
        for linear in decoder.scored_linears(DEPTH)
    }
    found: Signals = {}
    saved = SavedForBackward()
    held = [0]

    def keep(name: str, act_BTI: Tensor, outgrad_BTO: Tensor) -> None:
        found[name] = (act_BTI, outgrad_BTO)

    with ExitStack() as stack:
        norm, head = stack.enter_context(streamer.top())
        stack.enter_context(torch.enable_grad())
        stack.enter_context(saved.counted())
        stack.enter_context(SignalCapture(linears, keep))
        hidden_BTH = entry.first_BTH
        for index in streamer.indices:
            hidden_BTH = streamer.forward(
                streamer.module(index), hidden_BTH, entry.layer_inputs[index]
            )
            held.append(saved.held)
        _, outgrad_BTH = top_backward(norm, head, hidden_BTH.detach(), chunk, decoder.logit_softcap)
        hidden_BTH.backward(outgrad_BTH)
    return found, [after - before for before, after in pairwise(held)]


def by_tower(
    decoder: Decoder, entry: Entry, batch: Batch, *, resident: bool
) -> tuple[Signals, int]:
    """The signals by the tower, and the most bytes that its graphs held."""
    tower = Tower(decoder, DEPTH, CPU, resident=resident)
    tower.refresh()
    found: Signals = {}
    saved = SavedForBackward()

    def keep(signals: LinearSignals) -> None:
        found[signals.linear.name] = (signals.act_BTI, signals.outgrad_BTO)

    with saved.counted():
        tower.run(entry, batch, lambda _layer: nullcontext(keep))
    return found, saved.most


@pytest.mark.parametrize("name", by_architecture())
def test_layers_one_by_one_give_the_signals_of_one_graph_and_hold_one_layer(name: str) -> None:
    """To the last bit, with resident and with streamed weights."""
    case = CASES[name]
    model = case.build()
    if not case.eager_only:
        model.set_attn_implementation("sdpa")
    decoder = decoder_of(model)
    batch = make_batch(collate(random_sequences(LENGTHS, seed=1)))
    with torch.no_grad(), EntryCapture(decoder, 0, keep="every") as capture:
        decoder.hidden_states({"input_ids": batch["input_ids"]})
    expected, by_layer = at_once(decoder, capture.entry, batch)
    for resident in (True, False):
        found, held = by_tower(decoder, capture.entry, batch, resident=resident)
        assert found.keys() == expected.keys()
        for linear, signals in found.items():
            for kind, own, other in zip("hd", signals, expected[linear], strict=True):
                assert torch.equal(own, other), f"{kind} of {linear} differs"
        assert held <= 1.05 * max(by_layer)
        if not decoder.architecture.recurrent:  # layers are alike
            assert held <= 1.2 / DEPTH * sum(by_layer)
