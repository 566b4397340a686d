"""What the pictures' records hold: training runs in a terminal, and the losses of every backend."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import pty
import re
import select
import shlex
import struct
import subprocess
import sys
import tempfile
import termios
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from bench.record import Record, TrainingRun, Trajectory
from bench.report.results import RESULTS
from bench.timing import ROOT, commit, environment
from fastgpt2.config import ConfigError, Dtype
from fastgpt2.metrics import curve, read_json_lines

FOLDER = RESULTS / "pictures"
ROWS, COLUMNS = 24, 100
"""Size of the terminal that a run is watched on."""
FIRST = ("--data", "stdlib", "--lr", "3e-3", "--schedule", "cosine", "--warmup-steps", "40")
"""README's first run."""
SAMPLE = ("--prompt", "def ", "--max-new-tokens", "700")
PRECISIONS: tuple[Dtype, ...] = ("float32", "bfloat16")


def training_run(flags: Sequence[str]) -> TrainingRun:
    """Train by the command in a folder of its own, then evaluate and sample.

    Raises:
        ConfigError: pyte is missing, or one of the commands failed.
    """
    command = ["fastgpt2.train", *flags]
    with tempfile.TemporaryDirectory(prefix="fastgpt2-") as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"  # as on the first day; no path of this machine is shown
        screen = watch([sys.executable, "-m", *command], scratch)
        (out,) = Path(scratch, "runs").iterdir()
        records = read_json_lines(out / "metrics.jsonl")
        evaluated = _output("fastgpt2.evaluate", "--from", str(out))
        sample = _output("fastgpt2.sample", "--from", str(out), *SAMPLE)
    loss, unigram = (float(re.findall(rf"^{name} +([0-9.]+)", evaluated, re.M)[0]) for name in ("loss", "unigram"))
    return TrainingRun(
        command=f"python -m {shlex.join(command)}",
        losses=[*zip(*curve(records, "loss"), strict=True)],
        val_losses=[*zip(*curve(records, "val_loss"), strict=True)],
        loss=loss,
        unigram=unigram,
        seconds=max(record["seconds"] for record in records),
        sample_command=f"python -m fastgpt2.sample --from OUT {shlex.join(SAMPLE)}",
        sample=sample,
        screen=screen,
    )


def _environment() -> dict[str, str]:
    """Of a command of ours that runs in another folder."""
    return {**os.environ, "PYTHONPATH": str(ROOT)}


def _output(*command: str) -> str:
    """What a command of ours prints."""
    done = subprocess.run(
        [sys.executable, "-m", *command], env=_environment(), capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise ConfigError(f"{command[0]} failed: {done.stderr.strip()}")
    return done.stdout


def watch(command: Sequence[str], folder: str) -> list[list[tuple[str, str, bool]]]:
    """Run a command in a terminal, and return what its screen showed last before the first line left it."""
    try:
        import pyte  # only to record: no dependency
    except ImportError:
        raise ConfigError("recording a run needs a terminal emulator: pip install pyte") from None

    class Screen(pyte.Screen):
        def select_graphic_rendition(self, *attributes: int, **private: bool) -> None:
            """Show dim text, which pyte doesn't know, as bright black."""
            super().select_graphic_rendition(*(90 if a == 2 else a for a in attributes), **private)

    screen = Screen(COLUMNS, 10_000)  # lines that leave the terminal stay on it
    stream = pyte.ByteStream(screen)
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    look = {"TERM": "xterm-256color", "COLORTERM": "truecolor"}
    shown: list[list[tuple[str, str, bool]]] = []
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=folder,
        env=_environment() | look,
    ) as run:
        os.close(theirs)
        while chunk := _read(ours):
            stream.feed(chunk)
            idle = not select.select([ours], [], [], 0.02)[0]  # not in the middle of redrawing the bar
            if idle and screen.cursor.y < ROWS:
                shown = [_pieces(screen.buffer[y]) for y in range(screen.cursor.y + 1)]
    os.close(ours)
    if run.returncode:
        raise ConfigError(f"{shlex.join(command)} failed: {' '.join(' '.join(screen.display).split())}")
    return shown


def _read(terminal: int) -> bytes:
    """The terminal's next output; nothing where its last process is gone."""
    try:
        return os.read(terminal, 65536)
    except OSError:  # how Linux reports it
        return b""


def _pieces(line: Any) -> list[tuple[str, str, bool]]:
    """A line of the screen as pieces of one look each: text, colour, whether bold."""
    pieces: list[tuple[str, str, bool]] = []
    for x in range(COLUMNS):
        cell = line[x]
        if pieces and pieces[-1][1:] == (cell.fg, cell.bold):
            pieces[-1] = (pieces[-1][0] + cell.data, cell.fg, cell.bold)
        else:
            pieces.append((cell.data, cell.fg, cell.bold))
    if pieces[-1][1] == "default":
        pieces[-1] = (pieces[-1][0].rstrip(), *pieces[-1][1:])
    return pieces


def interpreted(measure: Callable[[], Any]) -> Any:
    """What a function returns in a process of its own: Triton decides at its import whether it interprets."""
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure).result()
    finally:
        del os.environ["TRITON_INTERPRET"]


def trajectories(steps: int = 100) -> list[Trajectory]:
    """The runs that verify compares with the reference, of each backend that this machine has, in each precision."""
    from fastgpt2.verify import Checks, backends

    checks, found = Checks("cpu", steps), []
    for dtype in PRECISIONS:
        for name, backend in backends().items():
            try:
                backend.ops("cpu", dtype)
            except ConfigError as error:
                print(f"{name}, {dtype}: not run: {error}")
                continue
            print(f"{name}, {dtype} ...", flush=True)
            losses = checks.losses(backend)
            trained = losses.train(backend, dtype).losses
            differences = [ours - exact for ours, exact in zip(trained, losses.reference, strict=True)]
            budget = losses.budget(dtype)
            found.append(Trajectory(backend=name, dtype=dtype, differences=differences, budget=budget))
    return found


RECORDS: dict[str, Callable[[], dict[str, Any]]] = {
    "first-run": lambda: {"training_runs": [training_run([*FIRST, "--eval-every", "60"])]},
    "ten-minutes": lambda: {"training_runs": [training_run([*FIRST, "--steps", "6000", "--eval-every", "500"])]},
    "backends": lambda: {"trajectories": interpreted(trajectories)},
}
"""By the name of a record: what measures its fields."""


def record(name: str, folder: Path = FOLDER) -> Path:
    """Measure a record and store it."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the pictures show what every machine can do
    begun = Record(commit=commit(), environment=environment())
    for field, value in RECORDS[name]().items():
        setattr(begun, field, value)
    folder.mkdir(parents=True, exist_ok=True)
    begun.write(folder / f"{name}.json")
    return folder / f"{name}.json"
