"""The chat templates that ship with the package: `configs/chat_templates` of the repository."""

from __future__ import annotations

from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import PurePath

TRAINING = "training"
"""Folder of the templates that take the place of a model's own while it is trained: they ask for an
answer as that does, and keep reasoning that it leaves out."""


def shipped_names() -> list[str]:
    """All of them, as `model.chat_template` takes them."""
    return sorted(_files())


def training_names() -> list[str]:
    """Those that may take the place of a model's own."""
    return sorted(_in(_folder() / TRAINING))


def shipped_template(name: str) -> str:
    """The template of one of `shipped_names`."""
    return _files()[name].read_text(encoding="utf-8")


def _files() -> dict[str, Traversable]:
    return _in(_folder()) | _in(_folder() / TRAINING)


def _in(folder: Traversable) -> dict[str, Traversable]:
    files = (file for file in folder.iterdir() if file.name.endswith(".jinja"))
    return {PurePath(file.name).stem: file for file in files}


def _folder() -> Traversable:
    return resources.files("alphatoken") / "chat_templates"
