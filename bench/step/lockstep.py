"""Contests between processes: each candidate in a worker of its own, built at leisure, timed strictly one at a time.

A worker has its own compile caches, allocator and peak memory, and one that crashes, hangs or errs costs only itself.
The parent tells it what to do over a pipe, a line of JSON each way: build, take the first calls, run a round, leave.
In round r every candidate is timed in turn, the order rotated by r, so that what drifts (clocks, temperature, other
work on the machine) meets all of them alike and cancels in ratios formed round by round.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from bench.contest import Candidate, Measured, Missing, Values
from bench.step.worker import FAILED, OUT_OF_MEMORY, UNAVAILABLE
from bench.timing import ROOT, Timed, take_turns
from fastgpt2.cuda_graph import WARM_UP_STEPS

FIRST_CALLS = WARM_UP_STEPS + 2
"""Calls before the first round; what they come to is compared between candidates. A CUDA graph's last two are replays:
nothing that is timed has not been compared."""
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
    """Seconds that a worker may take to answer."""

    build: float = 600.0
    """To be built, and for the first calls, which compile: each."""
    round: float = 120.0


class WorkerError(Exception):
    """A worker's answer was an error, or there was none."""

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
        references: the first of these that came so far has the values that the others' must agree with; where none
            did, the first of all.
        agree: one that doesn't is lost, and not timed.
        at_once: how many are built at the same time. One for which memory doesn't suffice meanwhile goes on when it has
            the device to itself.
        untimed: candidates that only give their values, and leave as soon as they have.
        built_by: time.monotonic() after which nothing is waited for that is not built: a candidate that hangs costs the
            others no round.
        until: time.monotonic() after which no round starts.
        say: told of each step, for a log.

    Returns:
        Every candidate's outcome but for those in `untimed`, in the order given.
    """
    limits = limits or Limits()
    outcomes: dict[str, Measured | Missing] = {}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, candidate)) for name, candidate in candidates.items()}
        lose = _Lose(workers, outcomes, say)
        _build(workers, lose, limits.build, built_by, at_once, untimed, say)
        _check(workers, lose, references, agree)
        for name in untimed:
            workers.pop(name, None)
        for worker in workers.values():
            worker.round_s, worker.round_limit_s = seconds / rounds, limits.round
        take_turns(workers, rounds, lose=lose, until=until, say=say)
        for name, worker in list(workers.items()):
            try:
                outcomes[name] = worker.finish(limits.round)
            except WorkerError as error:
                lose(name, error)
    return {name: outcomes[name] for name in candidates if name not in untimed}


class _Lose:
    """Takes a candidate out of the contest."""

    def __init__(
        self, workers: dict[str, Worker], outcomes: dict[str, Measured | Missing], say: Callable[[str], None]
    ) -> None:
        self._workers, self._outcomes, self._say = workers, outcomes, say

    def __call__(self, name: str, error: Exception) -> None:
        if not isinstance(error, WorkerError):
            raise error
        worker = self._workers.pop(name)
        worker.close()
        self._outcomes[name] = Missing(str(error), error.kind == FAILED, worker.output())
        self._say(f"{name}: lost: {error}")


def _build(
    workers: dict[str, Worker],
    lose: _Lose,
    limit: float,
    by: float,
    at_once: int,
    untimed: Collection[str],
    say: Callable[[str], None],
) -> None:
    """Build all and take their first calls; only then is anything timed."""

    def build(worker: Worker) -> WorkerError | None:
        try:
            worker.build(limit, by)
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
            error = build(workers[name])
        if error is not None:
            lose(name, error)


def _check(workers: dict[str, Worker], lose: _Lose, references: Sequence[str], agree: Agree | None) -> None:
    if agree is None or not workers:
        return
    right = next(workers[name] for name in (*references, *workers) if name in workers)
    for name, worker in list(workers.items()):
        if problem := agree(name, worker.values, right.name, right.values):
            lose(name, WorkerError(f"not timed: {problem}"))


class Worker:
    """A worker process, seen from the parent. Used as a context manager: at its end the process is gone.

    What it prints goes to a file that lives as long as this object.
    """

    def __init__(self, name: str, candidate: Candidate) -> None:
        self.name, self._candidate = name, candidate
        self.values: Values = []
        self.round_ms: list[float] = []
        self.samples_ms: list[float] = []
        self.round_s, self.round_limit_s = 0.0, Limits.round
        self.seconds_to_build = self.seconds_to_first = self._began = 0.0
        self._host_ms: list[float] = []
        self._built: dict[str, Any] = {}
        self._call_s = 0.0
        self._unread = b""
        self._printed = tempfile.TemporaryFile()  # noqa: SIM115 - closed in __exit__
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
        self._printed.close()

    def build(self, limit: float, by: float = float("inf")) -> None:
        """Start the process, make the contestant and take the first calls; where memory was lacking on the way, called
        again it goes on from there.

        Args:
            limit: seconds that each answer may take.
            by: time.monotonic() after which none is waited for.

        Raises:
            WorkerError: as `ask`; also where the time was up before something was begun.
        """

        def left() -> float:
            if time.monotonic() >= by:
                raise WorkerError("the time was up before it was built", UNAVAILABLE)
            return min(limit, by - time.monotonic())

        if not self._built:
            self._start(left())
        while len(self.values) < FIRST_CALLS:
            self._call_s = self.ask("first", left())["seconds"]
            if not self.values:
                self.seconds_to_first = time.monotonic() - self._began
            self.values.append(self.ask("check", left())["values"])
        self.ask("rest", left())

    def _start(self, limit: float) -> None:
        self.close()
        self._began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.step.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            cwd=ROOT,
            env={**os.environ, **self._candidate.environment, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,  # its compilers are ended with it
        )
        self._unread = b""
        self._built = self.ask("build", limit, make=self._candidate.load, arguments=self._candidate.arguments)
        self.seconds_to_build = time.monotonic() - self._began

    def round(self) -> float:
        """Time about as many calls as fit into round_s seconds, at least one."""
        calls = max(1, int(self.round_s / self._call_s))
        untimed = int(self._call_s < UNTIMED_BELOW_S[self._built["device"]])
        answer = self.ask("round", self.round_limit_s + 2 * self.round_s, calls=calls, untimed=untimed)
        self.round_ms.append(answer["ms"])
        self.samples_ms += answer["samples_ms"]
        if answer["host_ms"] is not None:
            self._host_ms.append(answer["host_ms"])
        self._call_s = min(self._call_s, answer["ms"] / 1e3)
        return answer["ms"]

    def finish(self, limit: float) -> Measured:
        """What was measured; ends the process.

        Raises:
            WorkerError: as `ask`; also if it was in no round.
        """
        last = self.ask("finish", limit)
        self.close()
        if not self.round_ms:
            raise WorkerError("the time was up before its first round", UNAVAILABLE)
        host_ms = statistics.median(self._host_ms) if self._host_ms else None
        kind = self._built["device"]
        facts = {
            **self._built["facts"],
            "peak_memory_bytes": last["peak_memory_bytes"],
            "peak_memory_meaning": MEMORY_MEANING[kind],
            "first_losses": [values["loss"] for values in self.values if "loss" in values],
            "seconds_to_build": self.seconds_to_build,
        }
        timed = Timed(self.round_ms, self.samples_ms, host_ms, CLOCK[kind])
        return Measured(timed, facts, self.values, last["versions"], self.seconds_to_first)

    def ask(self, command: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """Send a command and wait for the answer.

        Raises:
            WorkerError: the worker says that it failed, has died, or took longer than the limit (seconds).
        """
        assert self._process is not None and self._process.stdin is not None
        message = json.dumps({"command": command, **arguments}) + "\n"
        try:
            self._process.stdin.write(message.encode())
            self._process.stdin.flush()
        except OSError:
            raise WorkerError(self._death()) from None
        answer = json.loads(self._line(command, limit))
        if "error" in answer:
            raise WorkerError(answer["error"], answer["kind"])
        return answer

    def _line(self, command: str, limit: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        answers, ends = self._process.stdout.fileno(), time.monotonic() + limit
        while b"\n" not in self._unread:
            ready, _, _ = select.select([answers], [], [], max(0.0, ends - time.monotonic()))
            if not ready:
                self._process.send_signal(signal.SIGABRT)  # Python's fault handler prints where it hangs
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(1.0)
                raise WorkerError(f"no answer to {command!r} within {limit:.0f} s")
            read = os.read(answers, 1 << 16)
            if not read:
                raise WorkerError(self._death())
            self._unread += read
        line, self._unread = self._unread.split(b"\n", 1)
        return line

    def _death(self) -> str:
        assert self._process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        status = self._process.returncode
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
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what was not flushed to a dead process
                pipe.close()
        self._process = None
