"""The table of targets: what each line compares, and that bench.gpu measures every one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from bench.record import Record
from bench.report import targets
from bench.report.targets import TARGETS
from bench.result import Result
from bench.timing import ROOT

GIB = 2**30


def result(op: str, shape: dict[str, Any], backend: str, ms: float, **other: Any) -> Result:
    role = "ours" if backend == "triton" or backend.startswith("ours") else "peer"
    known = {"contest": f"{op} {shape}", "dtype": "bfloat16", "compiled": None, "peak_memory_bytes": GIB, "tflops": 0.0}
    times = {"ms_median": ms, "round_ms": [ms] * 5}
    return Result(op=op, shape=shape, backend=backend, role=role, **known | times | other)


def step(B: int, backend: str, ms: float, *, compiled: bool = True, gib: float = 1.0, **other: Any) -> Result:
    shape = {"model": "gpt2", "n_layer": 12, "B": B, "T": 1024}
    figures = {"compiled": compiled, "tokens_per_s": B * 1024e3 / ms, "peak_memory_bytes": int(gib * GIB)}
    figures["contest"] = f"step {shape} {compiled}"
    slots = {"slots": {"attn": "sdpa" if backend in ("ours-auto", "ours-torch") else "triton", "mlp": "torch"}}
    return result("training step", shape, backend, ms, **(figures | slots | other))


def attention(direction: str, T: int, **ms: float) -> list[Result]:
    shape, flops = {"B": 65536 // T, "T": T, "H": 12, "D": 64}, 1e11
    names = {name.replace("_", "-"): t for name, t in ms.items()}
    return [result(f"attention {direction}", shape, name, t, tflops=flops / t / 1e9) for name, t in names.items()]


HEAD, MLP = {"N": 65536, "C": 768, "V": 50304}, {"B": 64, "T": 1024, "C": 768}
RESULTS = [
    # 64 sequences are the faster step of ours; there plain-cudnn is the fastest plain one.
    step(64, "ours-triton", 100.0, gib=20.0),
    step(64, "ours-auto", 90.0),
    step(64, "plain", 140.0),
    step(64, "plain-cudnn", 125.0),
    step(64, "transformers", 160.0, gib=40.0),
    step(32, "ours-triton", 55.0),
    step(32, "plain", 99.0),
    # The fastest step of all stands beside no peer.
    step(32, "ours-attn-triton", 1.0, contest="an ablation"),
    *attention("forward", 1024, triton=0.25, sdpa_flash=0.40, cudnn=0.30, sdpa_cudnn_apart=0.28, naive=0.01),
    *attention("backward", 1024, triton=0.50, flex=0.55),
    *attention("forward", 4096, triton=1.0, sdpa_flash=0.9),
    result("linear_cross_entropy training", HEAD, "triton", 30.0, peak_memory_bytes=2 * GIB),
    result("linear_cross_entropy training", HEAD, "torch", 60.0, peak_memory_bytes=32 * GIB),
    result("linear_cross_entropy training", HEAD, "matmuls-alone", 25.0),
    result("mlp forward+backward", MLP, "triton", 5.0),
    result("mlp forward+backward", MLP, "torch-compiled", 5.25),
    step(1, "ours-auto", 12.0, compiled=False),
    step(1, "ours-auto-graph", 6.0, compiled=False),
    step(4, "ours-auto", 10.0),
    step(4, "ours-auto-graph", 10.5),
    # The first ours-auto at this size has no graph beside it.
    step(64, "ours-auto", 100.0, contest="graphs"),
    step(64, "ours-auto-graph", 98.0, contest="graphs"),
    step(32, "ours-triton-any-order", 54.0),
    step(4, "ours-auto-elementwise", 1.0),
]
EXPECTED = {
    "step, compiled, our attention, best B: tokens/s": ("655,360", "yes", "ours-triton at B=64"),
    "step over plain PyTorch, compiled": ("1.25 (1.25..1.25)", "yes", "ours-triton at B=64 over plain-cudnn"),
    "step over transformers, compiled": ("1.60 (1.60..1.60)", "yes", "ours-triton at B=64 over transformers"),
    "attention forward, T = 1024: TFLOP/s": ("400", "yes", "triton"),
    "attention forward, T = 1024": ("1.12 (1.12..1.12)", "yes", "triton over sdpa-cudnn-apart"),
    "attention backward, T = 1024: TFLOP/s": ("200", "no", "triton"),
    "attention backward, T = 1024": ("1.10 (1.10..1.10)", "yes", "triton over flex"),
    "attention forward, T = 4096": ("0.90 (0.90..0.90)", "no", "triton over sdpa-flash"),
    "linear cross-entropy over its matmuls: time": ("1.20 (1.20..1.20)", "no", "triton over matmuls-alone, in time"),
    "linear cross-entropy over the plain loss: memory": ("0.06", "yes", "triton over torch"),
    "gelu_mlp forward + backward over torch.compile's": (
        "1.05 (1.05..1.05)", "no, but auto doesn't use it", "triton over torch-compiled",
    ),
    "CUDA graph, B = 1, over eager": ("2.00 (2.00..2.00)", "yes", "ours-auto-graph at B=1 over ours-auto"),
    "CUDA graph, B = 4, over compiled": ("0.95 (0.95..0.95)", "no", "ours-auto-graph at B=4 over ours-auto"),
    "CUDA graph, B = 64, over compiled": ("1.02 (1.02..1.02)", "yes", "ours-auto-graph at B=64 over ours-auto"),
    "price of bitwise determinism, our kernels, B = 32: time": (
        "1.02 (1.02..1.02)", "no", "ours-triton at B=32 over ours-triton-any-order, in time",
    ),
    "step of 65,536 tokens over transformers, compiled: memory": (
        "0.50", "yes", "ours-triton at B=64 over transformers",
    ),
}  # fmt: skip


def test_each_target_is_judged_by_what_it_names() -> None:
    rows = targets.rows(Record(results=RESULTS))
    found = {row["<target"]: (row[">measured"], row["<reached"], row["<of"]) for row in rows}
    assert len(found) == len(TARGETS)
    for what, cells in found.items():
        assert cells == EXPECTED.get(what, ("", "not measured", "")), what
    assert EXPECTED.keys() <= found.keys()


@pytest.mark.parametrize("results", [[], [step(8, "plain", 1.0)]])
def test_where_no_target_was_measured_there_is_no_table(results: list[Result]) -> None:
    assert targets.rows(Record(results=results)) == []


def test_a_step_is_compared_with_a_peer_that_stood_beside_it() -> None:
    first = [step(64, name, ms, contest="first") for name, ms in (("ours-triton", 90), ("plain", 120))]
    peers = [step(64, name, ms, contest="peers") for name, ms in (("ours-auto-attn", 100), ("transformers", 150))]
    found = {row["<target"]: row["<of"] for row in targets.rows(Record(results=[*first, *peers]))}
    assert found["step over plain PyTorch, compiled"] == "ours-triton at B=64 over plain"
    assert found["step over transformers, compiled"] == "ours-auto-attn at B=64 over transformers"


def test_a_gelu_mlp_that_auto_uses_has_no_excuse() -> None:
    ablation = [step(32, name, ms, contest="an ablation") for name, ms in (("ours-torch", 60), ("ours-mlp-triton", 59))]
    rows = targets.rows(Record(results=[*RESULTS, *ablation]))
    assert next(row["<reached"] for row in rows if row["<target"].startswith("gelu_mlp")) == "no"


BENCHED = """
import json, torch
torch.cuda.is_available = lambda: True
from bench.ops import bench_attention, bench_loss, bench_mlp
from bench.step import bench_train_step
from bench.step.steps import STEPS

directions = ("forward", "backward")
contests = [bench_attention.AttentionContest(s, d) for s in bench_attention.SHAPES for d in directions]
contests += [bench_mlp.MlpContest(s, d) for s in bench_mlp.SHAPES for d in bench_mlp.FLOPS]
contests += [bench_loss.HeadContest(s, "training") for s in bench_loss.SHAPES]
benched = [(c.op, c.shape(), c.dtype, None, {}, list(c.candidates)) for c in contests]
for c in bench_train_step.ON_A_GPU:
    slots = {name: {"attn": STEPS[name].settings.get("attn", "sdpa"), "mlp": "torch"} for name in c.names}
    benched.append(("training step", c.shape(), c.dtype, c.compiled, slots, c.names))
print(json.dumps(benched))
"""


def test_every_target_is_measured_by_a_benchmark() -> None:
    done = subprocess.run([sys.executable, "-c", BENCHED], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    speed = {"tokens_per_s": 1.0}
    results = [
        result(op, shape, name, 1.0, dtype=dtype, compiled=compiled, contest=f"{i}", slots=slots.get(name), **speed)
        for i, (op, shape, dtype, compiled, slots, names) in enumerate(json.loads(done.stdout))
        for name in names
    ]
    missing = [row["<target"] for row in targets.rows(Record(results=results)) if row["<reached"] == "not measured"]
    assert missing == []
