"""Whether all ranks are alike: versions, code, configuration, model files, data, accelerators.

Each check takes what every rank has gathered, in rank order, and makes one finding of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from alphatoken.doctor.facts import PACKAGE, Facts
from alphatoken.doctor.findings import Finding, disagreement
from alphatoken.util.files import fingerprint
from alphatoken.util.wording import plural, size

SHOWN = 5  # differences that are listed
COMPARED = ("python", "torch", "deepspeed", "transformers", PACKAGE)


def compare_versions(everyone: Sequence[Facts], wanted: Mapping[str, SpecifierSet]) -> Finding:
    """Whether versions are equal on all ranks and within the `wanted` ranges, by package."""
    nodes = [of_rank.node for of_rank in everyone]
    problems: dict[str, list[int]] = {}
    for name in COMPARED:
        _compare(name, [of_rank.versions.get(name) for of_rank in everyone], problems)
    for rank, of_rank in enumerate(everyone):
        for name, allowed in wanted.items():
            version = of_rank.versions.get(name)
            if version is None:
                problems.setdefault(f"{name} is not installed", []).append(rank)
            elif not allowed.contains(version, prereleases=True):
                problems.setdefault(f"{name} {version} is outside {allowed}", []).append(rank)
    if problems:
        return disagreement(
            "versions", problems, nodes, "install the same environment on every node"
        )
    listed = ", ".join(f"{name} {everyone[0].versions.get(name)}" for name in COMPARED)
    if not wanted:
        return Finding(
            "versions",
            "warning",
            f"{listed}; {PACKAGE} is not installed, so ranges are unknown",
            "pip install .",
        )
    return Finding("versions", "ok", f"{listed}; within the ranges that {PACKAGE} requires")


def compare_code(everyone: Sequence[Facts]) -> Finding:
    """Whether every rank runs the same files of this package."""
    return _compare_parts(
        "code",
        "file",
        [of_rank.code for of_rank in everyone],
        everyone,
        "update the copies that differ",
    )


def compare_configs(everyone: Sequence[Facts]) -> Finding:
    """Whether every rank has the same resolved configuration; where not, which keys differ."""
    fix = "give every rank the same file, overrides and environment"
    return _compare_parts(
        "configuration", "key", [of_rank.config for of_rank in everyone], everyone, fix
    )


def compare_model_files(listings: Sequence[Mapping[str, Any]], nodes: Sequence[str]) -> Finding:
    """Whether every rank sees the same model folder; `listings`: `facts.model_listing` by rank."""
    problems = _differences(listings, "")
    if problems:
        return disagreement(
            "model files", problems, nodes, "copy the same model folder to every node"
        )
    total = sum(entry for entry in listings[0].values() if isinstance(entry, int))
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


def compare_model_settings(found: Sequence[str], nodes: Sequence[str]) -> Finding:
    """Whether every rank would run the model alike; `found`: `refusals.model_settings` by rank,
    with the attention kernel that `auto` stands for there."""
    problems: dict[str, list[int]] = {}
    _compare("the model runs with", found, problems)
    if problems:
        fix = "install the same packages on every node, or name model.attn_implementation"
        return disagreement("model settings", problems, nodes, fix)
    return Finding("model settings", "ok", found[0])


def compare_data(
    identities: Sequence[Mapping[str, Any]], nodes: Sequence[str], reports: Sequence[str]
) -> Finding:
    """Whether every rank has the same rows, tokenised alike.

    `identities`: by rank, of each part of the data; `reports`: lines about all parts.
    """
    different: dict[str, list[int]] = {}
    for unusual in _unusual(identities):
        parts = ", ".join(unusual.keys)
        message = f"{parts}: other rows, or tokenised otherwise, than elsewhere"
        different.setdefault(message, []).append(unusual.rank)
    if different:
        return disagreement("data", different, nodes, "copy the same files to every node")
    return Finding("data", "ok", "\n".join(reports))


def compare_accelerators(everyone: Sequence[Facts]) -> Finding:
    """Whether every node runs as many ranks as it has devices, all of one kind."""
    nodes = [of_rank.node for of_rank in everyone]
    counts, first = Counter(nodes), everyone[0]
    problems: dict[str, list[int]] = {}
    _compare("accelerator", [of_rank.accelerator for of_rank in everyone], problems)
    if problems:
        return disagreement(
            "accelerator", problems, nodes, "use the same kind of machine for every rank"
        )
    if first.accelerator == "cpu":
        found = f"CPU, {size(first.memory)} of memory a node, {_ranks_per_node(counts)}"
        return Finding("accelerator", "ok", found)
    found = f"{first.accelerator}, {size(first.memory)} each, {_ranks_per_node(counts)}"
    unused = sorted(
        {of_rank.node for of_rank in everyone if counts[of_rank.node] < of_rank.devices}
    )
    # A rank that is shown one device of several cannot tell how many there are.
    if unused and any(of_rank.devices > 1 for of_rank in everyone):
        return Finding(
            "accelerator",
            "warning",
            f"{found}; devices are idle on {', '.join(unused)}",
            "start a rank for each",
            tuple(unused),
        )
    uneven = {of_rank.node for of_rank in everyone if of_rank.memory != first.memory}
    if uneven:
        return Finding(
            "accelerator",
            "warning",
            f"{found}; another amount of memory on {', '.join(sorted(uneven))}",
            "",
            tuple(sorted(uneven)),
        )
    return Finding("accelerator", "ok", found)


def _ranks_per_node(counts: Counter[str]) -> str:
    different_counts = set(counts.values())
    if len(different_counts) == 1:
        return (
            f"{plural(different_counts.pop(), 'rank')} on "
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
    check: str, unit: str, parts: Sequence[Mapping[str, Any]], everyone: Sequence[Facts], fix: str
) -> Finding:
    nodes = [of_rank.node for of_rank in everyone]
    problems = _differences(parts, f"{unit} ")
    if problems:
        return disagreement(check, problems, nodes, fix)
    same = "" if len(everyone) == 1 else ", the same on all ranks"
    return Finding(
        check, "ok", f"{plural(len(parts[0]), unit)}, hash {fingerprint(parts[0])[:12]}{same}"
    )


def _differences(parts: Sequence[Mapping[str, Any]], prefix: str) -> dict[str, list[int]]:
    """A message for each kind of difference from what most ranks have, and the ranks that have
    it."""
    problems: dict[str, list[int]] = {}
    for unusual in _unusual(parts):
        here, elsewhere = parts[unusual.rank], unusual.elsewhere
        texts = [
            f"{prefix}{key} is {_short(here.get(key))}, elsewhere {_short(elsewhere.get(key))}"
            for key in unusual.keys[:SHOWN]
        ]
        if len(unusual.keys) > SHOWN:
            texts.append(f"and {len(unusual.keys) - SHOWN} more")
        problems.setdefault("; ".join(texts), []).append(unusual.rank)
    return problems


@dataclass(frozen=True)
class _Unusual:
    """A rank that is not like most."""

    rank: int
    keys: list[str]
    """Where it differs."""
    elsewhere: Mapping[str, Any]
    """What most ranks have."""


def _unusual(parts: Sequence[Mapping[str, Any]]) -> list[_Unusual]:
    hashes = [fingerprint(part) for part in parts]
    usual = parts[hashes.index(Counter(hashes).most_common(1)[0][0])]
    found = []
    for rank, part in enumerate(parts):
        keys = sorted(key for key in usual.keys() | part.keys() if part.get(key) != usual.get(key))
        if keys:
            found.append(_Unusual(rank, keys, usual))
    return found


def _short(value: Any) -> str:
    """A value as it is, a hash by its beginning."""
    if value is None:
        return "missing"
    return value[:12] if isinstance(value, str) and len(value) == 64 else repr(value)
