"""A worker of a contest: a process that builds one candidate and does with it what the parent says.

Commands and answers are lines of JSON, on the standard input and output; bench.step.lockstep is the other end.
"""

from __future__ import annotations

import gc
import itertools
import json
import os
import queue
import statistics
import sys
import threading
import time
from typing import Any, Protocol

import torch

from bench.contest import NO_KERNEL, imported, lacked_memory
from bench.timing import environment
from fastgpt2.config import ConfigError
from fastgpt2.device import peak_memory_bytes, synchronize

OUT_OF_MEMORY, UNAVAILABLE, FAILED = "out of memory", "unavailable", "failed"
"""Kinds of error; with the first two nothing is amiss with the candidate."""


class Contestant(Protocol):
    """What a candidate's `make` returns in the worker."""

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


class _Serving:
    """The commands, a method each; what they return is the answer."""

    def __init__(self) -> None:
        self.contestant: Contestant
        self.index = 0

    def _call(self) -> None:
        """A call that fails uses up no index: it can be made again."""
        self.contestant(self.index)
        self.index += 1

    def build(self, make: str, arguments: dict[str, Any]) -> dict[str, Any]:
        self.contestant = imported(make)(**arguments)
        return {"device": self.contestant.device.type, "facts": self.contestant.facts}

    def first(self) -> dict[str, Any]:
        began = time.perf_counter()
        self._call()
        synchronize(self.contestant.device)
        return {"seconds": time.perf_counter() - began}

    def check(self) -> dict[str, Any]:
        return {"values": self.contestant.check()}

    def round(self, calls: int, untimed: int) -> dict[str, Any]:
        for _ in range(untimed):
            self._call()
        synchronize(self.contestant.device)
        timed = self._cuda_round if self.contestant.device.type == "cuda" else self._cpu_round
        answer = timed(calls)
        self.rest()
        return answer

    def _cpu_round(self, calls: int) -> dict[str, Any]:
        samples = []
        for _ in range(calls):
            began = time.perf_counter()
            self._call()
            samples.append(1e3 * (time.perf_counter() - began))
        return {"ms": statistics.median(samples), "samples_ms": samples, "host_ms": None}

    def _cuda_round(self, calls: int) -> dict[str, Any]:
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
        return {"versions": environment(), "peak_memory_bytes": peak_memory_bytes(self.contestant.device)}


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
            sys.excepthook(type(error), error, error.__traceback__)
            answer = _explain(error)
        if answer.get("kind") == OUT_OF_MEMORY:
            gc.collect()  # what the error's frames held
            torch.cuda.empty_cache()
        print(json.dumps(answer), file=answers, flush=True)


def _explain(error: Exception) -> dict[str, str]:
    """An error as an answer."""
    text = " ".join(str(error).split())[:500]
    if isinstance(error, ConfigError):
        return {"error": text, "kind": UNAVAILABLE}
    if any(sign in str(error) for sign in NO_KERNEL):
        return {"error": "PyTorch has no such attention kernel for these inputs here", "kind": UNAVAILABLE}
    if lacked_memory(error):
        return {"error": "out of memory on the device", "kind": OUT_OF_MEMORY}
    return {"error": f"{type(error).__name__}: {text}", "kind": FAILED}


def _listen(commands: queue.Queue[str]) -> None:
    for line in sys.stdin:
        commands.put(line)
    os._exit(0)  # the parent is gone, whatever this process is doing


if __name__ == "__main__":
    serve()
