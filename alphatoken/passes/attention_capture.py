"""Attention layers whose queries and keys are handed over while their own kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from functools import partial
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from alphatoken.config.choices import is_flash
from alphatoken.passes.attention import AttentionCall, Visibility
from alphatoken.passes.blocked_attention import blocked_attention
from alphatoken.passes.divided_attention import attend_divided
from alphatoken.passes.kernel_sums import by_head, kernel_sums
from alphatoken.passes.kernels import kernel_function, named

CAPTURING_ATTENTION = "alphatoken_capture"
"""The attention implementation that layers are configured with to run inside `AttentionCapture`."""

AttentionConsumer = Callable[[int, AttentionCall], None]


class AttentionCapture(AbstractContextManager["AttentionCapture"]):
    """Runs layers configured with CAPTURING_ATTENTION and hands `(layer, AttentionCall)` of each to
    `consume`.

    `implementation` is the one the model was loaded with; the same kernel runs, and masks are read
    as it reads them. With `blocked` an explicit softmax in query blocks runs instead: it has a
    forward derivative, unlike fused kernels, and nothing is handed over.
    """

    def __init__(
        self,
        implementation: str,
        consume: AttentionConsumer | None = None,
        *,
        blocked: bool = False,
    ) -> None:
        self._implementation = implementation
        self._consume = consume
        self._blocked = blocked
        self._token: Token[AttentionCapture | None] | None = None

    def __enter__(self) -> AttentionCapture:
        self._token = _active_attention_capture.set(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._token is not None
        _active_attention_capture.reset(self._token)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs the attention of one layer and hands its arguments, and what its kernel knows of
        their softmax, to the consumer.

        Takes and returns what functions of the `transformers` attention interface do: `query`
        (B, H, T, D), `key` and `value` (B, G, T, D); the output (B, T, H, D), and weights or None.
        Of rows that are divided over ranks (`whole_rows`) the consumer gets whole rows in this
        rank's share of the heads.
        """
        attend = partial(self._attend, layer=module)
        if "whole_rows" not in kwargs:
            return attend(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return attend_divided(
            attend, self._implementation, module, query, key, value, scaling=scaling, **kwargs
        )

    def _attend(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        layer: nn.Module,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """Runs attention on whole rows, in the heads of `module`: those of `layer`, or some of
        them."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        visibility = self._visibility(query, attention_mask, kwargs)
        softcap = kwargs.get("softcap")
        if self._blocked:
            call = AttentionCall(query, key, scale, visibility, softcap)
            return blocked_attention(call, value).transpose(1, 2).contiguous(), None
        watched: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self._consume is not None:
            watched = kernel_sums(self._implementation)
        attention = kernel_function(self._implementation, layer)
        with named(module, self._implementation), watched as sums:
            output = attention(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if self._consume is not None:
            layer = module.layer_idx
            assert isinstance(layer, int)
            given_BHT = by_head(sums, query)
            query, key = query.detach(), key.detach()
            self._consume(layer, AttentionCall(query, key, scale, visibility, softcap, given_BHT))
        return output

    def _visibility(
        self, query: Tensor, mask: Tensor | None, arguments: Mapping[str, Any]
    ) -> Visibility:
        """What the kernel will make of its arguments. Flash attention gets no 4-dimensional mask:
        one of (B, T) for padding, or boundaries of documents, or positions that tell them."""
        if mask is not None and mask.dim() == 4:
            return Visibility(explicit=mask)
        documents = None
        if mask is not None:
            documents = torch.where(mask.bool(), 0, -1)
        elif is_flash(self._implementation):
            documents = _documents(query, arguments)
        return Visibility(sliding_window=arguments.get("sliding_window"), documents_BT=documents)


def _documents(query_BHTD: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """A number per document, (B, T), different for neighbours, from the arguments of flash
    attention; None where a row is one document."""
    bounds: Tensor | None = arguments.get("cu_seq_lens_q")
    positions_BT: Tensor | None = arguments.get("position_ids")
    rows, length = query_BHTD.shape[0], query_BHTD.shape[2]
    if bounds is not None:
        places_N = torch.arange(rows * length, device=bounds.device, dtype=bounds.dtype)
        return torch.bucketize(places_N, bounds, right=True).view(rows, length)
    if positions_BT is not None:
        return (positions_BT.diff(dim=-1, prepend=positions_BT[:, :1] - 1) != 1).cumsum(-1)
    return None


_active_attention_capture: ContextVar[AttentionCapture | None] = ContextVar(
    "attention_capture", default=None
)


def _capturing_attention(
    module: nn.Module, *args: Any, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    active = _active_attention_capture.get()
    assert active is not None, f"{CAPTURING_ATTENTION} runs inside AttentionCapture only"
    return active.attend(module, *args, **kwargs)


AttentionInterface.register(CAPTURING_ATTENTION, _capturing_attention)
