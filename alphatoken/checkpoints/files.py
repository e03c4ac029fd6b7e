"""What makes a checkpoint valid, on disk: its description, its files' hashes, which one is newest,
which may go.

A checkpoint is written into `step-N.partial`, described in `complete.json` (format version, step,
ranks, configuration, and the size and SHA-256 of every file, as told by the rank that wrote it),
and only then renamed; `latest` names the newest. A folder without a valid description does not
exist for us, and none of its files is opened.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from alphatoken.checkpoints.folder import STEP_FOLDER, step_folders
from alphatoken.distributed import collectives, process
from alphatoken.distributed.pickles import opened_as_data, refused_content
from alphatoken.errors import UserError
from alphatoken.util.files import PARTIAL, file_sha256, fingerprint, flush, publish_text

FORMAT_VERSION = 4
READABLE_VERSIONS = (3, 4)  # in version 3 every rank's file holds all ranks' random states
DESCRIPTION = "complete.json"
LATEST = "latest"
UNIVERSAL = "-universal"  # how names end of what was converted for any number of ranks
SHARDS = "*optim_states.pt"  # what DeepSpeed calls them; at stage 0 there are none
ABOUT = "about.json"  # in the run's model folder
# In names of files that every rank writes: which rank did.
RANK = re.compile(r"(?<=zero_pp_rank_)\d+(?=_)|(?<![^/-])\d{5}(?=-of-\d{5}\.)")


def remove_leftovers(checkpoints: Path) -> None:
    """Removes what saves that were killed have left."""
    for leftover in checkpoints.glob(f"step-*{PARTIAL}"):
        if STEP_FOLDER.fullmatch(leftover.name.removesuffix(PARTIAL)):
            shutil.rmtree(leftover, ignore_errors=True)


def tidy(
    checkpoints: Path,
    saved: int,
    keep_last: int | None,
    keep_every: int | None,
    best: int | None = None,
) -> None:
    """After step `saved`: sets aside what lies beyond it, removes what is not to be kept and
    converted ones of any other checkpoint. That of step `best` is kept.

    A checkpoint of a later step is damaged, or of a continuation that was given up; it is renamed,
    so that it is never taken for newer.
    """
    folders = step_folders(checkpoints)
    for step in [step for step in folders if step > saved]:
        aside = checkpoints / f"{folders.pop(step).name}.abandoned"
        shutil.rmtree(aside, ignore_errors=True)
        (checkpoints / f"step-{step}").rename(aside)
    for step in obsolete(
        [step for step, path in folders.items() if (path / DESCRIPTION).exists()],
        keep_last,
        keep_every,
    ):
        if step == best:
            continue
        shutil.rmtree(folders[step], ignore_errors=True)
    newest = checkpoints / f"step-{saved}"
    for converted in checkpoints.glob(f"step-*{UNIVERSAL}"):
        if converted != universal_folder(newest) or not is_form_of(converted, newest):
            shutil.rmtree(converted, ignore_errors=True)


def obsolete(steps: Iterable[int], keep_last: int | None, keep_every: int | None) -> list[int]:
    """Steps whose checkpoints may go: neither among the last `keep_last` nor a multiple of
    `keep_every`."""
    if keep_last is None:
        return []
    older = sorted(steps, reverse=True)[keep_last:]
    return [step for step in older if keep_every is None or step % keep_every]


def most_at_once(
    total_steps: int, save_every: int | None, keep_last: int | None, keep_every: int | None
) -> int:
    """How many checkpoints of a run lie on the disk together at worst: while one is written, none
    is removed."""
    if save_every is None:
        return 0
    most, kept = 0, set[int]()
    for step in sorted({*range(save_every, total_steps + 1, save_every), total_steps}):
        kept.add(step)
        most = max(most, len(kept))
        kept -= set(obsolete(kept, keep_last, keep_every))
    return most


def read_description(checkpoint: Path) -> dict[str, Any]:
    """Raises UserError where it is missing, damaged, or of another version of this project."""
    file = checkpoint / DESCRIPTION
    try:
        text = file.read_text(encoding="utf-8")
        description: Any = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not isinstance(description, dict) or not isinstance(description.get("sha256"), str):
        raise UserError(f"{file} does not describe a checkpoint: it lacks its own hash")
    sealed = description.pop("sha256")
    if description.get("format_version") not in READABLE_VERSIONS:
        raise UserError(
            f"{file} has format version {description.get('format_version')}, not "
            + " or ".join(map(str, READABLE_VERSIONS))
        )
    if text != _sealed(description):
        raise UserError(
            f"{file} does not have the content that was saved (its hash {sealed[:12]} does not "
            "match)"
        )
    return description


def universal_folder(checkpoint: Path) -> Path:
    """Where a checkpoint's universal form lies."""
    return checkpoint.with_name(checkpoint.name + UNIVERSAL)


def source_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint's universal form says of it: its description, with a fingerprint in place
    of its files."""
    description = read_description(checkpoint)
    # Another save of the same step has other files, and may have all else in common.
    made_from = fingerprint(description.pop("files"))
    return {**description, "made_from": made_from}


def is_form_of(converted: Path, checkpoint: Path) -> bool:
    """Whether a folder says that it was made from this checkpoint as it is now."""
    try:
        description = read_description(converted)
        del description["files"]
        return description == source_of(checkpoint)
    except UserError:
        return False


def write_description(checkpoint: Path, description: dict[str, Any]) -> None:
    """Makes a checkpoint valid."""
    publish_text(checkpoint / DESCRIPTION, _sealed(description))


def missing_files(names: Iterable[str], ranks: int) -> list[str]:
    """Names that a list of files lacks: where one rank has written a file of a kind, every rank
    has."""
    found: dict[tuple[str, str], set[str]] = {}
    for name in names:
        match = RANK.search(name)
        if match is not None:
            found.setdefault((name[: match.start()], name[match.end() :]), set()).add(match[0])
    missing = []
    for (before, after), written in found.items():
        width = 5 if after.startswith("-of-") else 1
        expected = (str(rank).zfill(width) for rank in range(ranks))
        missing += [f"{before}{rank}{after}" for rank in expected if rank not in written]
    return missing


def damage(checkpoint: Path, *, together: bool = False) -> str | None:
    """What is wrong with a checkpoint's files, naming the first wrong one, or None.

    `together`: every rank calls it, reads its share of the files, and gets the same answer. Files
    that pass have the content that was saved, and hold nothing but data.
    """
    if not together:
        return _damage_of_share(checkpoint, slice(None), workers())
    share = slice(collectives.rank(), None, collectives.world_size())
    threads = workers(process.local_ranks())
    found = collectives.agree(lambda: _damage_of_share(checkpoint, share, threads))
    return next((each for each in collectives.gather_objects(found) if each is not None), None)


def _damage_of_share(checkpoint: Path, share: slice, threads: int) -> str | None:
    """What is wrong with a part of the files, in an order that all ranks have."""
    try:
        description = read_description(checkpoint)
    except UserError as error:
        return str(error)
    missing = missing_files(description["files"], description["world_size"])
    if missing:
        return f"{checkpoint / missing[0]} is missing from {checkpoint / DESCRIPTION}"
    by_size = sorted(description["files"].items(), key=lambda item: -item[1]["bytes"])
    with opened_as_data(), ThreadPoolExecutor(threads) as pool:
        wrong = [
            pool.submit(_damage_of, checkpoint / name, expected)
            for name, expected in by_size[share]
        ]
        try:
            return next((found for each in wrong if (found := each.result()) is not None), None)
        finally:  # one wrong file is enough: the others are not read for nothing
            pool.shutdown(cancel_futures=True)


def check_listing(checkpoint: Path) -> None:
    """Whether the folder shows all its files, for readers of DeepSpeed's that take what they see.
    Raises UserError where it does not yet, as on a file system that other machines have written
    to."""
    shown = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*")}
    hidden = [name for name in read_description(checkpoint)["files"] if name not in shown]
    if hidden:
        raise UserError(
            f"the folder {checkpoint} does not show its file {hidden[0]}; a shared file system "
            "may show it in a minute: start again"
        )


def listed_files(checkpoint: Path, names: Iterable[str]) -> list[Path]:
    """Files of a checkpoint by names that its description lists. Raises UserError naming the first
    that is not there for this rank: the description knows which there are, not what a folder
    shows."""
    files = [checkpoint / name for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} is listed in {checkpoint / DESCRIPTION}, but rank {collectives.rank()} "
                "does not find it; a shared file system may show it in a minute: start again, or "
                "restore the file"
            )
    return files


def workers(sharing: int = 1) -> int:
    """How many files of a checkpoint each of so many processes of this machine reads or makes at
    once."""
    return max(1, min(16, (os.cpu_count() or 1) // sharing))


def _damage_of(file: Path, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with one file, or None."""
    try:
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size != expected["bytes"]:
            return f"{file} has {file.stat().st_size} bytes instead of {expected['bytes']}"
        digest = file_sha256(file)
    except OSError as error:
        return f"{file} cannot be read: {error}"
    if digest != expected["sha256"]:
        return (
            f"{file} does not have the content that was saved: its SHA-256 is {digest} instead of "
            f"{expected['sha256']}"
        )
    refused = refused_content(file) if file.suffix == ".pt" else None
    if refused is not None:
        return f"{file} holds more than data, or none, and is not opened: {refused}"
    return None


def described_files(folder: Path, names: Sequence[Path], threads: int) -> dict[str, dict[str, Any]]:
    """Size and hash of files in `folder`, which are on the disk afterwards; by relative name."""
    with ThreadPoolExecutor(threads) as pool:
        digests = pool.map(_flush_and_digest, names)
        return {
            str(file.relative_to(folder)): digest
            for file, digest in zip(names, digests, strict=True)
        }


def free_bytes(folder: Path) -> int:
    """Space left on the disk that holds `folder` or the nearest folder above it that exists."""
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return shutil.disk_usage(existing).free


def _sealed(description: dict[str, Any]) -> str:
    """The description as text, its own hash included."""
    return json.dumps({**description, "sha256": fingerprint(description)}, indent=1)


def _flush_and_digest(file: Path) -> dict[str, Any]:
    flush(file)
    return {"bytes": file.stat().st_size, "sha256": file_sha256(file)}
