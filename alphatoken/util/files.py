"""Files that are there whole or not at all, and hashes of them and of values."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

PARTIAL = ".partial"  # how names end of what is still being written


def flush(path: Path) -> None:
    """Makes sure that a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(final: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `final`, then renames it. Raises OSError when the disk
    refuses."""
    partial = final.with_name(f"{final.name}.{uuid.uuid4().hex}{PARTIAL}")
    try:
        write(partial)
        flush(partial)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    flush(final.parent)


def publish_folder(final: Path, write: Callable[[Path], object]) -> None:
    """Has `write` fill a folder beside `final`, then renames it, in place of an older one. What one
    that was killed left behind is removed. Raises OSError when the disk refuses."""
    partial = final.with_name(f"{final.name}{PARTIAL}")
    older = final.with_name(f"{final.name}.older{PARTIAL}")
    for leftover in (partial, older):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        write(partial)
        for path in (*partial.rglob("*"), partial):
            flush(path)
        if final.exists():
            final.rename(older)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    flush(final.parent)
    shutil.rmtree(older, ignore_errors=True)


def publish_text(final: Path, text: str) -> None:
    """Makes a text file appear whole at `final`, or not at all. Raises OSError when the disk
    refuses."""
    publish(final, lambda partial: partial.write_text(text, encoding="utf-8"))


def file_sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def fingerprint(value: object) -> str:
    """A hash of anything JSON can hold."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()
