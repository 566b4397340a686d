"""Contests between processes: each candidate in a worker of its own, built at leisure, timed strictly one at a time.

A worker has its own compile caches, allocator and peak memory, and one that crashes, hangs or errs costs only itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from bench.contest import Candidate, Measured, Missing, Values
from bench.step.worker import FAILED, OUT_OF_MEMORY, UNAVAILABLE, Built, Failure, Round
from bench.timing import ROOT, Timed, take_turns

UNTIMED_BELOW_S = {"cuda": float("inf"), "cpu": 0.25}
"""A round begins with an untimed call where a call is shorter than this. On a GPU it also takes back the memory that
was left to the others; on a CPU what it warms is gone from a longer one's caches before it ends."""
TAIL_CHARACTERS = 2_000
"""The end of a lost worker's output that is kept."""
MEMORY_MEANING = {
    "cuda": "allocated by torch, the most in a process of its own",
    "cpu": "resident in a process of its own, the most",
}
CLOCK = {
    "cuda": "wall clock of consecutive calls and one wait at the end, per call; samples are device events between them",
    "cpu": "wall clock of a call",
}


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take: to be built, first calls included, and for a round."""

    build: float = 300.0
    round: float = 30.0


class WorkerError(Exception):
    """A worker's answer was a failure, or there was none."""

    def __init__(self, reason: str, kind: str = FAILED) -> None:
        super().__init__(reason)
        self.kind = kind


Agree = Callable[[str, Values, str, Values], str | None]
"""(name, its values, the reference's name, its values) -> what is wrong with the former, None where nothing is."""


def contest(
    candidates: dict[str, Candidate],
    *,
    rounds: int,
    seconds: float,
    limits: Limits | None = None,
    references: Sequence[str] = (),
    agree: Agree | None = None,
    at_once: int = 1,
    untimed: Collection[str] = (),
    built_by: float = float("inf"),
    until: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Measured | Missing]:
    """Time candidates against each other.

    Args:
        rounds: at most.
        seconds: about how long a candidate is timed in all rounds together; a round has one call at least.
        references: the first of these that was built has the values that the others' must agree with; where none was,
            the first of all.
        agree: one that doesn't is lost, and not timed.
        at_once: how many are built at the same time. One that lacked memory then goes on alone.
        untimed: candidates that only give their values, and leave as soon as they have.
        built_by: time.monotonic() after which nothing is waited for that is not built.
        until: time.monotonic() after which no round starts.
        say: told of each step, for a log.

    Returns:
        Every candidate's outcome but for those in `untimed`, in the order given.
    """
    limits = limits or Limits()
    outcomes: dict[str, Measured | Missing] = {}

    def lose(name: str, error: Exception) -> None:
        if not isinstance(error, WorkerError):
            raise error
        worker = workers.pop(name)
        worker.close()
        outcomes[name] = Missing(str(error), error.kind == FAILED, worker.output())
        say(f"{name}: lost: {error}")

    with contextlib.ExitStack() as stack:
        share = seconds / rounds
        workers = {n: stack.enter_context(Worker(n, c, limits, share)) for n, c in candidates.items()}
        for name, error in _build(workers, built_by, at_once, untimed, say).items():
            lose(name, error)
        right = next((workers[name] for name in (*references, *workers) if name in workers), None)
        for name, worker in list(workers.items()):
            if right and agree and (problem := agree(name, worker.values, right.name, right.values)):
                lose(name, WorkerError(f"not timed: {problem}"))
        for name in untimed:
            workers.pop(name, None)
        take_turns(workers, rounds, lose=lose, until=until, say=say)
        for name, worker in list(workers.items()):
            try:
                outcomes[name] = worker.finish()
            except WorkerError as error:
                lose(name, error)
    return {name: outcomes[name] for name in candidates if name not in untimed}


def _build(
    workers: dict[str, Worker], by: float, at_once: int, untimed: Collection[str], say: Callable[[str], None]
) -> dict[str, WorkerError]:
    """Build all; returns why some could not be. Only then is anything timed."""

    def build(worker: Worker) -> WorkerError | None:
        say(f"{worker.name}: building")
        try:
            worker.build(by)
        except WorkerError as error:
            return error
        say(f"{worker.name}: built, {worker.seconds_to_first:.1f} s to the first call done")
        if worker.name in untimed:
            worker.close()
        return None

    with ThreadPoolExecutor(at_once) as pool:
        errors = dict(zip(list(workers), pool.map(build, list(workers.values())), strict=True))
    for name, error in errors.items():
        if error is not None and error.kind == OUT_OF_MEMORY and at_once > 1:
            say(f"{name}: lacked memory beside the others: again, with the device to itself")
            errors[name] = build(workers[name])
    return {name: error for name, error in errors.items() if error is not None}


class Worker:
    """A worker process, seen from the parent. Used as a context manager: at its end the process is gone.

    What it prints goes to a file that lives as long as this object.
    """

    def __init__(self, name: str, candidate: Candidate, limits: Limits, round_s: float = 0.0) -> None:
        self.name, self._candidate, self._limits, self._round_s = name, candidate, limits, round_s
        self._rounds: list[Round] = []
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process: subprocess.Popen | None = None
        self._pipe: Connection
        self._began = 0.0
        self.built: Built

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        self._printed.close()

    @property
    def values(self) -> Values:
        """What each of the first calls came to."""
        return self.built.values

    @property
    def seconds_to_first(self) -> float:
        return self.built.first_call_at - self._began

    def build(self, by: float = float("inf")) -> None:
        """Start the process, make the contestant and take the first calls; called again, go on where memory lacked.

        Args:
            by: time.monotonic() after which it is not waited for.

        Raises:
            WorkerError: as `ask`; also where the time was up before it began.
        """
        if time.monotonic() >= by:
            raise WorkerError("the time was up before it was built", UNAVAILABLE)
        if self._process is None:
            self._start()
        limit = min(self._limits.build, by - time.monotonic())
        self.built = self.ask("build", limit, make=self._candidate.load, arguments=self._candidate.arguments)

    def _start(self) -> None:
        self._began = time.monotonic()
        self._pipe, theirs = Pipe()
        program = f"from bench.step.worker import serve; serve({theirs.fileno()})"
        self._process = subprocess.Popen(
            [sys.executable, "-c", program],
            stdin=subprocess.DEVNULL,
            stdout=self._printed,
            stderr=self._printed,
            pass_fds=[theirs.fileno()],
            cwd=ROOT,
            env={**os.environ, **self._candidate.environment, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,  # its compilers are ended with it
        )
        theirs.close()

    def round(self) -> float:
        """Time about as many calls as fit into the round's seconds, at least one."""
        call_s = min([self.built.call_s, *(done.ms / 1e3 for done in self._rounds)])
        calls, untimed = max(1, int(self._round_s / call_s)), int(call_s < UNTIMED_BELOW_S[self.built.device])
        self._rounds.append(self.ask("round", self._limits.round + 2 * self._round_s, calls=calls, untimed=untimed))
        return self._rounds[-1].ms

    def finish(self) -> Measured:
        """What was measured; ends the process.

        Raises:
            WorkerError: as `ask`; also if it was in no round.
        """
        versions, peak_memory_bytes = self.ask("finish", self._limits.round)
        self.close()
        if not self._rounds:
            raise WorkerError("the time was up before its first round", UNAVAILABLE)
        built, host_ms = self.built, [done.host_ms for done in self._rounds if done.host_ms is not None]
        facts = {
            **built.facts,
            "peak_memory_bytes": peak_memory_bytes,
            "peak_memory_meaning": MEMORY_MEANING[built.device],
            "first_losses": [values["loss"] for values in built.values if "loss" in values],
            "seconds_to_build": built.made_at - self._began,
        }
        timed = Timed(
            [done.ms for done in self._rounds],
            [ms for done in self._rounds for ms in done.samples_ms],
            statistics.median(host_ms) if host_ms else None,
            CLOCK[built.device],
        )
        return Measured(timed, facts, built.values, versions, self.seconds_to_first)

    def ask(self, command: str, limit: float, **arguments: Any) -> Any:
        """Send a command and wait for the answer.

        Raises:
            WorkerError: the worker says that it failed, has died, or took longer than the limit (seconds).
        """
        try:
            self._pipe.send((command, arguments))
            answer = self._pipe.recv() if self._pipe.poll(limit) else None
        except (OSError, EOFError):
            raise WorkerError(self._death()) from None
        if answer is None:
            self._wait(signal.SIGABRT, 1.0)  # Python's fault handler prints where it hangs
            raise WorkerError(f"no answer to {command!r} within {limit:.0f} s")
        if isinstance(answer, Failure):
            raise WorkerError(*answer)
        return answer

    def _wait(self, send: int, seconds: float) -> int | None:
        """Send a signal (0: none), give it some time to end; returns its status."""
        assert self._process is not None
        self._process.send_signal(send)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode

    def _death(self) -> str:
        status = self._wait(0, 5.0)
        if status is not None and status < 0:
            maybe = " (out of memory?)" if status == -signal.SIGKILL else ""
            return f"the worker was ended by {signal.Signals(-status).name}{maybe}"
        return f"the worker ended with status {status}"

    def output(self) -> str:
        """The end of what it has printed."""
        size = self._printed.seek(0, os.SEEK_END)
        self._printed.seek(max(0, size - TAIL_CHARACTERS))
        return self._printed.read().decode(errors="replace")

    def close(self) -> None:
        """End the process and all that it started."""
        if self._process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # its session, made for it alone
        self._process.wait()
        self._pipe.close()
        self._process = None
