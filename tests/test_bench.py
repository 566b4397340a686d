"""The benchmarks say where and on what they ran; the command for a GPU outlives stages that crash or hang."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import ROOT, Files, Stage, all_stages, exit_status, run_stages, summary, table

BLOCKED = ("tyro", "rich", "safetensors", "matplotlib", "tiktoken", "transformers")


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


# ------------------------------------------------------------------------------------------------ bench.gpu


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_the_command_is_one_line_and_status_2(tmp_path: Path) -> None:
    done = run("-m", "bench.gpu", "--out", str(tmp_path))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "needs a CUDA GPU" in done.stderr
    assert not any(tmp_path.iterdir())


def python(name: str, program: str, seconds_limit: float = 30.0, **kwargs: Any) -> Stage:
    return Stage(name, [sys.executable, "-c", program], seconds_limit, **kwargs)


def files_in(folder: Path) -> Files:
    return Files(folder / "run.json", folder / "run.log", folder / "lines")


LINE = {
    "kind": "benchmark",
    "op": "attention forward",
    "dtype": "bfloat16",
    "shape": {"B": 1, "T": 8},
    "ms_median": 1.0,
    "tflops": 2.0,
}


def test_stages_that_crash_or_hang_cost_only_themselves(tmp_path: Path) -> None:
    files = files_in(tmp_path)
    result = json.dumps({**LINE, "backend": "sdpa", "tokens_per_s": 10.0})
    half = f"open({str(files.results)!r}, 'w').write({result!r} + chr(10) + '{{\"kind\": \"benchm')"
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    stages = [
        python("fine", "print('hello')", required=True),
        python("crashes", "import os; print('before'); os.abort()"),
        python("hangs", f"{half}; {child}; import time; time.sleep(600)", seconds_limit=4.0),
        # The record is complete up to here while a later stage runs.
        python("reads", f"import json; print([s['status'] for s in json.load(open({str(files.record)!r}))['stages']])"),
        python("never", "print('not to be seen')"),
    ]
    began = time.monotonic()
    record = run_stages(stages[:4], {"format": 1}, files, seconds=60.0)
    assert time.monotonic() - began < 30
    assert [s["status"] for s in record["stages"]] == ["passed", "failed", "timed out", "passed"]
    assert "['passed', 'failed', 'timed out']" in record["stages"][3]["output_tail"]
    assert "Fatal Python error" in record["stages"][2]["output_tail"], "a hang says where it hung"
    assert [r["backend"] for r in record["results"]] == ["sdpa"], "what it had measured is kept"
    assert [missing["name"] for missing in record["not_done"]] == ["hangs"]
    assert json.loads(files.record.read_text()) == record
    assert "==== crashes: failed" in files.log.read_text() and "hello" in files.log.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.log"]
    assert exit_status(record, ["fine"]) == 1


def test_no_stage_starts_once_the_time_is_up(tmp_path: Path) -> None:
    stages = [
        python("slow", "import time; time.sleep(600)"),
        python("second", "print('not to be seen')", required=True),
        python("third", "print('not to be seen')"),
    ]
    known = {"environment": {"device": "a GPU"}, "commit": {"id": "abc"}}
    record = run_stages(stages, known, files_in(tmp_path), seconds=1.0)
    assert [s["name"] for s in record["stages"]] == ["slow"]
    assert [missing["name"] for missing in record["not_done"]] == ["slow", "second", "third"]
    assert record["not_done"][1]["reason"] == "the minutes were used up"
    assert "not done: third: the minutes were used up" in summary(record)
    assert exit_status(record, ["second"]) == 1, "what was not verified is not right"
    assert exit_status(record, []) == 0


def test_stages_record_tests_and_the_state_of_the_device(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text(
        '<testsuites><testsuite><testcase classname="a" name="ok"/>'
        '<testcase classname="a" name="bad"><failure/></testcase>'
        '<testcase classname="b" name="left"><skipped/></testcase></testsuite></testsuites>'
    )
    stage = python("tests", "import time; time.sleep(0.3)", junit=junit)
    state = {"clocks.sm": "1980 MHz", "power.draw": "[N/A]"}
    (outcome,) = run_stages([stage], {}, files_in(tmp_path), seconds=30.0, state=lambda: state)["stages"]
    assert outcome["tests"] == {"run": 2, "failure": ["a::bad"], "error": [], "skipped": ["b::left"]}
    assert outcome["status"] == "passed"
    assert outcome["device_state"]["clocks.sm"] == {"min": 1980.0, "max": 1980.0, "last": "1980 MHz"}
    assert outcome["device_state"]["power.draw"] == ["[N/A]"]


def test_tests_that_were_all_skipped_have_not_passed(tmp_path: Path) -> None:
    junit = tmp_path / "tests.xml"
    junit.write_text('<testsuites><testcase classname="a" name="b"><skipped/></testcase></testsuites>')
    (outcome,) = run_stages([python("tests", "", junit=junit)], {}, files_in(tmp_path), seconds=30.0)["stages"]
    assert outcome["status"] == "failed"


def test_the_table_compares_with_the_best_peer() -> None:
    speeds = {"sdpa": 10.0, "sdpa-cudnn": 20.0, "triton": 30.0}
    lines = table([{**LINE, "backend": name, "tokens_per_s": speed} for name, speed in speeds.items()]).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["1.50", "1.00", "0.50"]


def test_the_table_takes_every_ops_shape_and_counts_no_part_of_the_work_for_a_peer() -> None:
    line = {**LINE, "op": "linear_cross_entropy", "shape": {"N": 64, "C": 8, "V": 128}}
    speeds = {"matmuls-alone": 50.0, "triton": 30.0, "chunked": 25.0, "torch-linear-cross-entropy-chunks": 20.0}
    lines = table([{**line, "backend": name, "tokens_per_s": speed} for name, speed in speeds.items()]).splitlines()
    assert [line.split()[-1] for line in lines[1:]] == ["2.50", "1.50", "1.25", "1.00"]
    assert lines[1].startswith("linear_cross_entropy N=64 C=8 V=128 ")
    step = {**LINE, "op": "training step", "shape": {"model": "gpt2", "B": 32}, "compiled": True}
    lines = table([{**step, "backend": n, "tokens_per_s": s} for n, s in (("plain", 10.0), ("all-triton", 15.0))])
    assert "training step gpt2 B=32" in lines and lines.splitlines()[1].split()[-1] == "1.50"


def test_every_stage_finds_what_it_runs(tmp_path: Path) -> None:
    for stage in all_stages(tmp_path, tmp_path / "lines", "abc"):
        for part in stage.argv:
            if part.endswith(".py"):
                assert (ROOT / part).is_file(), f"{stage.name}: {part}"
        assert 0 < stage.seconds_limit <= 300


def test_every_stage_of_the_step_selects_something_on_a_gpu(tmp_path: Path) -> None:
    from _pytest.mark.expression import Expression

    from bench.bench_train_step import VARIANTS

    names = [
        f"test_train_step[B{B}-{how}-{variant}]"
        for B in (32, 64, 16, 4, 1)
        for how in ("compiled", "eager")
        for variant in VARIANTS
    ]
    for stage in all_stages(tmp_path, tmp_path / "lines", "abc"):
        if "bench/bench_train_step.py" in stage.argv:
            chosen = Expression.compile(stage.argv[stage.argv.index("-k") + 1])
            found = [n for n in names if chosen.evaluate(lambda text, n=n, **_: text.lower() in n.lower())]
            assert 2 <= len(found) <= 16, (stage.name, found)


@pytest.mark.parametrize("modules", ["bench.gpu, bench.timing", "fastgpt2.verify, bench.bench_train_step"])
def test_a_gpu_machine_needs_only_torch_triton_numpy_and_pytest(modules: str) -> None:
    program = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError("not installed on a GPU machine: " + name, name=name)
sys.meta_path.insert(0, Blocker())
import {modules}
"""
    done = run("-c", program)
    assert done.returncode == 0, done.stderr[-2000:]
