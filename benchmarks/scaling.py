"""What a step costs on many ranks by the planner, and what ranks tell each other beside tensors.

    python -m benchmarks.scaling costs [--output FILE.json]
    python -m benchmarks.scaling objects [--output FILE.json]
    python -m benchmarks.scaling connections [--output FILE.json]

`costs`: messages, bytes and work of one rank's optimizer step, of models on 8 to 1,024 ranks, and
the seconds that follow from a bandwidth, a latency and a rate that are assumed (the options), not
measured. Every rank has as many micro-batches as on the fewest ranks, so a step has more rows.

`objects`: the files that so many ranks write into a checkpoint, what they tell each other about
them, and how long one process takes for what rank 0 does with it. The ranks are made up: one
process has the objects that each would have, and sends nothing.

`connections`: open files of rank 0 in as many real processes on this machine, before and after the
groups that a run on CPUs forms, and how long they take to agree.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import pickle
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from alphatoken.checkpoints.files import (
    missing_files,
    read_description,
    write_description,
)
from alphatoken.config.file import load_config
from alphatoken.config.run import RunConfig
from alphatoken.planner.plan import Plan, make_plan
from alphatoken.planner.workload import longest_rows
from benchmarks.measuring import write_result

MODELS = Path("tests/models")
TIMES = 5
DIGEST = {"bytes": 12_345_678_901, "sha256": "0" * 64}


@dataclass(frozen=True)
class Case:
    """A model with the configuration that it is planned with."""

    name: str
    config: str
    model: str
    fewest: int
    """Ranks from which on it is shown."""
    overrides: tuple[str, ...] = ()


CASES = (
    Case("8B", "configs/sft/llama3.1_8b_8gpu.yaml", "llama-3.1-8b", 8),
    Case("70B", "configs/sft/llama3.3_70b_4x8gpu.yaml", "llama-3.3-70b", 32),
    Case("235B, 22B of them active", "configs/sft/llama3.3_70b_4x8gpu.yaml", "qwen3-235b-a22b", 64),
)
RANKS = (8, 32, 64, 512, 1024)
PROCESSES = (2, 4, 8, 16, 32)


@dataclass(frozen=True)
class Speed:
    """What is assumed of the machines."""

    flops: float
    """Floating-point operations per second of one rank."""
    inside: float
    """Bytes per second that reach a rank within a machine."""
    between: float
    """The same where a ring goes through several machines."""
    latency: float
    """Seconds of a message within a machine, and again for each doubling of the machines."""
    ranks_of_machine: int

    def seconds_of(self, plan: Plan, ranks: int) -> tuple[float, float]:
        """Computing and communicating, each as if it were alone."""
        machines = math.ceil(ranks / self.ranks_of_machine)
        bandwidth = self.inside if machines == 1 else self.between
        received = sum(message.received(ranks) for message in plan.traffic)
        count = sum(message.count for message in plan.traffic)
        waiting = count * self.latency * (1 + math.log2(machines))
        return plan.own.total / self.flops, received / bandwidth + waiting


def costs(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A line per model and number of ranks."""
    speed = Speed(
        options.flops, options.inside, options.between, options.latency, options.ranks_of_machine
    )
    return [
        line
        for case in CASES
        for ranks in RANKS
        if ranks >= case.fewest
        for line in (_cost(case, ranks, speed),)
    ]


def _cost(case: Case, ranks: int, speed: Speed) -> dict[str, Any]:
    config = load_config(RunConfig, [Path(case.config)], _overrides(case, ranks))
    plan = make_plan(config, longest_rows(config, 1.0), ranks, "h100-80g")
    computing, communicating = speed.seconds_of(plan, ranks)
    return {
        "model": case.name,
        "ranks": ranks,
        "rows": config.train.global_batch_size,
        "needed_bytes": plan.needed,
        "fits": plan.fits,
        "messages": sum(message.count for message in plan.traffic),
        "received_bytes": sum(message.received(ranks) for message in plan.traffic),
        "flops": plan.own.total,
        "over_plain": plan.own.over_plain,
        "computing_s": computing,
        "communicating_s": communicating,
    }


def _overrides(case: Case, ranks: int) -> list[str]:
    config = load_config(
        RunConfig, [Path(case.config)], [f"model.name_or_path={MODELS}/{case.model}"]
    )
    train = config.train
    of_fewest = train.global_batch_size // (case.fewest * train.micro_batch_size) or 1
    return [
        f"model.name_or_path={MODELS}/{case.model}",
        f"train.global_batch_size={ranks * train.micro_batch_size * of_fewest}",
        # As published: the files that ship say less.
        "selection.keep_ratio=0.5",
        "valuation.validation_sequences=32",
        *case.overrides,
    ]


def objects(ranks: int) -> dict[str, Any]:
    """What one save and one look at it are made of on so many ranks."""
    config = load_config(RunConfig, [Path(CASES[0].config)], [])
    own = [dict.fromkeys(files_of(rank, ranks), DIGEST) for rank in range(ranks)]
    files = {name: digest for each in own for name, digest in each.items()}
    description = {
        "format_version": 4,
        "step": 100,
        "world_size": ranks,
        "versions": {},
        "config": config.model_dump(mode="json"),
        "files": files,
    }
    told = len(pickle.dumps(own[-1]))
    clock: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        _timed(clock, "merging", lambda: {k: v for part in own for k, v in part.items()})
        _timed(clock, "looking for what is missing", lambda: missing_files(files, ranks))
        _timed(clock, "writing the list", lambda: write_description(Path(name), dict(description)))
        _timed(clock, "reading it, on every rank", lambda: read_description(Path(name)))
        listed = (Path(name) / "complete.json").stat().st_size
    result_of_rank_0 = len(pickle.dumps(config.model_dump(mode="json")))
    return {
        "ranks": ranks,
        "files": len(files),
        "list_bytes": listed,
        "bytes_of_a_rank": told,
        "bytes_reaching_rank_0": told * ranks,
        "result_of_rank_0_bytes": result_of_rank_0,
        "result_gathered_bytes": result_of_rank_0 * ranks,
        "agreeing_bytes": len(pickle.dumps(None)) * ranks,
        "seconds": clock,
    }


def files_of(rank: int, ranks: int) -> Iterator[str]:
    """The names that DeepSpeed and we give to what a rank writes at stage 3."""
    yield f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"
    yield f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
    yield f"random/{rank:05}-of-{ranks:05}.safetensors"
    yield f"scorer/{rank:05}-of-{ranks:05}.safetensors"


def _timed(clock: dict[str, float], what: str, work: Callable[[], object]) -> None:
    """The quickest of a few times: the first may meet a garbage collection."""
    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        work()
        found.append(time.perf_counter() - began)
    clock[what] = min(found)


def connections(ranks: int) -> dict[str, Any]:
    """Open files of rank 0 of `ranks` processes, and the seconds of a small gather of objects."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # modules are in memory once
    told = context.Queue()
    processes = [
        context.Process(target=_connect, args=(rank, ranks, port, told)) for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    found: dict[str, Any] = told.get(timeout=120)
    for process in processes:
        process.join()
    return {"ranks": ranks, **found}


def _connect(rank: int, ranks: int, port: int, told: multiprocessing.Queue[dict[str, Any]]) -> None:
    """One rank; rank 0 tells what it found."""
    torch.set_num_threads(1)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), **address}
    before = _open_files()
    torch.distributed.init_process_group("gloo")
    with_tensors = _open_files()
    control = torch.distributed.new_group(backend="gloo")
    everyone: list[Any] = [None] * ranks
    found = []
    for _ in range(TIMES):
        began = time.perf_counter()
        torch.distributed.all_gather_object(everyone, None, group=control)
        found.append(time.perf_counter() - began)
    if rank == 0:
        told.put(
            {
                "files_before": before,
                "files_with_tensors_group": with_tensors,
                "files_with_objects_group": _open_files(),
                "agreeing_seconds": min(found),
            }
        )
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def table(head: str, rows: Iterable[str]) -> str:
    """Markdown; columns are divided by ` | `."""
    lines = [head, " | ".join(["---"] * (head.count(" | ") + 1)), *rows]
    return "\n".join(f"| {line} |" for line in lines)


def cost_row(line: Mapping[str, Any]) -> str:
    fits = " (does not fit)" if line["fits"] is False else ""
    exposed = max(0.0, line["communicating_s"] - line["computing_s"])
    return (
        f"{line['model']} | {line['ranks']:,} | {line['rows']:,} | "
        f"{line['needed_bytes'] / 2**30:.1f} GiB{fits} | {line['messages']:,.0f} | "
        f"{line['received_bytes'] / 1e9:,.0f} GB | {line['flops'] / 1e12:,.0f} TFLOP | "
        f"{line['computing_s']:.1f} s | {line['communicating_s']:.1f} s | {exposed:.1f} s"
    )


def object_row(line: Mapping[str, Any]) -> str:
    clock = line["seconds"]
    reading = clock["reading it, on every rank"]
    return (
        f"{line['ranks']:,} | {line['files']:,} | {line['list_bytes'] / 1e3:,.0f} kB | "
        f"{line['bytes_reaching_rank_0'] / 1e3:,.0f} kB | "
        f"{line['result_gathered_bytes'] / 1e3:,.0f} kB | "
        f"{line['result_of_rank_0_bytes'] / 1e3:,.1f} kB | "
        f"{1e3 * (sum(clock.values()) - reading):,.1f} ms | {1e3 * reading:,.1f} ms"
    )


def connection_row(line: Mapping[str, Any]) -> str:
    return (
        f"{line['ranks']} | {line['files_before']} | {line['files_with_tensors_group']} | "
        f"{line['files_with_objects_group']} | {1e3 * line['agreeing_seconds']:.0f} ms"
    )


COST_HEAD = (
    "model | ranks | rows of a step | memory of a rank | messages | bytes received | work | "
    "computing | communicating | at least exposed"
)
OBJECT_HEAD = (
    "ranks | files | the list | what rank 0 is told | an answer of rank 0, gathered | sent | "
    "rank 0 works | every rank reads"
)
CONNECTION_HEAD = "ranks | open files before | with a group | with two | agreeing"


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.what == "costs":
        lines = costs(options)
        print(table(COST_HEAD, map(cost_row, lines)))
    elif options.what == "objects":
        lines = [objects(ranks) for ranks in RANKS]
        print(table(OBJECT_HEAD, map(object_row, lines)))
    else:
        lines = [connections(ranks) for ranks in PROCESSES]
        print(table(CONNECTION_HEAD, map(connection_row, lines)))
    if options.output is not None:
        assumed = {
            name: getattr(options, name)
            for name in ("flops", "inside", "between", "latency", "ranks_of_machine")
        }
        write_result(
            {
                "command": f"python -m benchmarks.scaling {options.what}",
                **({"assumed": assumed} if options.what == "costs" else {}),
                "lines": lines,
            },
            options.output,
        )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["costs", "objects", "connections"])
    parser.add_argument("--flops", type=float, default=4e14, help="per second and rank")
    parser.add_argument("--inside", type=float, default=3e11, help="bytes per second, one machine")
    parser.add_argument("--between", type=float, default=4e10, help="bytes per second, several")
    parser.add_argument("--latency", type=float, default=2e-5, help="seconds of a message")
    parser.add_argument("--ranks-of-machine", type=int, default=8)
    parser.add_argument("--output", type=Path, help="also write everything to a JSON file")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
