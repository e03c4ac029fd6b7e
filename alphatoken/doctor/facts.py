"""What a rank knows of itself: versions, code, configuration, accelerator and model files."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import alphatoken
from alphatoken.doctor.rendezvous import Arrival
from alphatoken.util.files import file_sha256

PACKAGE = "alphatoken"


@dataclass(frozen=True)
class Facts:
    """What one rank knows of itself."""

    node: str
    accelerator: str
    devices: int
    """How many devices the rank sees."""
    memory: int
    """Bytes of its device, or of the node for a CPU."""
    versions: Mapping[str, str | None]
    """By package; None for one that is missing."""
    code: Mapping[str, str]
    """SHA-256 by file of this package."""
    config: Mapping[str, Any]
    """Values by dotted key; empty where the configuration could not be read."""


def this_node() -> str:
    return socket.gethostname()


def gather_facts(arrival: Arrival, memory: int, config: Mapping[str, Any]) -> Facts:
    """Facts of this rank; `memory`: bytes, `config`: values by dotted key."""
    return Facts(
        node=arrival.node,
        accelerator=arrival.accelerator,
        devices=arrival.devices,
        memory=memory,
        versions=installed_versions(),
        code=code_hashes(),
        config=config,
    )


def installed_versions() -> dict[str, str | None]:
    """Versions of Python and of all packages our metadata requires; None for what is missing."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        PACKAGE: alphatoken.__version__,
    }
    return versions | {name: _version(name) for name in requirements() if name != "python"}


def requirements() -> dict[str, SpecifierSet]:
    """Ranges of versions in our installed metadata, extras left out; empty where we are not
    installed."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return {}
    all_requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    ranges = {
        requirement.name: requirement.specifier
        for requirement in all_requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    }
    return {"python": SpecifierSet(metadata["Requires-Python"] or ""), **ranges}


def code_hashes() -> dict[str, str]:
    """SHA-256 of each file of this package."""
    folder = Path(alphatoken.__file__).parent
    return {
        str(file.relative_to(folder)): file_sha256(file) for file in sorted(folder.rglob("*.py"))
    }


def model_listing(name_or_path: str) -> dict[str, Any]:
    """Sizes in bytes of a model folder's weights and SHA-256 of its small files, by name.

    Empty for a hub name. Raises OSError for what cannot be read.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        return {}
    listing: dict[str, Any] = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if file.suffix in (".json", ".jinja", ".model"):
            listing[file.name] = file_sha256(file)
        elif file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as content:
                content.read(8)  # whether it can be read; hashing weights would take minutes
            listing[file.name] = file.stat().st_size
    return listing


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
