"""What the cost benchmarks share: a trainer on real rows, clocks, peaks and FLOPs, and how a result
is kept."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import platform
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from alphatoken.config.run import RunConfig
from alphatoken.objectives.supervised import SupervisedObjective
from alphatoken.planner.counting import FlopCounter
from alphatoken.training.setup import build_run
from alphatoken.training.trainer import Trainer

PAPER_MICRO_BATCHES = 16


class Peak:
    """Peak memory of a call above what was in use before it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def of(self, call: Callable[[], object]) -> int:
        reset_high_water(cuda=self._cuda)
        before = torch.cuda.memory_allocated() if self._cuda else status("VmRSS")
        call()
        return (torch.cuda.max_memory_allocated() if self._cuda else status("VmHWM")) - before


def reset_high_water(*, cuda: bool) -> None:
    """Peaks count from here on; free memory goes back to the system first."""
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        return
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def status(field: str) -> int:
    """A size of this process in bytes, by its name in /proc: VmRSS is what is resident, VmHWM its
    peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def flops(call: Callable[[], object]) -> int:
    counter = FlopCounter()
    with counter:
        call()
    return counter.total


def build_trainer(
    arguments: argparse.Namespace,
    folder: str,
    sections: Mapping[str, dict[str, Any]] | None = None,
    **valuation: Any,
) -> Trainer:
    """A trainer on the rows of the command line; `valuation` are keys of that section, `sections`
    those of others."""
    source = {"path": str(arguments.data)}
    values: dict[str, dict[str, Any]] = {
        "model": {"name_or_path": str(arguments.model), "dtype": arguments.dtype},
        "data": {
            "train": {**source, "skip": 64},
            "validation": {**source, "first": 64},
            "max_length": arguments.max_length,
            "cache_dir": folder,
        },
        "valuation": {
            "layers": 3,
            "window": 32,
            "split_terms": arguments.split_terms,
            "stability_weight": 0.0,
            **valuation,
        },
        "selection": {"keep_ratio": 0.5},
        "train": {
            "global_batch_size": PAPER_MICRO_BATCHES * arguments.micro_batch,
            "micro_batch_size": arguments.micro_batch,
            "max_steps": 1000,
            "output_dir": f"{folder}/run",
        },
    }
    for section, keys in (sections or {}).items():
        values[section] = {**values.get(section, {}), **keys}
    return Trainer(build_run(RunConfig.model_validate(values), SupervisedObjective()))


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.processor(),
    )
    return f"CPU, {torch.get_num_threads()} threads ({model})"


def cost_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every cost benchmark has."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True, help="folder of a Llama-like model")
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="rows {prompt, response}; the first 64 are held out",
    )
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="float32 where the processor has no bfloat16",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument(
        "--max-length", type=int, default=1024, help="rows are cut to as many tokens"
    )
    return parser


def circumstances(module: str, device: torch.device, model: Path) -> dict[str, Any]:
    """What has to be known about a measurement: command, machine and versions."""
    return {
        "command": f"python -m {module} " + " ".join(sys.argv[1:]),
        "device": device_name(device),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "model": model.name,
    }


def versions() -> dict[str, str]:
    """Of the packages that a measurement depends on."""
    return {package: version(package) for package in ("torch", "transformers", "deepspeed")}


def run_cost(
    parser: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], dict[str, Any]],
    show: Callable[[dict[str, Any]], None],
) -> None:
    """The whole of a cost benchmark's command."""
    arguments = parser.parse_args()
    result = measure(arguments)
    show(result)
    if arguments.output:
        write_result(result, arguments.output)


def write_result(result: dict[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
