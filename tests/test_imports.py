"""Packages import only those before them in one order, and the mathematics knows nothing of
ranks, engines or files."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# In order: a package may import those earlier in this list, never those later.
PACKAGES = (
    "errors",
    "util",
    "config",
    "batch",
    "data",
    "distributed",
    "models",
    "passes",
    "objectives",
    "selection",
    "stability",
    "values",
    "store",
    "reference",
    "evaluation",
    "checkpoints",
    "report",
    "training",
    "planner",
    "doctor",
    "cli",
    "__main__",
)
MATHEMATICS = (
    "batch",
    "models/head",
    "objectives/pair_losses",
    "objectives/supervised",
    "passes/attention",
    "selection/policy",
    "selection/rules",
    "selection/select",
    "selection/weights",
    "stability/squares",
    "values/algebra",
    "values/balance",
    "values/ghost/contract",
    "values/ghost/signals",
)
ALLOWED_IN_MATHEMATICS = {
    *(
        "torch",
        "numpy",
        "math",
        "collections",
        "dataclasses",
        "functools",
        "typing",
        "fractions",
        "__future__",
        "alphatoken",
    )
}
# A program, and the test double that shows where a token's value is, may look at anything of
# their own only.
PYTHON_FOLDERS = ("alphatoken", "recipes", "benchmarks", "tests")


def imports_of(file: Path) -> set[str]:
    """Dotted names of everything a file imports."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def package_of(dotted: str) -> str | None:
    """The package of ours that a dotted import names; None for everything else."""
    parts = dotted.split(".")
    return (
        parts[1] if parts[0] == "alphatoken" and len(parts) > 1 and parts[1] in PACKAGES else None
    )


def library_files() -> dict[Path, str]:
    """Every file of the library and the package it belongs to."""
    folder = ROOT / "alphatoken"
    return {
        file: file.relative_to(folder).parts[0].removesuffix(".py")
        for file in folder.rglob("*.py")
        if file != folder / "__init__.py"
    }


def python_files() -> list[Path]:
    """Every Python file of the project."""
    return [file for folder in PYTHON_FOLDERS for file in (ROOT / folder).rglob("*.py")]


def test_every_package_has_a_place() -> None:
    assert set(library_files().values()) == set(PACKAGES)


def test_packages_import_only_those_above_them() -> None:
    for file, package in library_files().items():
        for dotted in imports_of(file):
            imported = package_of(dotted)
            if imported is not None and imported != package:
                above = PACKAGES.index(imported) < PACKAGES.index(package)
                assert above, f"{file.relative_to(ROOT)} imports {dotted}, which is not above it"


def test_every_package_states_its_charter() -> None:
    for package in (ROOT / "alphatoken").rglob("__init__.py"):
        charter = ast.get_docstring(ast.parse(package.read_text(encoding="utf-8")))
        assert charter, f"{package} has no charter"
        assert charter.split("\n\n")[0].endswith("."), (
            f"{package}: its first paragraph is no sentence"
        )


def test_mathematics_imports_only_torch() -> None:
    for name in MATHEMATICS:
        file = ROOT / "alphatoken" / f"{name}.py"
        roots = {dotted.split(".")[0] for dotted in imports_of(file)}
        assert roots <= ALLOWED_IN_MATHEMATICS, f"{name} imports {roots - ALLOWED_IN_MATHEMATICS}"
        packages = {package_of(dotted) for dotted in imports_of(file)}
        assert not packages & {"distributed", "checkpoints", "data"}, f"{name} knows ranks or files"


def test_only_the_distributed_package_knows_deepspeed() -> None:
    for file, package in library_files().items():
        if any(dotted.split(".")[0] == "deepspeed" for dotted in imports_of(file)):
            assert package == "distributed", f"{file.relative_to(ROOT)} imports deepspeed"


@pytest.mark.parametrize("file", python_files(), ids=lambda file: str(file.relative_to(ROOT)))
def test_private_names_stay_in_their_module(file: Path) -> None:
    """Nobody imports a private name of ours, or reaches into an attribute of another object's that
    starts with `_`.

    Attributes that this file defines itself (methods, fields, assignments) are its own, whoever's
    instance they are read from; attributes of foreign libraries that have no public name are
    listed.
    """
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            own.add(node.attr)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            own.add(node.target.id)
        elif (
            isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in PYTHON_FOLDERS
        ):
            for alias in node.names:
                assert not is_private(alias.name), (
                    f"line {node.lineno} imports {alias.name} of {node.module}"
                )
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Attribute)
            and is_private(node.attr)
            and node.attr not in own | FOREIGN
        ):
            raise AssertionError(f"line {node.lineno} reads {ast.unparse(node)}")


FOREIGN = {
    "_C",  # torch: what is written in C++
    "_distributed_c10d",  # torch: its flight recorder
    "_attn_implementation",  # transformers: the attention a configuration was loaded with
    "_cdata",  # torch: whether two tensors share a storage
    "_forward_pre_hooks",  # torch
    "_fused_sdp_choice",  # torch: the kernel that SDPA would run
    "_model_mapping",  # transformers: the class that a configuration is loaded with
    "_keys_to_ignore_on_save",  # transformers: what save_pretrained leaves out
    "_zero3_consolidated_16bit_state_dict",  # DeepSpeed: whole weights on rank 0
    "_weight_conversions",  # transformers: how a model's weights were loaded
    "_buffers",  # torch: a module's buffers, replaced in place
    "_commit_hash",  # transformers: the commit that a hub name stood for
    "_current_frames",  # sys: where every thread is
    "_exit",  # os: ending without the interpreter's shutdown
    "_get_default_store",  # torch: what the ranks of a process group met in
    "_fingerprint",  # datasets: a hash of the content
    "_forward_hooks",  # torch: hooks left behind
    "_gradient_checkpointing_func",  # transformers: what a layer is checkpointed by
    "_lazy_init_hp_params_optimizer_state",  # DeepSpeed: fp32 moments of a bf16 optimizer
    "_overloadpacket",  # torch: an operator whatever its overload
    "_run_exitfuncs",  # atexit
    # torch: operators that have no public name
    "_grouped_mm",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_backward",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention_for_cpu_backward",
    "_supports_flash_attn",  # transformers
    "_supports_sdpa",  # transformers
}


def is_private(name: str) -> bool:
    """Whether a name is for its own module only."""
    return name.startswith("_") and not name.startswith("__")
