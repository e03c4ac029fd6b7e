"""The run folder: checkpoints written atomically, found again, and exported.

    config.yaml  metrics.jsonl  export/  checkpoints/{step-N/, latest}

A checkpoint is written into `step-N.partial`, described in `complete.json` (format version, step, ranks, configuration,
and the size and SHA-256 of every file), and only then renamed; `latest` names the newest. A folder without a valid
description does not exist for us.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alphatoken import collectives, zero3
from alphatoken.config import RunConfig
from alphatoken.config_file import save_config
from alphatoken.errors import UserError
from alphatoken.slices import flush

FORMAT_VERSION = 2
STATE = "alphatoken"  # the key of our own state in DeepSpeed's client state
DESCRIPTION = "complete.json"
STEP_FOLDER = re.compile(r"step-(\d+)")

# Configuration that may differ between a run and its continuation without changing what is computed.
HARMLESS_KEYS = re.compile(
    r"logging\..*|train\.(resume|output_dir|save_every|eval_every)|data\.cache_dir|fisher\.(output|save_every)|"
    r"reference\.(cache|offload|save_every)"
)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def export(self) -> Path:
        return self.path / "export"


def open_run_folder(config: RunConfig) -> tuple[RunFolder, Path | None]:
    """The run's folder and the checkpoint to continue from, if any. Writes nothing. Every rank must call it.

    Raises UserError if the folder holds another run and `train.resume` is `never`, or if the checkpoint to resume does
    not exist, is damaged, was written by another number of ranks, or belongs to a different configuration.
    """
    folder = RunFolder(config.train.output_dir)
    resume = config.train.resume
    if resume == "never":
        if folder.config.exists() or folder.checkpoints.exists():
            raise UserError(
                f"train.output_dir={folder.path} holds another run; choose another folder, or continue that run with "
                "train.resume=auto"
            )
        return folder, None
    checkpoint = _newest_complete(folder.checkpoints) if resume == "auto" else Path(resume)
    if checkpoint is None:
        return folder, None
    _check_compatible(checkpoint, config)
    return folder, checkpoint


def start_run_folder(folder: RunFolder, config: RunConfig) -> None:
    """Creates the folder and writes the resolved configuration, on rank 0."""
    if collectives.rank() == 0:
        folder.path.mkdir(parents=True, exist_ok=True)
        save_config(config, folder.config)
    collectives.barrier()


def save_checkpoint(engine: Any, folder: RunFolder, config: RunConfig, step: int, state: dict[str, Any]) -> Path:
    """Saves the engine's complete state, and `state` (the same on every rank), after `step` optimizer steps.

    Every rank must call it, between steps. All ranks write their shards, then each hashes and flushes its share of the
    files, and rank 0 makes the checkpoint valid. Raises UserError when the disk refuses; older checkpoints stay as they
    are.
    """
    final = folder.checkpoints / f"step-{step}"
    partial = final.with_name(final.name + ".partial")

    def remove_leftovers() -> None:
        if collectives.rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)

    collectives.agree(remove_leftovers)
    try:
        collectives.agree(
            lambda: engine.save_checkpoint(
                str(folder.checkpoints), tag=partial.name, client_state={STATE: state}, save_latest=False
            )
        )
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        own = files[collectives.rank() :: collectives.world_size()]
        digests = collectives.agree(lambda: {str(file.relative_to(partial)): _flush_and_digest(file) for file in own})
    except OSError as error:
        raise UserError(f"cannot write checkpoint {final}: {error}; older checkpoints are untouched") from None
    every = {name: digest for part in collectives.gather_objects(digests) for name, digest in part.items()}

    def describe() -> None:
        if collectives.rank() != 0:
            return
        description = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": collectives.world_size(),
            "versions": {package: version(package) for package in ("alphatoken", "torch", "deepspeed", "transformers")},
            "config": config.model_dump(mode="json"),
            "files": every,
        }
        _write_durably(partial / DESCRIPTION, json.dumps(description, indent=1))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _write_durably(folder.checkpoints / "latest.partial", final.name)
        (folder.checkpoints / "latest.partial").replace(folder.checkpoints / "latest")
        flush(folder.checkpoints)

    collectives.agree(describe)
    return final


def load_checkpoint(engine: Any, checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Loads the engine's complete state; returns the number of optimizer steps done and what was saved as `state`.

    Every rank must call it.
    """
    loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise UserError(f"DeepSpeed found nothing to load in {checkpoint}")
    return int(_read_description(checkpoint)["step"]), client_state[STATE]


def export_model(engine: Any, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Writes the current weights as a Hugging Face folder. Every rank must call it; rank 0 holds the whole model."""
    state = zero3.consolidated_state(engine)
    if state is not None:
        prefix = "lm."
        weights = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
        engine.module.lm.save_pretrained(target, state_dict=weights)
        tokenizer.save_pretrained(target)
    collectives.barrier()


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint's files, naming the first wrong one, or None."""
    try:
        description = _read_description(checkpoint)
    except UserError as error:
        return str(error)
    for name, expected in description["files"].items():
        file = checkpoint / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        if _digest(file) != expected["sha256"]:
            return f"{file} does not have the content that was saved"
    return None


def _newest_complete(checkpoints: Path) -> Path | None:
    if not checkpoints.is_dir():
        return None
    folders = [path for path in checkpoints.iterdir() if STEP_FOLDER.fullmatch(path.name)]
    for checkpoint in sorted(folders, key=lambda path: int(path.name.removeprefix("step-")), reverse=True):
        problem = _damage_on_rank_0(checkpoint)
        if problem is None:
            return checkpoint
        if collectives.rank() == 0:
            print(f"warning: not resuming from {checkpoint}: {problem}", flush=True)
    return None


def _damage_on_rank_0(checkpoint: Path) -> str | None:
    return collectives.on_rank_0(lambda: damage(checkpoint))


def _check_compatible(checkpoint: Path, config: RunConfig) -> None:
    problem = _damage_on_rank_0(checkpoint)
    if problem is not None:
        raise UserError(f"cannot resume from {checkpoint}: {problem}")
    description = _read_description(checkpoint)
    if description["world_size"] != collectives.world_size():
        raise UserError(
            f"{checkpoint} was written by {description['world_size']} ranks; resume with as many, not "
            f"{collectives.world_size()}"
        )
    before, now = _flatten(description["config"]), _flatten(config.model_dump(mode="json"))
    changed = [
        f"{key}: was {before.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not HARMLESS_KEYS.fullmatch(key)
    ]
    if changed:
        raise UserError(f"{checkpoint} belongs to a run with another configuration:\n  " + "\n  ".join(changed))


def _read_description(checkpoint: Path) -> dict[str, Any]:
    file = checkpoint / DESCRIPTION
    try:
        description: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if description.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{file} has format version {description.get('format_version')}, not {FORMAT_VERSION}")
    return description


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _flush_and_digest(file: Path) -> dict[str, Any]:
    with file.open("rb+") as content:
        os.fsync(content.fileno())
    return {"bytes": file.stat().st_size, "sha256": _digest(file)}


def _write_durably(file: Path, text: str) -> None:
    with file.open("w", encoding="utf-8") as content:
        content.write(text)
        content.flush()
        os.fsync(content.fileno())
