"""How everything here is timed, and the record of where it was.

A contest times all candidates for one piece of work together: in each round every candidate in turn, in an order that
rotates, is called once untimed and then some times timed. A candidate's figure for a round is the median of its timed
calls, its figure the median of its rounds; a ratio of two candidates is formed round by round, so that what drifts
(clocks, temperature, a neighbour on the same machine) cancels. Inputs rotate, so that the L2 cache holds none of them.

On a CUDA device the clock is a pair of device events around each call. The calls of a round are queued behind a kernel
that only spins for as long as the host takes to queue them: the events hold the device's time alone, and `host_ms` says
what launching took beside it. On a CPU it is the wall clock.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import platform
import statistics
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgpt2 import record
from fastgpt2.device import device_name
from fastgpt2.record import package_version

ROOT = Path(__file__).resolve().parents[1]
STAGE_ENDS = "BENCH_STAGE_ENDS"
"""The environment's variable by which a stage is told its end."""

Call = Callable[[int], object]
"""Launches the work on the inputs of an index, which grows by one a call."""


@dataclass(frozen=True)
class Timed:
    """A candidate's times in a contest.

    Args:
        round_ms: the median of each round, milliseconds.
        samples_ms: of every timed call.
        host_ms: what launching a call takes the host, the median over rounds, waits of its own for the device and all;
            None on a CPU.
        clock: what told the time.
    """

    round_ms: list[float]
    samples_ms: list[float]
    host_ms: float | None
    clock: str

    @property
    def ms_median(self) -> float:
        return statistics.median(self.round_ms)

    def info(self) -> dict[str, Any]:
        """A result's fields: ms_median, ms_p20, ms_p80 (over rounds), ms_clock, rounds, samples, round_ms, host_ms."""
        return {
            "ms_median": self.ms_median,
            "ms_p20": percentile(self.round_ms, 20),
            "ms_p80": percentile(self.round_ms, 80),
            "ms_clock": self.clock,
            "rounds": len(self.round_ms),
            "samples": len(self.samples_ms),
            "round_ms": self.round_ms,
            "host_ms": self.host_ms,
        }


ROUNDS, FEWEST_ROUNDS = 10, 5
MOST_CALLS = 20
"""Timed calls of a candidate in a round."""
QUEUED_MS = 2.5
"""The host's time for the calls that are queued together. A launch takes it some 2.5 us at the least: more than 1024 of
them fill the queue, and the host waits."""
MOST_SPIN_MS = 50.0


def take_turns(
    entrants: dict[str, Any],
    rounds: int,
    *,
    lose: Callable[[str, Exception], None],
    until: float = math.inf,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Time entrants in rounds whose order rotates, one at a time.

    Args:
        entrants: by name; `round()` of each times some calls and returns milliseconds a call. `lose` removes one.
        lose: called with an entrant's name and the exception that its round raised.
        until: time.monotonic() after which no round starts.
        say: told of each step, for a log.
    """
    for number in range(rounds):
        if time.monotonic() >= until:
            say(f"out of time after {number} of {rounds} rounds")
            return
        names = list(entrants)
        first = number % max(1, len(names))
        for name in names[first:] + names[:first]:
            try:
                say(f"{name}: round {number + 1}/{rounds}: {entrants[name].round():.3f} ms")
            except Exception as error:
                lose(name, error)


def contest(
    calls: Mapping[str, Call], device: torch.device, *, rounds: int = ROUNDS, seconds: float = 1.0
) -> dict[str, Timed | Exception]:
    """Time calls against each other, in interleaved rounds in this process.

    Args:
        calls: by name; none waits for the device.
        rounds: at most. Slow calls have fewer, at least FEWEST_ROUNDS.
        seconds: about how long each call is timed in all rounds.

    Returns:
        By name what was timed, or the exception that the call raised, after which it is left out.
    """
    entrants: dict[str, _Calls] = {}
    outcomes: dict[str, Timed | Exception] = {}

    def lose(name: str, error: Exception) -> None:
        traceback.clear_frames(error.__traceback__)  # its frames hold the device's memory
        entrants.pop(name)
        outcomes[name] = error

    for name, call in calls.items():
        entrants[name] = _Calls(call, device)
        try:
            entrants[name].warm_up()
        except Exception as error:
            lose(name, error)
    cost_ms = sum(entrant.cost_ms for entrant in entrants.values())
    rounds = max(FEWEST_ROUNDS, min(rounds, int(1e3 * seconds * len(calls) / max(2 * cost_ms, 1e-6))))
    for entrant in entrants.values():
        entrant.budget_ms = 1e3 * seconds / rounds
    take_turns(entrants, rounds, lose=lose)
    return outcomes | {name: entrant.timed() for name, entrant in entrants.items()}


class _Calls:
    """An entrant of this process: a call, and the times of its rounds."""

    WARM_UPS = 3

    def __init__(self, call: Call, device: torch.device) -> None:
        indices = itertools.count()
        self._launch = lambda: call(next(indices))
        self._time_calls, self._clock = _CLOCKS[device.type]
        self._batches: list[_Batch] = []
        self.budget_ms = 0.0
        """The time of a round."""
        self.cost_ms = 0.0
        """The time of a call, launch included."""

    def warm_up(self) -> None:
        """Compile, let the clocks rise, and see how long a call takes."""
        for _ in range(self.WARM_UPS):
            self._time(1)
        last = self._batches[-1]
        self.cost_ms = max(last.samples_ms[-1], last.host_ms, 1e-6)

    def round(self) -> float:
        """An untimed call, and as many timed ones as the budget allows, at least one."""
        most, host_ms = MOST_CALLS, self._batches[-1].host_ms
        if host_ms:
            most = min(most, int(QUEUED_MS / host_ms))
        return statistics.median(self._time(max(1, min(most, int(self.budget_ms / self.cost_ms) - 1))).samples_ms)

    def _time(self, count: int) -> _Batch:
        self._batches.append(self._time_calls(self._launch, count, self._batches[-1].host_ms if self._batches else 0.0))
        return self._batches[-1]

    def timed(self) -> Timed:
        rounds = self._batches[self.WARM_UPS :]
        return Timed(
            round_ms=[statistics.median(batch.samples_ms) for batch in rounds],
            samples_ms=[ms for batch in rounds for ms in batch.samples_ms],
            host_ms=statistics.median(batch.host_ms for batch in rounds) or None,
            clock=self._clock,
        )


class _Batch(NamedTuple):
    samples_ms: list[float]
    host_ms: float
    """The time of a launch; 0 if the launch is the work."""


def _time_on_host(launch: Callable[[], object], count: int, host_ms: float) -> _Batch:
    """One call untimed, then `count` by the wall clock."""
    launch()
    samples = []
    for _ in range(count):
        began = time.perf_counter()
        launch()
        samples.append(1e3 * (time.perf_counter() - began))
    return _Batch(samples, 0.0)


def _time_on_cuda(launch: Callable[[], object], count: int, host_ms: float) -> _Batch:
    """One launch untimed, then `count` between device events, queued behind a spin that lasts until all are queued.

    Args:
        host_ms: what a launch took the host the last time.
    """
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    cycles_per_ms = _spin_cycles_per_ms()
    torch.cuda.synchronize()
    launch()
    torch.cuda._sleep(int(min(MOST_SPIN_MS, 1.5 * (count + 1) * host_ms) * cycles_per_ms))
    began = time.perf_counter()
    for start, end in pairs:
        start.record()
        launch()
        end.record()
    host_ms = 1e3 * (time.perf_counter() - began) / count
    torch.cuda.synchronize()
    return _Batch([start.elapsed_time(end) for start, end in pairs], host_ms)


@functools.cache
def _spin_cycles_per_ms() -> float:
    cycles = 40_000_000
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(cycles)  # the clocks rise
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    torch.cuda.synchronize()
    return cycles / start.elapsed_time(end)


_CLOCKS = {
    "cpu": (_time_on_host, "wall clock, interleaved rounds"),
    "cuda": (_time_on_cuda, "device events, interleaved rounds, launches hidden behind a spin"),
}


class _Replay:
    """A timer for pytest-benchmark that makes durations measured elsewhere its own: it is read twice a round, and the
    difference is the next of the samples, to the last bit."""

    __name__ = "REPLAY"  # what pytest-benchmark's table calls it

    def __init__(self) -> None:
        self._readings: Iterator[float] = iter(())

    def load(self, seconds: Iterable[float]) -> None:
        self._readings = iter([reading for sample in seconds for reading in (0.0, sample)])

    def __call__(self) -> float:
        return next(self._readings)


REPLAY = _Replay()
"""For `@pytest.mark.benchmark(timer=REPLAY)`."""


def replay(benchmark: Any, timed: Timed) -> None:
    """Hand a contest's samples to pytest-benchmark's fixture, in a test whose timer is REPLAY."""
    REPLAY.load(ms / 1e3 for ms in timed.samples_ms)
    benchmark.pedantic(lambda: None, rounds=len(timed.samples_ms))


def percentile(values: list[float], percent: int) -> float:
    """By nearest rank."""
    return sorted(values)[round((len(values) - 1) * percent / 100)]


def peak_memory(launch: Callable[[], object], device: torch.device, *, others: int = 0) -> dict[str, Any]:
    """The fields peak_memory_bytes of a call, held_before_bytes, and what they mean; CUDA's from launching it once.

    Args:
        others: bytes of the device's memory that are held and have nothing to do with the call.
    """
    if device.type != "cuda":
        nothing = "not told apart from the others' in one process on a CPU"
        return {"peak_memory_bytes": None, "peak_memory_meaning": nothing, "held_before_bytes": None}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    launch()
    torch.cuda.synchronize(device)
    return {
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) - others,
        "peak_memory_meaning": "allocated by torch during a call, with all inputs",
        "held_before_bytes": held - others,
    }


def input_sets(device: torch.device, bytes_each: int) -> int:
    """How many sets of inputs to rotate: four times the L2 cache in all, 2 to 16."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, -(-4 * cache // bytes_each)))


def environment() -> dict[str, Any]:
    """The device and the versions that a figure depends on."""
    cuda = torch.cuda.is_available()
    properties = torch.cuda.get_device_properties(0) if cuda else None
    return {
        "device": device_name(torch.device("cuda:0" if cuda else "cpu")),
        "compute_capability": None if properties is None else f"{properties.major}.{properties.minor}",
        "multiprocessors": None if properties is None else properties.multi_processor_count,
        "memory_bytes": None if properties is None else properties.total_memory,
        "l2_cache_bytes": None if properties is None else properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "torch": torch.__version__,
        "triton": package_version("triton"),
        "numpy": package_version("numpy"),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "packages": {"transformers": version} if (version := package_version("transformers")) else {},
    }


def commit(given: str | None = None) -> dict[str, Any]:
    """The commit that is measured: as given, else git's, else "unknown"; `dirty` is None where nobody can tell."""
    if given:
        return {"id": given, "dirty": None}
    return record.commit(20.0)


def stage_ends() -> float:
    """time.monotonic() at which bench.stages stops the stage that this process is a part of; else infinite."""
    return float(os.environ.get(STAGE_ENDS, "inf"))


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Add an object to a file of JSON lines; a process that dies later doesn't lose it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
