"""Products of matrices in float32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def float32_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32, of factors of any dtype.

    On CUDA, factors of 16 bits are multiplied in TF32, which holds their numbers exactly: what
    differs from float32 proper is how sums are rounded. Nothing is different anywhere else.
    """
    exact = (torch.bfloat16, torch.float16)
    if left.is_cuda and left.dtype in exact and right.dtype in exact:
        with tensor_float_32():
            return left.float() @ right.float()
    return left.float() @ right.float()


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Float32 products run in TF32 on CUDA meanwhile; on other devices it has no effect."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
