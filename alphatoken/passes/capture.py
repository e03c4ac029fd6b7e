"""Context managers that own hooks and hand over what they see; leaving them leaves the modules
untouched."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

SignalConsumer = Callable[[str, Tensor, Tensor], None]


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

    def __init__(self, modules: Mapping[str, nn.Module], consume: SignalConsumer) -> None:
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
    """What the scored layers were given in a forward pass.

    states: (B, T, H) each, detached: what entered the first layer; where every state was asked for
    also what entered each of the others, and what left the last. `layer_inputs[i]` is what else the
    i-th of them got.
    """

    states: tuple[Tensor, ...]
    layer_inputs: tuple[LayerInput, ...]

    def rows(self, rows: slice) -> Entry:
        """The same entry for some of the sequences. Tensors whose first dimension is 1 are shared
        by all sequences."""
        batch = self.states[0].shape[0]

        def narrow(value: Any) -> Any:
            return (
                value[rows]
                if isinstance(value, Tensor) and value.dim() > 1 and value.shape[0] == batch
                else value
            )

        inputs = (
            LayerInput(*tree_map(narrow, (each.args, each.kwargs))) for each in self.layer_inputs
        )
        return Entry(tuple(state[rows] for state in self.states), tuple(inputs))


class EntryCapture(_HookOwner):
    """Records the `Entry` of one forward pass through the given (last) decoder layers.

    With the `norm` that follows them it keeps every state between layers, otherwise the first only.
    """

    def __init__(self, layers: Sequence[nn.Module], norm: nn.Module | None = None) -> None:
        super().__init__()
        self._layers = layers
        self._norm = norm
        self._states: dict[int, Tensor] = {}
        self._inputs: dict[int, LayerInput] = {}

    def __enter__(self) -> EntryCapture:
        for index, layer in enumerate(self._layers):
            hook = layer.register_forward_pre_hook(partial(self._on_layer, index), with_kwargs=True)
            self._hooks.enter_context(hook)
        if self._norm is not None:
            self._hooks.enter_context(self._norm.register_forward_pre_hook(self._on_norm))
        return self

    @property
    def entry(self) -> Entry:
        assert self._states, "no forward pass was recorded"
        inputs = tuple(self._inputs[index] for index in range(len(self._layers)))
        return Entry(tuple(self._states[index] for index in sorted(self._states)), inputs)

    def _on_layer(
        self, index: int, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        kwargs = dict(kwargs)
        hidden, *others = args or (kwargs.pop("hidden_states"),)
        if index == 0 or self._norm is not None:
            self._states[index] = hidden.detach()
        self._inputs[index] = LayerInput(*tree_map(_detached, (tuple(others), kwargs)))

    def _on_norm(self, _module: nn.Module, args: tuple[Any, ...]) -> None:
        self._states[len(self._layers)] = args[0].detach()


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
