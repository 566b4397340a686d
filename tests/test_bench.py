"""The benchmarks say where and on what they ran."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from bench.gpu import table
from bench.timing import ROOT


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    # What this very run was given must not reach the inner one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_INTERPRET"))}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def benchmarks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """`pytest bench/` of what is quick: its output, and what is in its two files of JSON."""
    folder = tmp_path_factory.mktemp("bench")
    small = "T256" if not torch.cuda.is_available() else "T1024"
    outputs = [f"--benchmark-json={folder / 'bench.json'}", f"--bench-jsonl={folder / 'lines'}"]
    quick = ["-p", "no:cacheprovider", "-k", f"{small} or (B8 and eager)"]
    done = run("-m", "pytest", "bench", *quick, *outputs, "--bench-commit=abc123")
    assert done.returncode == 0, done.stdout[-4000:]
    lines = [json.loads(line) for line in (folder / "lines").read_text().splitlines()]
    return {"out": done.stdout, "lines": lines, **json.loads((folder / "bench.json").read_text())}


def test_every_benchmark_names_its_figures(benchmarks: dict[str, Any]) -> None:
    assert benchmarks["benchmarks"]
    for result in benchmarks["benchmarks"]:
        info = result["extra_info"]
        assert {"op", "backend", "dtype", "shape", "deterministic", "mfu", "event_ms_median"} <= info.keys(), info
        assert info["tokens_per_s"] > 0 and info["tflops"] > 0 and info["peak_memory_bytes"] > 0
        assert info["flops_formula"] and info["mfu_formula"] and info["peak_memory_meaning"]
        if not torch.cuda.is_available():
            assert info["mfu"] is None, "no peak is known for a CPU"
    backends = {(r["extra_info"]["op"], r["extra_info"]["backend"]) for r in benchmarks["benchmarks"]}
    for op in ("attention forward", "attention backward"):
        assert {(op, "naive"), (op, "sdpa")} <= backends


def test_figures_follow_from_the_time(benchmarks: dict[str, Any]) -> None:
    for result in benchmarks["benchmarks"]:
        info, shape = result["extra_info"], result["extra_info"]["shape"]
        seconds = info["ms_median"] / 1e3
        assert info["tokens_per_s"] == pytest.approx(shape["B"] * shape["T"] / seconds)
        if info["op"] == "attention backward":
            # 2.5 times 4 B H T^2 D over the causal half.
            flops = 5 * shape["B"] * shape["H"] * shape["T"] ** 2 * shape["D"]
            assert info["tflops"] == pytest.approx(flops / seconds / 1e12)
        if not torch.cuda.is_available():
            assert seconds == pytest.approx(result["stats"]["median"])


def test_the_json_says_where_and_what(benchmarks: dict[str, Any]) -> None:
    where = benchmarks["machine_info"]["fastgpt2"]
    assert {"device", "torch", "triton", "python"} <= where.keys()
    assert where["torch"] == torch.__version__
    assert "node" not in benchmarks["machine_info"], "results are published: no names of machines"
    assert benchmarks["commit_info"]["id"] == "abc123"


def test_each_result_is_a_line_as_it_is_made(benchmarks: dict[str, Any]) -> None:
    assert [line["name"] for line in benchmarks["lines"]] == [r["name"] for r in benchmarks["benchmarks"]]
    assert all(line["kind"] == "benchmark" and line["group"] for line in benchmarks["lines"])
    text = table(benchmarks["lines"])
    assert text.count("\n") == len(benchmarks["lines"]) and "naive" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton is not skipped where there is a GPU")
def test_triton_is_skipped_on_a_cpu_and_says_why(benchmarks: dict[str, Any]) -> None:
    assert "Triton on a CPU is interpreted" in benchmarks["out"]
    assert not [r for r in benchmarks["benchmarks"] if r["extra_info"]["backend"] == "triton"]


def test_a_wrong_attention_is_not_timed() -> None:
    from bench.bench_attention import check_attention
    from bench.shapes import DEVICE, AttentionShape
    from fastgpt2.attention import sdpa_attention

    shape = AttentionShape(2, 33, 3, 16, torch.float32)
    check_attention("right", sdpa_attention, shape)
    with pytest.raises(AssertionError, match="not timed: o by maximum is off"):
        check_attention("sees no past", lambda qkv: qkv[:, :, 2] * 1.0, shape)
    with pytest.raises(AssertionError, match="not timed"):
        check_attention("heads mixed up", lambda qkv: sdpa_attention(qkv.flip(3)), shape)
    assert DEVICE.type in ("cpu", "cuda")
