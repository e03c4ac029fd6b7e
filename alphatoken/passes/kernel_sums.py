"""The logarithms of softmax denominators that fused attention kernels compute beside their output.

Shape legend: B sequences, H query heads, T queries, N queries of all sequences.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers.modeling_flash_attention_utils as flash
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from alphatoken.config.choices import is_flash

FUSED = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
"""The kernels behind torch's `scaled_dot_product_attention` whose second result they are; the
others, which write the probabilities out, give none."""


@contextmanager
def kernel_sums(implementation: str) -> Iterator[list[Tensor]]:
    """While it lasts, collects them from the kernels that `transformers` runs for an attention
    implementation: of SDPA as operators return them, of flash attention by its own argument."""
    found: list[Tensor] = []
    if not is_flash(implementation):
        with _Watched(found):
            yield found
        return
    look_up = flash.lazy_import_flash_attention

    def look_up_giving(*arguments: Any, **named: Any) -> Any:
        (dense, varlen, *others), processors = look_up(*arguments, **named)
        giving = [None if kernel is None else _giving(kernel, found) for kernel in (dense, varlen)]
        return (*giving, *others), processors

    flash.lazy_import_flash_attention = look_up_giving
    try:
        yield found
    finally:
        flash.lazy_import_flash_attention = look_up


def by_head(found: list[Tensor], query_BHTD: Tensor) -> Tensor | None:
    """What one attention call gave, (B, H, T) float32; None where its kernel gave nothing, or not
    of every query.

    Kernels lay it out as (B, H, T), perhaps with T rounded up or a last dimension of 1; and of
    documents in a row as (H, N).
    """
    if len(found) != 1:
        return None
    (sums,), (batch, heads, length, _) = found, query_BHTD.shape
    if sums.shape == (heads, batch * length):
        return sums.detach().view(heads, batch, length).transpose(0, 1).float()
    if sums.dim() == 4 and sums.shape[3] == 1:
        sums = sums[..., 0]
    if sums.dim() != 3 or sums.shape[:2] != (batch, heads) or sums.shape[2] < length:
        return None
    return sums.detach()[..., :length].float()


class _Watched(TorchDispatchMode):
    """Keeps the second result of fused kernels."""

    def __init__(self, found: list[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket.__name__ in FUSED:
            self._found.append(result[1])
        return result


def _giving(kernel: Callable[..., Any], found: list[Tensor]) -> Callable[..., Any]:
    """A function of flash attention that returns its output alone, and keeps the rest. Versions
    differ in whether they have to be asked."""
    asked = "return_attn_probs" in inspect.signature(kernel).parameters

    def call(*tensors: Tensor, **settings: Any) -> Any:
        result = kernel(*tensors, **settings, **({"return_attn_probs": True} if asked else {}))
        if not isinstance(result, tuple):
            return result
        if isinstance(result[1], Tensor):
            found.append(result[1])
        return result[0]

    return call
