"""Docstrings are there where a reader needs them, and can be read without the code around them."""

from __future__ import annotations

import ast
import importlib
import inspect
import operator
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

LIBRARY = Path(__file__).parent.parent / "alphatoken"
SHORT = 8  # lines of a body that may speak for themselves
# Beginnings that need the name, or the docstring before, to be understood: hover and help()
# show neither.
FRAGMENTS = ("The same", "Of ", "As ", "What of ", "Like ", "See ", "Ditto")

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def definitions(body: list[ast.stmt], prefix: str = "") -> Iterator[tuple[str, Definition]]:
    """All classes, functions and methods below `body` by dotted name; functions inside functions
    are not among them."""
    for node in body:
        if isinstance(node, Definition):
            yield prefix + node.name, node
        if isinstance(node, ast.ClassDef):
            yield from definitions(node.body, f"{prefix}{node.name}.")


def is_public(name: str) -> bool:
    """Whether no part of a dotted name starts with an underscore (so `__init__` is not public: its
    class has the docstring)."""
    return not any(part.startswith("_") for part in name.split("."))


def lines_of(node: Definition) -> int:
    """Lines of a definition's body."""
    assert node.end_lineno is not None
    return node.end_lineno - node.body[0].lineno + 1


def complaints(source: str, module: ModuleType | None = None) -> list[str]:
    """What is wrong with the docstrings of a module's source.

    With the `module` itself, methods that take their docstring from a base class have one, as they
    do for `help()`.
    """
    tree = ast.parse(source)
    found = [] if ast.get_docstring(tree) or not tree.body else ["the module has no docstring"]
    for name, node in definitions(tree.body):
        docstring = ast.get_docstring(node)
        if docstring is None:
            if is_public(name) and lines_of(node) > SHORT and not inherits(name, module):
                found.append(f"line {node.lineno}: {name} has no docstring")
        elif docstring.startswith(FRAGMENTS):
            start = docstring.splitlines()[0]
            found.append(f"line {node.lineno}: {name} does not stand alone: {start!r}")
    return found


def inherits(name: str, module: ModuleType | None) -> bool:
    """Whether a method has the docstring of the method it overrides."""
    if module is None or "." not in name:
        return False
    return bool(inspect.getdoc(operator.attrgetter(name)(module)))


@pytest.mark.parametrize(
    "file", sorted(LIBRARY.rglob("*.py")), ids=lambda file: str(file.relative_to(LIBRARY))
)
def test_docstrings_stand_alone(file: Path) -> None:
    dotted = ".".join(file.relative_to(LIBRARY.parent).with_suffix("").parts)
    module = None if file.stem == "__main__" else importlib.import_module(dotted)
    assert not complaints(file.read_text(encoding="utf-8"), module)


LONG = "\n".join(f"    x = {line}" for line in range(SHORT + 1))


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        ("x = 1", 1),
        (f'"""A module."""\ndef f():\n{LONG}', 1),
        (f'"""A module."""\ndef _f():\n{LONG}', 0),
        (f'"""A module."""\ndef f():\n    """Adds."""\n{LONG}', 0),
        ('"""A module."""\ndef f():\n    """The same for text."""', 1),
        ('"""A module."""\nclass C:\n    def f(self):\n        """As `g`."""', 1),
        ('"""A module."""\ndef f():\n    return 1', 0),
        ('"""A module."""\ndef f():\n    """Assigns."""', 0),
    ],
)
def test_what_is_complained_about(source: str, wrong: int) -> None:
    assert len(complaints(source)) == wrong
