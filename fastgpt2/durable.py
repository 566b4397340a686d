"""Files that are still there, and still right, after a crash, a power cut or a bad disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

LOCK_NAME = ".lock"


class OutputError(RuntimeError):
    """An output of a run can't be written: the disk is full, or gone. The message is one line."""


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't do it for a folder.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Replace a small file: whatever happens there is the old one or the new one, whole.

    Raises:
        OutputError: it can't be written; the old one is as it was.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise OutputError(f"can't write {path}: {error.strerror}") from None


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class InUseError(RuntimeError):
    """Another process holds the lock of a folder."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder for this process alone. The lock ends with the process, however that ends.

    Yields:
        True, or False where the file system knows no locks: then nothing keeps a second process out.

    Raises:
        InUseError: another process (or another caller in this one) holds it.
        OSError: the lock file can't be opened.
    """
    # The file stays: deleting it would let two processes lock two files of one name.
    descriptor = os.open(folder / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = True
        except BlockingIOError:
            raise InUseError(f"{folder} is in use by another process") from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
                raise
            held = False
        yield held
    finally:
        os.close(descriptor)
