"""The directions in which estimator `exact` moves the weights: G, B, V and D, or the weighted sum
of the first three, and D."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from alphatoken.distributed import zero3

Directions = dict[str, Tensor]
"""How the weights of a segment move in N directions: by path inside it N whole tensors, stacked;
absent ones do not move."""


@dataclass(frozen=True)
class DirectionSlices:
    """This rank's slices of the directions of one segment."""

    parameters: Mapping[str, nn.Parameter]
    """The parameters that move, by path inside the segment."""
    slices: Mapping[str, Tensor]
    """By the same paths this rank's slice of how each moves, flat, in each direction: (N, L)."""

    def gather(self) -> Directions:
        """Makes the directions whole: one all-gather for all of them. Every rank must call it."""
        own = [self.slices[path] for path in self.parameters]
        wholes = zero3.whole_tensors(own, list(self.parameters.values()))
        return dict(zip(self.parameters, wholes, strict=True))
