"""What Adam multiplies a gradient by."""

from __future__ import annotations

import torch
from torch import Tensor


def adam_scale(second_moment: Tensor, steps: int, beta2: float, eps: float) -> Tensor:
    """What Adam multiplies a gradient by after `steps` >= 1 steps: 1 / (sqrt(v / (1 - beta2^steps))
    + eps), float32.

    0 where v is 0: what has never had a gradient, such as the embedding of a token not yet seen,
    would get 1 / eps and outweigh everything, while Adam's own step there is bounded, as v takes in
    the step's gradient first.
    """
    unbiased = second_moment.float() / (1 - beta2**steps)
    return torch.where(unbiased > 0, (unbiased.sqrt() + eps).reciprocal(), 0.0)
