"""Runs a function of `tests.cases` in several gloo processes and collects what each returns.

The processes are forked from a server that has imported everything (`tests.preload`), which saves
each of them some ten seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import socket
import sys
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent

_context = multiprocessing.get_context("forkserver")
# Ports that the system gives to nobody who asks for any port (Linux: 32768 and above): one that
# was free a moment ago is still free when rank 0 listens on it. Every test process begins
# elsewhere.
PORTS = range(12000, 32000)
_ports = itertools.count(7919 * os.getpid() % len(PORTS))

_context.set_forkserver_preload(["tests.preload"])


def rank_environment(rank: int, world_size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    """A port that nobody listens on, another one in every call."""
    while True:
        port = PORTS[next(_ports) % len(PORTS)]
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def run_ranks(case: str, world_size: int, folder: Path, **arguments: Any) -> list[Any]:
    """Calls `tests.cases.<case>(folder, **arguments)` on every rank; returns the results in rank
    order.

    When a rank fails, the others are stopped and the test fails with that rank's output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    os.environ |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }  # read when the server imports torch and DeepSpeed
    forkserver.ensure_running()
    port = free_port()
    logs = [folder / f"rank-{rank}.log" for rank in range(world_size)]
    processes = [
        _context.Process(
            target=_run_rank, args=(case, folder, rank_environment(rank, world_size, port), log)
        )
        for rank, log in enumerate(logs)
    ]
    for process in processes:
        process.start()
    try:
        while True:
            # Looked up once: a process may end between two looks, and waiting for none would
            # have no end.
            alive = [process.sentinel for process in processes if process.is_alive()]
            for rank, process in enumerate(processes):
                if process.exitcode:
                    raise AssertionError(
                        f"rank {rank} of {case} failed:\n{logs[rank].read_text()[-6000:]}"
                    )
            if not alive:
                break
            wait(alive)
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [
        torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(world_size)
    ]


def _run_rank(case: str, folder: Path, environment: dict[str, str], log: Path) -> None:
    with log.open("w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ |= environment
    importlib.import_module("tests.cases").run(case, folder)


if __name__ == "__main__":
    # Repeats one case under torchrun, where a debugger has a terminal, in the folder of a test.
    importlib.import_module("tests.cases").run(sys.argv[1], Path(sys.argv[2]))
