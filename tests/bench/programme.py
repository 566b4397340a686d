"""Run the GPU day's stages in tests: small processes, where they write, and the commands of a plan."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.gpu import Run, programme
from bench.record import Record
from bench.stages import Files, NotNow, Stage, run_stages
from bench.timing import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # What this very run was given must not reach the inner one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def python(name: str, program: str, seconds_limit: float = 30.0, **kwargs: Any) -> Stage:
    return Stage(name, [sys.executable, "-c", program], seconds_limit, **kwargs)


def ran(folder: Path, *stages: Stage, seconds: float = 60.0, **more: Any) -> Record:
    """The record of stages that write to a folder: run.json, run.log and lines."""
    record = Record(environment={"device": "a GPU"}, commit={"id": "abc", "dirty": False})
    files = Files(folder / "run.json", folder / "run.log", folder / "lines")
    run_stages(stages, record, files, seconds=seconds, **more)
    return record


def until(done: Callable[[], object]) -> None:
    ends = time.monotonic() + 300  # on a machine with much else to do
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.05)


def none_is_left(folder: Path) -> bool:
    """Whether the processes that left their number in a file have ended."""
    return not any(Path("/proc", path.stem).exists() for path in folder.glob("*.pid"))


def run_in(folder: Path) -> Run:
    return Run(folder, folder / "lines", "abc", folder / "sm_90.json")


def commands(run: Run, part: int | None = None) -> dict[str, list[str]]:
    """Each stage's command, where it has one now."""
    found = {}
    for stage in programme(run, part):
        with contextlib.suppress(NotNow):
            found[stage.name] = stage.argv() if callable(stage.argv) else stage.argv
    return found
