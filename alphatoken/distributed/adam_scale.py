"""What Adam knows of gradients: what it multiplies them by, and their running mean."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from alphatoken.config.training import OptimConfig
from alphatoken.distributed import zero3


class AdamScale:
    """What an engine's Adam multiplies a parameter's gradient by, on this rank's slice.

    It is 1 before the optimizer's first step. `after` must be called before each use that follows
    an optimizer step, on every rank.
    """

    def __init__(self, *, engine: Any, optim: OptimConfig, device: torch.device) -> None:
        self._engine = engine
        self._beta2 = optim.betas[1]
        self._eps = optim.eps
        self._device = device
        self._steps = 0

    def after(self, steps: int) -> None:
        """Takes over the second moments as they are after `steps` optimizer steps."""
        self._steps = steps
        if steps > 0:
            zero3.link_moments(self._engine)

    def __call__(self, parameter: nn.Parameter) -> Tensor | float:
        """The scale of this rank's slice of `parameter`, flat float32; 1 before the first step."""
        if self._steps == 0:
            return 1.0
        moment = zero3.second_moment_slice(parameter, self._device)
        return adam_scale(moment, self._steps, self._beta2, self._eps)


class FirstMoment:
    """Adam's first moment of a parameter, on this rank's slice: the running mean of the gradients
    it was given, so of the kept tokens' objective, after clipping.

    `after` must be called before each use that follows an optimizer step, on every rank.
    """

    def __init__(self, *, engine: Any, optim: OptimConfig, device: torch.device) -> None:
        self._engine = engine
        self._beta1 = optim.betas[0]
        self._device = device
        self._steps = 0

    @property
    def is_empty(self) -> bool:
        """Whether the optimizer has not taken a step yet."""
        return self._steps == 0

    def after(self, steps: int) -> None:
        """Takes over the first moments as they are after `steps` optimizer steps."""
        self._steps = steps
        if steps > 0:
            zero3.link_moments(self._engine)

    def __call__(self, parameter: nn.Parameter) -> Tensor:
        """The moment of this rank's slice of `parameter`, flat float32, without the bias towards
        the zero it started at: m / (1 - beta1^steps). Only after the first step."""
        moment = zero3.first_moment_slice(parameter, self._device)
        return moment / (1 - self._beta1**self._steps)


def adam_scale(second_moment: Tensor, steps: int, beta2: float, eps: float) -> Tensor:
    """Adam's factor of a gradient after `steps` >= 1 steps, float32:
    1 / (sqrt(v / (1 - beta2^steps)) + eps).

    0 where v is 0: what has never had a gradient, such as the embedding of a token not yet seen,
    would get 1 / eps and outweigh everything, while Adam's own step there is bounded, as v takes in
    the step's gradient first.
    """
    unbiased = second_moment.float() / (1 - beta2**steps)
    return torch.where(unbiased > 0, (unbiased.sqrt() + eps).reciprocal(), 0.0)
