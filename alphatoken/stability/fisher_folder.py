"""The folder of a Fisher estimate: unfinished sums, and what is whole."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alphatoken.distributed import collectives, zero3
from alphatoken.distributed.shard_files import TensorFile, save_slices
from alphatoken.errors import UserError
from alphatoken.stability.fisher_sum import FisherSum
from alphatoken.util.differences import differences
from alphatoken.util.files import PARTIAL, WriterLock, flush


class EstimateFolder:
    """Where an estimate lies when it is done, and beside it (`.partial`) what has been summed so
    far.

    `settings` is what decides the numbers; `about` goes into the header too. Raises UserError when
    the folder or its partial one holds an estimate with other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], about: dict[str, Any]) -> None:
        self.path = path
        self._partial = path.with_name(path.name + PARTIAL)
        self._lock = WriterLock(path, "set fisher.output to another folder")
        self._settings = settings
        self._header = {"settings": settings, **about}

    @contextmanager
    def claimed(self) -> Iterator[bool]:
        """Tells whether the estimate has to be made, which no other run does meanwhile: rank 0
        holds a lock beside the folder that ends with its process. Every rank must enter it.

        Raises UserError on every rank where another run is making the estimate, or the disk
        refuses.
        """
        if self._is_complete():
            yield False
            return
        try:
            collectives.on_rank_0(self._lock.acquire)
        except OSError as error:
            raise UserError(f"cannot write the Fisher to {self.path}: {error}") from None
        try:
            yield not self._is_complete()  # the other run may have finished between the two
        finally:
            self._lock.release()

    def _is_complete(self) -> bool:
        """Whether the estimate is there. Every rank must ask."""

        def check() -> bool:
            if not self.path.exists() or (self.path.is_dir() and not any(self.path.iterdir())):
                return False
            self._check_settings(TensorFile(self.path), "or use it as it is with valuation.fisher")
            return True

        return collectives.on_rank_0(check)

    def resume(self, total: FisherSum) -> int:
        """Loads the newest sums, saved by any number of ranks; returns how many prompts they are
        of, 0 if none."""

        def newest() -> Path | None:
            states = sorted(
                self._partial.glob("prompts-*[0-9]"), key=lambda path: int(path.name.split("-")[1])
            )
            return states[-1] if states else None

        folder = collectives.on_rank_0(newest)
        if folder is None:
            return 0

        def load() -> int:
            state = TensorFile(folder)
            self._check_settings(state, "or finish it with the settings it has")
            for name, own in total.slices.items():
                start, end = zero3.slice_range(total.parameters[name])
                own[: end - start] = state.flat(name, start, end).to(own.device)
            return int(state.header["prompts"])

        return collectives.agree(load)

    def save(self, total: FisherSum, prompts: int) -> None:
        """Saves the sums over the first `prompts` prompts in place of older ones."""
        final = self._partial / f"prompts-{prompts}"
        self._write(
            total.slices, total, final, {**self._header, "prompts": prompts, "finished": False}
        )
        if collectives.rank() == 0:
            for older in self._partial.iterdir():
                if older != final:
                    shutil.rmtree(older, ignore_errors=True)
        collectives.barrier()

    def finish(self, total: FisherSum, prompts: int) -> None:
        """Writes the mean over all `prompts` prompts; what was kept for resuming is removed.

        Raises UserError on every rank, and writes nothing, where the mean is not finite.
        """

        def check() -> None:
            faulty = [
                name for name, own in total.slices.items() if not bool(torch.isfinite(own).all())
            ]
            if faulty:
                shutil.rmtree(self._partial, ignore_errors=True)  # no use going on from there
                raise UserError(
                    f"the Fisher of {', '.join(faulty)} is not finite: gradients overflow on these "
                    "prompts; try model.dtype=float32"
                )

        collectives.agree(check)
        mean = {name: own / prompts for name, own in total.slices.items()}
        self._write(mean, total, self.path, {**self._header, "prompts": prompts, "finished": True})
        if collectives.rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
        collectives.barrier()

    def _write(
        self, slices: Mapping[str, Tensor], total: FisherSum, final: Path, header: dict[str, Any]
    ) -> None:
        """All ranks write beside `final`; then rank 0 renames."""
        writing = self._partial / f"{final.name}.writing"

        def prepare() -> None:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir(parents=True)

        def publish() -> None:
            flush(writing)
            writing.rename(final)
            flush(final.parent)

        try:
            collectives.on_rank_0(prepare)
            collectives.agree(lambda: save_slices(writing, slices, total.parameters, header))
            collectives.on_rank_0(publish)
        except OSError as error:
            raise UserError(f"cannot write the Fisher to {final}: {error}") from None

    def _check_settings(self, found: TensorFile, otherwise: str) -> None:
        changed = differences(found.header.get("settings", {}), self._settings)
        if changed:
            raise UserError(
                f"{found} holds a Fisher with other settings; remove it, set fisher.output to "
                f"another folder, {otherwise}:\n"
                "  " + "\n  ".join(changed)
            )
