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
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from bench.device_state import States
from bench.report.results import FORMAT
from bench.timing import ROOT, STAGE_ENDS

LOG_BYTES = 200_000
"""The end of a stage's output that is kept in the log; it bounds the log's size."""
TAIL_CHARACTERS = 8_000
"""The end of it that is kept in the JSON."""
GRACE_S = 3.0
"""For a stage that is stopped to print where it stands."""
KEEP_EVERY_S = 1.0
"""Between two looks at what a running stage has measured."""
KINDS = {"benchmark": "results", "profile": "profiles", "smoke": "smokes", "kernels": "step_kernels"}
"""Where the record keeps a line, by its `kind`."""


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
    junit: Path | None = None
    """Where it writes its tests' results."""
    missing: str | None = None
    """What it needs and isn't there: it is not run, and the record says so."""


@dataclass(frozen=True)
class Files:
    """Where a run writes, and where its stages do."""

    record: Path
    log: Path
    results: Path
    """JSON lines that the stages append to: `kind` is "ceilings" or one of KINDS."""


def new_record(minutes: float, source: dict[str, Any], environment: dict[str, Any]) -> dict[str, Any]:
    """A record of format 2 in which nothing has been measured yet.

    Args:
        minutes: that the run is given.
        source, environment: what bench.timing's commit and environment return.
    """
    return {
        "format": FORMAT,
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "minutes": minutes,
        "commit": source,
        "environment": environment,
        "nvidia_smi": {},
        "device_state_at_start": {},
        "ceilings": None,
        "stages": [],
        **{place: [] for place in KINDS.values()},
        "not_done": [],
    }


def record_file(out: Path, record: dict[str, Any]) -> Path:
    """Where a record is kept: OUT/<device>/<date>-<commit>.json; makes the folder."""
    device, identity = record["environment"]["device"], record["commit"]["id"]
    folder = out.resolve() / re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.fromisoformat(record["started"])
    return folder / f"{started:%Y-%m-%d-%H%M%S}-{re.sub(r'[^A-Za-z0-9]+', '-', identity)[:12]}.json"


def run_stages(
    stages: Iterable[Stage],
    record: dict[str, Any],
    files: Files,
    *,
    seconds: float,
    state: Callable[[], dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Run stages in order until the time is used up; the record is on disk before the first and after each.

    Args:
        record: what is known so far; gains `stages`, `ceilings`, a list for each of KINDS, and `not_done`, a list of
            {name, reason}.
        seconds: for all stages together; one that is running when they end is stopped.
        state: reads the device's state, every few seconds while a stage runs.

    Returns:
        The record.
    """
    # A stage that is stopped with SIGABRT, so that it prints where it hung, is not to leave gigabytes behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ends = time.monotonic() + seconds
    stages = list(stages)
    record.update(stages=[], ceilings=None, **{place: [] for place in KINDS.values()})
    kept = _Kept(files, record, {stage.name: "not reached" for stage in stages})
    for stage in stages:
        left = ends - time.monotonic()
        try:
            argv = _command(stage, left)
        except NotNow as reason:
            kept.waiting[stage.name] = str(reason)
            continue
        print(f"{stage.name} ...", flush=True)
        ready = replace(stage, argv=argv, seconds_limit=min(stage.seconds_limit, left))
        outcome = run_stage(ready, files.log, state, partial(kept.collect, stage.name))
        record["stages"].append(outcome)
        if outcome["status"] == "timed out":
            kept.waiting[stage.name] = f"stopped after {outcome['seconds']:.0f} s; results it had made are kept"
        else:
            del kept.waiting[stage.name]
        kept.collect(stage.name, ended=True)
        print(f"{stage.name}: {outcome['status']} in {outcome['seconds']:.0f} s", flush=True)
        if outcome["status"] != "passed":
            print(outcome["output_tail"][-1500:], flush=True)
    kept.write()
    return record


def _command(stage: Stage, left: float) -> list[str]:
    """What to run, with that many seconds left.

    Raises:
        NotNow: it can't run, can't end in time, or has nothing to do.
    """
    if stage.missing is not None:
        raise NotNow(stage.missing)
    if left <= 0:
        raise NotNow("the minutes were used up")
    if left < stage.seconds_needed:
        raise NotNow(f"it needs {stage.seconds_needed:.0f} s, and {left:.0f} s were left")
    return stage.argv() if callable(stage.argv) else stage.argv


def run_stage(
    stage: Stage,
    log: Path,
    state: Callable[[], dict[str, str]] | None = None,
    collect: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Run one process to its end or its limit, and say how it went; its output goes to the log.

    Args:
        collect: called each KEEP_EVERY_S while it runs.
    """
    assert not callable(stage.argv)
    began, states, seconds_limit = time.monotonic(), States(state), stage.seconds_limit
    look_again = began
    # A Triton that interprets would be neither the kernels nor their time.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.tied", str(os.getpid()), *stage.argv],
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            env={
                **inherited,
                "PYTHONFAULTHANDLER": "1",
                "PYTHONUNBUFFERED": "1",
                # nvidia-smi counts the devices by their place on the bus: let torch do the same.
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
                STAGE_ENDS: str(began + seconds_limit),
            },
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() - began < seconds_limit:
                states.look()
                if time.monotonic() >= look_again:
                    collect()
                    look_again = time.monotonic() + KEEP_EVERY_S
                time.sleep(0.05)
        finally:
            timed_out = stop(process)
        output.seek(0)
        whole = output.read()
    size, text = len(whole), whole[-LOG_BYTES:].decode(errors="replace")
    tests = None if stage.junit is None else _tests_of(stage.junit, whole.decode(errors="replace"))
    nothing_ran = tests is not None and tests["run"] == 0
    status = "timed out" if timed_out else "failed" if process.returncode or nothing_ran else "passed"
    outcome = {
        "name": stage.name,
        "argv": ["python" if part == sys.executable else part for part in stage.argv],
        "required": stage.required,
        "status": status,
        "returncode": process.returncode,
        "seconds": round(time.monotonic() - began, 2),
        "seconds_limit": round(seconds_limit, 2),
        "device_state": states.summary(),
        "tests": tests,
        "output_tail": text[-TAIL_CHARACTERS:],
    }
    with log.open("a", encoding="utf-8") as file:
        cut = f" (the last {LOG_BYTES} of {size} bytes)" if size > LOG_BYTES else ""
        file.write(f"==== {stage.name}: {status}, exit status {process.returncode}{cut}\n{text}\n")
    return outcome


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


class _Kept:
    """A run's record, kept on disk.

    Args:
        waiting: the stages that are not done, by name, with the reason.
    """

    def __init__(self, files: Files, record: dict[str, Any], waiting: dict[str, str]) -> None:
        self._files, self._record, self.waiting = files, record, waiting
        self._read = 0
        self.write()

    def collect(self, stage: str, *, ended: bool = False) -> None:
        """Move the lines that a stage has written into the record; the last one may be cut off."""
        results, found = self._files.results, b""
        if results.exists():
            with results.open("rb") as file:
                file.seek(self._read)
                found = file.read()
        whole = found[: found.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            self._keep(stage, json.loads(line))
        if ended:
            results.unlink(missing_ok=True)
            self._read = 0
        if whole or ended:
            self.write()

    def _keep(self, stage: str, line: dict[str, Any]) -> None:
        kind = line.pop("kind")
        if kind == "ceilings":
            self._record["ceilings"] = line
        else:
            self._record[KINDS[kind]].append({"stage": stage, **line})

    def write(self) -> None:
        """Aside, and renamed, so that the file is whole whenever the machine goes away."""
        self._record["not_done"] = [{"name": name, "reason": reason} for name, reason in self.waiting.items()]
        aside = self._files.record.with_suffix(".writing")
        aside.write_text(json.dumps(self._record, indent=1) + "\n", encoding="utf-8")
        os.replace(aside, self._files.record)


_OUTCOME = "(PASSED|FAILED|ERROR|SKIPPED)"
_SAID = re.compile(rf"^(?:\[gw\d+\] \[ *\d+%\] {_OUTCOME} (\S+::.*?)|(\S+::.*?) {_OUTCOME}\b.*) *$", re.MULTILINE)
"""What pytest -v says of a test, with pytest-xdist and without."""


def _tests_of(junit: Path, output: str) -> dict[str, Any]:
    """How many tests ran, and the names of those that did not pass or did not run: from pytest's report, or, where it
    was stopped before it wrote one, from what it said of each test."""
    outcomes = {"FAILED": "failure", "ERROR": "error", "SKIPPED": "skipped"}
    if junit.exists():
        cases = [
            (
                f"{case.get('classname')}::{case.get('name')}",
                next((o for o in outcomes.values() if case.find(o) is not None), ""),
            )
            for case in ElementTree.parse(junit).iter("testcase")
        ]
    else:
        cases = [(m[2] or m[3], outcomes.get(m[1] or m[4], "")) for m in _SAID.finditer(output)]
    named = {outcome: [name for name, what in cases if what == outcome] for outcome in outcomes.values()}
    return {"run": len(cases) - len(named["skipped"]), **named}


def exit_status(record: dict[str, Any], required: Iterable[str]) -> int:
    """1 where a stage failed or a required one did not pass; else 0, also where a benchmark ran out of time."""
    status = {stage["name"]: stage["status"] for stage in record["stages"]}
    failed = "failed" in status.values()
    return int(failed or any(status.get(name) != "passed" for name in required))


def read_environment() -> dict[str, Any]:
    """bench.timing.environment from a process that then ends: this one is to hold no memory of the device."""
    program = "import json; from bench.timing import environment; print(json.dumps(environment()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)
