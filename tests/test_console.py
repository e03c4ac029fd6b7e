"""Recipes start by name from an installed wheel, and failed commands say what to type next."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from alphatoken import cli
from alphatoken.cli import RECIPES, app, next_step
from alphatoken.config.file import load_config
from alphatoken.config.help import PURPOSES, parse_arguments
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.distributed.settings import read_deepspeed_config
from alphatoken.errors import ConfigError, NonFiniteError, UserError
from alphatoken.util.shipped import SHIPPED, or_shipped
from tests.ranks import ROOT

CONFIG = ["--config", "configs/sft/quickstart.yaml", "model.name_or_path=a b"]


def test_every_recipe_for_users_has_a_command() -> None:
    """All that read a run's configuration."""
    files = {
        file.name
        for file in (ROOT / "recipes").glob("*.py")
        if "parse_arguments(" in file.read_text(encoding="utf-8")
    }
    assert {file for file, _ in RECIPES.values()} == files
    assert (SHIPPED / "recipes").resolve() == ROOT / "recipes"


@pytest.mark.parametrize("name", RECIPES)
def test_help_of_a_recipe_is_its_keys(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", sys.argv)
    result = CliRunner().invoke(app, [name, "--help"])
    assert result.exit_code == 0, result.output
    assert "train.output_dir" in result.stdout
    assert ("preference.beta" in result.stdout) is (name == "preference")


def test_help_has_every_section_once_by_what_it_is_for() -> None:
    sections = [section for each in PURPOSES.values() for section in each]
    assert sorted(sections) == sorted(PreferenceRunConfig.model_fields)
    shown = CliRunner().invoke(app, ["sft", "--help"]).stdout
    assert "Which tokens count" in shown
    assert "What is minimised on pairs" not in shown
    assert shown.index("selection.keep_ratio") < shown.index("train.max_steps")


@pytest.mark.parametrize(("name", "shown"), [("sft", True), ("preference", False)])
def test_help_has_the_default_of_the_recipe(name: str, shown: bool) -> None:
    assert ("auto, or 0.5" in CliRunner().invoke(app, [name, "--help"]).stdout) is shown


def test_a_recipe_is_handed_to_the_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    started = list[tuple[str, list[str], dict[str, str]]]()
    monkeypatch.setattr(os, "execvpe", lambda *arguments: started.append(arguments))
    monkeypatch.delenv("RANK", raising=False)
    assert CliRunner().invoke(app, ["sft", *CONFIG]).exit_code == 0
    ((shell, arguments, environment),) = started
    assert (shell, arguments[0]) == ("bash", "bash")
    assert [Path(each).resolve() for each in arguments[1:3]] == [
        ROOT / "launch" / "local.sh",
        ROOT / "recipes" / "sft.py",
    ]
    assert arguments[3:] == CONFIG
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)


def test_a_rank_is_no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = list[list[str]]()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(runpy, "run_path", lambda *_, **__: ran.append(sys.argv))
    assert CliRunner().invoke(app, ["value", *CONFIG]).exit_code == 0
    assert ran == [[str(SHIPPED / "recipes" / "value_tokens.py"), *CONFIG]]


def test_shipped_files_are_found_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_config(RunConfig, Path("configs/sft/llama3.1_8b_8gpu.yaml"))
    assert read_deepspeed_config(config.deepspeed.config)["zero_optimization"]["stage"] == 3
    own = tmp_path / "configs/sft/llama3.1_8b_8gpu.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("own")
    assert or_shipped(own.relative_to(tmp_path)) == own.relative_to(tmp_path), "one's own is first"
    assert or_shipped(Path("configs/none.yaml")) == Path("configs/none.yaml")


@pytest.mark.parametrize(
    ("error", "command_line", "expected"),
    [
        (ConfigError("x"), ["recipes/fisher.py", *CONFIG], "alphatoken fisher --help lists"),
        (ConfigError("x"), ["/bin/alphatoken", "plan", *CONFIG], "alphatoken sft --help lists"),
        (
            UserError("x"),
            ["recipes/sft.py", *CONFIG],
            "alphatoken doctor --config configs/sft/quickstart.yaml 'model.name_or_path=a b'",
        ),
        (UserError("x"), ["/bin/alphatoken", "export", "a", "b"], "alphatoken export --help"),
        (
            UserError("x"),
            ["/alphatoken/__main__.py", "values", "export"],
            "alphatoken values export --help",
        ),
        (UserError("x"), ["recipes/transcripts.py", "a"], "python recipes/transcripts.py --help"),
        (NonFiniteError("x"), ["recipes/sft.py", *CONFIG], "the same command with train.resume"),
    ],
)
def test_what_to_type_next(error: UserError, command_line: list[str], expected: str) -> None:
    assert next_step(error, command_line).startswith(expected)


def test_wrong_arguments_are_refused_as_configurations_are() -> None:
    with pytest.raises(ConfigError, match="unrecognized arguments: --cfg"):
        parse_arguments(RunConfig, "", ["--cfg", "x", "--config", "y"])
    with pytest.raises(ConfigError, match="unrecognized arguments: --conf"):
        parse_arguments(RunConfig, "", ["--conf", "x"])  # which starts no launcher


def test_it_is_the_last_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], not_a_rank: None
) -> None:
    monkeypatch.setattr(sys, "argv", ["alphatoken", "export", "none", "new"])
    with pytest.raises(SystemExit):
        cli.main()
    assert capsys.readouterr().err == (
        "error: the run folder none does not exist; train.output_dir names it\n"
        "next: alphatoken export --help\n"
    )
