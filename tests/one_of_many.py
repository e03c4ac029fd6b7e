"""A process group of ranks that are not there, for sizes and memory: NCCL refuses two ranks on one
GPU.

Rank 0 gathers its own shard as often as there are ranks, keeps its part of what is reduced, and
nobody else says anything. Numbers are therefore wrong, and finite; shapes, memory and the order of
messages are those of rank 0.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from alphatoken.distributed import process

NAME = "one_of_many"


def done(*_: Any, **__: Any) -> Any:
    """Work that has ended, for messages that change nothing here."""
    future: torch.futures.Future[Any] = torch.futures.Future()
    future.set_result(None)
    return getattr(torch._C._distributed_c10d, "_create_work_from_future")(future)  # noqa: B009


def gather_one(group: Any, output: Tensor, own: Tensor, *_: Any, **__: Any) -> Any:
    for part in output.view(group.size(), -1):
        if part.data_ptr() != own.data_ptr():  # gathered in place
            part.copy_(own.flatten())
    return done()


def gather_lists(
    group: Any, outputs: list[list[Tensor]], inputs: list[Tensor], *_: Any, **__: Any
) -> Any:
    for copies, own in zip(outputs, inputs, strict=True):
        for copy in copies:
            copy.copy_(own)
    return done()


def scatter_one(group: Any, output: Tensor, own: Tensor, *_: Any, **__: Any) -> Any:
    output.copy_(own.view(group.size(), -1)[0].view_as(output))
    return done()


def each_of(message: Callable[..., Any]) -> Callable[..., Any]:
    """The same for several tensors at once."""

    def several(group: Any, outputs: list[Tensor], inputs: list[Tensor], *_: Any, **__: Any) -> Any:
        for output, own in zip(outputs, inputs, strict=True):
            message(group, output, own)
        return done()

    return several


# Answers every collective at once. Four have other names before torch 2.13, which come second.
METHODS: dict[str, Any] = {
    "getBackendName": lambda group: NAME,
    **dict.fromkeys(("allreduce", "broadcast", "barrier"), done),
    "allgather": gather_lists,
    **dict.fromkeys(("all_gather_single", "_allgather_base"), gather_one),
    **dict.fromkeys(("reduce_scatter_single", "_reduce_scatter_base"), scatter_one),
    **dict.fromkeys(
        ("all_gather_single_coalesced", "allgather_into_tensor_coalesced"), each_of(gather_one)
    ),
    **dict.fromkeys(
        ("reduce_scatter_single_coalesced", "reduce_scatter_tensor_coalesced"),
        each_of(scatter_one),
    ),
}
OneOfMany: Any = type("OneOfMany", (dist.ProcessGroup,), METHODS)


def pretend_ranks(count: int) -> None:
    """Makes this process rank 0 of so many."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(count)}

    def create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        return OneOfMany(rank, size)

    dist.Backend.register_backend(NAME, create, devices=["cpu", "cuda"])
    dist.init_process_group(
        NAME, rank=0, world_size=count, store=torch._C._distributed_c10d.HashStore()
    )
    process.control_group = dist.group.WORLD
