"""What one layer computes and keeps, found by running it on the meta device, where tensors have
shapes but no storage.

Every architecture is thereby counted as it is written. Attention is counted as plain matrix
products over the whole row, causal or not, as torch's FLOP counter counts the math kernel, and
keeps what fused kernels keep.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface

from alphatoken.config.sections import ValuationConfig
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder
from alphatoken.passes.attention import AttentionCall, attention_band, mix_band
from alphatoken.passes.capture import Entry, EntryCapture, SignalCapture
from alphatoken.passes.streamer import LayerStreamer

META = torch.device("meta")


class FlopCounter(TorchDispatchMode):
    """torch's FLOP formulas without FlopCounterMode's module tracking, which does not bear
    `autograd.grad`."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=result))
        return result


class _CountedAttention(torch.autograd.Function):
    """The matrix products of attention and of its backward pass; keeps q, k, v, the output and one
    number per query."""

    @staticmethod
    def forward(
        ctx: Any, query_BHTD: Tensor, key_BGTD: Tensor, value_BGTD: Tensor, whole: bool
    ) -> Tensor:
        groups = query_BHTD.shape[1] // key_BGTD.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key_BGTD, value_BGTD))
        products_BHTT = query_BHTD @ key.mT
        products_BHTT.to(value.dtype) @ value  # counted as it is dispatched
        out_BHTD = torch.empty_like(
            query_BHTD, dtype=value.dtype
        )  # laid out like the query, as fused kernels do
        kept = (
            products_BHTT.float()
            if whole
            else query_BHTD.new_empty(query_BHTD.shape[:3], dtype=torch.float32)
        )
        ctx.save_for_backward(query_BHTD, key_BGTD, value_BGTD, out_BHTD, kept)
        return out_BHTD

    @staticmethod
    def backward(ctx: Any, outgrad_BHTD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_BHTD, key_BGTD, value_BGTD, _, _ = ctx.saved_tensors
        groups = query_BHTD.shape[1] // key_BGTD.shape[1]
        key, value = (each.repeat_interleave(groups, dim=1) for each in (key_BGTD, value_BGTD))
        outgrad_BHTT = outgrad_BHTD.to(value.dtype) @ value.mT
        for left, right in (
            (outgrad_BHTT.mT, outgrad_BHTD),
            (outgrad_BHTT, key),
            (outgrad_BHTT.mT, query_BHTD),
        ):
            left @ right.to(left.dtype)
        return (
            torch.empty_like(query_BHTD),
            torch.empty_like(key_BGTD),
            torch.empty_like(value_BGTD),
            None,
        )


def _counted_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **_: Any,
) -> tuple[Tensor, None]:
    whole = bool(
        getattr(module.config, "attn_logit_softcapping", None)
    )  # these run eagerly, and keep T x T numbers
    out: Tensor = _CountedAttention.apply(query, key, value, whole)  # type: ignore[no-untyped-call]
    return out.transpose(1, 2).contiguous(), None


COUNTED_ATTENTION = "alphatoken_counted"
"""The attention implementation that models are planned with."""

AttentionInterface.register(COUNTED_ATTENTION, _counted_attention)


@dataclass(frozen=True)
class LayerCost:
    """One layer on one micro-batch: floating-point operations, and bytes that are kept until its
    backward pass."""

    forward: int
    backward: int
    """With respect to input and weights."""
    training_bytes: int
    scoring_forward: int = 0
    """ghost: forward. exact: one pass in dual numbers, in one direction."""
    scoring_backward: int = 0
    """ghost: with respect to the input only."""
    scoring_bytes: int = 0
    """ghost: with weights frozen, and the inputs of linears held until their signals come."""
    band: int = 0
    """ghost: attention probabilities of the causal window."""
    mixing: int = 0
    """ghost: the causal path's mixture of output gradients."""


@dataclass(frozen=True)
class BodyCost:
    """All layers of a decoder on one micro-batch."""

    layers: tuple[LayerCost, ...]
    state_bytes: int
    """One hidden state between layers."""
    largest_bytes: int
    """The largest single activation that a layer keeps."""

    @property
    def forward(self) -> int:
        return sum(layer.forward for layer in self.layers)

    @property
    def backward(self) -> int:
        return sum(layer.backward for layer in self.layers)


class Tracer:
    """Runs the layers of a decoder that lives on the meta device. Layers that look alike are run
    once."""

    def __init__(self, decoder: Decoder, valuation: ValuationConfig, depth: int) -> None:
        self._decoder = decoder
        self._valuation = valuation
        self._exact = valuation.estimator == "exact"
        self._first = len(decoder.layers) - depth
        self._streamer = LayerStreamer(decoder, 0, META, resident=True)
        self._streamer.refresh()

    def run(self, rows: int, row_tokens: int) -> BodyCost:
        """The costs on a micro-batch of (rows, row_tokens). Raises UserError where layers cannot
        run without values."""
        # Embeddings rather than tokens, as some models look for padding among these.
        head = self._decoder.head.weight
        batch = {
            "inputs_embeds": torch.empty(
                rows, row_tokens, head.shape[1], dtype=head.dtype, device=META
            )
        }
        layers = list(self._decoder.layers)
        known: dict[Any, tuple[LayerCost, int]] = {}
        try:
            with (
                torch.no_grad(),
                self._one_of_each_kind(),
                EntryCapture(self._decoder, 0, keep="every") as capture,
            ):
                self._decoder.hidden_states(batch)
            costs = []
            for index in range(len(layers)):
                # Nothing flows back below the first layer that is scored.
                kind = (index > self._first) - (index < self._first), self._kind(index)
                if kind not in known:
                    known[kind] = self._cost(index, capture.entry)
                costs.append(known[kind][0])
        except RuntimeError as error:
            raise UserError(
                f"{type(self._decoder.model).__name__} cannot be planned: its layers look at "
                "values, and a plan has "
                f"shapes only ({str(error).splitlines()[0]})"
            ) from None
        largest = max(largest for _, largest in known.values())
        return BodyCost(tuple(costs), capture.entry.first_BTH.nbytes, largest)

    def _kind(self, index: int) -> Any:
        """What makes two layers compute the same."""
        types = getattr(self._decoder.config, "layer_types", None)
        shapes = [
            (path, tuple(each.shape))
            for path, each in self._decoder.segment_parameters(index).items()
        ]
        return types and types[index], tuple(shapes)

    @contextmanager
    def _one_of_each_kind(self) -> Iterator[None]:
        """Of layers that are alike only the first runs inside; the others hand on what they get."""
        seen, replaced = set(), []
        for index, layer in enumerate(self._decoder.layers):
            kind = self._kind(index)
            if kind in seen:
                layer.forward = _hand_on
                replaced.append(layer)
            seen.add(kind)
        try:
            yield
        finally:
            for layer in replaced:
                del layer.forward

    def _cost(self, index: int, entry: Entry) -> tuple[LayerCost, int]:
        """Of one layer; and the bytes of the largest activation it keeps."""
        layer, state, inputs = (
            self._decoder.layers[index],
            entry.into(index),
            entry.layer_inputs[index],
        )
        weights = self._decoder.segment_parameters(index).values()
        with _Pass([*weights, *tree_leaves((inputs.args, inputs.kwargs))]) as run:
            output = layer(state.detach().requires_grad_(), *inputs.args, **inputs.kwargs)
            output = output[0] if isinstance(output, tuple) else output
            forward = run.flops
            output.backward(torch.empty_like(output))
        cost = {
            "forward": forward,
            "backward": run.flops - forward,
            "training_bytes": run.kept_bytes,
        }
        if self._valuation.enabled and index >= self._first:
            cost |= (
                self._exact_cost(index, entry, forward)
                if self._exact
                else self._ghost_cost(index, entry)
            )
        return LayerCost(**cost), run.largest_bytes

    def _ghost_cost(self, index: int, entry: Entry) -> dict[str, int]:
        module, inputs = self._streamer.module(index), entry.layer_inputs[index]
        scored = [
            each
            for each in self._decoder.scored_linears(len(entry.layer_inputs))
            if each.layer == index
        ]
        linears = {each.path: module.get_submodule(each.path) for each in scored}
        calls: list[AttentionCall] = []
        outgrads: dict[str, Tensor] = {}

        def consume(path: str, _: Tensor, outgrad: Tensor) -> None:
            outgrads[path] = outgrad

        hidden_BTH = entry.into(index).detach().requires_grad_(index > self._first)
        shared = [*module.parameters(), *tree_leaves((inputs.args, inputs.kwargs))]
        with _Pass(shared, linears.values()) as tower, SignalCapture(linears, consume):
            output_BTH = self._streamer.forward(
                module, hidden_BTH, inputs, lambda _, call: calls.append(call)
            )
            forward = tower.flops
            output_BTH.backward(torch.empty_like(output_BTH))
        cost = {
            "scoring_forward": forward,
            "scoring_backward": tower.flops - forward,
            "scoring_bytes": tower.kept_bytes,
        }
        if self._valuation.window and calls:
            with torch.no_grad(), FlopCounter() as counter:
                band_BTW = attention_band(calls[0], self._valuation.window)
                cost["band"] = counter.total
                for each in scored:
                    if each.is_value and each.feeds is None:
                        rows = (
                            slice(None) if each.value_rows is None else slice(len(each.value_rows))
                        )
                        mix_band(band_BTW, outgrads[each.path][..., rows])
            cost["mixing"] = counter.total - cost["band"]
        return cost

    def _exact_cost(self, index: int, entry: Entry, forward: int) -> dict[str, int]:
        module, state_BTH = self._streamer.module(index), entry.into(index)
        paths = [
            each.path
            for each in self._decoder.scored_parameters(
                len(entry.layer_inputs), self._valuation.parameters
            )
            if each.segment == index
        ]
        direction = {path: torch.empty_like(module.get_parameter(path)) for path in paths}
        inputs = entry.layer_inputs[index]
        try:
            with FlopCounter() as counter:
                self._streamer.jvp(
                    module, state_BTH, torch.empty_like(state_BTH), inputs, direction
                )
        except (
            RuntimeError,
            UserError,
        ):  # experts and layer norms, in forward mode and without values
            return {
                "scoring_forward": 3 * forward
            }  # every product, and its derivative by either factor
        return {"scoring_forward": counter.total}


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states


class _Pass(ExitStack):
    """Counts FLOPs inside, what autograd keeps, and the inputs of `held` modules; `shared` tensors
    are not counted."""

    def __init__(self, shared: Iterable[Any], held: Iterable[nn.Module] = ()) -> None:
        super().__init__()
        self._shared = {
            each.untyped_storage()._cdata for each in shared if isinstance(each, Tensor)
        }
        self._held = list(held)
        self._kept: dict[
            int, torch.UntypedStorage
        ] = {}  # the storages themselves, or their addresses would be reused
        self._counter = FlopCounter()

    def __enter__(self) -> _Pass:
        super().__enter__()
        for module in self._held:
            self.callback(module.register_forward_pre_hook(self._on_held).remove)
        self.enter_context(saved_tensors_hooks(self._keep, lambda tensor: tensor))
        self.enter_context(torch.enable_grad())
        self.enter_context(self._counter)
        return self

    @property
    def flops(self) -> int:
        return self._counter.total

    @property
    def largest_bytes(self) -> int:
        return max(storage.nbytes() for storage in self._kept.values())

    @property
    def kept_bytes(self) -> int:
        return sum(storage.nbytes() for storage in self._kept.values())

    def _on_held(self, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._keep(inputs[0])

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._shared:
            self._kept[storage._cdata] = storage
        return tensor
