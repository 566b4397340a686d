"""Contests between processes: each candidate in a worker of its own, built at leisure, timed strictly one at a time.

A worker has its own compile caches, allocator and peak memory, and one that crashes, hangs or errs costs only itself.
The parent tells it what to do over a pipe, a line of JSON each way: build, take the first calls, run a round, leave.
In round r every candidate is timed in turn, the order rotated by r, so that what drifts (clocks, temperature, other
work on the machine) meets all of them alike and cancels in ratios formed round by round.

    python -m bench.lockstep        a worker; started by `contest`, speaks on its standard input and output
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import queue
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Protocol

import torch

from bench.timing import ROOT, Timed, environment
from fastgpt2.device import peak_memory_bytes, synchronize

FIRST_CALLS = 3
"""Calls before the first round, whose values are compared between candidates."""
UNTIMED_BELOW_S = 0.25
"""A round begins with an untimed call where a call is shorter than this: what it warms is gone from a longer one's
caches before it ends."""
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


class Contestant(Protocol):
    """What a candidate's `make` returns in the worker."""

    device: torch.device
    keeps_memory: bool
    """Whether cached memory must stay where it is, as under a CUDA graph."""
    facts: dict[str, Any]
    """For the result."""

    def __call__(self, index: int) -> torch.Tensor:
        """Launch the work on the inputs of an index, which only ever grows; a scalar that the work came to."""
        ...


@dataclass(frozen=True)
class Candidate:
    """A worker's work.

    Args:
        make: "module:function", called in the worker with `arguments`, which JSON must be able to hold.
        environment: beside the parent's variables.
    """

    make: str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Limits:
    """Seconds that a worker may take to answer."""

    build: float = 600.0
    """To be built, and for the first calls, which compile: each."""
    round: float = 120.0


@dataclass
class Finished:
    """A candidate that came through.

    Args:
        values: what the first calls came to.
        seconds_to_build, seconds_to_first: from the start of the process until it was built, and until the first
            call was done. Others may have been built at the same time.
    """

    timed: Timed
    values: list[float]
    facts: dict[str, Any]
    versions: dict[str, Any]
    seconds_to_build: float
    seconds_to_first: float
    peak_memory_bytes: int
    peak_memory_meaning: str


@dataclass(frozen=True)
class Lost:
    """A candidate that did not, and why; `wrong` where it ran and what it came to is not what the reference did."""

    reason: str
    wrong: bool = False
    output: str = ""


class WorkerError(Exception):
    """A worker's answer was an error, or there was none."""

    def __init__(self, reason: str, *, out_of_memory: bool = False) -> None:
        super().__init__(reason)
        self.out_of_memory = out_of_memory


Agree = Callable[[list[float], list[float]], str | None]
"""(values, the reference's) -> what is wrong with the first, None where nothing is."""


def contest(
    candidates: dict[str, Candidate],
    *,
    rounds: int,
    seconds: float,
    limits: Limits | None = None,
    reference: str | None = None,
    agree: Agree | None = None,
    at_once: int = 1,
    untimed: Iterable[str] = (),
    until: float = float("inf"),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Finished | Lost]:
    """Time candidates against each other.

    Args:
        rounds: at most.
        seconds: about how long a candidate is timed in all rounds together; a round has one call at least.
        reference: the candidate whose values the others' must agree with; without it, the first that came so far.
        agree: one that doesn't is lost, and not timed.
        at_once: how many are built at the same time. One for which memory doesn't suffice meanwhile is built again
            when it has the device to itself.
        untimed: candidates that only give their values.
        until: time.monotonic() after which no round starts.
        say: told of each step, for a log.

    Returns:
        Every candidate's outcome but for those in `untimed`, in the order given.
    """
    limits = limits or Limits()
    outcomes: dict[str, Finished | Lost] = {}
    with contextlib.ExitStack() as stack:
        workers = {name: stack.enter_context(Worker(name, candidate)) for name, candidate in candidates.items()}
        lose = _Lose(workers, outcomes, say)
        _build(workers, lose, limits, at_once, say)
        _check(workers, lose, reference, agree)
        for name in untimed:
            if name in workers:
                workers.pop(name).close()
        _rounds(workers, lose, limits, rounds, seconds, until, say)
        for name, worker in list(workers.items()):
            with lose.instead(name):
                outcomes[name] = worker.finish(limits.round)
    return {name: outcomes[name] for name in candidates if name in outcomes}


class _Lose:
    """Takes a candidate out of the contest."""

    def __init__(
        self, workers: dict[str, Worker], outcomes: dict[str, Finished | Lost], say: Callable[[str], None]
    ) -> None:
        self._workers, self._outcomes, self._say = workers, outcomes, say

    def __call__(self, name: str, reason: str, *, wrong: bool = False) -> None:
        worker = self._workers.pop(name)
        worker.close()
        self._outcomes[name] = Lost(reason, wrong, "" if wrong else worker.output())
        self._say(f"{name}: lost: {reason}")

    @contextlib.contextmanager
    def instead(self, name: str) -> Any:
        """Lose the candidate if its worker errs."""
        try:
            yield
        except WorkerError as error:
            self(name, str(error))


def _build(workers: dict[str, Worker], lose: _Lose, limits: Limits, at_once: int, say: Callable[[str], None]) -> None:
    """Build all and take their first calls; only then is anything timed."""

    def build(worker: Worker) -> WorkerError | None:
        try:
            worker.build(limits.build)
        except WorkerError as error:
            return error
        say(f"{worker.name}: built, {worker.seconds_to_first:.1f} s to the first call done")
        return None

    with ThreadPoolExecutor(at_once) as pool:
        errors = dict(zip(list(workers), pool.map(build, list(workers.values())), strict=True))
    for name, error in errors.items():
        if error is not None and error.out_of_memory and at_once > 1:
            say(f"{name}: again, with the device to itself")
            error = build(workers[name])
        if error is not None:
            lose(name, str(error))


def _check(workers: dict[str, Worker], lose: _Lose, reference: str | None, agree: Agree | None) -> None:
    if agree is None or not workers:
        return
    right = workers[reference if reference in workers else next(iter(workers))]
    for name, worker in list(workers.items()):
        if problem := agree(worker.values, right.values):
            lose(name, f"not timed: {problem}, against {right.name}", wrong=True)


def _rounds(
    workers: dict[str, Worker],
    lose: _Lose,
    limits: Limits,
    rounds: int,
    seconds: float,
    until: float,
    say: Callable[[str], None],
) -> None:
    for number in range(rounds):
        if time.monotonic() >= until:
            say(f"out of time after {number} of {rounds} rounds")
            return
        for name in _rotated(list(workers), number):
            with lose.instead(name):
                workers[name].round(seconds / rounds, limits.round)
                say(f"{name}: round {number + 1}/{rounds}: {workers[name].round_ms[-1]:.3f} ms")


def _rotated(names: list[str], by: int) -> list[str]:
    by %= max(1, len(names))
    return names[by:] + names[:by]


class Worker:
    """A worker process, seen from the parent. Used as a context manager: at its end the process is gone.

    What it prints goes to a file that lives as long as this object.
    """

    def __init__(self, name: str, candidate: Candidate) -> None:
        self.name, self._candidate = name, candidate
        self.values: list[float] = []
        self.round_ms: list[float] = []
        self.samples_ms: list[float] = []
        self.seconds_to_build = self.seconds_to_first = 0.0
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

    def build(self, limit: float) -> None:
        """Start the process, make the contestant and take the first calls. A second time: start over."""
        self.close()
        began = time.monotonic()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.lockstep"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._printed,
            cwd=ROOT,
            env={**os.environ, **self._candidate.environment, "PYTHONFAULTHANDLER": "1"},
            start_new_session=True,  # its compilers are ended with it
        )
        self._unread = b""
        self._built = self.ask("build", limit, make=self._candidate.make, arguments=self._candidate.arguments)
        self.seconds_to_build = time.monotonic() - began
        first = self.ask("first", limit, calls=1)
        self.seconds_to_first = time.monotonic() - began
        rest = self.ask("first", limit, calls=FIRST_CALLS - 1)
        self.values = [*first["values"], *rest["values"]]
        self._call_s = min(rest["seconds"])
        self.ask("rest", limit)

    def round(self, seconds: float, limit: float) -> None:
        """Time about as many calls as fit into the seconds, one at least."""
        calls = max(1, int(seconds / self._call_s))
        limit += 2 * seconds
        answer = self.ask("round", limit, calls=calls, untimed=int(self._call_s < UNTIMED_BELOW_S))
        self.round_ms.append(answer["ms"])
        self.samples_ms += answer["samples_ms"]
        if answer["host_ms"] is not None:
            self._host_ms.append(answer["host_ms"])
        self._call_s = min(self._call_s, answer["ms"] / 1e3)

    def finish(self, limit: float) -> Finished:
        """What there is to say of it, and the end of the process.

        Raises:
            WorkerError: also where it was in no round.
        """
        last = self.ask("finish", limit)
        self.close()
        if not self.round_ms:
            raise WorkerError("the time was up before its first round")
        host_ms = statistics.median(self._host_ms) if self._host_ms else None
        kind = self._built["device"]
        return Finished(
            timed=Timed(self.round_ms, self.samples_ms, host_ms, CLOCK[kind]),
            values=self.values,
            facts=self._built["facts"],
            versions=self._built["versions"],
            seconds_to_build=self.seconds_to_build,
            seconds_to_first=self.seconds_to_first,
            peak_memory_bytes=last["peak_memory_bytes"],
            peak_memory_meaning=MEMORY_MEANING[kind],
        )

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
            raise WorkerError(answer["error"], out_of_memory=answer["out_of_memory"])
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
            return f"the worker was ended by {signal.Signals(-status).name}"
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


# ------------------------------------------------------------------------------------------ in the worker


class _Serving:
    """The commands, a method each; what they return is the answer."""

    def __init__(self) -> None:
        self.contestant: Contestant
        self.indices = itertools.count()

    def build(self, make: str, arguments: dict[str, Any]) -> dict[str, Any]:
        module, function = make.split(":")
        self.contestant = getattr(import_module(module), function)(**arguments)
        return {
            "device": self.contestant.device.type,
            "facts": self.contestant.facts,
            "versions": environment(),
        }

    def first(self, calls: int) -> dict[str, Any]:
        values, seconds = [], []
        for _ in range(calls):
            began = time.perf_counter()
            values.append(self.contestant(next(self.indices)).item())
            seconds.append(time.perf_counter() - began)
        return {"values": values, "seconds": seconds}

    def round(self, calls: int, untimed: int) -> dict[str, Any]:
        for _ in range(untimed):
            self.contestant(next(self.indices))
        synchronize(self.contestant.device)
        timed = self._cuda_round if self.contestant.device.type == "cuda" else self._cpu_round
        answer = timed(calls)
        self.rest()
        return answer

    def _cpu_round(self, calls: int) -> dict[str, Any]:
        samples = []
        for _ in range(calls):
            began = time.perf_counter()
            self.contestant(next(self.indices))
            samples.append(1e3 * (time.perf_counter() - began))
        return {"ms": statistics.median(samples), "samples_ms": samples, "host_ms": None}

    def _cuda_round(self, calls: int) -> dict[str, Any]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        began = time.perf_counter()
        events[0].record()
        launched = began
        for number, event in enumerate(events[1:]):
            self.contestant(next(self.indices))
            event.record()
            if number == 0:  # later ones may wait for room in the queue
                launched = time.perf_counter()
        torch.cuda.synchronize(self.contestant.device)
        took = time.perf_counter() - began
        return {
            "ms": 1e3 * took / calls,
            "samples_ms": [start.elapsed_time(end) for start, end in itertools.pairwise(events)],
            "host_ms": 1e3 * (launched - began),
        }

    def rest(self) -> dict[str, Any]:
        """Leave the device's memory to the others."""
        if self.contestant.device.type == "cuda" and not self.contestant.keeps_memory:
            torch.cuda.empty_cache()
        return {}

    def finish(self) -> dict[str, Any]:
        return {"peak_memory_bytes": peak_memory_bytes(self.contestant.device)}


def serve() -> None:
    """Answer the parent's commands until it goes away."""
    # The answers' pipe is kept aside; what libraries print goes where errors do.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    commands: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_listen, args=(commands,), daemon=True).start()
    serving = _Serving()
    while True:
        request = json.loads(commands.get())
        try:
            answer = getattr(serving, request.pop("command"))(**request)
        except Exception as error:
            gc.collect()
            text = " ".join(str(error).split())
            out_of_memory = isinstance(error, torch.cuda.OutOfMemoryError)
            reason = "out of memory" if out_of_memory else f"{type(error).__name__}: {text[:500]}"
            answer = {"error": reason, "out_of_memory": out_of_memory}
            sys.excepthook(type(error), error, error.__traceback__)
        print(json.dumps(answer), file=answers, flush=True)


def _listen(commands: queue.Queue[str]) -> None:
    for line in sys.stdin:
        commands.put(line)
    os._exit(0)  # the parent is gone, whatever this process is doing


if __name__ == "__main__":
    serve()
