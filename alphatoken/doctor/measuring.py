"""What every rank's device and the network between ranks do: products in a run's dtype, the time of
an all-reduce. Measured on every rank, judged on what all have measured."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from alphatoken.distributed import collectives
from alphatoken.doctor.findings import Finding, disagreement, named
from alphatoken.util.wording import size

ROUNDS = 5  # all-reduces that are timed


def check_dtype(dtype: str, device: torch.device) -> float:
    """Multiplies two matrices in a run's dtype; the time it takes, in units of float32's.

    Raises ArithmeticError where the product is wrong, and whatever torch does where there is no
    such product.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).to(device) for _ in range(2))
    seconds = {}
    for tried in (torch.float32, getattr(torch, dtype)):
        a, b = left.to(tried), right.to(tried)
        product = (a @ b).float()
        error = float((product - left @ right).abs().max() / product.abs().max())
        if not error < 0.05:
            raise ArithmeticError(f"a product of matrices in {dtype} is off by {error:.1%}")
        began = time.perf_counter()
        for _ in range(3):
            product = a @ b
        product.sum().item()  # waits for the device
        seconds[tried] = time.perf_counter() - began
    return seconds[getattr(torch, dtype)] / seconds[torch.float32]


def judge_dtype(dtype: str, slower: Sequence[float], nodes: Sequence[str]) -> Finding:
    """Warns where `check_dtype` gave more than 4 on a rank; `slower` and `nodes`: by rank."""
    worst = max(slower)
    if worst > 4:
        ranks = [rank for rank, times in enumerate(slower) if times > 4]
        found = (
            f"{named(ranks, nodes)}: products in {dtype} work, but take {worst:.0f} times as long "
            "as in float32"
        )
        concerned = tuple(sorted({nodes[rank] for rank in ranks}))
        return Finding(
            "dtype", "warning", found, "set model.dtype=float32 on such machines", concerned
        )
    return Finding("dtype", "ok", f"products of matrices in {dtype} are right")


@dataclass(frozen=True)
class AllReduce:
    """An all-reduce of ones, as one rank saw it."""

    bytes: int
    seconds: float
    """Mean of ROUNDS."""
    total: float
    """An element of the sum: the number of ranks, where the network is right."""


def measure_all_reduce(device: torch.device) -> AllReduce:
    """Times all-reduces of ones, after one to warm up. Every rank must call it."""
    tensor = torch.ones(2**22 if device.type == "cpu" else 2**24, device=device)
    total = float(collectives.sum_over_ranks(tensor)[-1])
    tensor.zero_()  # sums of sums would overflow
    collectives.barrier()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        collectives.sum_over_ranks(tensor)
    tensor[-1].item()  # waits for the device
    seconds = (time.perf_counter() - began) / ROUNDS
    return AllReduce(bytes=tensor.nbytes, seconds=seconds, total=total)


def judge_all_reduce(measured: Sequence[AllReduce], nodes: Sequence[str]) -> Finding:
    """Checks the sums and reports the slowest rank's bandwidth; `measured` and `nodes`: by rank."""
    ranks = len(measured)
    wrong: dict[str, list[int]] = {}
    for rank, of_rank in enumerate(measured):
        if of_rank.total != ranks:
            message = f"ones of {ranks} ranks add up to {of_rank.total:g}"
            wrong.setdefault(message, []).append(rank)
    if wrong:
        return disagreement(
            "all-reduce",
            wrong,
            nodes,
            "the network or its library returns wrong sums; do not train",
        )
    if ranks == 1:
        return Finding("all-reduce", "ok", "a single rank has nobody to talk to")
    moved = measured[0].bytes
    seconds = max(of_rank.seconds for of_rank in measured)
    # What a ring sends over each link; comparable between numbers of ranks.
    rate = 2 * (ranks - 1) / ranks * moved / seconds
    found = (
        f"{size(moved)} in {1000 * seconds:.3g} ms, mean of {ROUNDS}: bus bandwidth {size(rate)}/s"
    )
    return Finding("all-reduce", "ok", found)
