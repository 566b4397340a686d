"""A worker of a contest: a process that builds one candidate and does with it what the parent says.

bench.step.lockstep is the other end of its pipe. It sends the name of a method of Serving with arguments, and is sent
what the method returns, or a Failure.
"""

from __future__ import annotations

import gc
import itertools
import os
import queue
import statistics
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, Protocol

import torch

from bench.contest import NO_KERNEL, Values, imported, lacked_memory
from bench.timing import environment
from fastgpt2.config import ConfigError
from fastgpt2.cuda_graph import WARM_UP_STEPS
from fastgpt2.device import peak_memory_bytes, synchronize

FIRST_CALLS = WARM_UP_STEPS + 2
"""Calls before the first round, whose results are compared between candidates. A CUDA graph's last two are replays:
nothing that is timed has not been compared."""
OUT_OF_MEMORY, UNAVAILABLE, FAILED = "out of memory", "unavailable", "failed"
"""Kinds of failure; with the first two nothing is amiss with the candidate."""


class Contestant(Protocol):
    """What a candidate's `load` returns in the worker."""

    device: torch.device
    keeps_memory: bool
    """Whether cached memory must stay where it is, as under a CUDA graph."""
    facts: dict[str, Any]
    """For the result."""

    def __call__(self, index: int) -> object:
        """Launch the work on the inputs of an index, which only ever grows."""
        ...

    def check(self) -> dict[str, float]:
        """What the last call came to, by name; may wait for the device."""
        ...


class Failure(NamedTuple):
    """An error as an answer."""

    reason: str
    kind: str


class Built(NamedTuple):
    """A contestant after its first calls: each result, seconds of the last, time.monotonic() at two points."""

    device: str
    facts: dict[str, Any]
    values: Values
    call_s: float
    made_at: float
    first_call_at: float


class Round(NamedTuple):
    """The time of a call, of each call, and of launching one (None on a CPU)."""

    ms: float
    samples_ms: list[float]
    host_ms: float | None


class Serving:
    """The commands, a method each."""

    contestant: Contestant
    made_at = first_call_at = call_s = 0.0

    def __init__(self) -> None:
        self.index = 0
        self.values: Values = []

    def _call(self) -> None:
        """A call that fails uses up no index: it can be made again."""
        self.contestant(self.index)
        self.index += 1

    def build(self, make: str, arguments: Mapping[str, Any]) -> Built:
        """Make the contestant and take the first calls; called again, go on from where memory was lacking."""
        if not self.made_at:
            self.contestant = imported(make)(**arguments)
            self.made_at = time.monotonic()
        device = self.contestant.device
        while len(self.values) < FIRST_CALLS:
            began = time.monotonic()
            self._call()
            synchronize(device)
            self.call_s = time.monotonic() - began
            self.first_call_at = self.first_call_at or time.monotonic()
            self.values.append(self.contestant.check())
        self._rest()
        return Built(device.type, self.contestant.facts, self.values, self.call_s, self.made_at, self.first_call_at)

    def round(self, calls: int, untimed: int) -> Round:
        for _ in range(untimed):
            self._call()
        synchronize(self.contestant.device)
        timed = self._cuda_round if self.contestant.device.type == "cuda" else self._cpu_round
        answer = timed(calls)
        self._rest()
        return answer

    def _cpu_round(self, calls: int) -> Round:
        samples = []
        for _ in range(calls):
            began = time.perf_counter()
            self._call()
            samples.append(1e3 * (time.perf_counter() - began))
        return Round(statistics.median(samples), samples, None)

    def _cuda_round(self, calls: int) -> Round:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(calls + 1)]
        began = time.perf_counter()
        events[0].record()
        launched = began
        for number, event in enumerate(events[1:]):
            self._call()
            event.record()
            if number == 0:  # later ones may wait for room in the queue
                launched = time.perf_counter()
        torch.cuda.synchronize(self.contestant.device)
        took = time.perf_counter() - began
        samples = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        return Round(1e3 * took / calls, samples, 1e3 * (launched - began))

    def _rest(self) -> None:
        """Leave the device's memory to the others."""
        if self.contestant.device.type == "cuda" and not self.contestant.keeps_memory:
            torch.cuda.empty_cache()

    def finish(self) -> tuple[dict[str, Any], int | None]:
        """Versions, and the most memory in use so far."""
        return environment(), peak_memory_bytes(self.contestant.device)


def serve(pipe: int) -> None:
    """Answer the commands that come through a pipe until the parent goes away."""
    os.set_inheritable(pipe, False)
    connection, commands, serving = Connection(pipe), queue.Queue[Any](), Serving()
    threading.Thread(target=_listen, args=(connection, commands), daemon=True).start()
    while True:
        command, arguments = commands.get()
        try:
            answer = getattr(serving, command)(**arguments)
        except Exception as error:
            sys.excepthook(type(error), error, error.__traceback__)
            answer = explain(error)
        if isinstance(answer, Failure) and answer.kind == OUT_OF_MEMORY:
            gc.collect()  # what the error's frames held
            torch.cuda.empty_cache()
        connection.send(answer)


def _listen(connection: Connection, commands: queue.Queue[Any]) -> None:
    try:
        while True:
            commands.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)  # the parent is gone, whatever this process is doing


def explain(error: Exception) -> Failure:
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ConfigError):
        return Failure(text, UNAVAILABLE)
    if any(sign in str(error) for sign in NO_KERNEL):
        return Failure("PyTorch has no such attention kernel for these inputs here", UNAVAILABLE)
    if lacked_memory(error):
        return Failure("out of memory on the device", OUT_OF_MEMORY)
    return Failure(f"{type(error).__name__}: {text}", FAILED)
