"""The tests of this folder and `benchmarks.gpu` on this machine, one table of all of it, and one
JSON file.

    python -m tests.gpu --output FILE.json

Without a CUDA device the same runs on the CPU, as far as it means something there. Ends with 1
where a test failed or a benchmark had an error; what was left out is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from benchmarks.measuring import device_name, versions, write_result
from tests.ranks import ROOT


@dataclass(frozen=True)
class Outcome:
    """What became of a test or a benchmark."""

    name: str
    outcome: str
    """passed, failed, or left out."""
    seconds: float
    note: str
    """What was measured, why it failed, or why it was left out."""


def run_tests(folder: Path, selected: list[str]) -> list[Outcome]:
    """Runs pytest on this folder; `selected` are more of its arguments."""
    report = folder / "tests.xml"
    options = ["-m", "", "--quiet", "-p", "no:xdist", f"--junitxml={report}", "--durations=0"]
    subprocess.run(
        [sys.executable, "-m", "pytest", str(Path(__file__).parent), *options, *selected],
        cwd=ROOT,
        check=False,
    )
    return list(outcomes_of_tests(report)) if report.exists() else [nothing("tests", "no report")]


def outcomes_of_tests(report: Path) -> Iterator[Outcome]:
    for case in ElementTree.parse(report).iter("testcase"):
        notes = [
            each.get("value", "") for each in case.iter("property") if each.get("name") == "note"
        ]
        outcome = "passed"
        for kind, called in {"skipped": "left out", "failure": "failed", "error": "failed"}.items():
            found = case.find(kind)
            if found is not None:
                outcome = called
                notes.insert(0, first_line(found.get("message", "")))
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        yield Outcome(name, outcome, float(case.get("time", 0)), "; ".join(notes))


def first_line(message: str) -> str:
    lines = message.strip().splitlines()
    return lines[0] if lines else ""


def run_benchmarks(file: Path, device: str) -> tuple[list[Outcome], dict[str, Any]]:
    """Their outcomes, and what they write into `file`, as they come; the profiler's trace is beside
    it."""
    file.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", device, "--output", str(file)]
    finished = subprocess.run(command, cwd=ROOT, check=False)
    if not file.exists():
        return [nothing("benchmarks.gpu", f"ended with {finished.returncode}")], {}
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    outcomes = [outcome_of_benchmark(name, case) for name, case in found["cases"].items()]
    if finished.returncode:
        outcomes.append(nothing("benchmarks.gpu", f"ended with {finished.returncode}"))
    return outcomes, found


def outcome_of_benchmark(name: str, case: dict[str, Any]) -> Outcome:
    if "left_out" in case:
        return Outcome(name, "left out", 0.0, case["left_out"])
    outcome = "failed" if "error" in case else "passed"
    measured = "" if "seconds" not in case else f"{case['seconds'] * 1e3:.2f} ms"
    if "over_plain" in case:
        measured += f", {case['over_plain']:.2f} of plain"
    return Outcome(name, outcome, case["seconds_of_case"], case.get("error", measured))


def nothing(name: str, reason: str) -> Outcome:
    return Outcome(name, "failed", 0.0, reason)


def show(outcomes: list[Outcome], console: Console) -> None:
    """A row per test and benchmark; cases of a test that were left out for one reason share one."""
    left_out = Counter(map(reason_of, outcomes))
    table = Table(Column("name", overflow="fold"), "outcome", "seconds", "measured, or why not")
    for each in outcomes:
        name, alike = each.name, left_out.pop(reason_of(each), 0)
        if each.outcome == "left out":
            if not alike:
                continue
            if alike > 1:
                name = f"{name.partition('[')[0]}, {alike} cases"
        table.add_row(escape(name), each.outcome, f"{each.seconds:.1f}", escape(each.note))
    console.print(table)
    counts = Counter(each.outcome for each in outcomes)
    console.print(", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "left out")))


def reason_of(outcome: Outcome) -> tuple[str, str, str]:
    """What cases of a test have in common that were left out for one reason."""
    name = outcome.name.partition("[")[0] if outcome.outcome == "left out" else outcome.name
    return name, outcome.outcome, outcome.note


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="where to write everything as JSON")
    parser.add_argument(
        "--tests", nargs=argparse.REMAINDER, default=[], help="more arguments of pytest"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TQDM_DISABLE"] = "1"
        outcomes = run_tests(Path(folder), arguments.tests)
        file = Path(folder) / "gpu.json" if arguments.output is None else arguments.output
        beside = file.with_name(f"{file.stem}-benchmarks.json").absolute()
        of_benchmarks, benchmarks = run_benchmarks(beside, device.type)
        outcomes += of_benchmarks
    show(outcomes, Console(width=160))
    if arguments.output:
        result = {
            "command": "python -m tests.gpu " + " ".join(sys.argv[1:]),
            "device": device_name(device),
            "versions": {"python": sys.version.split()[0], **versions()},
            "outcomes": [asdict(each) for each in outcomes],
            "benchmarks": benchmarks,
        }
        write_result(result, arguments.output)
    sys.exit(any(each.outcome == "failed" for each in outcomes))


if __name__ == "__main__":
    main()
