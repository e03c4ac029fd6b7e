"""The diagonal Fisher of the reference model, E over prompts x and completions y of squared
gradients (Eq. 5), sharded.

The gradients are those of each completion's summed loss, at the scored parameters. The decoder runs
forward under DeepSpeed's hooks and the scored layers, from the last, one at a time through the
streamer; each rank brings sequences of its own and keeps its slices of the sums. What has been
summed is saved now and then, so an interrupted estimate goes on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from alphatoken.batch import Batch, RowIndex
from alphatoken.distributed import zero3
from alphatoken.models.decoder import Decoder
from alphatoken.models.head import head_outgrads
from alphatoken.models.scored import ParameterSet, ScoredParameter, Segment
from alphatoken.passes.capture import Entry, EntryCapture, SignalCapture
from alphatoken.passes.chunks import Chunk, chunks_of, top_backward
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.stability import squares
from alphatoken.stability.squares import Square, TiedUse

Signals = defaultdict[str, list[tuple[Tensor, Tensor]]]
"""Inputs and output gradients of the modules of a segment, by path, a pair per chunk."""


@dataclass(frozen=True)
class Owner:
    """A module with scored parameters of its own."""

    path: str
    """Within its segment."""
    names: dict[str, str]
    """Full names of parameters by their names in the module."""


def _owners(parameters: Iterable[ScoredParameter]) -> dict[Segment, list[Owner]]:
    """Modules of each segment with gradients by position."""
    owners: dict[Segment, list[Owner]] = {}
    for scored in parameters:
        if scored.kind == "other":
            continue
        path, _, own_name = scored.path.rpartition(".")
        of_segment = owners.setdefault(scored.segment, [])
        owner = next((owner for owner in of_segment if owner.path == path), None)
        if owner is None:
            owner = Owner(path, names={})
            of_segment.append(owner)
        owner.names[own_name] = scored.name
    return owners


class FisherSum:
    """Sums of squared gradients over sequences, of the chosen parameters of the last `depth`
    layers.

    Parameters without a gradient by position (`kind` other: experts, convolutions) have none.
    """

    def __init__(
        self,
        decoder: Decoder,
        depth: int,
        square: Square,
        device: torch.device,
        *,
        parameters: ParameterSet = "linears",
        chunk_tokens: int = 16384,
    ) -> None:
        self._decoder = decoder
        self._square: Square = square
        self._device = device
        self._chunk_tokens = chunk_tokens
        self._streamer = LayerStreamer(decoder, len(decoder.layers) - depth, device, resident=False)
        self._owners = _owners(decoder.scored_parameters(depth, parameters))
        self.parameters = decoder.stable_parameters(depth, parameters)
        self.slices = {
            name: zero3.padded(torch.zeros(end - start, device=device), parameter)
            for name, parameter in self.parameters.items()
            for start, end in [zero3.slice_range(parameter)]
        }

    @torch.no_grad()
    def forward(self, ids_BT: Tensor) -> tuple[Entry, Tensor]:
        """Runs the model's body on sequences padded on the right: what `add` wants, and the states
        after the norm.

        Embeddings of tokens alone are gathered here, in small messages, rather than by DeepSpeed's
        hooks.
        """
        inputs = {"input_ids": ids_BT}
        paths = self._decoder.segment_parameters("embeddings").keys()
        if len(paths) == 1:
            with self._streamer.segment("embeddings") as module:
                weights = {path: module.get_parameter(path) for path in paths}
                inputs = {"inputs_embeds": self._streamer.embed(weights, inputs)}
        first = self._streamer.indices.start
        with EntryCapture(self._decoder, first, keep="every") as capture:
            hidden_BTH = self._decoder.hidden_states(inputs)
        return capture.entry, hidden_BTH

    @contextmanager
    def head(self) -> Iterator[nn.Linear]:
        """The model's head, gathered. Every rank must enter it."""
        with self._streamer.segment("head") as head:
            assert isinstance(head, nn.Linear)
            yield head

    @torch.no_grad()
    def add(self, entry: Entry, batch: Batch) -> None:
        """Adds the sequences of one batch per rank, which may be empty (no label). Every rank must
        call it.

        The batch is padded on the right. Memory: the states between the
        layers, one layer with the signals of its modules, one block of logits (all those of one
        sequence where the head is scored), and one parameter's matrix in float32, which is reduced
        before the next is formed.
        """
        chunks = chunks_of(entry, batch, self._chunk_tokens)
        outgrads = self._top(chunks)
        for place, index in reversed(list(enumerate(self._streamer.indices))):
            signals: Signals = defaultdict(list)
            with self._streamer.segment(index) as module:
                for number, chunk in enumerate(chunks):
                    if chunk.has_response:
                        outgrads[number] = self._back(
                            module, place, chunk, outgrads[number], signals
                        )
                self._take(index, module, signals)
        self._embeddings(chunks, outgrads, batch["input_ids"])
        self._head(chunks, outgrads, batch["input_ids"])

    def _top(self, chunks: Sequence[Chunk]) -> list[Tensor]:
        """Gradients at the last layer's output, (B, T, H); takes the final norm's on the way."""
        signals: Signals = defaultdict(list)
        outgrads = []
        with self._streamer.top() as (norm, head):
            for chunk in chunks:

                def remember(
                    path: str, act_RH: Tensor, outgrad_RH: Tensor, index: RowIndex = chunk.index
                ) -> None:
                    signals[path].append((index.put(act_RH), index.put(outgrad_RH)))

                with SignalCapture({"": norm}, remember):
                    states_BTH = chunk.entry.out
                    _, outgrad_BTH = top_backward(
                        norm, head, states_BTH, chunk, self._decoder.logit_softcap
                    )
                outgrads.append(outgrad_BTH)
            self._take("norm", norm, signals)
        return outgrads

    def _back(
        self, module: nn.Module, place: int, chunk: Chunk, outgrad_BTH: Tensor, signals: Signals
    ) -> Tensor:
        """One layer's backward pass; the gradient at its input, where something below wants it."""

        def remember(path: str, act: Tensor, outgrad: Tensor) -> None:
            if path in self._decoder.architecture.head_first_norms:
                act, outgrad = act.transpose(1, 2), outgrad.transpose(1, 2)
            signals[path].append((act, outgrad))

        watched = {
            owner.path: module.get_submodule(owner.path)
            for owner in self._owners.get(self._streamer.indices[place], ())
        }
        hidden_BTH = chunk.entry.into(place).detach()
        with torch.enable_grad(), SignalCapture(watched, remember):
            hidden_BTH.requires_grad_(place > 0 or "embeddings" in self._owners)
            self._streamer.forward(module, hidden_BTH, chunk.entry.layer_inputs[place]).backward(
                outgrad_BTH
            )
        return outgrad_BTH if hidden_BTH.grad is None else hidden_BTH.grad

    def _take(self, segment: Segment, module: nn.Module, signals: Signals) -> None:
        """Squares what a segment's modules saw, one parameter after the other, and adds it to the
        slices."""
        for owner in self._owners.get(segment, ()):
            owning, pairs = module.get_submodule(owner.path), signals.pop(owner.path, [])
            for own_name, name in owner.names.items():
                total = torch.zeros(zero3.full_shape(self.parameters[name]), device=self._device)
                for act, outgrad in pairs:
                    self._square_into(total, owning, own_name, act, outgrad)
                self._reduce(name, total)

    def _square_into(
        self, total: Tensor, owning: nn.Module, own_name: str, act: Tensor, outgrad: Tensor
    ) -> None:
        """Adds the squares of one parameter's gradients, by its name in its module, to `total`."""
        if not isinstance(owning, nn.Linear | Conv1D):
            gradients = squares.norm_gradients(owning, act, outgrad)
            total += squares.vector_square(gradients[own_name], self._square)
        elif own_name == "bias":
            total += squares.vector_square(outgrad, self._square)
        else:
            rows, columns = (act, outgrad) if isinstance(owning, Conv1D) else (outgrad, act)
            squares.add_linear_square(total, rows, columns, self._square)

    def _embeddings(
        self, chunks: Sequence[Chunk], outgrads: Sequence[Tensor], ids_BT: Tensor
    ) -> None:
        """Takes the embeddings that are not tied to the head."""
        for owner in self._owners.get("embeddings", ()):
            name = owner.names["weight"]
            if name == self._head_names()["weight"]:
                continue
            total_VH = torch.zeros(zero3.full_shape(self.parameters[name]), device=self._device)
            for chunk, outgrad_BTH in zip(chunks, outgrads, strict=True):
                index_BT, entered_BTH = self._entered(owner.path, ids_BT[chunk.rows], outgrad_BTH)
                squares.add_embedding_square(total_VH, index_BT, entered_BTH, self._square)
            self._reduce(name, total_VH)

    def _entered(self, path: str, ids_BT: Tensor, outgrad_BTH: Tensor) -> tuple[Tensor, Tensor]:
        """Which rows of an embedding the tokens take, and the gradients of those, from that at the
        first layer."""
        embedding = self._decoder.segment("embeddings").get_submodule(path)
        assert isinstance(embedding, nn.Embedding)
        if embedding is not self._decoder.model.get_input_embeddings():  # it is of positions
            ids_BT = torch.arange(ids_BT.shape[1], device=ids_BT.device).expand_as(ids_BT)
        entered_BTH = outgrad_BTH * getattr(embedding, "embed_scale", 1.0)
        if embedding.padding_idx is not None:  # a row that never gets a gradient
            entered_BTH = entered_BTH.masked_fill((ids_BT == embedding.padding_idx)[..., None], 0.0)
        return ids_BT, entered_BTH

    def _head(self, chunks: Sequence[Chunk], outgrads: Sequence[Tensor], ids_BT: Tensor) -> None:
        """Takes the head's parameters, one sequence after the other, and the embeddings' where they
        are the same."""
        names = self._head_names()
        if not names:
            return
        tied_path = self._tied_path(names["weight"])
        totals = {
            own: torch.zeros(zero3.full_shape(self.parameters[name]), device=self._device)
            for own, name in names.items()
        }
        with self._streamer.top() as (norm, head):
            for chunk, outgrad_BTH in zip(chunks, outgrads, strict=True):
                for row in range(len(chunk.targets_BT)):
                    one = slice(row, row + 1)
                    index = chunk.index.of_rows(one)
                    act_RH = norm(index.take(chunk.entry.out[one]))
                    targets_R = index.take(chunk.targets_BT[one])
                    outgrad_RV = head_outgrads(act_RH, head, targets_R, self._decoder.logit_softcap)
                    tied = None
                    if tied_path is not None:
                        index_1T, entered_1TH = self._entered(
                            tied_path, ids_BT[chunk.rows][one], outgrad_BTH[one]
                        )
                        tied = TiedUse(
                            position_R=index.index_R,
                            ids_T=index_1T[0],
                            entered_TH=entered_1TH[0],
                        )
                    squares.add_head_square(
                        totals["weight"], outgrad_RV, act_RH, tied, self._square
                    )
                    if "bias" in totals:
                        totals["bias"] += squares.vector_square(outgrad_RV[None], self._square)
        for own, total in totals.items():
            self._reduce(names[own], total)

    def _head_names(self) -> dict[str, str]:
        """Full names of the head's parameters by their own; none where it is not scored."""
        owners = self._owners.get("head", ())
        return next((owner.names for owner in owners if owner.path == ""), {})

    def _tied_path(self, head_weight: str) -> str | None:
        """Where the embeddings have the head's weight, if they do."""
        owners = self._owners.get("embeddings", ())
        return next((owner.path for owner in owners if owner.names["weight"] == head_weight), None)

    def _reduce(self, name: str, total: Tensor) -> None:
        self.slices[name] += zero3.sum_to_slices([total], [self.parameters[name]])[0]
