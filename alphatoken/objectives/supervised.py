"""Masked supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from alphatoken.objectives.base import KeptLosses, ResponseLosses


class SupervisedObjective:
    """Masked SFT (Eq. 13): the weighted sum of kept token losses over the number of kept tokens of
    the step, or of its response tokens."""

    branches: tuple[str, ...] = ()

    def coefficients(self, losses: ResponseLosses) -> Tensor:
        return torch.ones_like(losses.nll_BT)

    def total(self, losses: KeptLosses) -> Tensor:
        return (losses.of_kept(losses.weight_BT) * losses.kept_nll_R).sum()

    def denominator(self, counted_tokens: int, rows: int) -> int:
        return counted_tokens

    def metrics(self, losses: KeptLosses) -> dict[str, Tensor]:
        return {}

    def evaluation(self, losses: ResponseLosses) -> dict[str, Tensor]:
        return {"loss": losses.response_index.take(losses.nll_BT)}
