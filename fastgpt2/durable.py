"""Files that survive a crash, a power cut or a bad disk: atomic writes, checksums, locks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import stat
import threading
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

from fastgpt2.config import ConfigError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_NAME = ".lock"
JSON_BYTES = 16 << 20
"""The largest JSON file that is read. The meta.json of 100,000 shards has 12 MB."""


class OutputError(RuntimeError):
    """An output of a run can't be written: the disk is full or gone. The message is one line."""


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows can't open folders
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't sync a folder.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


class SameFolder:
    """A folder that must stay the same one during a run: a new folder of that name would lack earlier outputs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._was = self._identity()

    def check(self) -> None:
        """Raise OutputError if the folder was moved, deleted or replaced."""
        if self._identity() != self._was:
            raise OutputError(f"{self.path} was moved or deleted during the run: put it back")

    def _identity(self) -> tuple[int, int] | None:
        try:
            status = self.path.stat()
        except OSError:
            return None
        return status.st_dev, status.st_ino


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically: a crash leaves the old or the new contents, complete.

    Raises:
        OutputError: the file can't be written. The old contents are unchanged.
    """
    aside = path.with_name(f".{path.name}.writing")
    try:
        aside.write_text(text, encoding="utf-8")
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise OutputError(f"can't write {path}: {error.strerror}") from None


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read its bytes. Refuses a pipe or a device, which could block or never end.

    Raises:
        OSError: the file can't be opened or is not a regular file (IsADirectoryError).
    """
    descriptor = os.open(path, os.O_RDONLY | _READ_FLAGS)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, "Not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


_READ_FLAGS = sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_CLOEXEC", "O_BINARY"))
"""Windows has only the last; the others lack it."""


def read_at(descriptor: int, size: int, offset: int) -> bytes:
    """Read up to `size` bytes at an offset, from any thread. Uses os.pread, or a lock where Windows lacks it."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, size, offset)
    with _reading:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)


_reading = threading.Lock()


def sha256(path: Path) -> str:
    """A file's SHA-256, in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in an untrusted JSON file. The caller checks its keys and values.

    Raises:
        ConfigError: "can't read PATH: reason". The file is missing, unreadable, larger than JSON_BYTES, or not a JSON
            object.
    """
    try:
        with open_regular(path) as file:
            data = file.read(JSON_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"can't read {path}: {error.strerror}") from None
    if len(data) > JSON_BYTES:
        raise ConfigError(f"can't read {path}: it is larger than {JSON_BYTES:,} bytes")
    try:
        value = json.loads(data.decode("utf-8"))
    except RecursionError:
        raise ConfigError(f"can't read {path}: it is nested too deeply") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"can't read {path}: {error}") from None
    except ValueError:  # int() refuses thousands of digits
        raise ConfigError(f"can't read {path}: a number is too long") from None
    if not isinstance(value, dict):
        raise ConfigError(f"can't read {path}: expected a JSON object, got {type(value).__name__}")
    return value


class InUseError(RuntimeError):
    """Another process holds the lock of a folder. `holder` names it: "process 4711 on HOST"."""

    def __init__(self, folder: Path, holder: str) -> None:
        super().__init__(f"{folder} is in use by {holder}")
        self.holder = holder


_held: set[int] = set()
"""The descriptors of the locks that this process holds."""


def _leave_locks_to_the_parent() -> None:
    """Close a forked child's copies: they would keep the locks after its parent ends. Closing one releases no lock."""
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)
"""Errors of a file system without locks, or (EBADF) without locks on folders."""


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Lock a folder for this process. The lock ends with the process, even if it is killed.

    Yields:
        True if locked. False if the file system, or the system (Windows), has no such locks: nothing keeps a second
            process out.

    Raises:
        InUseError: another process (or another caller in this one) holds it.
        OSError: the folder or the lock file can't be opened.
    """
    if fcntl is None:
        yield False
        return
    # Lock the folder itself, which nobody deletes by mistake. The file names the holder, and is locked where a network
    # file system can lock only files.
    lock_file = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with _opened(folder, os.O_RDONLY | os.O_DIRECTORY) as itself, _opened(folder / LOCK_NAME, lock_file) as file:
        held = _try_to_lock(itself, folder, file) or _try_to_lock(file, folder, file)
        if held:
            _write_holder(file)
        yield held


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
    _held.add(descriptor)
    try:
        yield descriptor
    finally:
        if descriptor in _held:  # false in a forked child
            _held.remove(descriptor)
            os.close(descriptor)


def _try_to_lock(descriptor: int, folder: Path, holder: int) -> bool:
    """Try to lock a file or folder. Returns False if the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InUseError(folder, _read_holder(holder)) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _write_holder(descriptor: int) -> None:
    """Write who holds a lock, for the message to other processes. If that fails (full disk), keep the lock."""
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {platform.node()}".encode(errors="replace"), 0)


def _read_holder(descriptor: int) -> str:
    text = os.pread(descriptor, 200, 0).decode(errors="replace")
    return text if text.startswith("process ") and text.isprintable() else "another process"
