"""How everything here is timed, and the record of where it was.

A call is timed on inputs that rotate, so that the L2 cache holds none of them, after a warm-up that takes in
compilation and lets the clocks rise. pytest-benchmark's own figures are wall-clock seconds of a call and the wait
for the device. On a CUDA device the figures to quote are `event_ms_*`: device events around each of many calls
that are queued without waiting, so that the launches hide behind the work.

    python -m bench.timing --jsonl FILE     append the device's two ceilings to FILE, as one JSON object
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastgpt2.device import device_name, peak_flops, peak_memory_bytes, synchronize

ROOT = Path(__file__).resolve().parents[1]

Call = Callable[[int], object]
"""Launches the work on the inputs of an index, which only ever grows."""


def time_call(benchmark: Any, call: Call, device: torch.device, *, seconds: float = 1.0) -> dict[str, Any]:
    """Time a call with pytest-benchmark, and on a CUDA device with events.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: waits for nothing.
        seconds: about how long each of the two measurements may take.

    Returns:
        For extra_info: `ms_median` and `ms_clock`, which name the figure to quote, `event_ms_median`, `event_ms_p20`,
        `event_ms_p80` and `event_samples` (None without a GPU). Nothing under --benchmark-disable.
    """
    indices = itertools.count()

    def timed() -> None:
        call(next(indices))
        synchronize(device)

    if not benchmark.enabled:
        benchmark.pedantic(timed)
        return {}
    estimate = _warm_up(timed, seconds / 3)
    rounds = max(5, min(200, int(seconds / estimate)))
    benchmark.pedantic(timed, rounds=rounds)
    if device.type != "cuda":
        wall_ms = 1e3 * benchmark.stats.stats.median
        events = dict.fromkeys(("event_ms_median", "event_ms_p20", "event_ms_p80", "event_samples"))
        return {"ms_median": wall_ms, "ms_clock": "wall clock, with the wait", **events}
    samples = event_samples(lambda: call(next(indices)), rounds)
    spread = {"event_ms_p20": percentile(samples, 20), "event_ms_p80": percentile(samples, 80)}
    median = statistics.median(samples)
    clock = "device events, calls queued back to back"
    return {"ms_median": median, "ms_clock": clock, "event_ms_median": median, **spread, "event_samples": len(samples)}


def _warm_up(timed: Callable[[], None], seconds: float) -> float:
    """Call for some seconds, three times at least; the seconds that the fastest call took."""
    timed()  # compiles
    took: list[float] = []
    while len(took) < 2 or sum(took) < seconds:
        began = time.perf_counter()
        timed()
        took.append(time.perf_counter() - began)
    return min(took)


def event_samples(launch: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each of `count` launches on the current CUDA stream; waits once, at the end."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, end in pairs:
        start.record()
        launch()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def percentile(values: list[float], percent: int) -> float:
    """By nearest rank."""
    return sorted(values)[round((len(values) - 1) * percent / 100)]


def rates(
    timing: dict[str, Any], *, tokens: int, flops: float, formula: str, dtype: str, device: torch.device
) -> dict[str, Any]:
    """Tokens and FLOPs a second of a timed call, and MFU: FLOP/s over the device's dense peak, None where unknown.

    Args:
        timing: what `time_call` returned.
        tokens, flops: of one call.
        formula: what `flops` counts.
    """
    peak = peak_flops(device_name(device), dtype)
    named = {"flops_formula": formula, "mfu_formula": f"{formula}, over the dense {dtype} peak", "peak_flops": peak}
    if not timing:
        return named
    per_second = 1e3 / timing["ms_median"]
    return {
        "tokens_per_s": tokens * per_second,
        "tflops": flops * per_second / 1e12,
        "mfu": peak and flops * per_second / peak,
        **named,
    }


def peak_memory(launch: Callable[[], object], device: torch.device) -> dict[str, Any]:
    """`peak_memory_bytes` of a call, with what it means: the two devices can't tell the same thing."""
    if device.type != "cuda":
        launch()
        meaning = "resident in the process, the most so far, with everything run before"
        return {"peak_memory_bytes": peak_memory_bytes(device), "peak_memory_meaning": meaning}
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    held = torch.cuda.memory_allocated(device)
    launch()
    torch.cuda.synchronize(device)
    return {
        "peak_memory_bytes": peak_memory_bytes(device),
        "peak_memory_meaning": "allocated by torch during a call, with all inputs",
        "held_before_bytes": held,
    }


def input_sets(device: torch.device, bytes_each: int) -> int:
    """How many sets of inputs to rotate: four times the L2 cache in all, 2 to 16."""
    if device.type != "cuda":
        return 2
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, min(16, -(-4 * cache // bytes_each)))


def ceilings() -> dict[str, Any]:
    """What the CUDA device reaches at its simplest: a large copy, and a large bfloat16 product."""
    copies = [torch.randn(2**29, device="cuda", dtype=torch.bfloat16) for _ in range(2)]
    target = torch.empty_like(copies[0])
    index = itertools.count()
    copy_ms = _ceiling_ms(lambda: target.copy_(copies[next(index) % 2]))
    n = 8192
    matrices = [torch.randn(n, n, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    def product() -> None:
        i = next(index)
        torch.mm(matrices[i % 3], matrices[(i + 1) % 3])

    matmul_ms = _ceiling_ms(product)
    return {
        "copy_tb_per_s": 2 * target.nbytes / copy_ms / 1e9,
        "copy_meaning": f"device copy of {target.nbytes} bytes, read + written, median of events",
        "copy_ms": copy_ms,
        "matmul_bf16_tflops": 2 * n**3 / matmul_ms / 1e9,
        "matmul_meaning": f"2 n^3 of an n = {n} bfloat16 product of normal numbers, median of events",
        "matmul_ms": matmul_ms,
    }


def _ceiling_ms(launch: Callable[[], object]) -> float:
    event_samples(launch, 50)
    return statistics.median(event_samples(launch, 100))


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
        "triton": _version("triton"),
        "numpy": _version("numpy"),
        "python": platform.python_version(),
        "system": platform.system(),
        "machine": platform.machine(),
        "cpu_threads": torch.get_num_threads(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(given: str | None = None) -> dict[str, Any]:
    """The commit that is measured: as given, else git's, else "unknown"; `dirty` is None where nobody can tell."""
    if given:
        return {"id": given, "dirty": None}
    unknown = {"id": "unknown", "dirty": None}
    if not (ROOT / ".git").exists():  # git would answer for a repository further up
        return unknown
    try:
        head, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return unknown
    return {"id": head, "dirty": bool(changes)}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True)
    return done.stdout.strip()


def append_json_line(path: Path, record: dict[str, Any]) -> None:
    """Add an object to a file of JSON lines; a process that dies later doesn't lose it."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.timing", description="Measure the device's ceilings.")
    parser.add_argument("--jsonl", type=Path, required=True, help="file to append them to")
    given = parser.parse_args()
    record = {"kind": "ceilings", **ceilings()}
    append_json_line(given.jsonl, record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
