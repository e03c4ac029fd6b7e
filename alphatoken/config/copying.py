"""A new configuration from one that is there, as text, so that its comments stay."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from alphatoken.errors import UserError
from alphatoken.util.shipped import or_shipped

NAME = re.compile(r"[A-Za-z0-9][\w.-]*")
OUTPUT_DIR = ("train", "output_dir")
SHOWN_NAME = ("logging", "name")


def copy_config(target: Path, like: Path) -> str:
    """Writes the new file `target`: the configuration `like` with the run folder, and the name that
    trackers show where it has one, after the file's name. Returns the run folder.

    In comments the new file is named where the old one was. Raises UserError for a file that exists
    or cannot be read or written, a name that is no good for a folder, and a file without
    train.output_dir.
    """
    name = target.stem
    if not NAME.fullmatch(name):
        raise UserError(
            f"{name!r} cannot name a run folder; use letters, digits and . _ -, as in my-run"
        )
    if target.exists():
        raise UserError(f"{target} exists, and is left as it is; choose another name")
    try:
        text = or_shipped(like).read_text(encoding="utf-8")
        root = yaml.compose(text, yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"cannot read the configuration {like}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{like} is not valid YAML: {error}") from None
    folder = _scalar(root, OUTPUT_DIR)
    if folder is None:
        raise UserError(
            f"{like} has no train.output_dir, so it is no configuration of a run: choose one that "
            "has, and give a preset after it (--config FILE --config PRESET)"
        )
    new_folder = str(Path(folder.value).with_name(name))
    shown_name = _scalar(root, SHOWN_NAME)
    changes = [(folder, new_folder), *([] if shown_name is None else [(shown_name, name)])]
    for node, value in sorted(changes, key=lambda change: -change[0].start_mark.index):
        text = text[: node.start_mark.index] + value + text[node.end_mark.index :]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_renamed_in_comments(text, str(like), str(target)), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror}") from None
    return new_folder


def _scalar(node: yaml.Node | None, keys: Sequence[str]) -> yaml.ScalarNode | None:
    """The text at nested keys, where it stands; None where there is none."""
    for key in keys:
        if not isinstance(node, yaml.MappingNode):
            return None
        node = next((value for each, value in node.value if each.value == key), None)
    is_text = isinstance(node, yaml.ScalarNode) and node.tag == "tag:yaml.org,2002:str"
    return node if is_text and isinstance(node, yaml.ScalarNode) else None


def _renamed_in_comments(text: str, old: str, new: str) -> str:
    lines = text.split("\n")
    return "\n".join(
        line.replace(old, new) if line.lstrip().startswith("#") else line for line in lines
    )
