"""The attention kernels that `transformers` runs."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Attention = Callable[..., tuple[Tensor, Tensor | None]]
"""A function of the `transformers` attention interface: takes a layer, its `query` (B, H, T, D),
`key` and `value` (B, G, T, D), and a mask; returns (B, T, H, D), and weights or None."""


def kernel_function(kernel: str, module: nn.Module) -> Attention:
    """What runs for a kernel in an attention layer."""
    # Every Hugging Face modelling file brings its own eager function.
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward")  # noqa: B009
    function: Attention = ALL_ATTENTION_FUNCTIONS.get_interface(kernel, eager)
    return function


@contextmanager
def named(module: Any, kernel: str) -> Iterator[None]:
    """The layer's configuration names the kernel itself meanwhile: flash attention is looked up by
    that name, and the one that is loaded stays loaded for the whole process. Masks are made for the
    kernel that is named, too."""
    config: Any = module.config
    before = config._attn_implementation
    config._attn_implementation = kernel
    try:
        yield
    finally:
        config._attn_implementation = before
