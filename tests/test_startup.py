"""Keys are printed and mistakes refused without waiting for torch."""

from __future__ import annotations

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
RECIPES = ("recipes/sft.py", "recipes/preference.py", "recipes/fisher.py")


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
        (COMMAND, "plan", "--help"),
        (COMMAND, "doctor", "--help"),
        *((recipe, "--help") for recipe in RECIPES),
    ],
    ids=" ".join,
)
def test_help_loads_no_model_library(arguments: tuple[str, ...]) -> None:
    result = probe(*arguments)
    assert result.stdout.splitlines()[-1] == "ended with 0 loaded []", result.stderr


@pytest.mark.parametrize("start", [(recipe,) for recipe in RECIPES], ids=" ".join)
def test_a_mistaken_key_is_refused_before_model_libraries_load(
    start: tuple[str, ...], tmp_path: Path
) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("model:\n  name_or_paht: x\n")
    result = probe(*start, "--config", str(config))
    assert result.stdout.splitlines()[-1] == "ended with 2 loaded []", result.stderr
    assert "model.name_or_paht: unknown key; did you mean model.name_or_path?" in result.stderr


def test_a_plan_refuses_a_mistaken_key_before_model_libraries_load(tmp_path: Path) -> None:
    config = tmp_path / "bad.yaml"
    config.write_text("model:\n  name_or_paht: x\n")
    result = probe(COMMAND, "plan", "--config", str(config), "--world", "2")
    assert result.stdout.splitlines()[-1] == "ended with 2 loaded []", result.stderr
    assert "did you mean model.name_or_path?" in result.stderr


@pytest.mark.parametrize("name", alphatoken.__all__)
def test_every_public_name_is_found_when_asked_for(name: str) -> None:
    found = getattr(alphatoken, name)
    assert found.__name__ == name
    assert name in dir(alphatoken)


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'alphatoken' has no attribute 'score_token'"):
        alphatoken.score_token  # noqa: B018
