"""What a training objective offers the loop, and the losses it is given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from alphatoken.batch import Batch, RowIndex


@dataclass(frozen=True, kw_only=True)
class ResponseLosses:
    """A micro-batch as `data.batches` makes it, with the loss of each of its response tokens."""

    batch: Batch
    nll_BT: Tensor
    """Token losses, (B, T) float32 without a graph, zero off the response."""

    @property
    def response_BT(self) -> Tensor:
        """The response mask, (B, T) bool."""
        return self.batch["response"]

    @property
    def response_index(self) -> RowIndex:
        """Which positions the response mask marks, as the host knows them."""
        return self.batch["response_index"]


@dataclass(frozen=True, kw_only=True)
class KeptLosses(ResponseLosses):
    """The losses of a micro-batch whose tokens have been selected."""

    weight_BT: Tensor
    """Weights of the selection, (B, T) float32, zero where a token is not kept."""
    kept_index_R: Tensor
    """Where that is not zero, (R,) int64 into the B T positions, ascending."""
    kept_nll_R: Tensor
    """Losses of the kept tokens from the training graph, (R,) in order of (row, position)."""

    def of_kept(self, values_BT: Tensor) -> Tensor:
        """Picks from values by position, (B, T), those of the kept tokens: (R,)."""
        return values_BT.flatten().index_select(0, self.kept_index_R)


class Objective(Protocol):
    """What is minimised, as a sum over one micro-batch; the loop divides by a denominator of the
    optimizer step."""

    branches: tuple[str, ...]
    """Names of the responses that every row has; empty where it has one."""

    def coefficients(self, losses: ResponseLosses) -> Tensor:
        """d objective / d (sum_t l_t) of each position's sequence at an all-ones mask, detached,
        (B, T)."""
        ...

    def total(self, losses: KeptLosses) -> Tensor:
        """The objective of the kept tokens, with the graph of `kept_nll_R`; where rows are divided
        over ranks, this rank's share, such that those of all ranks add up to it. Scalar."""
        ...

    def denominator(self, counted_tokens: int, rows: int) -> int:
        """What the step's sum is divided by. `counted_tokens` are those that `selection.normalise`
        names; the counts are of the whole optimizer step, over all ranks."""
        ...

    def metrics(self, losses: KeptLosses) -> dict[str, Tensor]:
        """What is reported of a training micro-batch besides losses and values, a number per row
        each."""
        ...

    def evaluation(self, losses: ResponseLosses) -> dict[str, Tensor]:
        """What is reported of held-out rows: `loss` and others, each a vector of which the mean
        counts."""
        ...
