"""A new configuration from one that is there, as text, so that its comments stay."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from alphatoken.config.file import ConfigLoader, parse_yaml, read_text, sections_of
from alphatoken.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
PLAIN = re.compile(r"[\w./~-]+")
OUTPUT_DIR = ("train", "output_dir")
SHOWN_NAME = ("logging", "name")


def copy_config(target: Path, like: Path) -> str:
    """Writes the new file `target`: the configuration `like` with the run folder, and the name that
    trackers show where it has one, after the file's name. Returns the run folder.

    In comments the new file is named where the old one was. Raises UserError for a file that exists
    or cannot be read or written, a name that is no good for a folder, and a file without
    train.output_dir, or with one that cannot be changed alone.
    """
    name = target.stem
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a run folder; use letters, digits and . _ -, as in my-run"
        )
    text = read_text(like)
    values = sections_of(text, like)
    root = yaml.compose(text, ConfigLoader)
    folder = _scalar(root, OUTPUT_DIR)
    if folder is None:
        raise UserError(
            f"{like} has no train.output_dir, so it is no configuration of a run: choose one that "
            "has, and give a preset after it (--config FILE --config PRESET)"
        )
    new_folder = str(Path(folder.value).parent / name)
    values["train"]["output_dir"] = new_folder
    changes = [(folder, new_folder)]
    shown_name = _scalar(root, SHOWN_NAME)
    if shown_name is not None:
        values["logging"]["name"] = name
        changes.append((shown_name, name))
    for node, value in sorted(changes, key=lambda change: -change[0].start_mark.index):
        text = text[: node.start_mark.index] + _as_yaml(value) + text[node.end_mark.index :]
    if not _holds(text, values):
        raise UserError(
            f"cannot change train.output_dir or logging.name in {like}: write each as a text in "
            "its line, without &, * or >"
        )
    _write_new(target, _renamed_in_comments(text, str(like), str(target)))
    return new_folder


def _write_new(target: Path, text: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        if isinstance(error, FileExistsError) and target.exists():
            raise UserError(f"{target} exists, and is left as it is; choose another name") from None
        raise UserError(f"cannot write {target}: {error.strerror}") from None


def _as_yaml(text: str) -> str:
    """A text as YAML reads it as one: quoted where it would be a number, or more than one thing."""
    is_plain = PLAIN.fullmatch(text) and _holds(text, text)
    return text if is_plain else json.dumps(text, ensure_ascii=False)


def _holds(text: str, value: Any) -> bool:
    """Whether a text in YAML is this value."""
    try:
        return bool(parse_yaml(text) == value)
    except yaml.YAMLError:
        return False


def _scalar(node: yaml.Node | None, keys: Sequence[str]) -> yaml.ScalarNode | None:
    """The text at nested keys, where it stands; None where there is none."""
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for each, value in node.value if each.value == key), None)
    is_text = isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"
    return node if is_text and isinstance(node, yaml.ScalarNode) else None


def _renamed_in_comments(text: str, old: str, new: str) -> str:
    name = re.compile(rf"(?<![\w./-]){re.escape(old)}(?![\w-])")
    return "\n".join(
        name.sub(lambda _: new, line) if line.lstrip().startswith("#") else line
        for line in text.split("\n")
    )
