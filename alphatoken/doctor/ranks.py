"""Whether all ranks are alike: versions, code, configuration, model files, accelerators; and how
fast they talk."""

from __future__ import annotations

import importlib.metadata
import platform
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import alphatoken
from alphatoken.distributed import collectives
from alphatoken.doctor.findings import Finding, disagreement, named
from alphatoken.doctor.rendezvous import Arrival
from alphatoken.util.files import file_sha256, fingerprint
from alphatoken.util.wording import plural, size

PACKAGE = "alphatoken"
SHOWN = 5  # differences that are listed
COMPARED = ("python", "torch", "deepspeed", "transformers", PACKAGE)


@dataclass(frozen=True)
class Facts:
    """What one rank knows of itself."""

    node: str
    accelerator: str
    devices: int
    memory: int
    versions: Mapping[str, str | None]
    code: Mapping[str, str]
    config: Mapping[str, Any]


def this_node() -> str:
    return socket.gethostname()


def facts(arrival: Arrival, memory: int, config: Mapping[str, Any]) -> Facts:
    """This rank's own; `config`: by dotted key."""
    return Facts(
        arrival.node,
        arrival.accelerator,
        arrival.devices,
        memory,
        installed_versions(),
        code_hashes(),
        config,
    )


def installed_versions() -> dict[str, str | None]:
    """Of Python and of everything our installed metadata requires; None for what is missing."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        PACKAGE: alphatoken.__version__,
    }
    return versions | {name: _version(name) for name in requirements() if name != "python"}


def requirements() -> dict[str, SpecifierSet]:
    """The ranges of versions in our installed metadata, extras left out; empty where we are not
    installed."""
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        return {}
    wanted = [Requirement(line) for line in metadata.get_all("Requires-Dist") or []]
    ranges = {
        each.name: each.specifier
        for each in wanted
        if each.marker is None or each.marker.evaluate({"extra": ""})
    }
    return {"python": SpecifierSet(metadata["Requires-Python"] or ""), **ranges}


def code_hashes() -> dict[str, str]:
    """SHA-256 of each file of this package."""
    folder = Path(alphatoken.__file__).parent
    return {
        str(file.relative_to(folder)): file_sha256(file) for file in sorted(folder.rglob("*.py"))
    }


def compare_versions(ranks: Sequence[Facts], wanted: Mapping[str, SpecifierSet]) -> Finding:
    """Equal on all ranks, and within the ranges."""
    nodes = [facts.node for facts in ranks]
    problems: dict[str, list[int]] = {}
    for name in COMPARED:
        _compare(name, [facts.versions.get(name) for facts in ranks], problems)
    for rank, facts in enumerate(ranks):
        for name, allowed in wanted.items():
            version = facts.versions.get(name)
            if version is None:
                problems.setdefault(f"{name} is not installed", []).append(rank)
            elif not allowed.contains(version, prereleases=True):
                problems.setdefault(f"{name} {version} is outside {allowed}", []).append(rank)
    if problems:
        return disagreement(
            "versions", problems, nodes, "install the same environment on every node"
        )
    listed = ", ".join(f"{name} {ranks[0].versions.get(name)}" for name in COMPARED)
    if not wanted:
        return Finding(
            "versions",
            "warning",
            f"{listed}; {PACKAGE} is not installed, so ranges are unknown",
            "pip install .",
        )
    return Finding("versions", "ok", f"{listed}; within the ranges that {PACKAGE} requires")


def compare_code(ranks: Sequence[Facts]) -> Finding:
    """The same files of this package on every rank."""
    return _compare_parts(
        "code", "file", [facts.code for facts in ranks], ranks, "update the copies that differ"
    )


def compare_configs(ranks: Sequence[Facts]) -> Finding:
    """The same resolved configuration on every rank, told by hash and, where it differs, by key."""
    fix = "give every rank the same file, overrides and environment"
    return _compare_parts("configuration", "key", [facts.config for facts in ranks], ranks, fix)


def compare_model_files(listings: Sequence[Mapping[str, Any]], nodes: Sequence[str]) -> Finding:
    """The same model folder for every rank."""
    problems = _differences(listings, "")
    if problems:
        return disagreement(
            "model files", problems, nodes, "copy the same model folder to every node"
        )
    total = sum(each for each in listings[0].values() if isinstance(each, int))
    if not listings[0]:
        return Finding(
            "model files", "ok", "no folder but a hub name, read from each node's own cache"
        )
    return Finding(
        "model files",
        "ok",
        (
            f"{plural(len(listings[0]), 'file')} readable and alike on every rank, {size(total)} "
            "of weights"
        ),
    )


def compare_data(
    identities: Sequence[Mapping[str, Any]], nodes: Sequence[str], reports: Sequence[str]
) -> Finding:
    """The same rows for every rank, tokenised alike."""
    different: dict[str, list[int]] = {}
    for rank, keys, _ in _unusual(identities):
        different.setdefault(
            f"{', '.join(keys)}: other rows, or tokenised otherwise, than elsewhere", []
        ).append(rank)
    if different:
        return disagreement("data", different, nodes, "copy the same files to every node")
    return Finding("data", "ok", "\n".join(reports))


def model_listing(name_or_path: str) -> dict[str, Any]:
    """Sizes of a model folder's weights and hashes of its small files; raises OSError for what
    cannot be read."""
    folder = Path(name_or_path).expanduser()
    if not folder.is_dir():
        return {}
    listing: dict[str, Any] = {}
    for file in sorted(path for path in folder.iterdir() if path.is_file()):
        if file.suffix in (".json", ".jinja", ".model"):
            listing[file.name] = file_sha256(file)
        elif file.suffix in (".safetensors", ".bin"):
            with file.open("rb") as content:
                content.read(8)
            listing[file.name] = file.stat().st_size
    return listing


def compare_accelerators(ranks: Sequence[Facts]) -> Finding:
    """As many ranks on every node as it has devices, all of one kind."""
    nodes = [facts.node for facts in ranks]
    counts, first = Counter(nodes), ranks[0]
    problems: dict[str, list[int]] = {}
    _compare("accelerator", [facts.accelerator for facts in ranks], problems)
    if problems:
        return disagreement(
            "accelerator", problems, nodes, "use the same kind of machine for every rank"
        )
    if first.accelerator == "cpu":
        found = f"CPU, {size(first.memory)} of memory a node, {_ranks_per_node(counts)}"
        return Finding("accelerator", "ok", found)
    found = f"{first.accelerator}, {size(first.memory)} each, {_ranks_per_node(counts)}"
    unused = sorted({facts.node for facts in ranks if counts[facts.node] < facts.devices})
    # A rank that is shown one device of several cannot tell how many there are.
    if unused and any(facts.devices > 1 for facts in ranks):
        return Finding(
            "accelerator",
            "warning",
            f"{found}; devices are idle on {', '.join(unused)}",
            "start a rank for each",
            tuple(unused),
        )
    uneven = {facts.node for facts in ranks if facts.memory != first.memory}
    if uneven:
        return Finding(
            "accelerator",
            "warning",
            f"{found}; another amount of memory on {', '.join(sorted(uneven))}",
            "",
            tuple(sorted(uneven)),
        )
    return Finding("accelerator", "ok", found)


def check_dtype(dtype: str, device: torch.device) -> float:
    """Multiplies two matrices in a run's dtype; returns how many times longer it takes than in
    float32.

    Raises ArithmeticError where the product is wrong, and whatever torch does where there is no
    such product.
    """
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(256, 256, generator=generator).to(device) for _ in range(2))
    seconds = {}
    for each in (torch.float32, getattr(torch, dtype)):
        a, b = left.to(each), right.to(each)
        product = (a @ b).float()
        error = float((product - left @ right).abs().max() / product.abs().max())
        if not error < 0.05:
            raise ArithmeticError(f"a product of matrices in {dtype} is off by {error:.1%}")
        began = time.perf_counter()
        for _ in range(3):
            product = a @ b
        product.sum().item()  # waits for the device
        seconds[each] = time.perf_counter() - began
    return seconds[getattr(torch, dtype)] / seconds[torch.float32]


def judge_dtype(dtype: str, slower: Sequence[float], nodes: Sequence[str]) -> Finding:
    """From every rank's `check_dtype`."""
    worst = max(slower)
    if worst > 4:
        ranks = [rank for rank, each in enumerate(slower) if each > 4]
        found = (
            f"{named(ranks, nodes)}: products in {dtype} work, but take {worst:.0f} times as "
            "long as in float32"
        )
        concerned = tuple(sorted({nodes[rank] for rank in ranks}))
        return Finding(
            "dtype", "warning", found, "set model.dtype=float32 on such machines", concerned
        )
    return Finding("dtype", "ok", f"products of matrices in {dtype} are right")


ROUNDS = 5


def measure_all_reduce(device: torch.device) -> tuple[int, float, float]:
    """Bytes of an all-reduce of ones, the seconds it takes (the mean of some after one to warm up)
    and the sum it gave.

    Every rank must call it.
    """
    tensor = torch.ones(2**22 if device.type == "cpu" else 2**24, device=device)
    total = float(collectives.sum_over_ranks(tensor)[-1])
    tensor.zero_()  # sums of sums would overflow
    collectives.barrier()
    began = time.perf_counter()
    for _ in range(ROUNDS):
        collectives.sum_over_ranks(tensor)
    tensor[-1].item()  # waits for the device
    return tensor.numel() * tensor.element_size(), (time.perf_counter() - began) / ROUNDS, total


def judge_all_reduce(measured: Sequence[tuple[int, float, float]], nodes: Sequence[str]) -> Finding:
    """From every rank's `measure_all_reduce`; the slowest rank counts."""
    ranks = len(measured)
    wrong: dict[str, list[int]] = {}
    for rank, (_, _, total) in enumerate(measured):
        if total != ranks:
            wrong.setdefault(f"ones of {ranks} ranks add up to {total:g}", []).append(rank)
    if wrong:
        return disagreement(
            "all-reduce",
            wrong,
            nodes,
            "the network or its library returns wrong sums; do not train",
        )
    if ranks == 1:
        return Finding("all-reduce", "ok", "a single rank has nobody to talk to")
    moved, seconds = measured[0][0], max(each for _, each, _ in measured)
    # What a ring sends over each link; comparable between numbers of ranks.
    rate = 2 * (ranks - 1) / ranks * moved / seconds
    found = (
        f"{size(moved)} in {1000 * seconds:.3g} ms, mean of {ROUNDS}: bus bandwidth {size(rate)}/s"
    )
    return Finding("all-reduce", "ok", found)


def _ranks_per_node(counts: Counter[str]) -> str:
    each = set(counts.values())
    if len(each) == 1:
        return (
            f"{plural(each.pop(), 'rank')} on "
            f"{'each of ' if len(counts) > 1 else ''}{plural(len(counts), 'node')}"
        )
    return ", ".join(f"{plural(count, 'rank')} on {node}" for node, count in counts.items())


def _compare(name: str, values: Sequence[Any], problems: dict[str, list[int]]) -> None:
    """Adds a message for each value that is not the most frequent one."""
    usual = Counter(values).most_common(1)[0][0]
    for rank, value in enumerate(values):
        if value != usual:
            problems.setdefault(f"{name} {value}, elsewhere {usual}", []).append(rank)


def _compare_parts(
    check: str, unit: str, parts: Sequence[Mapping[str, Any]], ranks: Sequence[Facts], fix: str
) -> Finding:
    nodes = [facts.node for facts in ranks]
    problems = _differences(parts, f"{unit} ")
    if problems:
        return disagreement(check, problems, nodes, fix)
    same = "" if len(ranks) == 1 else ", the same on all ranks"
    return Finding(
        check, "ok", f"{plural(len(parts[0]), unit)}, hash {fingerprint(parts[0])[:12]}{same}"
    )


def _differences(parts: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, list[int]]:
    """A message for each kind of difference from what most ranks have, and the ranks that have
    it."""
    problems: dict[str, list[int]] = {}
    for rank, keys, usual in _unusual(parts):
        here = parts[rank]
        texts = [
            f"{prefix}{key} is {_short(here.get(key))}, elsewhere {_short(usual.get(key))}"
            for key in keys[:SHOWN]
        ]
        if len(keys) > SHOWN:
            texts.append(f"and {len(keys) - SHOWN} more")
        problems.setdefault("; ".join(texts), []).append(rank)
    return problems


def _unusual(
    parts: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[int, list[str], Mapping[str, Any]]]:
    """Each rank that is not like most: its number, the keys that differ, and what most have."""
    hashes = [fingerprint(part) for part in parts]
    usual = parts[hashes.index(Counter(hashes).most_common(1)[0][0])]
    for rank, part in enumerate(parts):
        keys = [
            key for key in sorted(usual.keys() | part.keys()) if part.get(key) != usual.get(key)
        ]
        if keys:
            yield rank, keys, usual


def _short(value: Any) -> str:
    """A value as it is, a hash by its beginning."""
    if value is None:
        return "missing"
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
