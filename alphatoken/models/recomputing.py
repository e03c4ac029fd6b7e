"""Layers that keep for the backward pass only what enters them, and compute the rest again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd.graph import save_on_cpu
from transformers import PreTrainedModel

from alphatoken.models.decoder import decoder_of


def recompute_layers(lm: PreTrainedModel, *, offload: bool) -> None:
    """Has every layer keep the state that enters it, (B, T, H), and run again in the backward pass.

    offload: the state is copied to pinned host memory and back, on the stream that computes; what
    all layers share, such as masks and positions, stays on the device. On a CPU nothing is copied.
    """
    lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if offload:
        layers: Any = decoder_of(lm).layers
        for layer in layers:
            # transformers' own `offload` pins memory on a CPU too, which torch refuses.
            layer._gradient_checkpointing_func = partial(
                _checkpoint_on_host, layer._gradient_checkpointing_func
            )


def _checkpoint_on_host(
    checkpoint: Callable[..., Any], layer: Callable[..., Any], hidden_BTH: Tensor, *others: Any
) -> Any:
    """Runs a layer by `checkpoint`, which saves the tensors that it is handed itself, with the
    hooks of this moment: the state alone. Inside, hooks of its own save nothing."""
    device = hidden_BTH.device.type
    with save_on_cpu(pin_memory=device != "cpu", device_type=device):
        return checkpoint(lambda state_BTH: layer(state_BTH, *others), hidden_BTH)
