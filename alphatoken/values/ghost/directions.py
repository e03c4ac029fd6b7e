"""The directions that signals are contracted with, from mean gradients that lie divided over the
ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from alphatoken.distributed import collectives
from alphatoken.values.algebra import Contraction, FromMatrix, FromSignals, WeightedSum


class MeanMatrices(ABC):
    """1/N sum_v d_v h_v^T of some rows by linear, and its signed form 1/N sum_v s_v d_v h_v^T: half
    the difference of the means of two halves of the rows, each with a weight of 2/N, so that half
    their sum is the mean."""

    @abstractmethod
    def own_slice(self, name: str, *, signed: bool = False) -> Tensor | None:
        """This rank's slice of a linear's matrix, flat float32; None where only signals are
        there."""

    @abstractmethod
    def all_signals(self, name: str) -> FromSignals:
        """The signals of all ranks where no matrix is there, with their signs if they have any.
        Every rank must call it."""


@dataclass(frozen=True)
class Weighted:
    """A summand of a direction."""

    weight: float
    mean: MeanMatrices
    signed: bool = False


def contractions_with(
    directions: Mapping[str, Sequence[Weighted]],
    names: Sequence[str],
    features: Mapping[str, tuple[int, int]],
    dtype: torch.dtype,
) -> dict[str, dict[str, Contraction]]:
    """What the named linears' signals are contracted with, by direction and linear; every rank must
    call it.

    Matrices are added in slices and gathered in `dtype`, all in one message; signals come in two
    messages per linear and mean (three with signs), each behind one that says how many rows it
    has. `features` are (out, in).
    """
    slices: dict[tuple[str, str], Tensor] = {}
    rest: dict[tuple[str, str], list[tuple[float, Contraction]]] = {}
    for name in names:
        found: dict[MeanMatrices, FromSignals] = {}
        for direction, parts in directions.items():
            for part in parts:
                own = part.mean.own_slice(name, signed=part.signed)
                if own is not None:
                    before = slices.get((direction, name))
                    own = part.weight * own
                    slices[direction, name] = own if before is None else before + own
                    continue
                if part.mean not in found:
                    found[part.mean] = part.mean.all_signals(name)
                signals = found[part.mean]
                signals = signals if part.signed else replace(signals, sign_N=None)
                rest.setdefault((direction, name), []).append((part.weight, signals))
    shapes = [torch.Size(features[name]) for _, name in slices]
    wholes = collectives.gather_slices([own.to(dtype) for own in slices.values()], shapes)
    matrices = dict(zip(slices, map(FromMatrix, wholes), strict=True))
    return {
        direction: {
            name: _together(matrices.get((direction, name)), rest.get((direction, name), []))
            for name in names
        }
        for direction in directions
    }


def _together(
    matrix: FromMatrix | None, others: Sequence[tuple[float, Contraction]]
) -> Contraction:
    """A matrix, if there is one, and weighted contractions as one."""
    parts = [*([] if matrix is None else [(1.0, matrix)]), *others]
    weight, only = parts[0]
    return only if len(parts) == 1 and weight == 1.0 else WeightedSum(parts)
