"""Files that are still there, and still right, after a crash, a power cut or a bad disk."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastgpt2.config import ConfigError

LOCK_NAME = ".lock"
JSON_BYTES = 16 << 20
"""The most that a JSON file of ours may have: the meta.json of 100,000 shards has 12 MB."""


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


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file to read its bytes. A pipe or a device, which could wait or go on for ever, is an error.

    Raises:
        OSError: it can't be opened, or is no regular file (IsADirectoryError).
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file that anyone may have written; its keys and values are for the caller to check.

    Raises:
        ConfigError: "can't read PATH: reason": it is missing, can't be read, is over JSON_BYTES, or is no JSON object.
    """
    try:
        with open_regular(path) as file:
            data = file.read(JSON_BYTES + 1)
        if len(data) > JSON_BYTES:
            raise ValueError(f"it has over {JSON_BYTES:,} bytes")
        value = json.loads(data.decode("utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"it holds no JSON object but a {type(value).__name__}")
    except RecursionError:
        raise ConfigError(f"can't read {path}: it is nested too deeply") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"can't read {path}: {reason}") from None
    return value


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
