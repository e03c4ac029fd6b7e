"""Attention layers whose queries and keys are handed over while their own kernel runs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from alphatoken.passes.attention import AttentionCall, Visibility, blocked_attention

CAPTURING_ATTENTION = "alphatoken_capture"
"""The attention implementation that layers are configured with to run inside `AttentionCapture`."""

AttentionConsumer = Callable[[int, AttentionCall], None]


class AttentionCapture(AbstractContextManager["AttentionCapture"]):
    """Runs layers configured with CAPTURING_ATTENTION and hands `(layer, AttentionCall)` of each to
    `consume`.

    `implementation` is the one the model was loaded with; the same kernel runs, and masks are read
    as it reads them. With `blocked` an explicit softmax in query blocks runs instead: it has a
    forward derivative, unlike fused kernels.
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
        """Runs the attention of one layer and hands its arguments to the consumer.

        Takes and returns what functions of the `transformers` attention interface do: `query`
        (B, H, T, D), `key` and `value` (B, G, T, D); the output (B, T, H, D), and weights or None.
        """
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        visibility = self._visibility(
            attention_mask, kwargs.get("sliding_window"), kwargs.get("position_ids")
        )
        softcap = kwargs.get("softcap")
        if self._consume is not None:
            layer = module.layer_idx
            assert isinstance(layer, int)
            self._consume(
                layer, AttentionCall(query.detach(), key.detach(), scale, visibility, softcap)
            )
        if self._blocked:
            call = AttentionCall(query, key, scale, visibility, softcap)
            return blocked_attention(call, value).transpose(1, 2).contiguous(), None
        # Every Hugging Face modelling file brings its own eager function.
        eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self._implementation, eager)
        output: tuple[Tensor, Tensor | None] = attention(
            module, query, key, value, attention_mask, scaling=scaling, **kwargs
        )
        return output

    def _visibility(
        self, mask: Tensor | None, sliding_window: int | None, positions: Tensor | None
    ) -> Visibility:
        """What the kernel will make of its arguments. Flash attention gets no mask, or a (B, T) one
        for padding."""
        if mask is not None and mask.dim() == 4:
            return Visibility(explicit=mask)
        documents = None
        if mask is not None:
            documents = torch.where(mask.bool(), 0, -1)
        elif positions is not None and "flash" in self._implementation:
            documents = (positions.diff(dim=-1, prepend=positions[:, :1] - 1) != 1).cumsum(-1)
        return Visibility(sliding_window=sliding_window, documents_BT=documents)


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
