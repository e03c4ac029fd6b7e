"""Sums of outer products d h^T, by linear, divided over the ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from alphatoken.distributed import collectives
from alphatoken.values import algebra


class OuterSums:
    """sum_v d_v h_v^T of some linears, and with `signed` also sum_v s_v d_v h_v^T, where s_v is 1
    in one half of the rows and -1 in the other.

    `features` maps names to (out, in). What is added stays whole on its rank until `reduce`; then
    every rank has its slice of the sum over ranks, flat float32. Every rank must call `reduce`
    alike.
    """

    def __init__(
        self, features: Mapping[str, tuple[int, int]], device: torch.device, *, signed: bool
    ) -> None:
        self._features = features
        self._device = device
        self._signed = signed
        self._pending: dict[str, list[Tensor]] = {}
        self._slices: dict[str, list[Tensor]] = {}
        """Per linear the sum, or with `signed` those of the two halves."""

    def begin(self, names: Sequence[str]) -> None:
        """Forgets all sums, and starts those of `names`, whose slices take memory from now on."""
        ranks, sums = collectives.world_size(), 2 if self._signed else 1
        self._pending = {}
        self._slices = {}
        for name in names:
            out_features, in_features = self._features[name]
            length = -(-out_features * in_features // ranks)
            self._slices[name] = [torch.zeros(length, device=self._device) for _ in range(sums)]

    def __contains__(self, name: str) -> bool:
        return name in self._slices

    def add(
        self,
        name: str,
        outgrad_NO: Tensor,
        act_NI: Tensor,
        halves: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Signals of some positions of this rank; for signed sums also which of them are in either
        half, int64 each."""
        if self._signed:
            assert halves is not None, "signed sums need the half of each position"
            # Both together are as much work as one whole.
            parts = [algebra.target_matrix(outgrad_NO[half], act_NI[half]) for half in halves]
        else:
            parts = [algebra.target_matrix(outgrad_NO, act_NI)]
        if name not in self._pending:
            self._pending[name] = parts
            return
        for total_OI, part_OI in zip(self._pending[name], parts, strict=True):
            total_OI += part_OI

    def reduce(self, names: Sequence[str]) -> None:
        """Moves what was added for `names` into the ranks' slices: one reduce-scatter for all of
        them."""
        begun = [name for name in names if name in self._slices]
        if not begun:
            return
        slices = [part for name in begun for part in self._slices[name]]
        wholes = [part for name in begun for part in self._whole(name)]
        for total, own in zip(slices, collectives.sum_to_slices(wholes), strict=True):
            total += own

    def own(self, name: str, *, signed: bool = False) -> Tensor:
        """This rank's slice of a linear's sum, or of its signed sum."""
        first, *second = self._slices[name]
        if not second:
            return first
        return first - second[0] if signed else first + second[0]

    def _whole(self, name: str) -> list[Tensor]:
        """What this rank has added to a linear's sums since the last time, zero without a
        position."""
        if name in self._pending:
            return self._pending.pop(name)
        zero_OI = torch.zeros(self._features[name], device=self._device)
        return [zero_OI] * (2 if self._signed else 1)
