"""Imports point only downwards, and the mathematics knows nothing of ranks, engines or files."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent

# From the bottom up; a module may import those above it in this list, never those below.
LAYERS = (
    "errors",
    "files",
    "wording",
    "config",
    "config_preference",
    "config_file",
    "timing",
    "valuation",
    "squares",
    "attention",
    "selection",
    "losses",
    "preference",
    "architectures",
    "compatibility",
    "capture",
    "passes",
    "collectives",
    "zero3",
    "slices",
    "drift",
    "streamer",
    "sampling",
    "held_out",
    "tower",
    "fisher",
    "gradient",
    "scorer",
    "ghost",
    "exact",
    "estimators",
    "api",
    "model",
    "statistics",
    "step_selection",
    "data",
    "continuation",
    "checkpoint_files",
    "checkpoint",
    "export",
    "engine",
    "report",
    "preemption",
    "watchdog",
    "estimation",
    "reference",
    "training",
    "planner",
    "doctor",
    "cli",
    "__main__",
)
MATHEMATICS = ("valuation", "squares", "attention", "selection", "losses", "preference")
ALLOWED_IN_MATHEMATICS = {
    *(
        "torch",
        "numpy",
        "math",
        "collections",
        "dataclasses",
        "typing",
        "fractions",
        "__future__",
        "alphatoken",
    )
}


def imports_of(file: Path) -> set[str]:
    """Dotted names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def module_of(dotted: str) -> str | None:
    """The module of ours that a dotted import names, `data` for everything in that package."""
    parts = dotted.split(".")
    return parts[1] if parts[0] == "alphatoken" and len(parts) > 1 and parts[1] in LAYERS else None


def library_files() -> dict[Path, str]:
    """Every file of the library and the module it belongs to."""
    folder = ROOT / "alphatoken"
    return {
        file: file.relative_to(folder).parts[0].removesuffix(".py")
        for file in folder.rglob("*.py")
        if file != folder / "__init__.py"
    }


def test_every_module_has_a_place() -> None:
    assert set(library_files().values()) == set(LAYERS)


def test_imports_point_downwards() -> None:
    for file, module in library_files().items():
        for dotted in imports_of(file):
            imported = module_of(dotted)
            if imported is not None and imported != module:
                above = LAYERS.index(imported) < LAYERS.index(module)
                assert above, f"{file.name} imports {imported}, which is not below it"


def test_mathematics_imports_only_torch() -> None:
    for file, module in library_files().items():
        if module in MATHEMATICS:
            roots = {dotted.split(".")[0] for dotted in imports_of(file)}
            assert roots <= ALLOWED_IN_MATHEMATICS, (
                f"{file.name} imports {roots - ALLOWED_IN_MATHEMATICS}"
            )


def test_only_zero3_and_the_engine_know_deepspeed() -> None:
    for file, module in library_files().items():
        if any(dotted.split(".")[0] == "deepspeed" for dotted in imports_of(file)):
            assert module in ("zero3", "engine"), f"{file.name} imports deepspeed"
