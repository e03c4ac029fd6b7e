"""Every message between ranks, by name. In a single process each function is a no-op on the same
path.

Tensors go through `deepspeed.comm` (so they show in its communications log), over all ranks or
those of one axis of the mesh. Their groups have a time limit (`deepspeed.timeout_minutes`), after
which a rank takes the others for lost. What one rank may work on for long while the others wait
(`barrier`, `gather_objects`, `agree`, `on_rank_0`) goes through a gloo group of the same ranks that
waits for hours (`ranks.CONTROL_LIMIT`). Every rank must call all of them in the same order. R is
the number of ranks that take part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor

from alphatoken.distributed import process
from alphatoken.distributed.mesh import Axis
from alphatoken.distributed.process import barrier as barrier
from alphatoken.distributed.process import running_comm
from alphatoken.errors import RemoteError

T = TypeVar("T")


def rank() -> int:
    comm = running_comm()
    return int(comm.get_rank()) if comm else 0


def world_size() -> int:
    comm = running_comm()
    return int(comm.get_world_size()) if comm else 1


def sum_over_ranks(tensor: Tensor, among: Axis | None = None) -> Tensor:
    """All-reduce, in place: every rank ends with the elementwise sum. A ring moves 2 (R-1)/R of it
    per rank."""
    comm = _comm_of(among)
    if comm:
        comm.all_reduce(tensor, group=_group_of(among))
    return tensor


def exchange(parts_RX: Tensor, among: Axis) -> Tensor:
    """All-to-all: entry r of (R, ...) goes to rank r, and what comes from rank r becomes entry r.
    A rank sends and receives (R-1)/R of the tensor."""
    comm = _comm_of(among)
    if not comm:
        return parts_RX.clone()
    received_RX = torch.empty_like(parts_RX, memory_format=torch.contiguous_format)
    comm.all_to_all_single(received_RX, parts_RX.contiguous(), group=among.group)
    return received_RX


def _comm_of(among: Axis | None) -> ModuleType | None:
    """What sends a message among some ranks, or all; None where that is this one alone."""
    alone = among is not None and (among.size == 1 or among.is_imagined)
    return None if alone else running_comm()


def _group_of(among: Axis | None) -> Any:
    return None if among is None else among.group


# On a CPU a longer shard is gathered in several messages, as gloo holds another copy of what it
# receives.
MESSAGE_BYTES = 2**24


def gather_equal(shard: Tensor, among: Axis | None = None) -> Tensor:
    """All-gather of equally long flat shards: every rank ends with (R, n). Receives (R-1) n
    elements per rank."""
    comm = _comm_of(among)
    if not comm:
        return shard[None]
    ranks = world_size() if among is None else among.size
    limit = MESSAGE_BYTES // shard.element_size()

    def gathered(block: Tensor) -> Tensor:
        out = shard.new_empty(ranks * block.numel())
        comm.all_gather_into_tensor(out, block.contiguous(), group=_group_of(among))
        return out.view(ranks, -1)

    if shard.numel() <= limit or shard.device.type != "cpu":
        return gathered(shard)
    out = shard.new_empty(ranks, shard.numel())
    for start in range(0, shard.numel(), limit):
        block = slice(start, start + limit)
        out[:, block] = gathered(shard[block])
    return out


def gather_slices(slices: Sequence[Tensor], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Whole tensors of the given shapes from every rank's equal slices of them, in one all-gather.

    Slices are flat and padded as `sum_to_slices` and ZeRO-3 cut them; the padding is dropped. N of
    one shape may be stacked, (N, L); their whole tensors then are, too.
    """
    if not slices:
        return []
    flat = [part.flatten() for part in slices]
    gathered = gather_equal(torch.cat(flat) if len(flat) > 1 else flat[0])
    columns = gathered.split([part.numel() for part in flat], dim=1)
    wholes = []
    for column, part, shape in zip(columns, slices, shapes, strict=True):
        by_rank = column.view(len(column), *part.shape).movedim(0, -2)
        wholes.append(by_rank.flatten(-2)[..., : math.prod(shape)].unflatten(-1, shape))
    return wholes


def sum_to_slices(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Reduce-scatter: every rank ends with its own slice of each tensor's sum over ranks, in one
    message.

    Each tensor is flattened, zero-padded to a multiple of R and cut into R equal slices. A rank
    sends (R-1)/R of the tensors' bytes.
    """
    ranks = world_size()
    rows = []
    for tensor in tensors:
        flat = tensor.reshape(-1)
        if flat.numel() % ranks:
            flat = torch.nn.functional.pad(flat, (0, -flat.numel() % ranks))
        rows.append(flat.view(ranks, -1))
    lengths = [part.shape[1] for part in rows]
    packed = (
        torch.cat(rows, dim=1) if len(rows) > 1 else rows[0]
    )  # a lone large matrix is not copied
    comm = running_comm()
    if comm:
        own = torch.empty(packed.shape[1], dtype=packed.dtype, device=packed.device)
        comm.reduce_scatter_tensor(own, packed.flatten())
    else:
        own = packed[0]
    return list(own.split(lengths))


def gather_rows(rows: Tensor, among: Axis | None = None) -> Tensor:
    """All-gather of matrices with unequally many rows: every rank ends with all rows, in rank
    order.

    Each is padded to the longest first, so a rank receives (R-1) times the longest.
    """
    if (world_size() if among is None else among.size) == 1:
        return rows
    count = torch.tensor([rows.shape[0]], device=rows.device)
    counts = gather_equal(count, among).flatten().tolist()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: rows.shape[0]] = rows
    gathered = gather_equal(padded.flatten(), among).view(len(counts), *padded.shape)
    return torch.cat([gathered[index, :count] for index, count in enumerate(counts)])


def gather_objects(value: T) -> list[T]:
    """Every rank ends with every rank's (small, picklable) object, in rank order."""
    comm = running_comm()
    if not comm:
        return [value]
    values: list[T] = [value] * world_size()
    torch.distributed.all_gather_object(values, value, group=process.control_group)
    return values


def collect_on_rank_0(value: T) -> list[T]:
    """Rank 0 ends with every rank's picklable object, in rank order; the others with nothing."""
    comm = running_comm()
    if not comm:
        return [value]
    values: list[Any] = [None] * world_size() if rank() == 0 else []
    torch.distributed.gather_object(value, values or None, dst=0, group=process.control_group)
    return values


def agree(work: Callable[[], T]) -> T:
    """Runs `work` on every rank and raises on all of them if it raised on any: none is left waiting
    in a collective.

    The failing ranks raise their own error, the others the first failing rank's.
    """
    failure: Exception | None = None
    result: T | None = None
    try:
        result = work()
    except Exception as error:
        failure = error
    reports = gather_objects(None if failure is None else f"rank {rank()}: {failure}")
    if failure is not None:
        raise failure
    first = next((report for report in reports if report is not None), None)
    if first is not None:
        raise RemoteError(first)
    return result  # type: ignore[return-value]


def on_rank_0(work: Callable[[], T]) -> T:
    """Runs `work` on rank 0; every rank ends with its (picklable) result, or raises if it raised.

    A rank receives the result once, where a gather would send it room for one from every rank.
    """
    return _of_rank_0(agree(lambda: work() if rank() == 0 else None))  # type: ignore[return-value]


def _of_rank_0(value: T) -> T:
    comm = running_comm()
    if not comm:
        return value
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0, group=process.control_group)
    return values[0]
