"""Keys are printed and mistakes refused without waiting for torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import alphatoken
from tests.ranks import ROOT

HEAVY = ("torch", "transformers", "deepspeed", "datasets", "pyarrow", "numpy")

# Runs a program as `python file arguments` does, then says what it ended with and loaded.
PROBE = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
    status = 0
except SystemExit as ended:
    status = ended.code or 0
heavy = sorted({name.partition(".")[0] for name in sys.modules} & set(HEAVY))
print("ended with", status, "loaded", heavy)
"""
COMMAND = "alphatoken/__main__.py"
RECIPES = (
    "recipes/sft.py",
    "recipes/preference.py",
    "recipes/fisher.py",
    "recipes/value_tokens.py",
    "recipes/evaluate.py",
)
COMMANDS = (
    "export",
    "convert",
    "preview",
    "tokenise",
    "plan",
    "doctor",
    "report",
    "schema",
    "new",
    "compare",
)


def probe(*arguments: str) -> subprocess.CompletedProcess[str]:
    program = PROBE.replace("HEAVY", repr(HEAVY))
    return subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "COLUMNS": "200"},
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(
    "arguments",
    [
        (COMMAND, "--help"),
        (COMMAND, "--version"),
        *((COMMAND, command, "--help") for command in COMMANDS),
        (COMMAND, "values", "export", "--help"),
        *((recipe, "--help") for recipe in (*RECIPES, "recipes/transcripts.py")),
    ],
    ids=" ".join,
)
def test_help_loads_no_model_library(arguments: tuple[str, ...]) -> None:
    result = probe(*arguments)
    assert result.stdout.splitlines()[-1] == "ended with 0 loaded []", result.stderr


@pytest.mark.parametrize(
    "start",
    [
        *((recipe,) for recipe in RECIPES),
        (COMMAND, "preview"),
        (COMMAND, "tokenise"),
        (COMMAND, "plan", "--world", "2"),
        (COMMAND, "values", "export", "rows.parquet"),
    ],
    ids=" ".join,
)
def test_a_mistaken_key_is_refused_before_model_libraries_load(
    start: tuple[str, ...], tmp_path: Path
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("model:\n  name_or_paht: x\n")
    result = probe(*start, "--config", str(config))
    assert result.stdout.splitlines()[-1] == "ended with 2 loaded []", result.stderr
    assert "model.name_or_paht: unknown key; did you mean model.name_or_path?" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "none", "new"), "the run folder none does not exist"),
        (("convert", "none"), "cannot convert none: there is no such folder"),
        (("report", "none"), "so none is no folder of a run"),
    ],
    ids=lambda each: each[0] if isinstance(each, tuple) else "",
)
def test_a_missing_folder_is_named_before_model_libraries_load(
    arguments: tuple[str, ...], message: str
) -> None:
    result = probe(COMMAND, *arguments)
    assert result.stdout.splitlines()[-1] == "ended with 2 loaded []", result.stderr
    assert message in result.stderr


def test_a_report_is_written_without_model_libraries(tmp_path: Path) -> None:
    """What its numbers mean is known all the same, those of pairs included."""
    (tmp_path / "config.yaml").write_text("train: {output_dir: run}\n", encoding="utf-8")
    line = {"step": 1, "rewards_margin": 0.25, "peak_memory_bytes": 2**20}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line) + "\n", encoding="utf-8")
    result = probe(COMMAND, "report", str(tmp_path))
    assert result.stdout.splitlines()[-1] == "ended with 0 loaded []", result.stderr
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "beta times the log-ratio over all response tokens" in page


@pytest.mark.parametrize("name", alphatoken.__all__)
def test_every_public_name_is_found_when_asked_for(name: str) -> None:
    found = getattr(alphatoken, name)
    assert found.__name__ == name
    assert name in dir(alphatoken)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'alphatoken' has no attribute 'score_token'"):
        alphatoken.score_token  # noqa: B018
