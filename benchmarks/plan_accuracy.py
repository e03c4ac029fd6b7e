"""How far `alphatoken plan` is from what runs take: peak memory, bytes communicated, floating-point
operations.

    MALLOC_MMAP_THRESHOLD_=65536 python -m benchmarks.plan_accuracy --model models/smollm2 --output
    FILE

Every case runs four optimizer steps by `launch/local.sh` on generated rows of one length. Memory is
the highest that was resident on any rank in the first three, loading included, less what was
resident after its imports (on a GPU: the highest allocated). Bytes are those of the third step in
DeepSpeed's communications log. FLOPs are counted in the fourth, which runs with the math kernel of
attention. With the environment variable glibc gives freed memory back; without it a process holds
on to some.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel

from alphatoken.cli import readable_errors
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.distributed.accounting import communicated_bytes
from alphatoken.distributed.ranks import initialise_ranks
from alphatoken.objectives.base import Objective
from alphatoken.objectives.preference import PreferenceObjective
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.planner.counting import FlopCounter
from alphatoken.planner.messages import Message, Op
from alphatoken.planner.plan import make_plan
from alphatoken.planner.workload import rows_of
from alphatoken.training.setup import build_run
from alphatoken.training.trainer import Trainer
from benchmarks.measuring import circumstances, status, write_result
from benchmarks.preference_memory import run_values, save_data

STEPS = 3
PARTS = {"sequence_parallel": 2}
DIVIDED: dict[str, dict[str, Any]] = {
    "ghost, rows divided": {"train": PARTS},
    "ghost, checkpointing, stage 2, rows divided": {
        "train": {**PARTS, "gradient_checkpointing": True},
        "deepspeed": {"config": {"zero_optimization": {"stage": 2}}},
    },
    "exact, rows divided": {"train": PARTS, "valuation": {"estimator": "exact"}},
    "pairs, rows divided": {"train": PARTS, "preference": {}},
}
CASES: dict[str, dict[str, Any]] = {
    "ghost": {},
    "without valuation": {"valuation": {"enabled": False}},
    "ghost, checkpointing": {"train": {"gradient_checkpointing": True}},
    "ghost, all layers, streamed": {"valuation": {"layers": "all", "residency": "streamed"}},
    "ghost, stage 2": {"deepspeed": {"config": {"zero_optimization": {"stage": 2}}}},
    "exact": {"valuation": {"estimator": "exact"}},
    "ghost, contrast": {"valuation": {"contrast": 1.0, "reliability": True}},
    "exact, contrast": {"valuation": {"estimator": "exact", "contrast": 1.0, "reliability": True}},
    "pairs, reference cached": {"preference": {}},
    "pairs, contrast drawn": {
        "preference": {},
        "valuation": {"contrast": 1.0, "contrast_from": "drawn", "residency": "streamed"},
    },
    "pairs, by held-out pairs": {"preference": {}, "valuation": {"target": "preference"}},
    **DIVIDED,
}


def config_of(case: str, folder: Path, model: Path, dtype: str, ranks: int = 2) -> RunConfig:
    """As many rows in a step as make two micro-batches of two documents on each rank."""
    changes = {**CASES[case], "model": {"dtype": dtype}}
    kind = "pairs" if "preference" in changes else "sft"
    run = case.replace(" ", "-")
    values = run_values(kind, folder, model, ranks=ranks, documents=2, steps=STEPS + 1, run=run)
    for section, keys in changes.items():
        values[section] = {**values.get(section, {}), **keys}
    return (PreferenceRunConfig if kind == "pairs" else RunConfig).model_validate(values)


def measure(config: RunConfig) -> dict[str, Any]:
    """What this rank takes, and what the plan of the same rows says."""
    device = initialise_ranks()
    at_start = status("VmRSS")
    objective: Objective = SupervisedObjective()
    if isinstance(config, PreferenceRunConfig):
        objective = PreferenceObjective(config.preference)
    trainer = Trainer(build_run(config, objective))
    for step in range(STEPS - 1):
        trainer.step.take(step, evaluates=False)
    with communicated_bytes() as communicated:
        trainer.step.take(STEPS - 1, evaluates=False)
    peak = (
        torch.cuda.max_memory_allocated() if device.type == "cuda" else status("VmHWM") - at_start
    )
    with FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):
        trainer.step.take(STEPS, evaluates=False)
    rows = rows_of(trainer.run.splits.train, len(config.selections))

    def planned() -> tuple[int, tuple[Message, ...], float]:
        ranks = collectives.world_size()
        plan = make_plan(config, rows, ranks, "cpu" if device.type == "cpu" else None)
        return plan.memory.peak, plan.traffic, plan.own.total

    memory, traffic, flops = collectives.on_rank_0(planned)
    pairs = {
        "memory": (memory, peak),
        "bytes": (sum(message.bytes for message in traffic), sum(communicated.values())),
        "flops": (flops, counter.total),
    }
    return {
        "row_tokens": rows.tokens,
        "operations": by_operation(traffic, communicated),
        **{name: {"planned": pair[0], "measured": pair[1]} for name, pair in pairs.items()},
    }


def by_operation(
    planned: Sequence[Message], measured: Mapping[str, int]
) -> dict[str, dict[str, float]]:
    """Bytes of each collective operation, planned and in DeepSpeed's log."""
    found: dict[str, dict[str, float]] = {}
    for operation in get_args(Op):
        sums = (
            sum(message.bytes for message in planned if message.op == operation),
            sum(size for name, size in measured.items() if name.startswith(operation)),
        )
        found[operation] = dict(zip(("planned", "measured"), sums, strict=True))
    return found


def of_ranks(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What the rank that took the most memory measured, and FLOPs of the mean rank: of divided rows
    some parts have no response."""
    most = max(found, key=lambda rank: int(rank["memory"]["measured"]))
    measured = sum(rank["flops"]["measured"] for rank in found) / len(found)
    return {**most, "flops": {**most["flops"], "measured": measured}}


def run_case(case: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    options = [
        "--case",
        case,
        "--folder",
        folder,
        "--model",
        arguments.model,
        "--dtype",
        arguments.dtype,
    ]
    command = ["launch/local.sh", "--module", "benchmarks.plan_accuracy", *map(str, options)]
    subprocess.run(command, check=True, env={**os.environ, "RANKS": "2"})
    return of_ranks(json.loads((folder / "result.json").read_text()))


def show(results: dict[str, Any], console: Console) -> None:
    table = Table("", title="planned / measured", title_justify="left")
    for name in ("memory", "bytes", "FLOPs"):
        table.add_column(name, justify="right")
    units = {"memory": (2**20, "MiB"), "bytes": (2**20, "MiB"), "flops": (1e9, "GFLOP")}
    for case, result in results.items():
        cells = []
        for what, (unit, name) in units.items():
            planned, measured = result[what]["planned"], result[what]["measured"]
            cells.append(
                f"{planned / unit:,.1f} / {measured / unit:,.1f} {name} = {planned / measured:.3f}"
            )
        table.add_row(case, *cells)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of the model")
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument(
        "--words", type=int, default=128, help="words of each prompt and of each response"
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        with readable_errors():
            config = config_of(arguments.case, arguments.folder, arguments.model, arguments.dtype)
            ranks = collectives.gather_objects(measure(config))
            if collectives.rank() == 0:
                (arguments.folder / "result.json").write_text(json.dumps(ranks), encoding="utf-8")
        return
    results = {}
    for case in arguments.cases:
        with tempfile.TemporaryDirectory() as folder:
            save_data(Path(folder), 16, arguments.words)
            results[case] = run_case(case, Path(folder), arguments)
    show(results, Console(width=150))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = circumstances("benchmarks.plan_accuracy", device, arguments.model)
    if arguments.output:
        write_result({**about, "cases": results}, arguments.output)


if __name__ == "__main__":
    main()
