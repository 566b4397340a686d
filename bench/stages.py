"""Stages by importance, each in a process of its own with a limit: one that hangs or crashes costs only itself.

What is known is on disk after each stage, and each second while one runs, so that a run may be killed at any time. A
stage ends with this process (bench.tied), and none starts that can't end. Nothing here needs a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from bench.device_state import States
from bench.record import Outcome, Record, Tested
from bench.timing import ROOT, STAGE_ENDS

LOG_BYTES = 200_000
"""The end of a stage's output that is kept in the log; it bounds the log's size."""
TAIL_CHARACTERS = 8_000
"""The end of it that is kept in the record."""
GRACE_S = 3.0
"""For a stage that is stopped to print where it stands."""


class NotNow(Exception):
    """A stage has nothing to do, as its command says when it is asked for; the message is the reason."""


@dataclass(frozen=True)
class Stage:
    """One process."""

    name: str
    argv: list[str] | Callable[[], list[str]]
    """A function where it depends on what earlier stages found; it may raise NotNow."""
    seconds_limit: float
    seconds_needed: float = 0.0
    """With less time left it does not start: it would be stopped before it had anything to show."""
    required: bool = False
    """Whether the run counts as failed unless this stage passes."""
    tests: bool = False
    """Whether it is `pytest -v`."""


@dataclass(frozen=True)
class Files:
    """Where a run writes, and where its stages do."""

    record: Path
    log: Path
    results: Path
    """JSON lines that the stages append to, for Record.add."""


def run_stages(
    stages: Iterable[Stage],
    record: Record,
    files: Files,
    *,
    seconds: float,
    state: Callable[[], dict[str, str]] | None = None,
) -> None:
    """Run stages in order until the time is used up; the record is on disk before the first and after each.

    Args:
        record: gains what the stages measure, how they went, and which were not done.
        seconds: for all stages together; one that is running when they end is stopped.
        state: reads the device's state, every few seconds while a stage runs.
    """
    # A stage that is stopped with SIGABRT, so that it prints where it hung, must not leave gigabytes behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ends = time.monotonic() + seconds
    stages = list(stages)
    record.not_done = {stage.name: "not reached" for stage in stages}
    record.write(files.record)
    for stage in stages:
        left = ends - time.monotonic()
        try:
            argv = _command(stage, left)
        except NotNow as reason:
            record.not_done[stage.name] = str(reason)
            continue
        print(f"{stage.name} ...", flush=True)
        outcome = _run_stage(
            replace(stage, argv=argv, seconds_limit=min(stage.seconds_limit, left)), record, files, state
        )
        record.stages.append(outcome)
        if outcome.status == "timed out":
            record.not_done[stage.name] = f"stopped after {outcome.seconds:.0f} s; results it had made are kept"
        else:
            del record.not_done[stage.name]
        record.write(files.record)
        print(f"{stage.name}: {outcome.status} in {outcome.seconds:.0f} s", flush=True)
        if outcome.status != "passed":
            print(outcome.output_tail[-1500:], flush=True)
    record.write(files.record)


def _command(stage: Stage, left: float) -> list[str]:
    """What to run, with that many seconds left.

    Raises:
        NotNow: it can't run, can't end in time, or has nothing to do.
    """
    if left <= 0:
        raise NotNow("the minutes were used up")
    if left < stage.seconds_needed:
        raise NotNow(f"it needs {stage.seconds_needed:.0f} s, and {left:.0f} s were left")
    return stage.argv() if callable(stage.argv) else stage.argv


def _run_stage(stage: Stage, record: Record, files: Files, state: Callable[[], dict[str, str]] | None) -> Outcome:
    """Run a stage to its end or its limit; what it measures goes to the record as it comes, its output to the log."""
    assert not callable(stage.argv)
    began, states, lines = time.monotonic(), States(state), _Lines(files.results)

    def look() -> None:
        states.look()
        if new := lines.new():
            for line in new:
                record.add(line)
            record.write(files.record)

    # A Triton that interprets would be neither the kernels nor their time.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment = {
        **inherited,
        "PYTHONFAULTHANDLER": "1",
        "PYTHONUNBUFFERED": "1",
        # nvidia-smi counts the devices by their place on the bus: let torch do the same.
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
        STAGE_ENDS: str(began + stage.seconds_limit),
    }
    with tempfile.TemporaryFile() as output:
        returncode, timed_out = run_tied(
            stage.argv, output, stage.seconds_limit, look, stderr=subprocess.STDOUT, env=environment
        )
        output.seek(0)
        whole = output.read()
    look()
    files.results.unlink(missing_ok=True)  # the last line may be cut off
    tests = tested(whole.decode(errors="replace")) if stage.tests else None
    failed = returncode or (tests is not None and tests.run == 0)
    outcome = Outcome(
        name=stage.name,
        argv=["python" if part == sys.executable else part for part in stage.argv],
        required=stage.required,
        status="timed out" if timed_out else "failed" if failed else "passed",
        returncode=returncode,
        seconds=round(time.monotonic() - began, 2),
        seconds_limit=round(stage.seconds_limit, 2),
        device_state=states.summary(),
        tests=tests,
        output_tail=whole.decode(errors="replace")[-TAIL_CHARACTERS:],
    )
    with files.log.open("a", encoding="utf-8") as file:
        cut = f" (the last {LOG_BYTES} of {len(whole)} bytes)" if len(whole) > LOG_BYTES else ""
        text = whole[-LOG_BYTES:].decode(errors="replace")
        file.write(f"==== {stage.name}: {outcome.status}, exit status {returncode}{cut}\n{text}\n")
    return outcome


class _Lines:
    """The JSON lines of a file, as they come."""

    def __init__(self, path: Path) -> None:
        self._path, self._read = path, 0

    def new(self) -> list[dict[str, Any]]:
        """What was appended since the last call, but for a line that is not whole yet."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._read)
            found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def run_tied(
    argv: list[str],
    output: IO,
    seconds_limit: float,
    look: Callable[[], None] = lambda: None,
    *,
    stderr: int | None = None,
    env: Mapping[str, str] | None = None,
) -> tuple[int, bool]:
    """Run a command to its end or its limit, in a process group that ends with this process (bench.tied).

    Args:
        output: a file. The end of a pipe would be waited for while anything that the command started holds it.
        look: called every 50 ms meanwhile.

    Returns:
        Its exit status, and whether it was stopped.
    """
    ends = time.monotonic() + seconds_limit
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.tied", str(os.getpid()), *argv],
        stdout=output,
        stderr=stderr,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=env,
        start_new_session=True,
    )
    try:
        while process.poll() is None and time.monotonic() < ends:
            look()
            time.sleep(0.05)
    finally:
        stopped = stop(process)
    return process.returncode, stopped


def stop(process: subprocess.Popen) -> bool:
    """End a process that leads a group if it still runs, and all it started; whether it ran."""
    running = process.poll() is None
    if running:
        with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGABRT)  # Python's fault handler prints every thread's stack
            process.wait(GRACE_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # its session, made for it alone
    process.wait()
    return running


_OUTCOMES = {"PASSED": "", "FAILED": "failure", "ERROR": "error", "SKIPPED": "skipped"}
_ONE = f"({'|'.join(_OUTCOMES)})"
_SAID = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] {_ONE} (\S+::.*?)|(\S+::.*?) {_ONE}\b.*) *$", re.MULTILINE)
"""What pytest -v says of a test, with pytest-xdist and without."""


def tested(output: str) -> Tested:
    """What pytest -v said of its tests. Its report says the same, but is written at the end, which may not come."""
    said = {m[2] or m[3]: _OUTCOMES[m[1] or m[4]] for m in _SAID.finditer(output)}
    named = {kind: [name for name, what in said.items() if what == kind] for kind in _OUTCOMES.values() if kind}
    return Tested(run=len(said) - len(named["skipped"]), **named)


def exit_status(record: Record, required: Iterable[str]) -> int:
    """1 where a stage failed or a required one did not pass; else 0, also where a benchmark ran out of time."""
    status = {stage.name: stage.status for stage in record.stages}
    failed = "failed" in status.values()
    return int(failed or any(status.get(name) != "passed" for name in required))


def read_environment() -> dict[str, Any]:
    """bench.timing.environment from a process that then ends: this one is to hold no memory of the device."""
    program = "import json; from bench.timing import environment; print(json.dumps(environment()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)
