"""What `keep_ratio: auto` drops, as the benchmark counts it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.dropped import main
from recipes.quickstart.get_model import save_tiny


@pytest.mark.slow
def test_what_is_vetoed_takes_no_part_in_b(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A random model gives most tokens a probability of about 1 / 256."""
    save_tiny(tmp_path / "tiny")
    output = tmp_path / "dropped.json"
    arguments = ["--scored", "4", "--contrast", "4", "--held-out", "4", "--max-length", "1024"]
    arguments += ["--contrasts", "0.5", "1"]
    arguments += ["--model", str(tmp_path / "tiny"), "--output", str(output)]
    arguments += ["--cases", "junk, problems", "--veto"]

    main([*arguments, "1e-9"])
    case = json.loads(output.read_text())["cases"]["junk, problems"]
    assert 0 < case["bad"] < 1
    half, whole, half_spared, whole_spared = case["dropped"]
    assert half["vetoed of good"] == 0
    assert {**half_spared, "B of": "all"} == half
    assert {**whole_spared, "B of": "all"} == whole
    assert half["harmful of good"] != whole["harmful of good"]

    main([*arguments, "0.0041"])
    _, whole, _, whole_spared = json.loads(output.read_text())["cases"]["junk, problems"]["dropped"]
    assert 0 < whole["vetoed of good"] == whole_spared["vetoed of good"] < 1
    assert whole["harmful of good"] != whole_spared["harmful of good"]

    with pytest.raises(SystemExit):  # nothing is left for B
        main([*arguments, "0.9"])
    assert "no response token" in capsys.readouterr().err
