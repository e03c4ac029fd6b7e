"""What one layer computes and keeps, found by running it on the meta device, where tensors have
shapes but no storage.

Every architecture is thereby counted as it is written. Attention is counted as plain matrix
products over the whole row, causal or not, as torch's FLOP counter counts the math kernel, and
keeps what fused kernels keep.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from alphatoken.batch import WholeRows
from alphatoken.distributed.mesh import imagined_mesh
from alphatoken.errors import UserError
from alphatoken.models.decoder import Decoder
from alphatoken.passes.capture import Entry, EntryCapture, LayerInput
from alphatoken.passes.divided_attention import attend_divided
from alphatoken.passes.streamer import LayerStreamer
from alphatoken.planner.counting import CountedPass

META = torch.device("meta")


class _CountedAttention(torch.autograd.Function):
    """The matrix products of attention and of its backward pass; keeps q, k, v, the output and one
    number per query."""

    @staticmethod
    def forward(
        ctx: Any,
        query_BHTD: Tensor,
        key_BGTD: Tensor,
        value_BGTD: Tensor,
        whole: bool,  # noqa: FBT001 - autograd takes arguments by place
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
    **arguments: Any,
) -> tuple[Tensor, None]:
    if "whole_rows" in arguments:
        return attend_divided(
            _counted_attention, COUNTED_ATTENTION, module, query, key, value, **arguments
        )
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
    """Floating-point operations of one layer's training on one micro-batch, and bytes that are kept
    until its backward pass."""

    forward: int
    backward: int
    """With respect to input and weights."""
    kept_bytes: int
    largest_bytes: int
    """The largest single activation among them."""


@dataclass(frozen=True)
class BodyCost:
    """All layers of a decoder on one micro-batch."""

    layers: tuple[LayerCost, ...]
    state_bytes: int
    """One hidden state between layers."""

    @property
    def forward(self) -> int:
        return sum(layer.forward for layer in self.layers)

    @property
    def backward(self) -> int:
        return sum(layer.backward for layer in self.layers)

    @property
    def largest_bytes(self) -> int:
        """The largest single activation that a layer keeps."""
        return max(layer.largest_bytes for layer in self.layers)


@dataclass(frozen=True)
class TracedLayer:
    """One scored layer, ready to be run by what traces an estimator's scoring."""

    decoder: Decoder
    streamer: LayerStreamer
    """Holds a plain copy of the layer, as scorers run it."""
    index: int
    is_first: bool
    """Whether no layer below it is scored, so that nothing has to flow back through it; False where
    the estimator does not ask."""
    state_BTH: Tensor
    """Enters the layer."""
    inputs: LayerInput
    training: LayerCost

    @property
    def depth(self) -> int:
        """Number of last layers that begin with this one."""
        return len(self.decoder.layers) - self.index


SettingT = TypeVar("SettingT", bound=Hashable)
ScoringT = TypeVar("ScoringT")


class Tracer:
    """Runs the layers of a decoder that lives on the meta device.

    Layers that look alike are run once, and what was run once is remembered: a plan asks for the
    same micro-batch again with other estimators, and with every change that it considers. parts:
    over how many ranks rows are divided; `row_tokens` are then those of a part.
    """

    def __init__(self, decoder: Decoder, parts: int = 1) -> None:
        self._decoder = decoder
        self._parts = parts
        self._entries: dict[tuple[int, int], Entry] = {}
        self._bodies: dict[tuple[int, int], BodyCost] = {}
        self._scoring: dict[Any, Any] = {}

    @cached_property
    def _kinds(self) -> list[Hashable]:
        """For each layer, what makes it compute the same as another."""
        types = getattr(self._decoder.config, "layer_types", None)
        kinds: list[Hashable] = []
        for index in range(len(self._decoder.layers)):
            weights = self._decoder.segment_parameters(index).items()
            shapes = tuple((path, tuple(each.shape)) for path, each in weights)
            kinds.append((types and types[index], shapes))
        return kinds

    @cached_property
    def _streamer(self) -> LayerStreamer:
        streamer = LayerStreamer(self._decoder, 0, META, resident=True)
        streamer.refresh()
        return streamer

    def body(self, rows: int, row_tokens: int) -> BodyCost:
        """Traces the training of all layers on a micro-batch of (rows, row_tokens). Raises
        UserError where layers cannot run without values."""
        size = rows, row_tokens
        if size not in self._bodies:
            with self._shapes_only():
                entry = self._entry(*size)
                known: dict[Hashable, LayerCost] = {}
                for index, kind in enumerate(self._kinds):
                    if kind not in known:
                        known[kind] = self._training_cost(index, entry)
            layers = tuple(known[kind] for kind in self._kinds)
            self._bodies[size] = BodyCost(layers, entry.first_BTH.nbytes)
        return self._bodies[size]

    def scoring(
        self,
        trace: Callable[[TracedLayer, SettingT], ScoringT],
        setting: SettingT,
        *,
        depth: int,
        rows: int,
        row_tokens: int,
        first_differs: bool,
    ) -> list[ScoringT]:
        """Has the last `depth` layers traced on a micro-batch of (rows, row_tokens).

        `trace` must depend on its arguments only: layers alike are handed to it once for each
        `setting`, and with `first_differs` the lowest once more. Raises UserError where layers
        cannot run without values.
        """
        body = self.body(rows, row_tokens)
        first = len(body.layers) - depth
        found = []
        for index in range(first, len(body.layers)):
            is_first = first_differs and index == first
            key = trace, setting, rows, row_tokens, self._kinds[index], is_first
            if key not in self._scoring:
                with self._shapes_only():
                    entry = self._entry(rows, row_tokens)
                    layer = TracedLayer(
                        decoder=self._decoder,
                        streamer=self._streamer,
                        index=index,
                        is_first=is_first,
                        state_BTH=entry.into(index),
                        inputs=entry.layer_inputs[index],
                        training=body.layers[index],
                    )
                    self._scoring[key] = trace(layer, setting)
            found.append(self._scoring[key])
        return found

    def _entry(self, rows: int, row_tokens: int) -> Entry:
        """What every layer is given in the forward pass of a micro-batch."""
        size = rows, row_tokens
        if size not in self._entries:
            # Embeddings rather than tokens, as some models look for padding among these.
            head = self._decoder.head.weight
            embeddings_BTH = torch.empty(*size, head.shape[1], dtype=head.dtype, device=META)
            with (
                torch.no_grad(),
                self._one_of_each_kind(),
                EntryCapture(self._decoder, 0, keep="every") as capture,
            ):
                batch: dict[str, object] = {"inputs_embeds": embeddings_BTH}
                if self._parts > 1:
                    batch["whole_rows"] = WholeRows(self._parts, None)
                self._decoder.hidden_states(batch)
            self._entries[size] = capture.entry
        return self._entries[size]

    @contextmanager
    def _shapes_only(self) -> Iterator[None]:
        """Explains what layers raise that look at values."""
        try:
            with imagined_mesh(self._parts):
                yield
        except RuntimeError as error:
            raise UserError(
                f"{type(self._decoder.model).__name__} cannot be planned: its layers look at "
                f"values, and a plan has shapes only ({str(error).splitlines()[0]})"
            ) from None

    @contextmanager
    def _one_of_each_kind(self) -> Iterator[None]:
        """Inside, only the first of equal layers runs; the others hand on what they get."""
        seen: set[Hashable] = set()
        replaced = []
        for layer, kind in zip(self._decoder.layers, self._kinds, strict=True):
            if kind in seen:
                layer.forward = _hand_on
                replaced.append(layer)
            seen.add(kind)
        try:
            yield
        finally:
            for layer in replaced:
                del layer.forward

    def _training_cost(self, index: int, entry: Entry) -> LayerCost:
        layer, inputs = self._decoder.layers[index], entry.layer_inputs[index]
        weights = self._decoder.segment_parameters(index).values()
        with CountedPass([*weights, *tree_leaves((inputs.args, inputs.kwargs))]) as run:
            hidden_BTH = entry.into(index).detach().requires_grad_()
            output = layer(hidden_BTH, *inputs.args, **inputs.kwargs)
            output = output[0] if isinstance(output, tuple) else output
            forward = run.flops
            output.backward(torch.empty_like(output))
        return LayerCost(
            forward=forward,
            backward=run.flops - forward,
            kept_bytes=run.kept_bytes,
            largest_bytes=run.largest_bytes,
        )


def _hand_on(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_states
