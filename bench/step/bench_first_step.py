"""Benchmark of the first step: seconds from the start of a process, with imports, model and compiler.

Twice, in processes that have the machine to themselves: `cold` with empty caches of compiled code, as after an
installation, and `cached` with what the first one left there. pytest-benchmark's table shows the latter.
"""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable
from typing import Any

import pytest

from bench.contest import CUDA
from bench.result import Result
from bench.step.lockstep import Worker, WorkerError
from bench.step.steps import STEPS, Kernels, StepContest, StepShape
from bench.step.worker import FAILED
from bench.timing import REPLAY, Timed, replay

SHAPE = StepShape("gpt2", 4, "bfloat16") if CUDA else StepShape("tiny", 8, "float32", n_layer=1)
NAMES = ("ours-auto", "ours-triton", "plain", "transformers")


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
def test_first_step(
    benchmark: Any, record: Callable[[Result], None], kernels: Kernels, compiled: bool, name: str
) -> None:
    if STEPS[name].needs_gpu and not CUDA:
        pytest.skip(STEPS[name].needs_gpu)
    benchmark.group = f"first step, {SHAPE.model}, {'compiled' if compiled else 'eager'}"
    contest = StepContest("first", SHAPE, compiled, NAMES, kernels=kernels)
    with tempfile.TemporaryDirectory() as caches:
        seconds = {state: seconds_to_first(contest, name, caches) for state in ("cold", "cached")}
    record(
        Result(
            contest=uuid.uuid4().hex,
            op="first step",
            backend=name,
            role=STEPS[name].role,
            compiled=compiled,
            dtype=SHAPE.dtype,
            shape=SHAPE.info(),
            seconds_to_first=seconds,
        )
    )
    cached_ms = [1e3 * seconds["cached"]]
    replay(benchmark, Timed(cached_ms, cached_ms, None, "wall clock of one process"))


def seconds_to_first(contest: StepContest, name: str, caches: str) -> float:
    """Run one process to its first step, with its caches of compiled code in a folder."""
    candidate = contest.place(name, contest.compiled)
    candidate.environment.update(TORCHINDUCTOR_CACHE_DIR=f"{caches}/inductor", TRITON_CACHE_DIR=f"{caches}/triton")
    with Worker(name, candidate, contest.limits) as worker:
        try:
            worker.build()
        except WorkerError as error:
            if error.kind != FAILED:
                pytest.skip(str(error))
            pytest.fail(f"{error}\n{worker.output()}", pytrace=False)
        return worker.seconds_to_first
