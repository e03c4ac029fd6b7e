"""`alphatoken new` copies a configuration with its comments, and changes what names the run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from alphatoken.cli import app
from alphatoken.config.file import sections_of
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


@pytest.mark.parametrize("name", ["2024", "1e5", "null", "true", "2024-01-02", "2024-13-45", "v1"])
@pytest.mark.parametrize("folder", ["old", "runs/old", "/", "'/a disk: #1, {big}/old'"])
def test_names_that_yaml_takes_for_something_else(name: str, folder: str) -> None:
    Path("old.yaml").write_text(f"train: {{output_dir: {folder}}}\nlogging: {{name: old}}\n")
    result = CliRunner().invoke(app, ["new", name, "--like", "old.yaml"])
    assert result.exit_code == 0, result.output
    file = Path(f"{name}.yaml")
    new = sections_of(file.read_text(), file)
    parent = Path(folder.strip("'")).parent
    assert new == {"train": {"output_dir": str(parent / name)}, "logging": {"name": name}}


def test_other_files_in_comments_and_a_folder_with_a_space() -> None:
    Path("old.yaml").write_text("# gold.yaml, not old.yaml\ntrain: {output_dir: runs/old}\n")
    result = CliRunner().invoke(app, ["new", "my runs/new", "--like", "old.yaml"])
    assert "alphatoken sft --config 'my runs/new.yaml'" in result.output
    assert "# gold.yaml, not my runs/new.yaml\n" in Path("my runs/new.yaml").read_text()


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
        ("a" * 300, "configs/sft/quickstart.yaml", "File name too long"),
        ("mine", "tagged.yaml", "tagged.yaml is not valid YAML"),
        ("mine", "keys.yaml", "keys.yaml is not valid YAML"),
        ("mine", "binary.yaml", "binary.yaml is not valid YAML"),
        ("mine", "folded.yaml", "cannot change train.output_dir"),
        ("mine", "anchored.yaml", "cannot change train.output_dir"),
    ],
)
def test_it_says_what_is_wrong(name: str, like: str, said: str) -> None:
    Path("broken.yaml").write_text("train: {")
    Path("empty.yaml").write_text("{}")
    Path("tagged.yaml").write_text("train: {output_dir: runs/old}\nx: !mine 1\n")
    Path("keys.yaml").write_text("train: {output_dir: runs/old}\nx: {{ name }}\n")
    Path("binary.yaml").write_bytes(b"\xff\xfe")
    Path("folded.yaml").write_text("train:\n  output_dir: >-\n    runs/old\n  seed: 1\n")
    Path("anchored.yaml").write_text("data: {train: &a runs/old}\ntrain: {output_dir: *a}\n")
    assert said in refusal(name, "--like", like)
    assert not Path("mine.yaml").exists()
