"""The ranks as a mesh: groups that take different rows, of ranks that divide the same rows.

Rank r of R is in data group r // n and has part r % n of the rows of its group, n being
`train.sequence_parallel`. Ranks of a group are neighbours, so that they are on one machine where it
has n. ZeRO knows nothing of it: weights, gradients and moments are divided over all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

from alphatoken.distributed.process import running_comm


@dataclass(frozen=True)
class Axis:
    """Ranks among which something is divided."""

    size: int
    """How many they are."""
    place: int
    """Which of them this rank is, from 0."""
    group: Any = None
    """Their process group; None where they are all ranks, or this rank alone."""
    is_imagined: bool = False
    """Whether there are no such ranks, as in a plan: nothing is sent."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place among the others."""

    data: Axis
    """Ranks that have the same part of different rows: one of each data group."""
    sequence: Axis
    """The data group of this rank: ranks that have different parts of the same rows."""


_formed: Mesh | None = None
ALONE = Axis(size=1, place=0)


def all_ranks() -> Axis:
    """Every rank."""
    comm = running_comm()
    return Axis(comm.get_world_size(), comm.get_rank()) if comm else ALONE


def mesh() -> Mesh:
    """The mesh as it was formed last; where none was, every rank is a data group of its own."""
    return Mesh(data=all_ranks(), sequence=ALONE) if _formed is None else _formed


@contextmanager
def imagined_mesh(parts: int) -> Iterator[None]:
    """Shapes are meanwhile those of the last of `parts` ranks that divide rows, in a process that
    is none of them."""
    global _formed
    before = _formed
    _formed = Mesh(data=ALONE, sequence=Axis(parts, parts - 1, is_imagined=True))
    try:
        yield
    finally:
        _formed = before


def form_mesh(parts: int, limit: timedelta) -> Mesh:
    """Forms the mesh of a run whose rows are cut into `parts` each, which must divide the number of
    ranks. Ranks of a group wait for each other as long as `limit`. Every rank must call it."""
    global _formed
    _formed = None
    if parts == 1:
        return mesh()
    everyone = all_ranks()
    ranks, (group, part) = everyone.size, divmod(everyone.place, parts)
    assert ranks % parts == 0, f"{ranks} ranks are no groups of {parts}"
    alike = [range(place, ranks, parts) for place in range(parts)]
    neighbours = [range(first, first + parts) for first in range(0, ranks, parts)]
    _formed = Mesh(data=_axis(alike, part, limit), sequence=_axis(neighbours, group, limit))
    return _formed


def _axis(divisions: list[range], own: int, limit: timedelta) -> Axis:
    """Forms a process group of each division of the ranks; returns that of this rank."""
    members, everyone = divisions[own], all_ranks()
    if len(members) == 1:
        return ALONE
    if len(members) == everyone.size:
        return everyone
    formed = [torch.distributed.new_group(list(ranks), timeout=limit) for ranks in divisions]
    return Axis(len(members), members.index(everyone.place), formed[own])
