"""The clock of the benchmarks and the ceilings that their figures are held against."""

from __future__ import annotations

import functools
import itertools
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import timing
from bench.roofline import Work, ceilings, figures, least_ms, read_or_measure
from bench.timing import ROOT, Timed, contest

CPU, CUDA = torch.device("cpu"), torch.cuda.is_available()
CEILINGS: dict[str, Any] = {
    "memory_bytes_per_s": 1e9,
    "matrix_flops_per_s": {"float32": 5e11, "bfloat16": 1e12},
    "special_per_s": 4e9,
}


def test_a_round_is_one_untimed_call_and_then_timed_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of our own, where a call takes its candidate's time, or 50 ms when another's came before."""
    now, calls, ms = [0.0], [], {"a": 1.0, "b": 2.0, "c": 4.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(name: str, i: int) -> None:
        now[0] += (ms[name] if calls and calls[-1][0] == name else 50.0) / 1e3
        calls.append((name, i))

    timed = contest({name: functools.partial(call, name) for name in ms}, CPU, rounds=6, seconds=0.063)
    turns = "".join(name for name, _ in itertools.groupby(name for name, _ in calls))
    assert turns == "abc" + "abc" + "bca" + "cab" + "abc" + "bca" + "cab", "the warm-up, then rounds in rotating order"
    # 10.5 ms a round for each: an untimed call, and 9, 4 and 1 timed ones.
    for name, count in {"a": 9, "b": 4, "c": 1}.items():
        result = timed[name]
        assert isinstance(result, Timed) and len(result.samples_ms) == 6 * count
        assert result.round_ms == pytest.approx([ms[name]] * 6), "the slow first call of a round is not timed"
        # Three times two calls to warm up; an index is never used twice, so that inputs rotate.
        assert [i for n, i in calls if n == name] == list(range(6 + 6 * (1 + count)))
        assert result.info()["ms_median"] == pytest.approx(ms[name]) and result.host_ms is None


def test_slow_calls_have_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def call(i: int) -> None:
        now[0] += 0.01

    for seconds, rounds in ((1.0, 10), (0.14, 7), (0.001, 5)):
        timed = contest({"a": call, "b": call}, CPU, seconds=seconds)["a"]
        assert isinstance(timed, Timed) and len(timed.round_ms) == rounds, seconds


def test_a_call_that_fails_is_left_out_and_holds_nothing() -> None:
    held: list[weakref.ref] = []

    def fails(i: int) -> None:
        if i == 8:
            memory = torch.zeros(8)
            held.append(weakref.ref(memory))
            raise RuntimeError("out of something")

    timed = contest({"fails": fails, "fine": lambda i: None}, CPU, seconds=0.01)
    assert isinstance(timed["fails"], RuntimeError) and isinstance(timed["fine"], Timed)
    assert len(timed["fine"].round_ms) == 10
    assert [reference() for reference in held] == [None], "a failure keeps its memory for the rest of the contest"


def test_on_cuda_launches_hide_behind_a_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the device: what is queued runs in order; events read the device's clock, 2 ms a launch."""
    queue: list[tuple[str, float]] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = sum(ms for _, ms in queue)

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    stand_ins = {
        "Event": Event,
        "synchronize": lambda: queue.append(("wait", 0.0)),
        "_sleep": lambda cycles: queue.append(("spin", cycles / 1000.0)),
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(timing, "_spin_cycles_per_ms", lambda: 1000.0)
    batch = timing._time_on_cuda(lambda: queue.append(("work", 2.0)), 3, 0.5)
    assert batch.samples_ms == pytest.approx([2.0] * 3) and batch.host_ms > 0
    # Four launches of 0.5 ms and half as much again.
    assert queue == [("wait", 0.0), ("work", 2.0), ("spin", 3.0), *[("work", 2.0)] * 3, ("wait", 0.0)]
    queue.clear()
    timing._time_on_cuda(lambda: None, 20, 100.0)
    assert queue[1] == ("spin", timing.MOST_SPIN_MS), "never long"


def test_what_is_queued_at_once_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 timed calls at most, and no more than take the host 2.5 ms to launch: a queue holds 1024 launches."""
    asked: list[int] = []

    def clock(launch: Any, count: int, host_ms: float) -> timing._Batch:
        asked.append(count)
        return timing._Batch([0.01] * count, 0.2)

    monkeypatch.setitem(timing._CLOCKS, "cuda", (clock, "a stand-in"))
    timed = contest({"a": lambda i: None}, torch.device("cuda"), seconds=1.0)["a"]
    assert isinstance(timed, Timed) and timed.host_ms == 0.2
    assert asked == [1, 1, 1, *[12] * 10]


def test_memory_of_a_call_is_without_what_others_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"memory_allocated": 700, "max_memory_allocated": 1000}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    launched: list[str] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: launched.append("reset"))
    found = timing.peak_memory(lambda: launched.append("call"), torch.device("cuda"), others=400)
    assert launched == ["reset", "call"]
    assert (found["peak_memory_bytes"], found["held_before_bytes"]) == (600, 300)


# --------------------------------------------------------------------------------------------- the roofline


def test_the_longest_of_the_three_is_the_limit() -> None:
    work = Work(tokens=100, flops=5e9, bytes=2e6, special=1.2e7, flops_formula="by hand", bytes_formula="by hand")
    # 5e9 / 1e12, 2e6 / 1e9, 1.2e7 / 4e9
    assert least_ms(work, "bfloat16", CEILINGS) == pytest.approx({"matrix": 5.0, "memory": 2.0, "special": 3.0})
    found = figures(work, 10.0, "bfloat16", CPU, CEILINGS)
    assert (found["limit"], found["limit_ms"], found["limit_fraction"]) == ("matrix", 5.0, 0.5)
    assert (found["tokens_per_s"], found["tflops"], found["bytes_per_s"]) == (10000.0, 0.5, 2e8)
    assert figures(work, 10.0, "float32", CPU, CEILINGS)["limit_ms"] == 10.0
    # A precision without a ceiling leaves the others; no ceilings leave nothing.
    assert figures(work, 10.0, "float16", CPU, CEILINGS)["limit"] == "special"
    nothing = figures(work, 10.0, "float32", CPU, None)
    assert nothing["limit"] is nothing["limit_ms"] is nothing["limit_fraction"] is None


def test_mfu_by_each_formula_is_of_the_dense_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.roofline.device_name", lambda device: "NVIDIA H100 80GB HBM3")
    work = Work(1, 989.4e9, None, None, "llm.c", "unknown")
    found = figures(work, 2.0, "bfloat16", CPU, CEILINGS, {"nanogpt": 2 * 989.4e9})
    assert found["mfu"] == pytest.approx({"llm.c": 0.5, "nanogpt": 1.0}) and found["peak_flops"] == 989.4e12
    assert found["limit"] == "matrix" and found["bytes_per_s"] is None


@pytest.mark.skipif(CUDA, reason="a GPU has every ceiling")
def test_ceilings_of_a_cpu_are_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = read_or_measure(tmp_path / "ceilings.json", CPU)
    with monkeypatch.context() as patch:
        patch.setattr("bench.roofline.ceilings", None)
        assert read_or_measure(tmp_path / "ceilings.json", CPU) == found
    assert found["special_per_s"] is None and set(found["matrix_flops_per_s"]) == {"bfloat16", "float32"}
    assert all(rate > 1e8 for rate in (found["memory_bytes_per_s"], *found["matrix_flops_per_s"].values()))


def test_exponentials_dominate_the_loop_that_measures_them() -> None:
    """A warp's MUFU takes eight clocks of its units, any instruction one of its scheduler: compiled for sm_90."""
    program = """
import subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.special import BLOCK, RUNS, UNROLLED, WARPS, exp2_loop
from fastgpt2.kernels.tools.bounds import read_code

constants = {"RUNS": RUNS, "UNROLLED": UNROLLED, "BLOCK": BLOCK}
signature = {"out_ptr": "*fp32", **dict.fromkeys(constants, "constexpr")}
source = ASTSource(exp2_loop, signature, constants)
kernel = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": WARPS})
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(kernel.asm["cubin"])
    file.flush()
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-sass", file.name]
    sass = subprocess.run(command, check=True, capture_output=True, text=True).stdout
(loop,) = read_code(sass).loops
print(loop.always["MUFU"], loop.total())
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    special, issued = map(int, done.stdout.split())
    # A whole number of runs of the loop, 8 numbers a thread, 8 exponentials each: nothing was left out as unused.
    assert special % 64 == 0 and 8 * special > 3 * issued


@pytest.mark.gpu
def test_a_gpu_s_ceilings_and_its_clock() -> None:
    """One test for both: beside another on the same GPU the ceilings would not hold."""
    device = torch.device("cuda:0")
    found = ceilings(device)
    # An exponential a clock on each of a multiprocessor's 16 lanes: the rate of a lane is the clock's.
    lane = found["special_per_s"] / torch.cuda.get_device_properties(device).multi_processor_count / 16
    assert 0.9e9 < lane < 2.8e9
    rates = found["matrix_flops_per_s"]
    assert rates["bfloat16"] > rates["tf32"] and rates["bfloat16"] > 1.5 * rates["float32"]
    assert found["memory_bytes_per_s"] > 2e11

    small, large = torch.zeros(16, device=device), torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def tiny(i: int) -> None:
        for _ in range(20):
            small.add_(1.0)

    timed = contest({"tiny": tiny, "product": lambda i: large @ large}, device, seconds=0.1)
    many, product = timed["tiny"], timed["product"]
    assert isinstance(many, Timed) and isinstance(product, Timed) and many.host_ms and product.host_ms
    # The host's clock isn't compared with the events': other work on the host changes it. A played queue tests that.
    assert len(many.round_ms) == len(product.round_ms) >= timing.FEWEST_ROUNDS
    assert min(*many.samples_ms, *product.samples_ms) > 0
