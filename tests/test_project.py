"""What surrounds the code agrees with it: packaging, citation, hooks, templates."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from alphatoken.cli import RECIPES
from alphatoken.data.templates import shipped_names

ROOT = Path(__file__).parent.parent


def project() -> dict[str, Any]:
    """The `project` table of pyproject.toml."""
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def from_yaml(name: str) -> Any:
    """The content of a YAML file of the repository."""
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_wheels_carry_what_is_no_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """PEP 561: without `py.typed` in the wheel, type checkers ignore our annotations. Chat
    templates, and the report's, are looked for in the package."""
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(
        ROOT / "alphatoken",
        tmp_path / "alphatoken",
        symlinks=True,
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    for folder in ("configs", "recipes", "launch"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    monkeypatch.chdir(tmp_path)
    build = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], check=True, capture_output=True)
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "alphatoken/py.typed" in names
    templates = {Path(name).name for name in names if name.startswith("alphatoken/chat_templates/")}
    assert templates == {f"{name}.jinja" for name in shipped_names()}
    assert {"alphatoken/report/page.html.jinja", "alphatoken/report/style.css"} <= {*names}
    assert not [name for name in names if name.startswith("tests/")]
    shipped = {name.removeprefix("alphatoken/shipped/") for name in names if "/shipped/" in name}
    assert {f"recipes/{file}" for file, _ in RECIPES.values()} <= shipped
    for kind, pattern in (("configs", "*/*.json"), ("configs", "*/*.yaml"), ("launch", "*")):
        own = {str(file.relative_to(ROOT)) for file in (ROOT / kind).glob(pattern)}
        assert own <= shipped


def test_the_citation_names_this_software_and_the_paper() -> None:
    citation = from_yaml("CITATION.cff")
    assert citation["type"] == "software"
    assert citation["version"] == project()["version"]
    assert citation["license"] == project()["license"]
    paper = citation["preferred-citation"]
    assert [author["family-names"] for author in paper["authors"]] == ["Qing", "Wu", "Du"]
    assert paper["url"] == "https://arxiv.org/abs/2606.01635"
    assert paper["title"] in " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_commits_are_checked_without_a_network() -> None:
    (repository,) = from_yaml(".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local"
    assert all(hook["language"] == "system" for hook in repository["hooks"])
    commands = {" ".join(hook["entry"].split()[:2]) for hook in repository["hooks"]}
    assert commands == {"ruff format", "ruff check", "mypy"}


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_templates_can_be_shown(name: str) -> None:
    """GitHub drops a form without saying so if a key is missing or an id occurs twice."""
    form = from_yaml(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert form["name"]
    assert form["description"]
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids))
    assert all(field["attributes"]["label"] for field in form["body"])
    for field in form["body"]:
        if field["type"] == "dropdown":
            assert len(set(field["attributes"]["options"])) == len(field["attributes"]["options"])


def test_the_changelog_has_the_form_it_names() -> None:
    """Keep a Changelog: unreleased changes first, grouped under its six headings."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    groups = set(re.findall(r"^### (.*)$", text, re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
