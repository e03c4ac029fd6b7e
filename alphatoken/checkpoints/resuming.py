"""How a run goes on from a checkpoint, and what must not have changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from alphatoken.checkpoints.files import (
    SHARDS,
    UNIVERSAL,
    damage,
    read_description,
)
from alphatoken.checkpoints.folder import RunFolder, step_folders
from alphatoken.checkpoints.universal import universal_checkpoint
from alphatoken.config.file import flat, may_change
from alphatoken.config.run import RunConfig
from alphatoken.data.sources import without_nulls
from alphatoken.distributed import collectives
from alphatoken.errors import UserError


@dataclass(frozen=True)
class Note:
    """A line about the checkpoint a run continues from."""

    text: str
    severity: Literal["info", "warning"] = "info"

    def __str__(self) -> str:
        return f"warning: {self.text}" if self.severity == "warning" else self.text


@dataclass(frozen=True)
class Continuation:
    """A checkpoint to go on from."""

    checkpoint: Path
    step: int
    universal: bool
    """Whether it has to be converted, as another number of ranks wrote it."""
    notes: tuple[Note, ...]
    """What the user should know about it."""


def open_run_folder(config: RunConfig) -> tuple[RunFolder, Continuation | None]:
    """The run's folder and the checkpoint to continue from, if any. Every rank must call it, and
    reads its share of the files to be checked.

    A checkpoint of another number of ranks is converted first, beside itself; nothing else is
    written. Raises as `find_checkpoint` does, on every rank.
    """
    ranks = collectives.world_size()
    candidates = collectives.on_rank_0(lambda: _candidates(config))
    usable, problems = _first_usable(candidates, lambda each: damage(each, together=True))
    found = collectives.on_rank_0(lambda: _continuation(config, ranks, usable, problems))
    if found is not None and found.universal:
        found = replace(found, checkpoint=universal_checkpoint(found.checkpoint))
    return RunFolder(config.train.output_dir), found


def find_checkpoint(config: RunConfig, ranks: int) -> Continuation | None:
    """The checkpoint that a run on so many ranks would continue from, not converted yet; None for a
    new run.

    Raises UserError if the folder holds another run and `train.resume` is `never`, or if the
    checkpoint to resume does not exist, is damaged, or belongs to a different configuration.
    """
    return _continuation(config, ranks, *_first_usable(_candidates(config), damage))


def _candidates(config: RunConfig) -> list[Path]:
    """The checkpoints to continue from, the best first. Raises UserError if there must be none."""
    folder = RunFolder(config.train.output_dir)
    match config.train.resume:
        case "never":
            if folder.config.exists() or folder.checkpoints.exists():
                raise UserError(
                    f"train.output_dir={folder.path} holds another run; choose another folder, or "
                    "continue that run with train.resume=auto"
                )
            return []
        case "auto":
            return list(step_folders(folder.checkpoints).values())
        case path:
            named = Path(path) if Path(path).name else Path(path).resolve()  # . has no name
            name = named.name.removesuffix(UNIVERSAL)
            if not name:
                raise UserError(
                    f"train.resume={path} is no checkpoint; name a folder checkpoints/step-N of a "
                    "run, or auto"
                )
            return [named.with_name(name)]


def _first_usable(
    candidates: Sequence[Path], damage_of: Callable[[Path], str | None]
) -> tuple[Path | None, dict[Path, str]]:
    """The first undamaged checkpoint, and what is wrong with those before it."""
    problems: dict[Path, str] = {}
    for checkpoint in candidates:
        problem = damage_of(checkpoint)
        if problem is None:
            return checkpoint, problems
        problems[checkpoint] = problem
    return None, problems


def _continuation(
    config: RunConfig, ranks: int, checkpoint: Path | None, problems: Mapping[Path, str]
) -> Continuation | None:
    """What to go on from. Raises UserError where nothing is usable of what there is, or where it
    belongs to a different configuration."""
    if config.train.resume != "auto":
        for damaged, problem in problems.items():
            raise UserError(f"cannot resume from {damaged}: {problem}")
    notes = [
        Note(f"not resuming from {damaged}: {problem}", "warning")
        for damaged, problem in problems.items()
    ]
    if checkpoint is None:
        if notes:
            raise UserError(
                "train.resume=auto finds no usable checkpoint, but some that are not; remove "
                "them to start anew:\n  " + "\n  ".join(map(str, notes))
            )
        return None
    description = read_description(checkpoint)
    notes += accepted_changes(checkpoint, description["config"], config)
    written_by = description["world_size"]
    moved = written_by != ranks and any(fnmatch.filter(description["files"], SHARDS))
    if moved:
        notes.append(
            Note(f"{checkpoint} was written by {written_by} ranks and converted for {ranks}")
        )
    return Continuation(checkpoint, description["step"], moved, tuple(notes))


def accepted_changes(checkpoint: Path, saved: dict[str, Any], config: RunConfig) -> list[Note]:
    """A note for each key that may differ and does. Raises UserError for those that may not."""
    before, now = flat(saved), flat(config.model_dump(mode="json"))
    notes, refused = [], []
    for key in sorted(before.keys() | now.keys()):
        # A key of a source that an older version did not have is there now, and not set.
        if without_nulls(before.get(key)) == without_nulls(now.get(key)):
            continue
        change = f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        if key in ("train.resume", "train.resume_allow"):
            continue
        if is_allowed(key, config.train.resume_allow):
            notes.append(
                Note(f"changed since {checkpoint.name}, as train.resume_allow says: {change}")
            )
        elif may_change(type(config), key):
            notes.append(Note(f"changed since {checkpoint.name}: {change}"))
        else:
            refused.append(change)
    if refused:
        raise UserError(
            f"{checkpoint} belongs to a run with another configuration (train.resume_allow lists "
            "keys that may change nevertheless):\n"
            "  " + "\n  ".join(refused)
        )
    return notes


# What each input is, and the key by which train.resume_allow lets it change.
INPUTS = {
    "data.train": "the rows of data.train",
    "data.validation": "the rows of data.validation",
    "data.eval": "the rows of data.eval",
    "model.tokenizer": "the tokenizer or its chat template",
    "deepspeed.config": "the DeepSpeed configuration",
    "reference.model": "the reference model (reference.model, by default model.name_or_path)",
    "valuation.fisher": "the Fisher or the stability reference",
    "selection.store": "the stored values",
}


def is_allowed(key: str, patterns: Sequence[str]) -> bool:
    """Whether `train.resume_allow` lets a key change."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def changed_inputs(
    before: Mapping[str, Any], now: Mapping[str, Any], allowed: Sequence[str], where: str
) -> list[str]:
    """A note for each input that differs and may. Raises UserError naming those that may not."""
    changed = [key for key in INPUTS if before.get(key) != now.get(key)]
    refused = [key for key in changed if not is_allowed(key, allowed)]
    if refused:
        lines = "\n  ".join(f"{key}: {INPUTS[key]} changed" for key in refused)
        raise UserError(
            f"{where} was trained with other inputs than those given now (train.resume_allow lists "
            "keys that may change nevertheless):\n"
            f"  {lines}"
        )
    return [f"changed since {where}, as train.resume_allow says: {INPUTS[key]}" for key in changed]
