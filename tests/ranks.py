"""Runs a function of `tests.cases` in several gloo processes and collects what each returns."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        **os.environ,
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "PYTHONPATH": str(ROOT),
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def run_ranks(case: str, world_size: int, folder: Path, **arguments: Any) -> list[Any]:
    """Calls `tests.cases.<case>(folder, **arguments)` on every rank; returns the results in rank order.

    When a rank fails, the others are stopped and the test fails with that rank's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    port = free_port()
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    processes = []
    for rank, log in enumerate(logs):
        with log.open("w") as output:
            command = [sys.executable, "-m", "tests.cases", case, str(folder)]
            environment = rank_environment(rank, world_size, port)
            processes.append(
                subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)
            )
    try:
        waiting = dict(enumerate(processes))
        while waiting:
            for rank, process in list(waiting.items()):
                try:
                    status = process.wait(timeout=0.1)
                except subprocess.TimeoutExpired:
                    continue
                del waiting[rank]
                if status:
                    raise AssertionError(f"rank {rank} of {case} failed:\n{logs[rank].read_text()[-6000:]}")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)]
