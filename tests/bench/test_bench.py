"""The operations' benchmarks: what is timed, against whom and how, and what a result says."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.contest import Function, Missing
from bench.ops.bench_attention import AttentionContest, AttentionShape
from bench.ops.bench_loss import HeadContest, HeadShape
from bench.ops.bench_mlp import MlpContest, MlpShape
from bench.ops.bench_norm import NormContest, NormShape
from bench.ops.bench_optimizer import ONE_BLOCK, OptimizerContest, fused
from bench.ops.op_contest import OpContest
from bench.report.results import table
from bench.result import Result
from bench.step.worker import FAILED, OUT_OF_MEMORY, Failure, explain
from bench.timing import ROOT
from fastgpt2.backends.attention import sdpa_attention
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.backends.norm import torch_norm
from fastgpt2.kernels.loss import linear_cross_entropy_reference
from fastgpt2.model import parameter_count

CUDA = torch.cuda.is_available()
PRODUCTS = {"float32": 5e11, "bfloat16": 1e12}
CEILINGS: dict[str, Any] = {
    "memory_bytes_per_s": 1e9,
    "matrix_flops_per_s": PRODUCTS,
    "special_per_s": 4e9,
}


def run(*arguments: str) -> subprocess.CompletedProcess:
    # What this very run was given must not reach the inner one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=inherited, capture_output=True, text=True, timeout=300, check=False)


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------- `pytest bench/`

FILES = (
    "ops/bench_attention",
    "ops/bench_mlp",
    "ops/bench_norm",
    "ops/bench_loss",
    "ops/bench_optimizer",
)


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`pytest bench/` of the operations but for what is compiled: its output, and what is in its two files of JSON."""
    folder = tmp_path_factory.mktemp("bench")
    (folder / "ceilings.json").write_text(json.dumps(CEILINGS))
    outputs = [f"--benchmark-json={folder / 'bench.json'}", f"--bench-jsonl={folder / 'lines'}"]
    small = "not compiled and not chunks" + (" and (B4 or N4096 or gpt2)" if CUDA else "")
    done = run(
        *(f"bench/{file}.py" for file in FILES),
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
            assert CUDA or shape["parameters"] == parameter_count(ONE_BLOCK, padded=True)
        else:
            assert line["tokens"] == shape.get("N", shape.get("B", 0) * shape.get("T", 0))
            assert line["tokens_per_s"] == pytest.approx(line["tokens"] / seconds)
        assert line["tflops"] == pytest.approx(line["flops"] / seconds / 1e12)
        least = {"memory": line["bytes"] / 1e9, "special": line["special"] / 4e9}
        least["matrix"] = line["flops"] / PRODUCTS[line["dtype"]]
        assert least[line["limit"]] == max(least.values())
        assert line["limit_ms"] == pytest.approx(1e3 * least[line["limit"]])
        assert line["limit_fraction"] == pytest.approx(line["limit_ms"] / line["ms_median"])


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
    assert all(line["kind"] == "benchmark" and line["group"] for line in benchmarks["lines"])
    assert "naive" in table([Result.from_json(line) for line in benchmarks["lines"]])


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

from bench.contest import Candidate, Unavailable
from bench.ops.op_contest import OpContest
from bench.roofline import Work
from bench.timing import REPLAY

LOG = Path(__file__).with_name("log")


def absent():
    raise Unavailable("sleepless is not installed: pip install sleepless")


class Sleep(OpContest):
    op, dtype, work = "sleep", "float32", Work(10, 1e9, 4e6, 2e6, "FLOPs", "bytes")
    candidates = {
        "quick": Candidate("ours", lambda: 0.001),
        "slow": Candidate("peer", lambda: 0.003),
        "wrong": Candidate("peer", lambda: 0.001),
        "breaks": Candidate("peer", lambda: 0.001),
        "absent": Candidate("peer", absent),
        "left-out": Candidate("peer", lambda: 0.001),
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


def test_without_ceilings_there_is_no_limit(sleepers: dict[str, Any]) -> None:
    quick, slow = sleepers["lines"]
    if not CUDA:
        assert quick["limit"] is quick["limit_ms"] is quick["limit_fraction"] is None, "a CPU's are not measured"
    assert quick["contest"] == slow["contest"]
    assert quick["ms_median"] >= 1.0 and slow["ms_median"] >= 3.0, "they sleep as long"


def test_without_pytest_benchmark_a_line_says_what_is_missing() -> None:
    done = run("-p", "no:benchmark", "bench/ops/bench_mlp.py")
    assert done.returncode == 4
    assert "ERROR: the benchmarks need pytest-benchmark: pip install pytest-benchmark" in done.stdout + done.stderr


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB"),
        RuntimeError(f"backend='inductor' raised: {'x' * 600} OutOfMemoryError: CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_lacking_memory_is_no_failure(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert Missing.because(error) == Missing("out of memory on a GPU", failed=False)
    assert explain(error) == Failure("out of memory on the device", OUT_OF_MEMORY)
    assert Missing.because(ValueError("memory")).failed and explain(ValueError("memory")).kind == FAILED


OUTSIDE = """
import torch.nn.functional as F

def attention(qkv):
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

def sees_the_future(qkv):
    q, k, v = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)
"""


def test_an_attention_from_outside_is_timed_beside_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(OUTSIDE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    flags = ["--attn", "mine:attention", "--attn", "mine:sees_the_future", "--bench-jsonl", str(tmp_path / "lines")]
    done = run("bench/ops/bench_attention.py", *flags, "-k", "forward and (mine or naive) and T256 and not compiled")
    assert "not timed: " in done.stdout and "1 failed, 2 passed" in done.stdout, done.stdout[-2000:]
    assert {(line["backend"], line["role"]) for line in read_lines(tmp_path / "lines")} == {
        ("mine:attention", "ours"),
        ("naive", "peer"),
    }


# ------------------------------------------------------------------------------------- what is wrong is not timed


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


WRONG: dict[str, tuple[OpContest, Function, Function]] = {
    "attention sees no past": (ATTENTION, sdpa_attention, lambda qkv: qkv[:, :, 2] * 1.0),
    "attention mixes heads up": (ATTENTION, sdpa_attention, lambda qkv: sdpa_attention(qkv.flip(3))),
    "mlp with the exact GELU": (MLP, torch_mlp, exact_gelu),
    "mlp without a bias's gradient": (MLP, torch_mlp, lambda x, w, b, v, c: torch_mlp(x, w, b, v, c.detach() + 0 * c)),
    "norm of x alone": (
        NORM,
        torch_norm,
        lambda x, r, w, b: (torch_norm(x, 0 * r, w, b)[0], torch_norm(x, r, w, b)[1]),
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
    name = next(iter(contest.candidates))
    contest.check(name, right)
    with pytest.raises(AssertionError, match=r"^not timed: .* is off by .* is allowed"):
        contest.check(name, wrong)


def _gradients(function: Function, inputs: Any, received: Any) -> tuple[torch.Tensor, ...]:
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(function(*inputs), wanted, received)


PREPARED: dict[str, tuple[Any, Function]] = {
    # a contest class with its size, and the plain form
    "attention": (ATTENTION, sdpa_attention),
    "mlp": (MLP, torch_mlp),
    "norm": (NORM, torch_norm),
    "head": (HEAD, linear_cross_entropy_reference),
}
DIRECTIONS = [(what, direction) for what in PREPARED for direction in ("forward", "backward") if what != "head"]
DIRECTIONS += [("mlp", "forward+backward"), ("head", "training"), ("head", "evaluation")]


@pytest.mark.parametrize(("what", "direction"), DIRECTIONS)
def test_what_is_timed_is_the_work_on_inputs_that_rotate(what: str, direction: str) -> None:
    like, function = PREPARED[what]
    contest = type(like)(like.size, direction)
    sets = contest.draw()
    call: Any = contest.prepare(next(iter(contest.candidates)), function, sets)
    assert len(sets) > 1
    for i in (0, 1, 2, 3):  # a backward more than once, too
        inputs, received = sets[i % len(sets)]
        outputs, gradients = function(*inputs), _gradients(function, inputs, received)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        expected = {"forward": outputs, "evaluation": outputs, "backward": gradients}
        got = call(i)
        got = got if isinstance(got, tuple) else (got,)
        torch.testing.assert_close(got, expected.get(direction, (*outputs, *gradients)), rtol=0, atol=0)


def test_attention_of_inputs_apart_has_three_gradients() -> None:
    def apart(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    contest = AttentionContest(ATTENTION.size, "backward")
    with pytest.raises(AssertionError, match="not timed"):
        contest.check("sdpa-flash-apart", lambda q, k, v: apart(q, v, k))
    sets = contest.draw()
    call: Any = contest.prepare("sdpa-flash-apart", apart, sets)
    (packed,) = _gradients(sdpa_attention, *sets[1])
    torch.testing.assert_close(torch.stack(call(1)), packed.permute(2, 0, 3, 1, 4))
