"""How long commands take until they answer, in this checkout and in an earlier one.

    git worktree add ../before REVISION
    python -m benchmarks.startup --against ../before --run RUN --output FILE

Each command is started `--rounds` times in both, in turn, and the best counts: seconds on the
clock, and of processor time, which other work on the machine disturbs less. RUN is the folder of
any finished run. Files of both checkouts and of libraries are read once before, so that none waits
for the disk.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.measuring import versions, write_result

ROOT = Path(__file__).parent.parent
ALPHATOKEN = ("-m", "alphatoken")
MODEL = f"model.name_or_path={ROOT / 'tests' / 'models' / 'llama-3.1-8b'}"


def commands(run: Path, scratch: Path) -> dict[str, tuple[str, ...]]:
    """What is measured: arguments of Python, by what a user types."""
    wrong = scratch / "wrong.yaml"
    wrong.write_text("model:\n  name_or_paht: x\n", encoding="utf-8")
    plan = ("--config", "configs/sft/llama3.1_8b_8gpu.yaml", "--world", "8", "--gpu", "h100-80g")
    none = str(scratch / "none")
    return {
        "alphatoken --help": (*ALPHATOKEN, "--help"),
        "alphatoken plan --help": (*ALPHATOKEN, "plan", "--help"),
        "recipes/sft.py --help": ("recipes/sft.py", "--help"),
        "recipes/transcripts.py --help": ("recipes/transcripts.py", "--help"),
        "recipes/sft.py, mistaken key": ("recipes/sft.py", "--config", str(wrong)),
        "alphatoken plan, 8B": (*ALPHATOKEN, "plan", *plan, MODEL),
        "alphatoken report RUN": (
            *(*ALPHATOKEN, "report", str(run)),
            *("--output", str(scratch / "report.html")),
        ),
        "alphatoken export, no such run": (*ALPHATOKEN, "export", none, f"{none}-export"),
        "alphatoken convert, no such folder": (*ALPHATOKEN, "convert", none),
        "alphatoken preview, mistaken key": (*ALPHATOKEN, "preview", "--config", str(wrong)),
        "alphatoken tokenise, mistaken key": (*ALPHATOKEN, "tokenise", "--config", str(wrong)),
        "alphatoken values export, mistaken key": (
            *(*ALPHATOKEN, "values", "export"),
            *(none, "--config", str(wrong)),
        ),
    }


def measure(checkout: Path, arguments: tuple[str, ...]) -> tuple[float, float]:
    """Seconds on the clock and of processor time that a command takes in a checkout."""
    environment = {**os.environ, "PYTHONPATH": str(checkout), "DATA_DIR": "."}
    used, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(
        [sys.executable, *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        check=False,
    )
    seconds = time.perf_counter() - began
    now = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime


def compare(before: Path, run: Path, rounds: int, only: str) -> dict[str, dict[str, float]]:
    """The best of each command, before and now."""
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, arguments in commands(run, Path(folder)).items():
            if only not in name:
                continue
            for checkout in (before, ROOT):
                measure(checkout, arguments)
            best: dict[str, float] = {}
            for _ in range(rounds):
                for when, checkout in (("before", before), ("now", ROOT)):
                    for kind, seconds in zip(
                        ("clock", "processor"), measure(checkout, arguments), strict=True
                    ):
                        key = f"{kind} {when}"
                        best[key] = min(seconds, best.get(key, seconds))
            found[name] = {key: round(seconds, 3) for key, seconds in best.items()}
    return found


def show(found: dict[str, dict[str, float]]) -> None:
    """A line for each command."""
    table = Table("command", "s before", "s now", "ratio", "processor before", "now", "ratio")
    for name, best in found.items():
        cells = []
        for kind in ("clock", "processor"):
            before, now = best[f"{kind} before"], best[f"{kind} now"]
            cells += [f"{before:.2f}", f"{now:.2f}", f"{before / now:.1f}"]
        table.add_row(name, *cells)
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--against", type=Path, required=True, help="an earlier checkout")
    parser.add_argument("--run", type=Path, required=True, help="folder of a finished run")
    parser.add_argument("--only", default="", help="commands with this in their name")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="where to write the result as JSON")
    parsed = parser.parse_args()
    found = compare(parsed.against.resolve(), parsed.run.resolve(), parsed.rounds, parsed.only)
    show(found)
    if parsed.output:
        result: dict[str, Any] = {
            "command": "python -m benchmarks.startup --against BEFORE --run RUN",
            "only": parsed.only,
            "rounds": parsed.rounds,
            "cores": os.cpu_count(),
            "versions": {"python": platform.python_version(), **versions()},
            "seconds": found,
        }
        write_result(result, parsed.output)


if __name__ == "__main__":
    main()
