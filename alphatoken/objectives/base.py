"""What a training objective offers the loop."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from alphatoken.batch import Batch


class Objective(Protocol):
    """What is minimised, as a sum over one micro-batch; the loop divides by a denominator of the
    optimizer step.

    `nll_BT` are all token losses without a graph, zero off the response; `weight_BT` the weights of
    the selection, zero where a token is not kept. `batch` is as `data.batches` makes it.
    """

    branches: tuple[str, ...]
    """Names of the responses that every row has; empty where it has one."""

    def coefficients(self, batch: Batch, nll_BT: Tensor, response_BT: Tensor) -> Tensor:
        """d objective / d (sum_t l_t) of each position's sequence at an all-ones mask, detached,
        (B, T)."""
        ...

    def total(
        self,
        batch: Batch,
        nll_BT: Tensor,
        response_BT: Tensor,
        weight_BT: Tensor,
        kept_nll_R: Tensor,
    ) -> Tensor:
        """The objective of the kept tokens, whose losses with their graph are `kept_nll_R`.
        Scalar."""
        ...

    def denominator(self, kept_tokens: int, rows: int) -> int:
        """What the step's sum is divided by; the counts are of the whole optimizer step, over all
        ranks."""
        ...

    def metrics(
        self, batch: Batch, nll_BT: Tensor, response_BT: Tensor, weight_BT: Tensor
    ) -> dict[str, Tensor]:
        """What is reported of a training micro-batch besides losses and values, a number per row
        each."""
        ...

    def evaluation(self, batch: Batch, nll_BT: Tensor, response_BT: Tensor) -> dict[str, Tensor]:
        """What is reported of held-out rows: `loss` and others, each a vector of which the mean
        counts."""
        ...
