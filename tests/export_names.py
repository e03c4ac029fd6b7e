"""The table of tensors in exports, docs/exports.md, from the files that tiny models are published
as. Rewrite it with `make exports`."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path

from safetensors import safe_open

from tests.tiny import CASES, save_published

HEAD = """\
# Tensors in exports

What the safetensors files of an export hold, of a run's own and of `alphatoken export`, at every
ZeRO stage: the tensors of the files that the model was read from, by name and shape. Here for the
tiny model of each class in `tests/tiny.py`, of 4 layers, and 3 experts where there are any; {n}
stands for the number of each. `python -m pytest tests/test_export_names.py` runs them all at stages
2 and 3 and compares. Written by `make exports`.
"""


def tensors_of(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors in the files of a folder, by name."""
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    return found


def section(name: str, title: str, tensors: dict[str, tuple[int, ...]]) -> str:
    """One architecture's part of the table; names that differ by number share a line."""
    shapes: dict[tuple[str, tuple[int, ...]], int] = {}
    for tensor, shape in sorted(tensors.items()):
        key = re.sub(r"\.\d+\.", ".{n}.", tensor), shape
        shapes[key] = shapes.get(key, 0) + 1
    lines = [
        f"| `{tensor}` | {' x '.join(map(str, shape))} | {count} |"
        for (tensor, shape), count in shapes.items()
    ]
    table = "\n".join(["| tensor | shape | how many |", "|---|---|---|", *lines])
    return f"\n## {title} ({name})\n\n{table}\n"


def document() -> str:
    """All of docs/exports.md."""
    parts = [HEAD]
    with tempfile.TemporaryDirectory() as scratch:
        for name in CASES:
            folder = Path(scratch) / name
            model = save_published(name, folder)
            parts.append(section(name, type(model).__name__, tensors_of(folder)))
    return "".join(parts)


if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("docs", "exports.md").write_text(
        document(), encoding="utf-8"
    )
