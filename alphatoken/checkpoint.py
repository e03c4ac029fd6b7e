"""The run folder: checkpoints written and found again by all ranks together, on any number of them.

    config.yaml  metrics.jsonl  model/  export/  checkpoints/{step-N/, latest}

What makes a checkpoint valid is in `checkpoint_files`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import uuid
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alphatoken import collectives, zero3
from alphatoken.checkpoint_files import (
    ABOUT,
    FORMAT_VERSION,
    LATEST,
    SHARDS,
    damage,
    described_files,
    free_bytes,
    read_description,
    remove_leftovers,
    step_folders,
    tidy,
    write_description,
)
from alphatoken.config import RunConfig
from alphatoken.config_file import flat, save_config
from alphatoken.continuation import is_allowed
from alphatoken.errors import UserError
from alphatoken.files import PARTIAL, flush, publish_text
from alphatoken.model import WEIGHTS

UNIVERSAL = "-universal"
STATE = "alphatoken"  # the key of our own state in DeepSpeed's client state

# Configuration that may differ between a run and its continuation without changing what is
# computed.
HARMLESS_KEYS = re.compile(
    r"logging\..*|data\.cache_dir|fisher\.(output|save_every)|reference\.(cache|offload|save_every)|"
    r"train\.(resume|resume_allow|output_dir|save_every|keep_last|keep_every|eval_every|grace_seconds|watchdog_seconds)"
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
    def model(self) -> Path:
        return self.path / "model"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def heartbeats(self) -> Path:
        return self.path / "heartbeats"


@dataclass(frozen=True)
class Continuation:
    """A checkpoint to go on from."""

    checkpoint: Path
    step: int
    universal: bool
    """Whether it has to be converted, as another number of ranks wrote it."""
    notes: tuple[str, ...]
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
                "continue that run with "
                "train.resume=auto"
            )
        return None
    notes: list[str] = []
    found = _newest_complete(folder.checkpoints, notes) if resume == "auto" else Path(resume)
    if found is None:
        if notes:
            raise UserError(
                "train.resume=auto finds no usable checkpoint, but some that are not; remove "
                "them to start anew:\n  " + "\n  ".join(notes)
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
        notes.append(f"{checkpoint} was written by {written_by} ranks and converted for {ranks}")
    return Continuation(checkpoint, description["step"], moved, tuple(notes))


def start_run_folder(
    folder: RunFolder,
    config: RunConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    about: dict[str, Any],
) -> None:
    """Creates the folder and writes what is known before the first step, on rank 0: the resolved
    configuration, and what an export needs besides weights (the model's configuration and
    tokenizer, and `about`: the data).
    """

    def write() -> None:
        folder.model.mkdir(parents=True, exist_ok=True)
        save_config(config, folder.config)
        model.config.save_pretrained(folder.model)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder.model)
        tokenizer.save_pretrained(folder.model)
        for adapters in getattr(model, "peft_config", {}).values():
            adapters.base_model_name_or_path = config.model.name_or_path
            adapters.save_pretrained(folder.model)
        publish_text(folder.model / ABOUT, json.dumps(about, indent=1))

    collectives.on_rank_0(write)


def checkpoint_bytes(module: nn.Module, trains_in_16_bit: bool) -> int:
    """Size of a checkpoint: fp32 masters and Adam's two moments of what is trained, and the weights
    themselves.

    `module` may be on the meta device.
    """
    sizes = [(zero3.full_shape(each).numel(), each.requires_grad) for each in module.parameters()]
    weight = 2 if trains_in_16_bit else 4
    return sum(count * (weight + (12 if trained else 0)) for count, trained in sizes)


def check_space(folder: RunFolder, needed: int) -> None:
    """Removes what killed saves have left. Raises UserError on every rank if a checkpoint of so
    many bytes does not fit beside the others.
    """

    def check() -> None:
        remove_leftovers(folder.checkpoints)
        free = free_bytes(folder.checkpoints)
        if free < needed:
            raise UserError(
                f"{folder.checkpoints} has {free / 2**30:.2f} GiB free, but a checkpoint takes "
                f"{needed / 2**30:.2f} GiB; make room, or keep fewer with train.keep_last"
            )

    collectives.on_rank_0(check)


def save_checkpoint(
    engine: Any, folder: RunFolder, config: RunConfig, step: int, state: dict[str, Any], needed: int
) -> Path:
    """Saves the engine's complete state, and `state` (the same on every rank), after `step`
    optimizer steps.

    Every rank must call it, between steps. All ranks write their shards, then each hashes and
    flushes its share of the files, and rank 0 makes the checkpoint valid and removes those that
    `train.keep_last` does not keep. `needed`: bytes that must be free. Raises UserError when the
    disk refuses; older checkpoints stay as they are.
    """
    final = folder.checkpoints / f"step-{step}"
    partial = final.with_name(final.name + PARTIAL)
    check_space(folder, needed)

    def check_writing() -> None:
        if refused is not None:
            raise refused

    def publish() -> None:
        description = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": collectives.world_size(),
            "versions": {
                package: version(package)
                for package in ("alphatoken", "torch", "deepspeed", "transformers")
            },
            "config": config.model_dump(mode="json"),
            "files": every,
        }
        write_description(partial, description)
        flush(partial)
        aside = final.with_name(f"{final.name}.abandoned")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        publish_text(folder.checkpoints / LATEST, final.name)
        shutil.rmtree(aside, ignore_errors=True)
        tidy(folder.checkpoints, step, config.train.keep_last, config.train.keep_every)

    try:
        collectives.on_rank_0(lambda: partial.mkdir(parents=True))
        refused = zero3.save_shards(engine, folder.checkpoints, partial.name, {STATE: state})
        collectives.agree(check_writing)
        # Rank 0 lists the files: what another rank does not see of them is an error, not a file
        # without a hash.
        files = collectives.on_rank_0(
            lambda: sorted(path for path in partial.rglob("*") if path.is_file())
        )
        own = files[collectives.rank() :: collectives.world_size()]
        digests = collectives.gather_objects(
            collectives.agree(lambda: described_files(partial, own))
        )
        every = {name: digest for part in digests for name, digest in part.items()}
        collectives.on_rank_0(publish)
    except (OSError, RuntimeError) as error:
        collectives.barrier()
        collectives.on_rank_0(lambda: remove_leftovers(folder.checkpoints))
        raise UserError(
            f"cannot write checkpoint {final}: {error}; older checkpoints are untouched"
        ) from None
    return final


def load_checkpoint(engine: Any, checkpoint: Path) -> dict[str, Any]:
    """Loads the engine's complete state; returns what was saved as `state`. Every rank must call
    it.

    Learning rate, decay, betas and epsilon stay those the engine was built with.
    """
    options = zero3.optimizer_options(engine)
    loaded, client_state = engine.load_checkpoint(str(checkpoint.parent), tag=checkpoint.name)
    if loaded is None:
        raise UserError(f"DeepSpeed found nothing to load in {checkpoint}")
    zero3.separate_step_counts(engine)
    zero3.set_optimizer_options(engine, options)
    state: dict[str, Any] = client_state[STATE]
    return state


def universal_checkpoint(checkpoint: Path) -> Path:
    """The checkpoint in DeepSpeed's universal form, which any number of ranks can load; made once,
    beside it.

    Raises UserError with DeepSpeed's last words where it cannot be made.
    """
    target = checkpoint.with_name(checkpoint.name + UNIVERSAL)
    if target.exists() and damage(target) is None and _source_of(target) == _source_of(checkpoint):
        return target
    shutil.rmtree(target, ignore_errors=True)
    partial = target.with_name(f"{target.name}.{uuid.uuid4().hex}{PARTIAL}")
    folders = ["--input_folder", str(checkpoint), "--output_folder", str(partial)]
    workers = ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *folders, *workers]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(
            f"DeepSpeed cannot convert {checkpoint} for another number of "
            f"ranks:\n{finished.stderr.strip()[-1000:]}"
        )
    names = sorted(path for path in partial.rglob("*") if path.is_file())
    write_description(partial, {**_source_of(checkpoint), "files": described_files(partial, names)})
    partial.rename(target)
    # DeepSpeed's converter notes the new tag beside the checkpoints.
    (checkpoint.parent / "latest_universal").unlink(missing_ok=True)
    flush(checkpoint.parent)
    return target


def export_model(engine: Any, tokenizer: PreTrainedTokenizerBase, target: Path) -> None:
    """Writes the current weights as a Hugging Face folder. Every rank must call it; rank 0 holds
    the whole model."""
    state = zero3.consolidated_state(engine)
    if state is not None:
        weights = {
            name.removeprefix(WEIGHTS): tensor
            for name, tensor in state.items()
            if name.startswith(WEIGHTS)
        }
        engine.module.lm.save_pretrained(target, state_dict=weights)
        tokenizer.save_pretrained(target)
    collectives.barrier()


def random_state(device: torch.device) -> list[torch.Tensor]:
    """State of this rank's random number generators."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Takes over what `random_state` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


def _source_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint and its universal form have in common."""
    description = read_description(checkpoint)
    return {key: value for key, value in description.items() if key != "files"}


def _newest_complete(checkpoints: Path, notes: list[str]) -> Path | None:
    for checkpoint in step_folders(checkpoints).values():
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        notes.append(f"warning: not resuming from {checkpoint}: {problem}")
    return None


def _accepted_changes(checkpoint: Path, saved: dict[str, Any], config: RunConfig) -> list[str]:
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
            notes.append(f"changed since {checkpoint.name}, as train.resume_allow says: {change}")
        elif HARMLESS_KEYS.fullmatch(key):
            notes.append(f"changed since {checkpoint.name}: {change}")
        else:
            refused.append(change)
    if refused:
        raise UserError(
            f"{checkpoint} belongs to a run with another configuration (train.resume_allow lists "
            "keys that may change "
            "nevertheless):\n  " + "\n  ".join(refused)
        )
    return notes
