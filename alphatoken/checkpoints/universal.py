"""Checkpoints for another number of ranks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console

from alphatoken.checkpoints.files import (
    check_listing,
    damage,
    described_files,
    is_form_of,
    read_description,
    source_of,
    universal_folder,
    workers,
    write_description,
)
from alphatoken.distributed import collectives, conversion
from alphatoken.errors import UserError
from alphatoken.util.files import PartialFolder


def universal_checkpoint(checkpoint: Path) -> Path:
    """The checkpoint in DeepSpeed's universal form, which any number of ranks can load; made once,
    beside it, by rank 0. Every rank must call it.

    Raises UserError with DeepSpeed's last words where it cannot be made.
    """
    target = universal_folder(checkpoint)
    is_there = collectives.on_rank_0(lambda: is_form_of(target, checkpoint))
    if not is_there or damage(target, together=True) is not None:
        collectives.on_rank_0(lambda: _convert(checkpoint, target))
    return target


def bytes_to_convert(checkpoint: Path) -> int:
    """What the disk of a checkpoint has to have free for its universal form: nothing where it is
    there already.

    That is twice its size: DeepSpeed first writes every rank's pieces, which it then merges, and
    the form goes only when the next checkpoint has been written.
    """
    if is_form_of(universal_folder(checkpoint), checkpoint):
        return 0
    files = read_description(checkpoint)["files"].values()
    return 2 * sum(int(each["bytes"]) for each in files)


def _convert(checkpoint: Path, target: Path) -> None:
    """Makes the universal form, in place of what is there."""
    check_listing(checkpoint)
    folder = PartialFolder(target)
    try:
        folder.create()
        shutil.rmtree(target, ignore_errors=True)  # before, as both may not fit
        _fill(checkpoint, folder.path)
        folder.publish()
    except OSError as error:
        raise UserError(
            f"cannot convert {checkpoint} to {target}: {error}; make room, or make the folder "
            "writable"
        ) from None
    finally:
        folder.discard()


def _fill(checkpoint: Path, partial: Path) -> None:
    """Writes the universal form with its description."""
    Console(stderr=True, highlight=False).print(
        f"converting {checkpoint} for another number of ranks, which wait", markup=False
    )
    folders = ["--input_folder", str(checkpoint), "--output_folder", str(partial)]
    at_once = [
        *("--num_extract_workers", str(_extracting(checkpoint))),
        *("--num_merge_workers", str(workers())),
    ]
    command = [sys.executable, "-m", conversion.__name__, *folders, *at_once]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise UserError(
            f"DeepSpeed cannot convert {checkpoint} for another number of "
            f"ranks:\n{finished.stderr.strip()[-1000:]}"
        )
    names = sorted(path for path in partial.rglob("*") if path.is_file())
    write_description(
        partial, {**source_of(checkpoint), "files": described_files(partial, names, workers())}
    )
    # DeepSpeed's converter notes the new tag beside the checkpoints.
    (checkpoint.parent / "latest_universal").unlink(missing_ok=True)


def _extracting(checkpoint: Path) -> int:
    """How many of DeepSpeed's processes may read a rank's file each: together they take at most a
    quarter of the machine's memory, or one reads after the other."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    largest = max(file.stat().st_size for file in checkpoint.glob("*.pt"))
    return max(1, min(workers(), memory // (4 * largest)))
