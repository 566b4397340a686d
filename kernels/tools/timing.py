"""How the tuner times the configurations of a kernel: in turn, on inputs that no cache holds.

Device events time the calls. The inputs rotate, four times the L2 cache in all. In each round every configuration is
called once, so that all see the same clocks and temperature; the median of the rounds counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from fastgpt2.kernels.tuning import LaunchConfig

AGREE = 0.02
"""The largest difference of two configurations' results, relative to their norm: ten times bfloat16's rounding."""
WARM_UP, ROUNDS = 3, 50

Launch = Callable[[LaunchConfig], Any]


def rotating(make: Callable[[int], Launch], cache: int, allocated: Callable[[], int]) -> list[Launch]:
    """make(0), make(1), ...: as many as fill four times the cache, in bytes, with inputs; 2 to 16."""
    before = allocated()
    launches = [make(0)]
    each = max(1, allocated() - before)
    return launches + [make(seed) for seed in range(1, max(2, min(16, -(-4 * cache // each))))]


def disagreement(results: Any, reference: Any) -> float:
    """The largest difference of two calls' tensors, relative to the reference's norm; 0 if there are no tensors."""
    largest = 0.0
    for mine, theirs in zip(_tensors(results), _tensors(reference), strict=True):
        if theirs.numel():
            norm = torch.linalg.vector_norm(theirs.double()).item()
            error = torch.linalg.vector_norm(mine.double() - theirs.double()).item()
            largest = max(largest, error / max(norm, 1e-300) if error == error else float("inf"))
    return largest


def _tensors(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [] if results is None else [results]


def checked(launch: Launch, configs: Iterable[LaunchConfig]) -> Iterator[tuple[LaunchConfig, str | None]]:
    """Each configuration with the reason not to time it (it fails, or disagrees with the first), or None."""
    reference: Any = None
    first = True
    for config in configs:
        try:
            results = launch(config)
            error = 0.0 if first else disagreement(results, reference)
        except Exception as failure:
            if type(failure).__name__ == "OutOfMemoryError":
                raise
            yield config, f"fails: {type(failure).__name__}: {str(failure).strip().splitlines()[-1:]}"
            continue
        if first:
            reference, first = results, False
        yield config, None if error <= AGREE else f"disagrees with the first by {error:.1e} of its norm"


def milliseconds(launches: list[Launch], configs: list[LaunchConfig], seconds: float) -> dict[LaunchConfig, float]:
    """Each configuration's median over the rounds.

    seconds: the approximate time for all rounds; at least five are made.
    """

    def call(i: int, config: LaunchConfig) -> tuple[Any, Any]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launches[i % len(launches)](config)
        end.record()
        return start, end

    def rounds(count: int) -> list[dict[LaunchConfig, float]]:
        # Queue without waiting: launches hide behind the work. Every call takes the next inputs, so that no call reads
        # what the call before it left in the cache.
        events = [{c: call(r * len(configs) + j, c) for j, c in enumerate(configs)} for r in range(count)]
        torch.cuda.synchronize()
        return [{c: start.elapsed_time(end) for c, (start, end) in pairs.items()} for pairs in events]

    took = sum(rounds(WARM_UP)[-1].values())
    samples = rounds(max(5, min(ROUNDS, int(1e3 * seconds / max(took, 1e-3)))))
    return {c: statistics.median(sample[c] for sample in samples) for c in configs}
