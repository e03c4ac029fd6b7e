"""Saving and loading checkpoints."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from alphatoken.checkpoints.best import Best
from alphatoken.checkpoints.files import (
    FORMAT_VERSION,
    LATEST,
    UNIVERSAL,
    described_files,
    free_bytes,
    listed_files,
    missing_files,
    read_description,
    remove_leftovers,
    tidy,
    workers,
    write_description,
)
from alphatoken.checkpoints.folder import RunFolder
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives, process, zero3
from alphatoken.distributed.shard_files import EqualSlices, TensorFile, save_tensors
from alphatoken.errors import UserError
from alphatoken.util.files import PARTIAL, flush, publish_text
from alphatoken.util.metrics import Metrics

SCORER = "scorer"  # the folder of a checkpoint with what its scorer keeps in slices
RANDOM = "random"  # the folder of a checkpoint with every rank's random state
STATE = "alphatoken"  # the key of our own state in DeepSpeed's client state
GENERATORS = ("cpu", "cuda")  # in the order of `random_state`
PACKAGES = ("alphatoken", "torch", "deepspeed", "transformers")


@dataclass(frozen=True)
class TrainingState:
    """What a checkpoint holds besides the engine's own state."""

    scales: list[list[float]] | None
    """Running scales of adaptation and stability; None without a scorer."""
    inputs: dict[str, str | None]
    """Hashes of what the run was made from, by name."""
    best: Best | None
    """The best evaluation so far, with `train.keep_best`."""
    random: list[torch.Tensor] | None
    """The states of this rank's random number generators; None where another number of ranks wrote
    the checkpoint."""
    owed: Metrics | None = None
    """The metrics of the last step, where the evaluation after it is still to be made; None where
    none is owed."""


class Checkpoints:
    """Saves the checkpoints of one run, knows the newest, and loads one.

    `needed`: bytes that a checkpoint takes on disk. Every rank must make the same calls, between
    steps.
    """

    def __init__(self, *, folder: RunFolder, engine: Any, config: RunConfig, needed: int) -> None:
        self._folder = folder
        self._engine = engine
        self._config = config
        self._needed = needed
        self.newest = 0
        """Optimizer steps of the newest checkpoint that this run saved or continued; 0 is none."""
        self._best: int | None = None
        """Optimizer steps of the best evaluation, as of that checkpoint."""

    def check_space(self) -> None:
        """Removes what killed saves have left. Raises UserError on every rank if a checkpoint does
        not fit beside the others."""
        collectives.on_rank_0(self._check_space)

    def save(self, done: int, state: TrainingState, scorer: EqualSlices | None = None) -> Path:
        """Saves the engine's complete state, `state` and the scorer's slices after `done` optimizer
        steps.

        All ranks write their shards, and each tells names, sizes and hashes of the files it wrote;
        of these rank 0 makes the list, which makes the checkpoint valid, and removes those that
        neither `train.keep_last` nor `train.keep_best` keeps. No rank looks for files of others: a
        shared file system may show them late. Raises UserError when the disk refuses; older
        checkpoints stay as they are.
        """
        final = self._folder.checkpoints / f"step-{done}"
        partial = final.with_name(final.name + PARTIAL)
        self.check_space()
        try:
            collectives.on_rank_0(lambda: partial.mkdir(parents=True))
            own = self._write_shards(partial, state)
            own += collectives.agree(lambda: _write_own(partial, state, scorer))
            files = _describe_together(partial, own)
            collectives.on_rank_0(lambda: self._publish(partial, final, files, state.best))
        except (OSError, RuntimeError) as error:
            collectives.barrier()
            collectives.on_rank_0(lambda: remove_leftovers(self._folder.checkpoints))
            raise UserError(
                f"cannot write checkpoint {final}: {error}; older checkpoints are untouched"
            ) from None
        self.newest = done
        self._best = None if state.best is None else state.best.step
        return final

    def load(self, checkpoint: Path, step: int) -> TrainingState:
        """Loads the engine's complete state after `step` optimizer steps.

        Learning rate, decay, betas and epsilon stay those the engine was built with. Raises
        UserError on every rank where a file that the checkpoint lists is not there.
        """
        options = zero3.optimizer_options(self._engine)
        client_state = zero3.load_shards(self._engine, checkpoint)
        if client_state is None:
            raise UserError(f"DeepSpeed found nothing to load in {checkpoint}")
        zero3.separate_step_counts(self._engine)
        zero3.set_optimizer_options(self._engine, options)
        self.newest = step
        values = client_state[STATE]
        best = Best.from_json(values.get("best"))
        self._best = None if best is None else best.step
        return TrainingState(
            scales=values["scales"],
            inputs=values["inputs"],
            best=best,
            random=_random_of(checkpoint, values),
            owed=None if values.get("owed") is None else json.loads(values["owed"]),
        )

    def scorer_slices(self, checkpoint: Path) -> TensorFile | None:
        """What the scorer of a checkpoint kept in slices, if it lists any; of one that was
        converted for another number of ranks, as it was written.

        Every rank must call it. Raises UserError on every rank where a listed file is not there.
        """
        _, listed = _written(checkpoint)
        names = [name for name in listed if name.startswith(f"{SCORER}/")]

        def opened() -> TensorFile | None:
            files = listed_files(_as_written(checkpoint), names)
            return TensorFile(_as_written(checkpoint) / SCORER, files) if files else None

        return collectives.agree(opened)

    def _check_space(self) -> None:
        folder = self._folder.checkpoints
        remove_leftovers(folder)
        free = free_bytes(folder)
        if free < self._needed:
            raise UserError(
                f"{folder} has {free / 2**30:.2f} GiB free, but a checkpoint takes "
                f"{self._needed / 2**30:.2f} GiB; make room, or keep fewer with train.keep_last"
            )

    def _write_shards(self, partial: Path, state: TrainingState) -> list[Path]:
        """Returns the files that this rank wrote. Raises on every rank what any rank's disk
        refused."""
        values = {
            "scales": state.scales,
            "inputs": state.inputs,
            "best": None if state.best is None else state.best.as_json(),
            "owed": None if state.owed is None else json.dumps(state.owed),
        }
        written, refused = zero3.save_shards(
            self._engine, self._folder.checkpoints, partial.name, {STATE: values}
        )

        def check() -> None:
            if refused is not None:
                raise refused

        collectives.agree(check)
        return written

    def _publish(
        self, partial: Path, final: Path, files: dict[str, dict[str, Any]], best: Best | None
    ) -> None:
        """Makes a written checkpoint the valid one of its step, and the latest."""
        missing = missing_files(files, collectives.world_size())
        if missing:
            raise RuntimeError(f"no rank has written {', '.join(missing)}")
        step = int(final.name.removeprefix("step-"))
        description = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "world_size": collectives.world_size(),
            "versions": {package: version(package) for package in PACKAGES},
            "config": self._config.model_dump(mode="json"),
            "files": files,
        }
        write_description(partial, description)
        flush(partial)
        aside = final.with_name(f"{final.name}.abandoned")
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():
            final.rename(aside)
        partial.rename(final)
        publish_text(final.parent / LATEST, final.name)
        shutil.rmtree(aside, ignore_errors=True)
        train = self._config.train
        keep_last = train.keep_last
        if train.save_every is None and train.keep_best is not None:
            keep_last = 1  # they are saved for being the best alone
        best_step = None if best is None else best.step
        tidy(final.parent, step, keep_last, train.keep_every, best_step)
        self._remove_former_best({step, best_step})

    def _remove_former_best(self, kept: set[int | None]) -> None:
        """Removes what was the best and is no more, unless it is among `kept` or was due."""
        train, former = self._config.train, self._best
        every = [each for each in (train.save_every, train.keep_every) if each is not None]
        if former is None or former in kept or train.keep_last is not None:
            return  # the last few are removed when they are older
        if all(former % each for each in every):
            shutil.rmtree(self._folder.checkpoints / f"step-{former}", ignore_errors=True)


def checkpoint_bytes(module: nn.Module, *, trains_in_16_bit: bool) -> int:
    """Size of a checkpoint: fp32 masters and Adam's two moments of what is trained, and the weights
    themselves.

    `module` may be on the meta device.
    """
    sizes = [(zero3.full_shape(each).numel(), each.requires_grad) for each in module.parameters()]
    weight = 2 if trains_in_16_bit else 4
    return sum(count * (weight + (12 if trained else 0)) for count, trained in sizes)


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


def _as_written(checkpoint: Path) -> Path:
    """The folder of a checkpoint, also of one that was converted for another number of ranks."""
    return checkpoint.with_name(checkpoint.name.removesuffix(UNIVERSAL))


def _written(checkpoint: Path) -> tuple[int, list[str]]:
    """How many ranks wrote a checkpoint, and the names of its files; every rank gets what rank 0
    reads, and does not look for files."""

    def read() -> tuple[int, list[str]]:
        description = read_description(_as_written(checkpoint))
        return description["world_size"], list(description["files"])

    return collectives.on_rank_0(read)


def _random_file() -> str:
    """This rank's file in a checkpoint of as many ranks as there are."""
    return f"{RANDOM}/{collectives.rank():05}-of-{collectives.world_size():05}.safetensors"


def _random_of(checkpoint: Path, values: Mapping[str, Any]) -> list[torch.Tensor] | None:
    """This rank's random state, if as many ranks wrote the checkpoint, and wrote one; `values` hold
    those of all ranks up to format version 3."""
    if "random" in values:
        states: list[list[torch.Tensor]] = values["random"]
        return states[collectives.rank()] if len(states) == collectives.world_size() else None
    ranks, listed = _written(checkpoint)
    own = [_random_file()] if ranks == collectives.world_size() else []

    def saved() -> list[torch.Tensor] | None:
        files = listed_files(_as_written(checkpoint), [name for name in own if name in listed])
        found = [load_file(file) for file in files]
        return [each[name] for each in found for name in GENERATORS if name in each] or None

    return collectives.agree(saved)


def _write_own(partial: Path, state: TrainingState, scorer: EqualSlices | None) -> list[Path]:
    """Writes what this rank has besides the engine's shards; returns the files."""
    written = []
    if state.random is not None:
        file = partial / _random_file()
        file.parent.mkdir(exist_ok=True)
        save_tensors(dict(zip(GENERATORS, state.random, strict=False)), file)
        written.append(file)
    if scorer is not None:
        folder = partial / SCORER
        folder.mkdir(exist_ok=True)
        written.append(scorer.save(folder))
    return written


def _describe_together(partial: Path, own: list[Path]) -> dict[str, dict[str, Any]]:
    """Sizes and hashes by name of the files that all ranks have written, each of its `own`; on rank
    0 alone, which writes them down."""
    threads = workers(process.local_ranks())
    described = collectives.agree(lambda: described_files(partial, own, threads))
    return {
        name: digest
        for part in collectives.collect_on_rank_0(described)
        for name, digest in part.items()
    }
