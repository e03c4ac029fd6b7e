"""Reproducible noise for policies and for sampling."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def uniform_noise(seed: int, step: int, row: int, length: int) -> Tensor:
    """Uniform noise, (`length`,) float32, that depends on (seed, step, row) alone, not on
    ranks."""
    return torch.from_numpy(
        np.random.default_rng([seed, step, row]).random(length, dtype=np.float32)
    )
