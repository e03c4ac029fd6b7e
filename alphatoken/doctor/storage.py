"""Whether every rank can write where a run writes, sees what the others write there, and whether
there is room."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from torch import nn

from alphatoken.checkpoints.files import free_bytes, most_at_once
from alphatoken.checkpoints.folder import RunFolder, step_folders
from alphatoken.checkpoints.saving import checkpoint_bytes
from alphatoken.config.run import RunConfig
from alphatoken.distributed import collectives
from alphatoken.doctor.findings import Finding, Seen, named, on_every_rank, verdict
from alphatoken.errors import UserError
from alphatoken.util.wording import plural, size

# How long a file may take to appear on another node: network file systems look into a folder
# again after seconds.
APPEARS_WITHIN = 10.0


def check_shared_folder(
    check: str, folder: Path, nodes: Sequence[str], mark: str, *, must_be_shared: bool
) -> Finding:
    """Has every rank write a file into `folder` and rank 0's be looked for by all. Every rank must
    call it.

    `mark` is part of the files' names, the same on all ranks and of no other run. What it has
    written, folders included, is removed again.
    """
    rank, leads = collectives.rank(), nodes.index(nodes[collectives.rank()]) == collectives.rank()
    name = f".{mark}-rank-"
    made: list[Path] = []

    def write() -> None:
        try:
            made.extend(_make_missing(folder))
            (folder / f"{name}{rank}").write_text(mark, encoding="utf-8")
        except OSError as error:
            reason = "it is a file" if folder.is_file() else error.strerror
            raise UserError(f"cannot write into {folder}: {reason}") from None

    # In this order, so that one rank makes (and removes) all missing folders of a file system.
    stages = [on_every_rank(lambda: write() if rank == 0 else None)]
    stages.append(on_every_rank(lambda: write() if rank and leads else None))
    stages.append(on_every_rank(lambda: write() if rank and not leads else None))
    by_rank = zip(*(stage.failures for stage in stages), strict=True)
    writing = Seen[None](None, tuple(next(filter(None, of_rank), None) for of_rank in by_rank))
    sees = not stages[0].everywhere or _appears(folder / f"{name}0", mark)
    seen = collectives.gather_objects(sees)
    with suppress(OSError):
        (folder / f"{name}{rank}").unlink(missing_ok=True)
    collectives.barrier()
    if rank:
        _remove(made)
    collectives.barrier()
    _remove(made)

    if not writing.everywhere:
        fix = "make it writable for the user of every rank, or choose another folder"
        return verdict(check, writing, nodes, "", fix)
    blind = [each for each, found_it in enumerate(seen) if not found_it]
    if blind:
        found = (
            f"{named(blind, nodes)}: {folder} is writable, but the file that rank 0 ({nodes[0]}) "
            "wrote is not there"
        )
        concerned = tuple(sorted({nodes[each] for each in blind}))
        if must_be_shared:
            return Finding(
                check,
                "failed",
                found,
                "choose a folder on a file system that all nodes share",
                concerned,
            )
        return Finding(
            check,
            "warning",
            found,
            "each node will tokenise the data for itself; share it to do that once",
            concerned,
        )
    shared = "" if len(nodes) == 1 else ", and seen by all ranks"
    return Finding(check, "ok", f"{folder} is writable{shared}")


def check_space(config: RunConfig, model: nn.Module, train_rows: int) -> Finding:
    """Free space against what the checkpoints and the export of a run take together at worst; for
    rank 0.

    `model` may be on the meta device.
    """
    train, folder = config.train, RunFolder(config.train.output_dir)
    in_16_bit = config.model.dtype == "bfloat16"
    one = checkpoint_bytes(model, trains_in_16_bit=in_16_bit)
    exported = [
        each for each in model.parameters() if each.requires_grad or config.model.lora is None
    ]
    export = sum(each.numel() for each in exported) * (2 if in_16_bit else 4)
    most = most_at_once(
        train.total_steps(train_rows), train.save_every, train.keep_last, train.keep_every
    )
    if train.keep_best is not None:  # the best one so far, and the next while it is written
        most += 2 if train.save_every is None else 1
    to_come = max(most - len(step_folders(folder.checkpoints)), min(most, 1))
    needed, free = to_come * one + export, free_bytes(folder.path)
    what = f"the export ({size(export)})"
    if most:
        what = f"{plural(to_come, 'checkpoint')} of {size(one)} and {what}"
    found = f"{size(free)} free for {folder.path}, where a run writes {what}"
    if free >= needed:
        return Finding("disk space", "ok", found)
    fix = f"make room for {size(needed - free)} more"
    if most > 1:
        fix += ", or keep fewer checkpoints with train.keep_last"
    return Finding("disk space", "failed", found, fix)


def _make_missing(folder: Path) -> list[Path]:
    """Makes a folder with those above it; returns the ones that were not there, outermost first."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing[::-1]


def _remove(folders: list[Path]) -> None:
    """Removes empty folders, innermost first; what others have filled stays."""
    for folder in reversed(folders):
        with suppress(OSError):
            folder.rmdir()


def _appears(file: Path, content: str) -> bool:
    until = time.monotonic() + APPEARS_WITHIN
    while True:
        with suppress(OSError):
            if file.read_text(encoding="utf-8") == content:
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
