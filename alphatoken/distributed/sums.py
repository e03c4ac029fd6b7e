"""Sums by name over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from alphatoken.distributed import collectives
from alphatoken.distributed.mesh import mesh


class _SumOfParts(torch.autograd.Function):
    """A sum over the ranks of a data group, each of which has a copy of it; the gradient is the sum
    of those of all copies."""

    @staticmethod
    def forward(ctx: Any, own: Tensor) -> Tensor:
        return collectives.sum_over_ranks(own.clone(), mesh().sequence)

    @staticmethod
    def backward(ctx: Any, *outgrads: Tensor) -> Tensor:
        return collectives.sum_over_ranks(outgrads[0].clone(), mesh().sequence)


def sum_of_parts(own: Tensor) -> Tensor:
    """The sum of what the ranks that divide the same rows have, with its gradient. Every one of
    them must call it, and run its backward pass if it has one: an all-reduce each."""
    if mesh().sequence.size == 1 or not own.numel():
        return own
    total: Tensor = _SumOfParts.apply(own)  # type: ignore[no-untyped-call]
    return total


class NamedSums:
    """Sums tensors by name on the device, without making the host wait, until `reduce`.

    Names and shapes must be the same on every rank.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}

    def add(self, name: str, value: Tensor) -> None:
        """Adds a tensor of any shape to the sum of that name, in float64."""
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_vectors(self, vectors: Mapping[str, Tensor], prefix: str = "") -> None:
        """Adds each vector's sum and length, from which `mean` gives the mean over all ranks."""
        for name, vector in vectors.items():
            count = torch.ones_like(vector, dtype=torch.float64).sum()
            self.add(prefix + name, torch.stack([vector.double().sum(), count]))

    def reduce(self) -> dict[str, Tensor]:
        """Returns the sums over all ranks, float64 on the host. Every rank must call it: one
        all-reduce of 8 bytes per number."""
        if not self._sums:
            return {}
        flat = torch.cat([value.flatten() for value in self._sums.values()]).to(self._device)
        reduced = collectives.sum_over_ranks(flat).cpu()
        sizes = [value.numel() for value in self._sums.values()]
        return {
            name: part.view(value.shape)
            for (name, value), part in zip(self._sums.items(), reduced.split(sizes), strict=True)
        }


def mean(sum_and_count: Tensor) -> float:
    """The mean of all vectors that `NamedSums.add_vectors` was given under one name; 0 of none."""
    total, count = sum_and_count.tolist()
    return float(total / max(count, 1))
