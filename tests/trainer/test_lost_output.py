"""Output that goes away: a closed pipe, a full disk or a lost terminal never ends a run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import pytest

from fastgpt2 import console
from fastgpt2.command import main
from fastgpt2.console import discard_unwritten, unfailing
from fastgpt2.reporters.display import TrainDisplay

RUN = ["--model", "tiny", "--batch-size", "2", "--block-size", "8", "--device", "cpu", "--steps", "4"]


@pytest.fixture(autouse=True)
def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.reporters.display.plot_losses", lambda out, result: out / "loss.png")


def nobody_reads() -> TextIO:
    read, write = os.pipe()
    os.close(read)
    return open(write, "w")


def full() -> TextIO:
    return open("/dev/full", "w")


def terminal_that_is_gone() -> TextIO:
    master, slave = os.openpty()
    stream = os.fdopen(slave, "w")
    os.close(master)
    return stream


def closed() -> TextIO:
    stream = io.TextIOWrapper(io.BytesIO())
    stream.close()
    return stream


GONE = [nobody_reads, full, terminal_that_is_gone, closed, lambda: None]
EACH_GONE = pytest.mark.parametrize("make", GONE, ids=["pipe", "full disk", "terminal", "closed", "none"])


@EACH_GONE
def test_what_can_not_be_written_is_dropped(make: Callable[[], TextIO]) -> None:
    stream = make()
    output = unfailing(stream)
    for _ in range(3):
        assert output.write("text\n") == 5
        output.flush()
    assert not output.isatty() or make is terminal_that_is_gone
    discard_unwritten(stream)
    assert discard_unwritten(stream) is None or make is closed
    if make not in (closed, GONE[-1]):
        stream.close()  # this writes what is buffered


def test_a_reader_that_stops_reading_is_waited_for_once_and_may_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.console.STALLED_S", 0.01)
    waits = []
    poll = console.can_write
    monkeypatch.setattr(console, "can_write", lambda fd, seconds: (waits.append(seconds), poll(fd, seconds))[1])
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader, os.fdopen(writing, "w") as stream:
        output = unfailing(stream)
        while not waits or poll(writing, 0.0):
            output.write("x" * 4096)
        waits.clear()
        for _ in range(3):
            output.write("dropped")
        assert waits == [0.01, 0.0, 0.0]
        assert set(os.read(reading, 1 << 20)) == {ord("x")}
        output.write("again\n")
        assert reader.readline() == b"again\n"


def test_output_goes_on_when_the_disk_has_room_again() -> None:
    class Disk(io.StringIO):
        room, flushed = False, 0

        def flush(self) -> None:
            if not self.room:
                raise OSError(28, "No space left on device")
            self.flushed += 1

    disk = Disk()
    output = unfailing(disk)
    output.write("one ")
    output.flush()
    disk.room = True
    output.write("two")
    output.flush()
    assert disk.getvalue() == "one two" and disk.flushed == 1


@EACH_GONE
@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_run_outlives_its_output(
    make: Callable[[], TextIO], both: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", make())
    if both:
        monkeypatch.setattr(sys, "stderr", make())
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    assert (tmp_path / "checkpoints" / "step-00000004").is_dir()


def test_a_terminal_may_go_away_under_the_progress_bar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    master, slave = os.openpty()
    with os.fdopen(slave, "w") as terminal:
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setattr(sys, "stdout", terminal)
        stepped = TrainDisplay.stepped
        shown = []

        def then(self: TrainDisplay, done: int) -> None:
            stepped(self, done)
            if done == 1:
                assert self.live
                shown.append(os.read(master, 65536))
                os.close(master)

        monkeypatch.setattr(TrainDisplay, "stepped", then)
        assert main([*RUN, "--out", str(tmp_path)]) == 0
    assert b"writing to" in shown[0] and (tmp_path / "checkpoints" / "step-00000004").is_dir()


# Each runs in its own process, forked after the slow imports, and exits as Python does.
ENDINGS = """
import contextlib, gc, io, os, sys
sys.modules["triton"] = None  # frozen, it would print what it leaks
from pathlib import Path
from fastgpt2 import console
from fastgpt2.reporters import display
from fastgpt2.command import main
display.plot_losses = lambda out, result: out / "loss.png"


def ends(name, prepare, command):
    if child := os.fork():
        print(name, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        sys.stdout.flush()
        return
    prepare()
    console.run_command(command)


def pipe(*numbers):
    read, write = os.pipe()
    for number in numbers:
        os.dup2(write, number)
    os.close(read)
    os.close(write)


def file(path, *numbers):
    opened = os.open(path, os.O_RDWR)
    for number in numbers:
        os.dup2(opened, number)


def close():
    sys.stdout = None
    os.close(1)


def run(name):
    return lambda: main([*sys.argv[1:], "--out", name])


def refuse():
    from fastgpt2 import ConfigError
    raise ConfigError("no")


with contextlib.redirect_stdout(io.StringIO()):
    run("first")()  # for its imports
gc.freeze()  # or the end of each would go through all that was imported
ends("pipes", lambda: pipe(1, 2), run("pipes"))
ends("full", lambda: file("/dev/full", 1), run("full"))
ends("closed", close, run("closed"))
# Other commands exist for their output: if it is lost, the status says so.
ends("print_pipe", lambda: pipe(1), lambda: print("text"))
ends("print_full", lambda: file("/dev/full", 1), lambda: print("text"))
ends("refused", lambda: pipe(2), refuse)
"""


def test_no_output_changes_how_a_run_ends(tmp_path: Path) -> None:
    line = [sys.executable, "-c", ENDINGS, *RUN]
    # Unbuffered output would fail when it is printed, not at the end.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    ends = {name: int(status) for name, status in (line.split() for line in done.stdout.splitlines())}
    runs = dict.fromkeys(["pipes", "full", "closed"], 0)
    assert ends == runs | {"print_pipe": 1, "print_full": 1, "refused": 2}, done.stderr
    for name in runs:
        assert (tmp_path / name / "checkpoints" / "step-00000004").is_dir(), name
        text = (tmp_path / name / "metrics.jsonl").read_text()
        assert text.count("\n") == text.count('{"step": ') == 2, text  # nothing printed ended up in it
    assert done.stderr == "error: No space left on device\n"
