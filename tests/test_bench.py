"""The operations' benchmarks: what is timed, against whom and how, and what a result says."""

from __future__ import annotations

import functools
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import timing
from bench.bench_attention import AttentionContest
from bench.bench_data import TOKENS, DataContest, nanogpt, write_counting_shard
from bench.bench_gelu_mlp import MlpContest, MlpShape
from bench.bench_layer_norm import NormContest, NormShape
from bench.bench_linear_cross_entropy import HeadContest, HeadShape
from bench.bench_optimizer import ONE_BLOCK, OptimizerContest, fused
from bench.contests import Contest, Function
from bench.peers import torch_add_layer_norm
from bench.results import table
from bench.roofline import Work, ceilings, figures, least_ms, read_or_measure
from bench.shapes import AttentionShape
from bench.timing import ROOT, Timed, contest
from fastgpt2.attention import sdpa_attention
from fastgpt2.data import GPT2_VOCAB_SIZE
from fastgpt2.model import parameter_count
from fastgpt2.ops import torch_mlp
from kernels.linear_cross_entropy import linear_cross_entropy_reference

CPU, CUDA = torch.device("cpu"), torch.cuda.is_available()
PRODUCTS = {"float32": 5e11, "bfloat16": 1e12}
CEILINGS: dict[str, Any] = {
    "memory_bytes_per_s": 1e9,
    "matrix_flops_per_s": PRODUCTS,
    "special_per_s": 4e9,
    "how": {},
}
FIELDS = {
    *("name", "group", "contest", "op", "backend", "role", "compiled", "dtype", "shape", "deterministic"),
    *("ms_median", "ms_p20", "ms_p80", "ms_clock", "rounds", "samples", "round_ms", "host_ms"),
    *("tokens", "flops", "bytes", "special", "flops_formula", "bytes_formula"),
    *("tokens_per_s", "tflops", "bytes_per_s", "mfu", "peak_flops", "limit", "limit_ms", "limit_fraction"),
    *("peak_memory_bytes", "peak_memory_meaning", "held_before_bytes", "device_state"),
}


def run(*arguments: str) -> subprocess.CompletedProcess:
    # What this very run was given must not reach the inner one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=300, check=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------- `pytest bench/`

OPS = ("attention", "gelu_mlp", "layer_norm", "linear_cross_entropy", "optimizer", "data")


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`pytest bench/` of the operations but for what is compiled: its output, and what is in its two files of JSON."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "ceilings.json").write_text(json.dumps(CEILINGS))
    outputs = [f"--benchmark-json={folder / 'bench.json'}", f"--bench-jsonl={folder / 'lines'}"]
    small = "not compiled and not chunks" + (" and (B4 or N4096 or gpt2)" if CUDA else "")
    done = run(
        *(f"bench/bench_{op}.py" for op in OPS),
        "-k",
        small,
        *outputs,
        f"--bench-ceilings={folder / 'ceilings.json'}",
        "--bench-commit=abc123",
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return {
        "out": done.stdout,
        "lines": read_lines(folder / "lines"),
        **json.loads((folder / "bench.json").read_text()),
    }


def test_every_result_names_its_figures(benchmarks: dict[str, Any]) -> None:
    for line in benchmarks["lines"]:
        assert line.keys() >= FIELDS, FIELDS - line.keys()
        assert line["ms_p20"] <= line["ms_median"] <= line["ms_p80"] and line["rounds"] == len(line["round_ms"]) >= 5
        assert line["flops_formula"] and line["bytes_formula"] and line["peak_memory_meaning"] and line["ms_clock"]
        assert list(line["mfu"]) == [line["flops_formula"]]
        if not CUDA:
            assert line["mfu"][line["flops_formula"]] is None, "no peak is known for a CPU"
            assert line["host_ms"] is None and line["peak_memory_bytes"] is None and line["device_state"] == {}
    found = {(line["op"], line["backend"], line["role"]) for line in benchmarks["lines"]}
    for direction in ("forward", "backward"):
        assert {(f"attention {direction}", n, "peer") for n in ("naive", "sdpa")} <= found
        assert (f"add_layer_norm {direction}", "torch", "peer") in found
    assert {(f"mlp {d}", "torch", "peer") for d in ("forward", "backward", "forward+backward")} <= found
    for direction in ("training", "evaluation"):
        op = f"linear_cross_entropy {direction}"
        assert {(op, "chunked", "ours"), (op, "torch", "peer"), (op, "matmuls-alone", "floor")} <= found
    assert {("optimizer step", "fused", "ours"), ("optimizer step", "foreach", "peer")} <= found
    assert {("data loading", "shards", "ours"), ("data loading", "nanogpt-memmap", "peer")} <= found


def test_figures_follow_from_the_time(benchmarks: dict[str, Any]) -> None:
    for line in benchmarks["lines"]:
        seconds, shape, op = line["ms_median"] / 1e3, line["shape"], line["op"]
        size = 4 if line["dtype"] == "float32" else 2
        if op == "attention backward":
            # 2.5 times 4 B H T^2 D over the causal half; qkv, o, do, dqkv and the log-sum-exp.
            assert line["flops"] == 5 * shape["B"] * shape["H"] * shape["T"] ** 2 * shape["D"]
            assert line["special"] == shape["B"] * shape["H"] * shape["T"] ** 2 / 2
            rows = shape["B"] * shape["H"] * shape["T"]
            assert line["bytes"] == rows * (8 * shape["D"] * size + 4)
        if op == "mlp forward+backward":
            assert line["flops"] == 48 * shape["B"] * shape["T"] * shape["C"] ** 2
            assert line["special"] == 2 * shape["B"] * shape["T"] * 4 * shape["C"]
        if op == "linear_cross_entropy training":
            N, C, V = shape["N"], shape["C"], shape["V"]
            assert (line["flops"], line["special"]) == (6 * N * C * V, 2 * N * V)
            assert line["bytes"] == 2 * (N + V) * C * size + 8 * N
        if op == "add_layer_norm forward" and not CUDA:
            assert line["bytes"] == 4 * 4 * shape["N"] * shape["C"]
        if op == "optimizer step":
            assert line["bytes"] == 28 * shape["parameters"] and line["tokens_per_s"] is None
        else:
            assert line["tokens"] == shape.get("N", shape.get("B", 0) * shape.get("T", 0))
            assert line["tokens_per_s"] == pytest.approx(line["tokens"] / seconds)
        assert line["tflops"] == pytest.approx(line["flops"] / seconds / 1e12)
        if op == "data loading" and CUDA:
            assert line["limit"] is None
        else:
            least = {"memory": line["bytes"] / 1e9, "special": line["special"] / 4e9}
            least["matrix"] = line["flops"] / PRODUCTS.get(line["dtype"], float("inf"))
            assert least[line["limit"]] == max(least.values())
            assert line["limit_ms"] == pytest.approx(1e3 * least[line["limit"]])
            assert line["limit_fraction"] == pytest.approx(line["limit_ms"] / line["ms_median"])


def test_parameters_of_the_optimizer_are_the_models(benchmarks: dict[str, Any]) -> None:
    counted = {line["shape"]["parameters"] for line in benchmarks["lines"] if line["op"] == "optimizer step"}
    if not CUDA:
        assert counted == {parameter_count(ONE_BLOCK, padded=True)}


def test_pytest_benchmark_is_given_exactly_our_samples(benchmarks: dict[str, Any]) -> None:
    """Its data, in rounds of equal length, have the medians that we recorded."""
    for result, line in zip(benchmarks["benchmarks"], benchmarks["lines"], strict=True):
        data, rounds = result["stats"]["data"], line["rounds"]
        assert result["name"] == line["name"] and len(data) == line["samples"] == result["stats"]["rounds"]
        per_round = len(data) // rounds
        ours = [statistics.median(data[i : i + per_round]) for i in range(0, len(data), per_round)]
        if len(data) == rounds * per_round:
            assert ours == pytest.approx([ms / 1e3 for ms in line["round_ms"]], rel=1e-12)


def test_the_json_says_where_and_what(benchmarks: dict[str, Any]) -> None:
    where = benchmarks["machine_info"]["fastgpt2"]
    assert {"device", "torch", "triton", "python"} <= where.keys()
    assert where["torch"] == torch.__version__
    assert "node" not in benchmarks["machine_info"], "results are published: no names of machines"
    assert benchmarks["commit_info"]["id"] == "abc123"


def test_each_result_is_a_line_as_it_is_made(benchmarks: dict[str, Any]) -> None:
    assert [line["name"] for line in benchmarks["lines"]] == [r["name"] for r in benchmarks["benchmarks"]]
    assert all(line["kind"] == "benchmark" and line["group"] for line in benchmarks["lines"])
    assert "naive" in table(benchmarks["lines"])


def test_results_of_a_contest_are_beside_each_other(benchmarks: dict[str, Any]) -> None:
    contests: dict[str, list[dict[str, Any]]] = {}
    for line in benchmarks["lines"]:
        contests.setdefault(line["contest"], []).append(line)
    assert len(contests) == len({line["group"] for line in benchmarks["lines"]}), "one run of each contest"
    assert all(len({line["rounds"] for line in lines}) == 1 for lines in contests.values())
    attention = [{line["backend"] for line in c} for c in contests.values() if c[0]["op"] == "attention forward"]
    assert all({"naive", "sdpa"} <= backends for backends in attention) and attention


@pytest.mark.skipif(CUDA, reason="Triton is not skipped where there is a GPU")
def test_triton_is_skipped_on_a_cpu_and_says_why(benchmarks: dict[str, Any]) -> None:
    assert "Triton on a CPU is interpreted" in benchmarks["out"]
    assert not [line for line in benchmarks["lines"] if line["backend"] == "triton"]


# --------------------------------------------------------------------------- who takes part, and what it costs

SLEEPERS = """
import time
from pathlib import Path

import pytest

from bench.contests import Candidate, Contest
from bench.peers import Unavailable
from bench.roofline import Work
from bench.timing import REPLAY

LOG = Path(__file__).with_name("log")


def absent():
    raise Unavailable("sleepless is not installed: pip install sleepless")


class Sleep(Contest):
    op, dtype, work = "sleep", "float32", Work(10, 1e9, 4e6, 2e6, "FLOPs", "bytes")
    candidates = {
        "quick": Candidate(lambda: 0.001, "ours"),
        "slow": Candidate(lambda: 0.003, "peer"),
        "wrong": Candidate(lambda: 0.001, "peer"),
        "breaks": Candidate(lambda: 0.001, "peer"),
        "absent": Candidate(absent, "peer"),
        "left-out": Candidate(lambda: 0.001, "peer"),
    }

    def __init__(self, size):
        self.size = size

    def shape(self):
        return {"N": self.size}

    def draw(self):
        return []

    def check(self, name, function):
        assert name != "wrong", "not timed: y is off by 1"

    def prepare(self, name, function, sets):
        def call(i):
            if name == "breaks" and i == 9:
                raise ValueError("it broke")
            with LOG.open("a") as file:
                print(name, i, file=file)
            time.sleep(function)
        return call


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", Sleep.candidates)
@pytest.mark.parametrize("size", [1, 2])
def test_sleep(compete, size, name):
    compete(Sleep(size), name)
"""


@pytest.fixture(scope="module")
def sleepers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("sleepers")
    (folder / "test_sleep.py").write_text(SLEEPERS)
    options = ["-p", "bench.conftest", "--rootdir", str(folder), "-rA", f"--bench-jsonl={folder / 'lines'}"]
    done = run(str(folder), *options, "-k", "not left-out and 1-")
    log = [line.split() for line in (folder / "log").read_text().splitlines()]
    return {"out": done.stdout, "lines": read_lines(folder / "lines"), "log": [(name, int(i)) for name, i in log]}


def test_what_one_candidate_cannot_do_costs_only_itself(sleepers: dict[str, Any]) -> None:
    assert re.search(r"2 failed, 2 passed, 1 skipped, 7 deselected", sleepers["out"]), sleepers["out"]
    assert "not timed: y is off by 1" in sleepers["out"], "what is wrong says what"
    assert "ValueError: it broke" in sleepers["out"] and "in call" in sleepers["out"], "an error says where"
    assert "sleepless is not installed: pip install sleepless" in sleepers["out"], "what can't run says why"
    assert [line["backend"] for line in sleepers["lines"]] == ["quick", "slow"]


def test_only_the_selected_are_run_and_the_wrong_are_not_timed(sleepers: dict[str, Any]) -> None:
    assert {name for name, _ in sleepers["log"]} == {"quick", "slow", "breaks"}
    assert max(i for name, i in sleepers["log"] if name == "breaks") == 8


def test_the_rounds_of_a_contest_interleave(sleepers: dict[str, Any]) -> None:
    turns = [name for name, _ in itertools.groupby(name for name, _ in sleepers["log"])]
    turns = [name for name in turns if name != "breaks"]
    # Prepared one after the other, warmed up one after the other, then in rounds whose order rotates.
    both = [name for name, _ in itertools.groupby(turns)]
    assert both.count("quick") >= 5 and both.count("slow") >= 5
    assert both == list(itertools.islice(itertools.cycle(["quick", "slow"]), len(both)))


def test_without_ceilings_there_is_no_limit(sleepers: dict[str, Any]) -> None:
    quick, slow = sleepers["lines"]
    if not CUDA:
        assert quick["limit"] is quick["limit_ms"] is quick["limit_fraction"] is None, "a CPU's are not measured"
    assert quick["contest"] == slow["contest"]
    assert 1.0 <= quick["ms_median"] < slow["ms_median"], "3 ms of sleep are longer than 1"


def test_disabled_each_is_checked_and_called_once(tmp_path: Path) -> None:
    (tmp_path / "test_sleep.py").write_text(SLEEPERS)
    options = ["-p", "bench.conftest", "--rootdir", str(tmp_path), "-rA", f"--bench-jsonl={tmp_path / 'lines'}"]
    done = run(str(tmp_path), *options, "--benchmark-disable", "-k", "1- and (quick or wrong or absent)")
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout
    assert (tmp_path / "log").read_text() == "quick 0\n"
    assert not (tmp_path / "lines").exists(), "nothing was measured"


# ---------------------------------------------------------------------------------------------- the clock


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


@pytest.mark.parametrize("samples", [[0.1 + 0.2, 1e-9, 12345.678], [1 / 3] * 40])
def test_the_replayed_clock_is_exact(samples: list[float]) -> None:
    """pytest-benchmark subtracts two readings a round."""
    timing.REPLAY.load(samples)
    readings = [timing.REPLAY() for _ in range(2 * len(samples))]
    assert [end - start for start, end in zip(readings[::2], readings[1::2], strict=True)] == samples


# ------------------------------------------------------------------------------------- what is wrong is not timed


def shifted(batch: Function) -> Function:
    return lambda step: tuple(x.roll(1, -1) if i else x for i, x in enumerate(batch(step)))


F32 = torch.float32
ATTENTION = AttentionContest(AttentionShape(2, 33, 3, 16, F32), "forward")
MLP, NORM = MlpContest(MlpShape(2, 5, 16, F32), "forward"), NormContest(NormShape(7, 16, F32), "forward")
HEAD, ADAMW = HeadContest(HeadShape(9, 16, 64, F32), "training"), OptimizerContest("tiny", ONE_BLOCK)


def adam(model: Any) -> Any:
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4, weight_decay=0.1)
    return optimizer, optimizer.step


def exact_gelu(x: torch.Tensor, w_fc: Any, b_fc: Any, w_proj: Any, b_proj: Any) -> torch.Tensor:
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, w_fc, b_fc))
    return torch.nn.functional.linear(hidden, w_proj, b_proj)


WRONG: dict[str, tuple[Contest, Function, Function]] = {
    "attention sees no past": (ATTENTION, sdpa_attention, lambda qkv: qkv[:, :, 2] * 1.0),
    "attention mixes heads up": (ATTENTION, sdpa_attention, lambda qkv: sdpa_attention(qkv.flip(3))),
    "mlp with the exact GELU": (MLP, torch_mlp, exact_gelu),
    "mlp without a bias's gradient": (MLP, torch_mlp, lambda x, w, b, v, c: torch_mlp(x, w, b, v, c.detach() + 0 * c)),
    "norm of x alone": (
        NORM,
        torch_add_layer_norm,
        lambda x, r, w, b: (torch_add_layer_norm(x, 0 * r, w, b)[0], torch_add_layer_norm(x, r, w, b)[1]),
    ),
    "loss a thousandth off": (
        HEAD,
        linear_cross_entropy_reference,
        lambda hidden, weight, targets: 1.001 * linear_cross_entropy_reference(hidden, weight, targets),
    ),
    "the weight's gradient twice": (
        HEAD,
        linear_cross_entropy_reference,
        lambda hidden, weight, targets: linear_cross_entropy_reference(hidden, 2 * weight - weight.detach(), targets),
    ),
    "decay inside the gradient": (ADAMW, fused, adam),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_not_timed(what: str) -> None:
    contest, right, wrong = WRONG[what]
    contest.check("right", right)
    with pytest.raises(AssertionError, match=r"^not timed: .* is off by .* is allowed"):
        contest.check("wrong", wrong)


def test_wrong_batches_are_not_timed(tmp_path: Path) -> None:
    B, T = 3, 64
    data = DataContest(B, T, write_counting_shard(tmp_path))
    right = nanogpt(tmp_path / "train_000000.bin", B, T)
    data.check("nanogpt-memmap", right)
    first = right(0)
    for wrong, why in (
        (shifted(right), "targets are wrong"),
        (lambda step: first, "the second batch is the first"),
        (lambda step: (first[0][:2], first[1][:2]), "the batch is"),
    ):
        with pytest.raises(AssertionError, match=f"^not timed: .*{why}"):
            data.check("wrong", wrong)
    with pytest.raises(AssertionError, match="not timed"):
        data.check("dummy", lambda step: (first[0], first[1] + GPT2_VOCAB_SIZE))
    assert TOKENS % GPT2_VOCAB_SIZE, "the shard's windows are not all the same"


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
def test_ceilings_of_a_cpu_are_measured_once(tmp_path: Path) -> None:
    found = read_or_measure(tmp_path / "ceilings.json", CPU)
    began = timing.time.perf_counter()
    assert read_or_measure(tmp_path / "ceilings.json", CPU) == found
    assert timing.time.perf_counter() - began < 0.01
    assert found["special_per_s"] is None and set(found["matrix_flops_per_s"]) == {"bfloat16", "float32"}
    assert all(rate > 1e8 for rate in (found["memory_bytes_per_s"], *found["matrix_flops_per_s"].values()))
    assert set(found["how"]) == {"memory", "matrix", "special", "all"}


def test_exponentials_dominate_the_loop_that_measures_them() -> None:
    """A warp's MUFU takes eight clocks of its units, any instruction one of its scheduler: compiled for sm_90."""
    program = """
import subprocess, tempfile
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bench.special import BLOCK, RUNS, UNROLLED, WARPS, exp2_loop
from kernels.bounds import read_code

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
def test_ceilings_of_a_gpu_are_those_of_hardware() -> None:
    """No rate is above what the card's multiprocessors and clock allow, and none far below it."""
    device = torch.device("cuda:0")
    properties = torch.cuda.get_device_properties(device)
    found = ceilings(device)
    lanes = found["special_per_s"] / properties.multi_processor_count / 16
    assert 0.9e9 < lanes < 2.8e9, "exponentials a second of a lane: one a clock"
    rates = found["matrix_flops_per_s"]
    assert rates["bfloat16"] > rates["tf32"] and rates["bfloat16"] > 1.5 * rates["float32"]
    assert found["memory_bytes_per_s"] > 2e11


@pytest.mark.gpu
def test_device_time_leaves_the_launches_out() -> None:
    """A call of many tiny kernels takes the host longer than the device; one of a large product the other way."""
    device, small = torch.device("cuda:0"), torch.zeros(16, device="cuda")
    large = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)

    def tiny(i: int) -> None:
        for _ in range(20):
            small.add_(1.0)

    timed = contest({"tiny": tiny, "product": lambda i: large @ large}, device, seconds=0.1)
    tiny_time, product = timed["tiny"], timed["product"]
    assert isinstance(tiny_time, Timed) and isinstance(product, Timed)
    assert product.host_ms is not None and tiny_time.host_ms is not None
    assert product.host_ms < product.ms_median and tiny_time.host_ms > tiny_time.ms_median
    # Of wall-clock time for 20 products in a row the events miss little.
    torch.cuda.synchronize()
    began = timing.time.perf_counter()
    for _ in range(20):
        large @ large
    torch.cuda.synchronize()
    assert product.ms_median == pytest.approx(1e3 * (timing.time.perf_counter() - began) / 20, rel=0.3)
