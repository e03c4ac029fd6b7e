"""How a run goes on from a checkpoint, and what must not have changed."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from alphatoken.checkpoints.files import (
    SHARDS,
    damage,
    read_description,
    step_folders,
)
from alphatoken.checkpoints.folder import RunFolder
from alphatoken.checkpoints.universal import UNIVERSAL, universal_checkpoint
from alphatoken.config.file import flat, may_change
from alphatoken.config.run import RunConfig
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
    """The run's folder and the checkpoint to continue from, if any. Every rank must call it.

    A checkpoint of another number of ranks is converted first, beside itself; nothing else is
    written. Raises as `find_checkpoint` does, on every rank.
    """
    found = collectives.on_rank_0(lambda: find_checkpoint(config, collectives.world_size()))
    if found is not None and found.universal:
        written = found.checkpoint
        found = replace(
            found, checkpoint=collectives.on_rank_0(lambda: universal_checkpoint(written))
        )
    return RunFolder(config.train.output_dir), found


def find_checkpoint(config: RunConfig, ranks: int) -> Continuation | None:
    """The checkpoint that a run on so many ranks would continue from, not converted yet; None for a
    new run.

    Raises UserError if the folder holds another run and `train.resume` is `never`, or if the
    checkpoint to resume does not exist, is damaged, or belongs to a different configuration.
    """
    folder = RunFolder(config.train.output_dir)
    resume = config.train.resume
    if resume == "never":
        if folder.config.exists() or folder.checkpoints.exists():
            raise UserError(
                f"train.output_dir={folder.path} holds another run; choose another folder, or "
                "continue that run with train.resume=auto"
            )
        return None
    notes: list[Note] = []
    found = _newest_complete(folder.checkpoints, notes) if resume == "auto" else Path(resume)
    if found is None:
        if notes:
            raise UserError(
                "train.resume=auto finds no usable checkpoint, but some that are not; remove "
                "them to start anew:\n  " + "\n  ".join(map(str, notes))
            )
        return None
    checkpoint: Path = found.with_name(found.name.removesuffix(UNIVERSAL))
    if resume != "auto":
        problem = damage(checkpoint)
        if problem is not None:
            raise UserError(f"cannot resume from {checkpoint}: {problem}")
    description = read_description(checkpoint)
    notes += _accepted_changes(checkpoint, description["config"], config)
    written_by = description["world_size"]
    moved = written_by != ranks and any(checkpoint.glob(SHARDS))
    if moved:
        notes.append(
            Note(f"{checkpoint} was written by {written_by} ranks and converted for {ranks}")
        )
    return Continuation(checkpoint, description["step"], moved, tuple(notes))


def _newest_complete(checkpoints: Path, notes: list[Note]) -> Path | None:
    """Finds the newest undamaged checkpoint; adds a warning to `notes` for each newer one."""
    for checkpoint in step_folders(checkpoints).values():
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        notes.append(Note(f"not resuming from {checkpoint}: {problem}", "warning"))
    return None


def _accepted_changes(checkpoint: Path, saved: dict[str, Any], config: RunConfig) -> list[Note]:
    """A note for each key that may differ and does. Raises UserError for those that may not."""
    before, now = flat(saved), flat(config.model_dump(mode="json"))
    notes, refused = [], []
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) == now.get(key):
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
