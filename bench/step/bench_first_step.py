"""Seconds from the start of a process until its first training step is done: imports, model, compiler and all.

Twice, in processes that have the machine to themselves: `cold` with empty caches of compiled code, as after an
installation, and `cached` with what the first one left there. pytest-benchmark's table shows the latter.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from bench.ops.shapes import CUDA, DEVICE
from bench.step.bench_train_step import LIMITS
from bench.step.lockstep import Worker, WorkerError
from bench.step.steps import STEPS, Kernels, StepShape
from bench.step.worker import FAILED
from bench.timing import REPLAY, Timed, replay

SHAPE = StepShape("gpt2", 4, "bfloat16") if CUDA else StepShape("tiny", 8, "float32", n_layer=1)
NAMES = ("ours-auto", "ours-triton", "plain", "transformers")


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_first_step(
    benchmark: Any, record: Callable[[dict[str, Any]], None], kernels: Kernels, compiled: bool, name: str
) -> None:
    if reason := STEPS[name].cuda * (not CUDA):
        pytest.skip(reason)
    benchmark.group = f"first step, {SHAPE.model}, {'compiled' if compiled else 'eager'}"
    with tempfile.TemporaryDirectory() as caches:
        seconds = {state: seconds_to_first(name, compiled, caches, kernels) for state in ("cold", "cached")}
    record(
        {
            "contest": uuid.uuid4().hex,
            "op": "first step",
            "backend": name,
            "role": STEPS[name].role,
            "compiled": compiled,
            "dtype": SHAPE.dtype,
            "shape": SHAPE.info(),
            "ms_median": None,
            "seconds_to_first": seconds,
        }
    )
    cached_ms = [1e3 * seconds["cached"]]
    replay(benchmark, Timed(cached_ms, cached_ms, None, "wall clock of one process"))


def seconds_to_first(name: str, compiled: bool, caches: str, kernels: Kernels) -> float:
    """Run one process to its first step, with its caches of compiled code in a folder."""
    candidate = STEPS[name].on(SHAPE, DEVICE, compiled=compiled, threads=None if CUDA else 1, kernels=kernels)
    candidate.environment.update(TORCHINDUCTOR_CACHE_DIR=f"{caches}/inductor", TRITON_CACHE_DIR=f"{caches}/triton")
    with Worker(name, candidate) as worker:
        try:
            worker.build(LIMITS.build)
        except WorkerError as error:
            if error.kind != FAILED:
                pytest.skip(str(error))
            pytest.fail(f"{error}\n{worker.output()}", pytrace=False)
        return worker.seconds_to_first
