"""The command for a GPU outlives stages that crash or hang, and every stage finds what it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.gpu import ALONE, SESSIONS, all_stages, gpu_test_sessions
from bench.results import summary
from bench.stages import Files, Stage, exit_status, run_stages
from bench.timing import ROOT

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
    outlives = f"import time; time.sleep(600); open({str(tmp_path / 'outlived')!r}, 'w')"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {outlives!r}])"
    stages = [
        python("fine", "print('hello')", required=True),
        python("crashes", "import os; print('before'); os.abort()"),
        python("hangs", f"{half}; {child}; import time; time.sleep(600)", seconds_limit=4.0),
        # The record is complete up to here while a later stage runs.
        python("reads", f"import json; print([s['status'] for s in json.load(open({str(files.record)!r}))['stages']])"),
        python("never", "print('not to be seen')"),
    ]
    record = run_stages(stages[:4], {"format": 1}, files, seconds=60.0)
    assert [s["status"] for s in record["stages"]] == ["passed", "failed", "timed out", "passed"]
    assert "['passed', 'failed', 'timed out']" in record["stages"][3]["output_tail"]
    assert "Fatal Python error" in record["stages"][2]["output_tail"], "a hang says where it hung"
    assert [r["backend"] for r in record["results"]] == ["sdpa"], "what it had measured is kept"
    assert [missing["name"] for missing in record["not_done"]] == ["hangs"]
    assert json.loads(files.record.read_text()) == record
    assert "==== crashes: failed" in files.log.read_text() and "hello" in files.log.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run.json", "run.log"], "nobody waited for the child"
    assert exit_status(record, ["fine"]) == 1


SLOW = """
import time, pytest
def test_ran(): pass
@pytest.mark.skip
def test_skipped(): pass
@pytest.mark.parametrize("what", ["of words"])
def test_fails(what): assert False
def test_hangs(): time.sleep(600)
"""


def test_tests_that_are_stopped_leave_the_results_of_those_that_ran(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text(SLOW)
    junit = tmp_path / "tests.xml"
    argv = [sys.executable, "-m", "pytest", "-c", os.devnull, "-v", f"--junitxml={junit}", str(tmp_path)]
    for parallel in ([], ["-n", "1"]):
        stage = Stage("tests", [*argv, *parallel], 9.0, junit=junit)
        (outcome,) = run_stages([stage], {}, files_in(tmp_path), seconds=60.0)["stages"]
        assert outcome["status"] == "timed out" and not junit.exists()
        tests = outcome["tests"]
        assert tests["run"] == 2 and tests["error"] == []
        (skipped,), (failed,) = tests["skipped"], tests["failure"]
        assert skipped.endswith("test_slow.py::test_skipped") and failed.endswith("::test_fails[of words]"), parallel


def test_every_gpu_test_is_in_one_session() -> None:
    sessions = gpu_test_sessions()
    files = [path for session in sessions.values() for path in session]
    assert len(files) == len(set(files)) >= 14
    for name, stems in (SESSIONS | {ALONE: ("bench_step", "gpu_tools", "timing", "tune")}).items():
        assert {path.stem.removeprefix("test_") for path in sessions[name]} == set(stems), name


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


def test_a_stage_knows_when_it_is_stopped(tmp_path: Path) -> None:
    program = "import time; from bench.timing import stage_ends; print('left', stage_ends() - time.monotonic())"
    stage = python("asks", program, seconds_limit=250.0)
    (outcome,) = run_stages([stage], {}, files_in(tmp_path), seconds=600.0)["stages"]
    assert 0.0 < float(outcome["output_tail"].split("left")[1]) < 250.0


def test_a_stage_may_have_a_share_of_the_time_alone(tmp_path: Path) -> None:
    tests = [python(name, "import time; time.sleep(600)", until=0.25) for name in ("tests", "more tests")]
    record = run_stages([*tests, python("measures", "")], {}, files_in(tmp_path), seconds=4.0)
    assert [(s["name"], s["status"]) for s in record["stages"]] == [("tests", "timed out"), ("measures", "passed")]
    reasons = {missing["name"]: missing["reason"] for missing in record["not_done"]}
    assert reasons.keys() == {"tests", "more tests"} and reasons["more tests"] == "its 25% of the minutes were used up"


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


def test_every_stage_finds_what_it_runs(tmp_path: Path) -> None:
    for stage in all_stages(tmp_path, tmp_path / "lines", "abc"):
        for part in stage.argv:
            if part.endswith(".py"):
                assert (ROOT / part).is_file(), f"{stage.name}: {part}"
        assert 0 < stage.seconds_limit <= 300


COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["bench", "--collect-only", "-q", "-p", "no:cacheprovider"]))
"""


def test_the_stages_run_every_benchmark_that_there_is_on_a_gpu(tmp_path: Path) -> None:
    from _pytest.mark.expression import Expression

    listed = run("-c", COLLECT)
    names = [line for line in listed.stdout.splitlines() if line.startswith("bench/") and "::" in line]
    assert len(names) > 300, listed.stdout[-1000:]
    times_run = dict.fromkeys(names, 0)
    for stage in all_stages(tmp_path, tmp_path / "lines", "abc"):
        files = [part for part in stage.argv if part.startswith("bench/")]
        if not files:
            continue
        chosen = Expression.compile(stage.argv[stage.argv.index("-k") + 1])
        found = [
            name
            for name in names
            if name.startswith(f"{files[0]}::")
            and chosen.evaluate(lambda text, name=name, **_: text.lower() in name.lower())
        ]
        assert found, stage.name
        for name in found:
            times_run[name] += "repeated" not in stage.name
    assert set(times_run.values()) == {1}, [name for name, times in times_run.items() if times != 1]


BENCHMARKS = [f"bench.{path.stem}" for path in sorted((ROOT / "bench").glob("bench_*.py"))]


@pytest.mark.parametrize(
    "modules", ["bench.gpu, bench.roofline", ", ".join(["fastgpt2.verify, bench.worker", *BENCHMARKS])]
)
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
