"""Runs a function of `tests.cases` in several gloo processes and collects what each returns, or a
program and collects what it writes.

The processes are forked from a server that has imported everything (`tests.preload`), which saves
each of them some ten seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
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


def environment_of_no_rank() -> dict[str, str]:
    """This process's environment for a program of its own: a test may have made the process a rank
    of its own group, which is not the program's."""
    of_ranks = {*rank_environment(0, 1, 0), "LOCAL_SIZE"}
    return {name: value for name, value in os.environ.items() if name not in of_ranks}


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
    ensure_server()
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


def run_on(
    device: torch.device, case: str, folder: Path, ranks: int = 2, **arguments: Any
) -> list[Any]:
    """As `run_ranks` on a CPU; on a GPU, which NCCL lets one rank have, with one rank in a new
    process, as nothing may be forked that has used CUDA. Tensors come back on the CPU."""
    if device.type == "cpu":
        return run_ranks(case, ranks, folder, **arguments)
    return [run_alone(case, folder, **arguments)]


def run_alone(
    case: str, folder: Path, environment: Mapping[str, str] | None = None, **arguments: Any
) -> Any:
    """Calls `tests.cases.<case>(folder, **arguments)` as the only rank, on this machine's
    accelerator if it has one, and returns the result; fails as `run_ranks` does."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(arguments, folder / "arguments.pt")
    inherited = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    if not torch.cuda.is_available():
        inherited |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    log = folder / "rank-0.log"
    with log.open("w") as output:
        finished = subprocess.run(
            [sys.executable, "-m", "tests.ranks", case, str(folder)],
            cwd=ROOT,
            env={**inherited, **rank_environment(0, 1, free_port()), **(environment or {})},
            stdout=output,
            stderr=output,
            check=False,
            timeout=540,
        )
    if finished.returncode:
        raise AssertionError(f"{case} failed:\n{log.read_text()[-6000:]}")
    return torch.load(folder / "result-0.pt", weights_only=False, map_location="cpu")


def run_program(
    *words: str | Path, environments: Sequence[Mapping[str, str]] = ({},), timeout: float = 300
) -> list[subprocess.CompletedProcess[str]]:
    """What `python WORDS` does in the project's folder, once with each of the environments, which
    add to this one, all at the same time; the first words are `-m MODULE` or a file.

    Nothing is imported, so what a program loads, when and with which settings needs a process of
    its own. Raises TimeoutExpired after so many seconds.
    """
    ensure_server()
    command = [str(word) for word in words]
    inherited = environment_of_no_rank()
    with tempfile.TemporaryDirectory() as name:
        logs = [(Path(name, f"{n}.out"), Path(name, f"{n}.err")) for n in range(len(environments))]
        processes = [
            _context.Process(target=_run_program, args=(command, {**inherited, **added}, *files))
            for added, files in zip(environments, logs, strict=True)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        try:
            for process in processes:
                process.join(end - time.monotonic())
                if process.exitcode is None:
                    raise subprocess.TimeoutExpired(command, timeout)
        finally:
            for process in processes:
                process.kill()
                process.join()
        return [
            subprocess.CompletedProcess(
                command, int(process.exitcode or 0), *(file.read_text() for file in files)
            )
            for process, files in zip(processes, logs, strict=True)
        ]


def ensure_server() -> None:
    """Starts the server, so that processes that anything starts from now on are forked from it."""
    # Read when the server imports torch and DeepSpeed.
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    forkserver.ensure_running()


def _run_program(words: list[str], environment: dict[str, str], output: Path, error: Path) -> None:
    _redirect(1, output)
    _redirect(2, error)
    os.environ.clear()
    os.environ |= environment
    os.chdir(ROOT)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def _redirect(descriptor: int, file: Path) -> None:
    with file.open("w") as opened:
        os.dup2(opened.fileno(), descriptor)


def _run_rank(case: str, folder: Path, environment: dict[str, str], log: Path) -> None:
    _redirect(1, log)
    os.dup2(1, 2)
    os.environ.pop("LOCAL_SIZE", None)  # of the test's own process
    os.environ |= environment
    importlib.import_module("tests.cases").run(case, folder)


if __name__ == "__main__":
    # Repeats one case under torchrun, where a debugger has a terminal, in the folder of a test.
    importlib.import_module("tests.cases").run(sys.argv[1], Path(sys.argv[2]))
