"""Files that are there whole or not at all, and hashes of them and of values."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from alphatoken.errors import UserError

PARTIAL = ".partial"  # how names end of what is still being written
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # what a file system without them says


def flush(path: Path) -> None:
    """Makes sure that a file's content, or a folder's list of files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def writing(file: Path) -> Iterator[None]:
    """Inside, a file is written; what the disk says against it is a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {file}: {error.strerror}") from None


def publish(final: Path, write: Callable[[Path], object]) -> None:
    """Has `write` make a file beside `final`, then renames it. Raises OSError when the disk
    refuses."""
    # Not with_name, which refuses `.` and `/`: the disk does.
    partial = final.parent / f"{final.name}.{uuid.uuid4().hex}{PARTIAL}"
    try:
        write(partial)
        flush(partial)
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)
    flush(final.parent)


def check_is_new(target: Path) -> None:
    """Raises UserError where a folder to be written exists."""
    if target.exists():
        raise UserError(f"{target} exists; name a new folder")


class WriterLock:
    """What one process at a time holds while it writes `final`: a lock beside it that ends with the
    process. On a file system that knows no locks nothing keeps others out. `otherwise` is what else
    than waiting the user of another process can do."""

    def __init__(self, final: Path, otherwise: str = "name another folder") -> None:
        self._final = final
        self._otherwise = otherwise
        lock = final.with_name(f"{final.name}.lock{PARTIAL}")
        self._lock = FileLock(lock, thread_local=False)

    @property
    def is_held(self) -> bool:
        """Whether this process holds it."""
        return bool(self._lock.is_locked)

    def acquire(self) -> None:
        """Raises UserError where another process holds it, and OSError when the disk refuses."""
        self._final.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise UserError(
                f"another process is writing {self._final} (it holds {self._lock.lock_file}); wait "
                f"until it has ended, or {self._otherwise}"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise

    def release(self) -> None:
        """Lets others write. Nothing where it is not held."""
        if not self.is_held:
            return
        # While it is locked: who has opened it before finds that it is gone.
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


class PartialFolder:
    """A folder that is filled beside its place, at `path`, and then renamed, in place of an older
    one, by one process at a time (`WriterLock`). Raises OSError when the disk refuses."""

    def __init__(self, final: Path) -> None:
        final = final.resolve()  # a link stays one, and what it leads to is replaced
        self._final = final
        self._lock = WriterLock(final)
        self._is_created = False
        self._older = final.with_name(f"{final.name}.older{PARTIAL}")
        self.path = final.with_name(f"{final.name}{PARTIAL}")

    def create(self, *, replace: bool = True) -> None:
        """Makes it, empty. What one that was killed has left behind is removed, and an older folder
        is put back that it had only moved away. Raises UserError where another process is filling
        it, and without `replace` where there is one at its place."""
        self._lock.acquire()
        if self._older.exists() and not self._final.exists():
            self._older.rename(self._final)
        for leftover in (self.path, self._older):
            _remove(leftover)
        if not replace:
            check_is_new(self._final)
        self.path.mkdir()
        self._is_created = True

    def publish(self) -> None:
        """Makes it appear whole in its place."""
        for path in (*self.path.rglob("*"), self.path):
            flush(path)
        if self._final.exists():
            self._final.rename(self._older)
        self.path.rename(self._final)
        self._is_created = False
        flush(self._final.parent)
        _remove(self._older)

    def discard(self) -> None:
        """Ends the writing: removes it where it was not published. Nothing where it was not
        created."""
        if self._is_created:
            shutil.rmtree(self.path, ignore_errors=True)
        self._lock.release()


def _remove(leftover: Path) -> None:
    """Removes a folder, or whatever stood in the place of one, if there is any."""
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)


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
