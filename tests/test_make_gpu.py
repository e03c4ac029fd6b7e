"""`make gpu` where there is no GPU: the command as a user runs it, with few of its tests."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.ranks import ROOT, environment_of_no_rank

FEW = "sum_of_outer_products or layers_have_a_forward_derivative"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="`make gpu` itself asks it there")
def test_it_runs_what_a_cpu_can_and_says_what_it_left_out(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "tests.gpu", "--output", str(output), "--tests", "-k", FEW]
    inherited = environment_of_no_rank().items()
    own = {name: text for name, text in inherited if not name.startswith("PYTEST_")}
    finished = subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)
    assert finished.returncode == 0, finished.stdout[-3000:] + finished.stderr[-3000:]
    found = json.loads(output.read_text(encoding="utf-8"))
    outcomes = {each["name"]: each for each in found["outcomes"]}
    counts = {
        kind: sum(each["outcome"] == kind for each in outcomes.values())
        for kind in ("passed", "failed", "left out")
    }
    assert ", ".join(f"{count} {kind}" for kind, count in counts.items()) in finished.stdout
    assert (counts["passed"] > 0, counts["failed"]) == (True, 0)
    for each in outcomes.values():
        assert each["note"] or each["outcome"] == "passed", f"{each['name']}: left out, but why?"
    derivative = outcomes["test_values::test_layers_have_a_forward_derivative[llama]"]
    assert (derivative["outcome"], derivative["note"]) == ("left out", "needs a CUDA device")
    assert outcomes["A flash_attention_2, packed"]["note"] == "no CUDA device"
    assert set(found) >= {"command", "device", "versions", "benchmarks"}
    assert found["benchmarks"]["cases"], "what was measured is in the file"
