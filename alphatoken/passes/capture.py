"""Context managers that own hooks and hand over what they see; leaving them leaves the modules
untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from alphatoken.batch import WholeRows
from alphatoken.models.decoder import Decoder

HookConsumer = Callable[[str, Tensor, Tensor], None]


class _HookOwner(AbstractContextManager[Any]):
    """Removes every hook it registered on exit."""

    def __init__(self) -> None:
        self._hooks = ExitStack()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._hooks.close()


class SignalCapture(_HookOwner):
    """Hands `(name, act_BTI, outgrad_BTO)` of every given module to `consume`, as the backward pass
    reaches it.

    The modules must be frozen, so that autograd does not keep their inputs. Those whose input needs
    no gradient become the leaves of the graph, and the backward pass stops there.
    """

    def __init__(self, modules: Mapping[str, nn.Module], consume: HookConsumer) -> None:
        super().__init__()
        self._modules = modules
        self._consume = consume
        self._acts: dict[str, Tensor] = {}

    def __enter__(self) -> SignalCapture:
        for name, module in self._modules.items():
            self._hooks.enter_context(module.register_forward_hook(partial(self._on_forward, name)))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, trace)
        self._acts.clear()

    def _on_forward(
        self, name: str, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
    ) -> None:
        self._acts[name] = inputs[0].detach()
        if not output.requires_grad:
            output.requires_grad_()
        output.register_hook(partial(self._on_backward, name))

    def _on_backward(self, name: str, outgrad: Tensor) -> None:
        self._consume(name, self._acts.pop(name), outgrad.detach())


@dataclass(frozen=True)
class LayerInput:
    """What a layer is called with besides the hidden state: masks, rotary embeddings, whatever the
    model passes."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """What the last layers of a decoder were given in one forward pass.

    Hidden states are (B, T, H), detached; which of them are there is `EntryCapture`'s `keep`.
    """

    layer_inputs: tuple[LayerInput, ...]
    """For each layer, what it was called with besides the hidden state."""
    first_BTH: Tensor
    """Entered the first layer."""
    between: tuple[Tensor, ...] | None
    """Entered each of the other layers; None where only the first state was kept."""
    last_BTH: Tensor | None
    """Left the last layer; None where only the first state was kept."""

    def into(self, place: int) -> Tensor:
        """The state that entered the layer at `place` (0 is the first captured one)."""
        if place == 0:
            return self.first_BTH
        assert self.between is not None, "only the state before the first layer was kept"
        return self.between[place - 1]

    @property
    def out(self) -> Tensor:
        """The state that left the last layer."""
        assert self.last_BTH is not None, "only the state before the first layer was kept"
        return self.last_BTH

    def rows(self, rows: slice) -> Entry:
        """Narrows the entry to some of the sequences. Tensors whose first dimension is 1 are shared
        by all sequences, and what has one dimension describes them all (boundaries of packed
        documents, of which there is one sequence)."""
        batch = self.first_BTH.shape[0]

        def narrow(value: Any) -> Any:
            if isinstance(value, WholeRows):
                return value.rows(rows)
            of_sequences = isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch
            return value[rows] if of_sequences else value

        return Entry(
            layer_inputs=tuple(
                LayerInput(*tree_map(narrow, (each.args, each.kwargs)))
                for each in self.layer_inputs
            ),
            first_BTH=self.first_BTH[rows],
            between=None if self.between is None else tuple(state[rows] for state in self.between),
            last_BTH=None if self.last_BTH is None else self.last_BTH[rows],
        )


class EntryCapture(_HookOwner):
    """Records the `Entry` of one forward pass through the decoder layers from index `first` on.

    keep: "first" keeps the state that enters layer `first`, which is all that a forward pass needs;
    "every" also keeps those between the layers and the one that leaves the last, so that layers can
    be run again one at a time, in any order.
    """

    def __init__(self, decoder: Decoder, first: int, *, keep: Literal["first", "every"]) -> None:
        super().__init__()
        self._layers = list(decoder.layers)[first:]
        self._norm = decoder.norm
        self._keeps_every = keep == "every"
        self._states: dict[int, Tensor] = {}
        self._inputs: dict[int, LayerInput] = {}

    def __enter__(self) -> EntryCapture:
        for place, layer in enumerate(self._layers):
            hook = layer.register_forward_pre_hook(partial(self._on_layer, place), with_kwargs=True)
            self._hooks.enter_context(hook)
        if self._keeps_every:
            self._hooks.enter_context(self._norm.register_forward_pre_hook(self._on_norm))
        return self

    @property
    def entry(self) -> Entry:
        """What was recorded, after the forward pass."""
        assert self._states, "no forward pass was recorded"
        depth, every = len(self._layers), self._keeps_every
        return Entry(
            layer_inputs=tuple(self._inputs[place] for place in range(depth)),
            first_BTH=self._states[0],
            between=tuple(self._states[place] for place in range(1, depth)) if every else None,
            last_BTH=self._states[depth] if every else None,
        )

    def _on_layer(
        self, place: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        kwargs = dict(kwargs)
        hidden, *others = args or (kwargs.pop("hidden_states"),)
        if place == 0 or self._keeps_every:
            self._states[place] = hidden.detach()
        self._inputs[place] = LayerInput(*tree_map(_detached, (tuple(others), kwargs)))

    def _on_norm(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states[len(self._layers)] = args[0].detach()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
