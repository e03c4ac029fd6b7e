"""The schema for editors says of a configuration file what reading it says, key by key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

from alphatoken.cli import app
from alphatoken.config.file import load_config
from alphatoken.config.preference import PreferenceRunConfig
from alphatoken.config.run import RunConfig
from alphatoken.config.schema import config_schema
from alphatoken.errors import UserError
from tests.ranks import ROOT

SHIPPED = sorted((ROOT / "configs").rglob("*.yaml"))
SCHEMA = config_schema()
WHOLE = {
    "model": {"name_or_path": "m"},
    "data": {"train": "t.jsonl", "validation": "v.jsonl"},
    "train": {"output_dir": "runs/r"},
}


def mistakes(values: Any) -> list[str]:
    """What the schema says against values."""
    validator = jsonschema.Draft202012Validator(SCHEMA)
    return [error.message for error in validator.iter_errors(values)]


def is_read(values: Any, folder: Path) -> bool:
    """Whether a run accepts values as its configuration."""
    file = folder / "config.yaml"
    file.write_text(json.dumps(values), encoding="utf-8")
    try:
        load_config(RunConfig, file, with_section={"preference": PreferenceRunConfig})
    except UserError:
        return False
    return True


def test_it_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_shipped_configurations_are_valid(file: Path) -> None:
    """Presets too, which lack what the file before them gives."""
    assert mistakes(yaml.safe_load(file.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("section", "key", "value", "valid"),
    [
        ("data", "train", {"path": "t.jsonl", "weight": 2}, True),
        ("data", "train", ["t.jsonl", {"path": "u.jsonl", "format": "alpaca"}], True),
        ("data", "train", [{"weight": 2}], False),
        ("data", "train", [], False),
        ("data", "eval", [], False),
        ("data", "train", [{"path": "u.jsonl", "format": "alpacca"}], False),
        ("data", "trian", "t.jsonl", False),
        ("data", "max_length", "512", False),
        ("data", "max_length", 4, False),
        ("data", "packing", 1, False),
        ("model", "dtype", "float16", False),
        ("model", "lora", {"r": 4}, True),
        ("model", "lora", None, True),
        ("valuation", "layers", "all", True),
        ("valuation", "layers", 3, True),
        ("valuation", "estimator", "exact", True),
        ("valuation", "estimator", "exakt", False),
        ("valuation", "balance", "std", True),
        ("selection", "keep_ratio", 0.25, True),
        ("selection", "keep_ratio", 0, False),
        ("selection", "veto", {"by": "loss", "threshold": -1.0}, True),
        ("selection", "veto", {"buy": "loss", "threshold": -1.0}, False),
        ("optim", "lr", 1, True),
        ("optim", "lr", True, False),
        ("train", "max_steps", None, True),
        ("train", "resume_allow", ["optim.lr"], True),
        ("deepspeed", "config", {"zero_optimization": {"stage": 2}}, True),
        ("preference", "objective", "dpo", True),
        ("preference", "objective", "dpo2", False),
    ],
)
def test_one_key(section: str, key: str, value: Any, valid: bool, tmp_path: Path) -> None:
    values: dict[str, dict[str, Any]] = json.loads(json.dumps(WHOLE))
    values.setdefault(section, {})[key] = value
    assert (mistakes(values) == []) is valid
    assert is_read(values, tmp_path) is valid


@pytest.mark.parametrize(("value", "valid"), [("online", True), ("offline", False)])
def test_a_word_for_a_section(value: str, valid: bool, tmp_path: Path) -> None:
    values = {**WHOLE, "reference": value}
    assert (mistakes(values) == []) is valid
    assert is_read(values, tmp_path) is valid


def test_keys_of_pairs_need_their_section() -> None:
    selection = {"chosen": {"keep_ratio": 0.5}}
    assert mistakes({"preference": {}, "selection": selection}) == []
    assert mistakes({"selection": selection}) != []


def test_every_key_says_what_it_is_for() -> None:
    for name, section in SCHEMA["$defs"].items():
        if name not in ("RunConfig", "PreferenceRunConfig"):
            for key, schema in section.get("properties", {}).items():
                assert schema.get("description"), f"{name}.{key}"


def test_the_command_prints_it_or_writes_a_file(tmp_path: Path) -> None:
    printed = CliRunner().invoke(app, ["schema"])
    assert json.loads(printed.stdout) == SCHEMA
    file = tmp_path / "schema.json"
    told = CliRunner().invoke(app, ["schema", "--output", str(file)])
    assert json.loads(file.read_text(encoding="utf-8")) == SCHEMA
    assert f"# yaml-language-server: $schema={file}" in told.stdout
    refused = CliRunner().invoke(app, ["schema", "--output", str(tmp_path / "no" / "schema.json")])
    assert isinstance(refused.exception, UserError)
