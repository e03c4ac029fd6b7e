"""The directions in which estimator `exact` moves the weights: G, B, V and D, or the weighted sum
of the first three, and D."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from alphatoken.distributed import zero3

Direction = dict[str, Tensor]
"""How the weights of a segment move: whole tensors by path inside it; absent ones do not move."""


@dataclass(frozen=True)
class DirectionSlices:
    """This rank's slices of the directions of one segment, each in a slice per parameter."""

    parameters: Mapping[str, nn.Parameter]
    """The parameters that move, by path inside the segment."""
    directions: Sequence[Mapping[str, Tensor]]
    """Per direction, this rank's slice of how each parameter moves, flat, by the same paths."""

    def gather(self) -> list[Direction]:
        """Makes the directions whole: one all-gather for all of them. Every rank must call it."""
        paths = list(self.parameters)
        slices = [own[path] for own in self.directions for path in paths]
        parameters = [self.parameters[path] for _ in self.directions for path in paths]
        wholes = zero3.whole_tensors(slices, parameters)
        return [
            dict(zip(paths, wholes[number * len(paths) :][: len(paths)], strict=True))
            for number in range(len(self.directions))
        ]
