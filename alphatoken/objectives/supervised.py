"""Masked supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from alphatoken.batch import Batch


class SupervisedObjective:
    """Masked SFT (Eq. 13): the weighted sum of kept token losses over the number of kept tokens of
    the step."""

    branches: tuple[str, ...] = ()

    def coefficients(self, batch: Batch, nll_BT: Tensor, response_BT: Tensor) -> Tensor:
        return torch.ones_like(nll_BT)

    def total(
        self,
        batch: Batch,
        nll_BT: Tensor,
        response_BT: Tensor,
        weight_BT: Tensor,
        kept_nll_R: Tensor,
    ) -> Tensor:
        return (weight_BT[weight_BT > 0] * kept_nll_R).sum()

    def denominator(self, kept_tokens: int, rows: int) -> int:
        return kept_tokens

    def metrics(
        self, batch: Batch, nll_BT: Tensor, response_BT: Tensor, weight_BT: Tensor
    ) -> dict[str, Tensor]:
        return {}

    def evaluation(self, batch: Batch, nll_BT: Tensor, response_BT: Tensor) -> dict[str, Tensor]:
        return {"loss": nll_BT[response_BT]}
