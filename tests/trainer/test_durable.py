"""Reading JSON that may hold anything, and a folder's lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastgpt2.config import ConfigError
from fastgpt2.durable import JSON_BYTES, LOCK_NAME, InUseError, locked, read_json, sha256


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


NO_OBJECTS: dict[str, tuple[bytes | Callable[[Path], object], str]] = {
    "missing": (lambda path: None, "No such file or directory"),
    "a folder": (Path.mkdir, "Not a regular file"),
    "a pipe": (os.mkfifo, "Not a regular file"),
    "an endless device": (link_to("/dev/zero"), "Not a regular file"),
    "a link to itself": (link_to("file.json"), "Too many levels of symbolic links"),
    "an input/output error": (link_to("/proc/self/mem"), "Input/output error"),
    "empty": (b"", "Expecting value"),
    "no JSON": (b"step 4", "Expecting value"),
    "cut": (b'{"step": ', "Expecting value"),
    "no UTF-8": (b'{"step": "\xff"}', "can't decode byte 0xff"),
    "no object": (b"[1]", "expected a JSON object, got list"),
    "deep list": (b"[" * 100_000, "it is nested too deeply"),
    "deep object": (b'{"a":' * 100_000, "it is nested too deeply"),
    "an integer of thousands of digits": (b'{"step": ' + b"9" * 5000 + b"}", "a number is too long"),
    "a list of integers of thousands of digits": (b'{"a": [' + b"9" * 5000 + b"]}", "a number is too long"),
    "too large": (b" " * (JSON_BYTES + 1), "it is larger than 16,777,216 bytes"),
}


@pytest.mark.parametrize("name", NO_OBJECTS)
def test_what_is_no_json_object_is_one_line(name: str, tmp_path: Path) -> None:
    made, reason = NO_OBJECTS[name]
    path = tmp_path / "file.json"
    path.write_bytes(made) if isinstance(made, bytes) else made(path)
    with pytest.raises(ConfigError) as error:
        read_json(path)
    message = str(error.value)
    assert message.startswith(f"can't read {path}: ") and reason in message and "\n" not in message


def test_a_json_object_is_read(tmp_path: Path) -> None:
    value = {"step": 4, "loss": None, "name": "ä", "nested": {"list": [1.5, True]}}
    (tmp_path / "file.json").write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
    assert read_json(tmp_path / "file.json") == value


def test_the_sum_of_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        sha256(tmp_path / "pipe")


# ---------------------------------------------------------------------------------------------------- lock

HOLD = """
import os, sys
from pathlib import Path
from fastgpt2.durable import locked
with locked(Path(sys.argv[1])) as held:
    assert held
    if len(sys.argv) > 2:
        ready, tell = os.pipe()
        if os.fork() == 0:
            os.close(1)
            os.write(tell, b"!")
            sys.stdin.read()  # outlives its parent
            os._exit(0)
        os.read(ready, 1)  # it has begun: what it does after a fork is done
    print(os.getpid(), flush=True)
    sys.stdin.read()
"""


def holder(folder: Path, *more: str) -> subprocess.Popen[str]:
    argv = [sys.executable, "-c", HOLD, str(folder), *more]
    return subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("children", [(), ("a forked child",)], ids=["alone", "with a child"])
def test_a_lock_names_its_process_and_dies_with_it(children: tuple[str, ...], tmp_path: Path) -> None:
    with holder(tmp_path, *children) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        with pytest.raises(InUseError) as error, locked(tmp_path):
            pass
        assert error.value.holder == f"process {pid} on {os.uname().nodename}"
        assert str(error.value) == f"{tmp_path} is in use by {error.value.holder}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        with locked(tmp_path) as held:  # even though the child is alive
            assert held


def test_a_lock_keeps_out_its_own_process_until_it_is_given_back(tmp_path: Path) -> None:
    for _ in range(2):
        with locked(tmp_path), pytest.raises(InUseError, match=f"in use by process {os.getpid()} "), locked(tmp_path):
            pass


def test_a_lock_outlives_its_file(tmp_path: Path) -> None:
    """Someone may delete the hidden file. A link in its place is not written through."""
    with locked(tmp_path):
        (tmp_path / LOCK_NAME).unlink()
        with pytest.raises(InUseError), locked(tmp_path):
            pass
    other = tmp_path / "other"
    other.write_text("mine")
    (tmp_path / LOCK_NAME).unlink()
    (tmp_path / LOCK_NAME).symlink_to(other)
    with pytest.raises(OSError), locked(tmp_path):
        pass
    assert other.read_text() == "mine"


def test_where_folders_have_no_locks_the_file_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS, for example, only locks files open for writing."""
    flock = fcntl.flock

    def of_files(descriptor: int, how: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", of_files)
    with locked(tmp_path) as held:
        assert held
        with pytest.raises(InUseError, match=f"process {os.getpid()} "), locked(tmp_path):
            pass


def test_a_child_that_is_forked_gives_no_lock_back(tmp_path: Path) -> None:
    with locked(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(InUseError), locked(tmp_path):
            pass


@pytest.mark.parametrize("text", [b"", b"\xff\0\n", b"another text"])
def test_a_lock_file_may_hold_anything(text: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with locked(tmp_path):
        (tmp_path / LOCK_NAME).write_bytes(text)
        with pytest.raises(InUseError, match="in use by another process"), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    with locked(tmp_path) as held:
        assert not held
