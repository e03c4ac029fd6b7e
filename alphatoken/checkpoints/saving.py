"""Saving and loading checkpoints."""

from __future__ import annotations

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from alphatoken.checkpoints.files import (
    FORMAT_VERSION,
    LATEST,
    described_files,
    free_bytes,
    remove_leftovers,
    tidy,
    write_description,
)
from alphatoken.checkpoints.folder import RunFolder
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives, zero3
from alphatoken.errors import UserError
from alphatoken.util.files import PARTIAL, flush, publish_text

STATE = "alphatoken"  # the key of our own state in DeepSpeed's client state


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
