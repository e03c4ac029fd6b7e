"""`alphatoken new` copies a configuration with its comments, and changes what names the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from alphatoken.cli import app
from alphatoken.errors import UserError
from tests.ranks import ROOT

RUNS = sorted([*(ROOT / "configs/sft").glob("*"), *(ROOT / "configs/preference").glob("*")])


@pytest.fixture(autouse=True)
def in_a_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with our configurations, which is current."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(*arguments: str) -> str:
    """What the command says where it refuses."""
    result = CliRunner().invoke(app, ["new", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return str(result.exception)


@pytest.mark.parametrize("like", RUNS, ids=lambda file: file.stem)
def test_only_the_run_folder_and_the_files_own_name_differ(like: Path) -> None:
    like = like.relative_to(ROOT)
    result = CliRunner().invoke(app, ["new", "mine", "--like", str(like)])
    assert result.exit_code == 0, result.output
    old, new = like.read_text(), Path("mine.yaml").read_text()
    changed = [
        (before, after)
        for before, after in zip(old.splitlines(), new.splitlines(), strict=True)
        if before != after
    ]
    for before, after in changed:
        if before.startswith("#"):
            assert after == before.replace(str(like), "mine.yaml")
        else:
            folder = yaml.safe_load(old)["train"]["output_dir"]
            assert after == before.replace(folder, "runs/mine")
    assert yaml.safe_load(new)["train"]["output_dir"] == "runs/mine"
    recipe = like.parts[1]
    assert f"alphatoken {recipe} --config mine.yaml" in result.output


def test_a_quoted_folder_a_name_for_trackers_and_a_folder_to_write_to() -> None:
    Path("old.yaml").write_text(
        "# What it is.\n"
        "logging: {name: old, project: p}  # kept\n"
        "train:\n"
        "  output_dir: '/data/runs/old'   # big disk; see old.yaml\n"
        "# The end.\n"
    )
    result = CliRunner().invoke(app, ["new", "here/there/v2.1.yaml", "--like", "old.yaml"])
    assert result.exit_code == 0, result.output
    assert Path("here/there/v2.1.yaml").read_text() == (
        "# What it is.\n"
        "logging: {name: v2.1, project: p}  # kept\n"
        "train:\n"
        "  output_dir: /data/runs/v2.1   # big disk; see old.yaml\n"
        "# The end.\n"
    )


def test_it_overwrites_nothing() -> None:
    Path("mine.yaml").write_text("precious")
    said = refusal("mine", "--like", "configs/sft/quickstart.yaml")
    assert "mine.yaml exists, and is left as it is" in said
    assert Path("mine.yaml").read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "like", "said"),
    [
        ("mine", "none.yaml", "cannot read the configuration none.yaml: No such file"),
        ("mine", "configs/presets/paper.yaml", "paper.yaml has no train.output_dir"),
        ("a b", "configs/sft/quickstart.yaml", "'a b' cannot name a run folder"),
        ("mine", "broken.yaml", "broken.yaml is not valid YAML"),
        ("mine", "empty.yaml", "empty.yaml has no train.output_dir"),
        ("configs/sft/quickstart.yaml/mine", "configs/sft/quickstart.yaml", "cannot write"),
    ],
)
def test_it_says_what_is_wrong(name: str, like: str, said: str) -> None:
    Path("broken.yaml").write_text("train: {")
    Path("empty.yaml").write_text("")
    assert said in refusal(name, "--like", like)
    assert not Path("mine.yaml").exists()
