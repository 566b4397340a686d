"""Stages that crash or hang cost only themselves, and what was measured is on disk."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu, stages
from bench.record import load
from bench.report.results import summary
from bench.stages import NotNow, Stage, exit_status
from bench.timing import ROOT
from tests.bench.programme import none_is_left, python, ran, run, until

LINE = {
    "kind": "benchmark",
    "op": "attention forward",
    "dtype": "bfloat16",
    "shape": {"B": 1, "T": 8},
    "role": "peer",
    "ms_median": 1.0,
    "tflops": 2.0,
}


def test_stages_that_crash_or_hang_cost_only_themselves(tmp_path: Path) -> None:
    result = json.dumps({**LINE, "backend": "sdpa", "tokens_per_s": 10.0})
    half = f"open({str(tmp_path / 'lines')!r}, 'w').write({result!r} + chr(10) + '{{\"kind\": \"benchm')"
    outlives = f"import time; time.sleep(600); open({str(tmp_path / 'outlived')!r}, 'w')"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {outlives!r}])"
    stages = [
        python("fine", "print('hello')", required=True),
        python("crashes", "import os; print('before'); os.abort()"),
        python("hangs", f"{half}; {child}; import time; time.sleep(600)", seconds_limit=4.0),
        # The record is complete up to here while a later stage runs.
        python(
            "reads",
            f"import json; print([s['status'] for s in json.load(open({str(tmp_path / 'run.json')!r}))['stages']])",
        ),
    ]
    record = ran(tmp_path, *stages)
    assert [stage.status for stage in record.stages] == ["passed", "failed", "timed out", "passed"]
    assert record.stages[1].returncode == 128 + signal.SIGABRT
    assert "['passed', 'failed', 'timed out']" in record.stages[3].output_tail
    assert "Fatal Python error" in record.stages[2].output_tail, "a hang says where it hung"
    assert [result.backend for result in record.results] == ["sdpa"], "what it had measured is kept"
    assert list(record.not_done) == ["hangs"]
    assert load(tmp_path / "run.json") == record
    log = (tmp_path / "run.log").read_text()
    assert "==== crashes: failed" in log and "hello" in log
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
    said = tmp_path / "said"
    for parallel in ([], ["-n", "1"]):
        argv = [sys.executable, "-m", "pytest", "-c", os.devnull, "-v", *parallel, str(tmp_path)]
        with said.open("w") as output:
            process = subprocess.Popen(argv, stdout=output, start_new_session=True)
        try:
            until(lambda: "FAILED" in said.read_text())
        finally:
            assert stages.stop(process)
        tests = stages.tested(said.read_text())
        assert tests.run == 2 and tests.error == []
        (skipped,), (failed,) = tests.skipped, tests.failure
        assert skipped.endswith("test_slow.py::test_skipped") and failed.endswith("::test_fails[of words]"), parallel


CRASHES = """
import os, pathlib, time, pytest
@pytest.mark.parametrize("n", range(12))
def test_one(n):
    if n < 4:
        here = pathlib.Path(__file__).parent
        (here / f"{n}.here").touch()
        ends = time.monotonic() + 3
        while len(list(here.glob("*.here"))) < 2 and time.monotonic() < ends:
            time.sleep(0.01)
        os._exit(1)
"""


def test_processes_that_crash_at_once_cost_only_their_tests(tmp_path: Path) -> None:
    (tmp_path / "test_crashes.py").write_text(CRASHES)
    argv = [sys.executable, "-m", "pytest", "-c", os.devnull, "-v", *gpu.processes(2), str(tmp_path)]
    (outcome,) = ran(tmp_path, Stage("tests", argv, 100.0, tests=True), seconds=100.0).stages
    tests = outcome.tests
    assert tests is not None
    assert tests.run == 12 and len(tests.failure + tests.error) == 4, outcome.output_tail


def test_no_stage_starts_once_the_time_is_up(tmp_path: Path) -> None:
    record = ran(
        tmp_path,
        python("slow", "import time; time.sleep(600)"),
        python("second", "print('not to be seen')", required=True),
        python("third", "print('not to be seen')"),
        seconds=1.0,
    )
    assert [stage.name for stage in record.stages] == ["slow"]
    assert list(record.not_done) == ["slow", "second", "third"]
    assert record.not_done["second"] == "the minutes were used up"
    assert "not done: third: the minutes were used up" in summary(record)
    assert exit_status(record, ["second"]) == 1, "what was not verified is not right"
    assert exit_status(record, []) == 0


def test_a_stage_knows_when_it_is_stopped(tmp_path: Path) -> None:
    program = "import time; from bench.timing import stage_ends; print('left', stage_ends() - time.monotonic())"
    stage = python("asks", program, seconds_limit=250.0)
    (outcome,) = ran(tmp_path, stage, seconds=600.0).stages
    assert 0.0 < float(outcome.output_tail.split("left")[1]) < 250.0


def test_none_starts_that_cannot_end_or_has_nothing_to_do(tmp_path: Path) -> None:
    def nothing() -> list[str]:
        raise NotNow("nothing was tuned")

    stages = [python("long", "", seconds_needed=90.0), Stage("tuned", nothing, 30.0), python("short", "")]
    record = ran(tmp_path, *stages, seconds=60.0)
    assert [stage.name for stage in record.stages] == ["short"]
    assert record.not_done == {"long": "it needs 90 s, and 60 s were left", "tuned": "nothing was tuned"}


KILLED = """
import json, sys
from pathlib import Path
from bench.record import Record
from bench.stages import Files, Stage, run_stages

folder = Path(sys.argv[1])
line = json.dumps({"kind": "profile", "op": "norm"}) + chr(10)
write = f"open({str(folder / 'lines')!r}, 'a').write({line!r})"
sleep = f"import os, time; open({str(folder)!r} + '/' + str(os.getpid()) + '.pid', 'w'); time.sleep(600)"
child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}])"
programs = {"first": "", "second": f"{write}; {child}; {sleep}"}
stages = [Stage(name, [sys.executable, "-c", program], 600.0) for name, program in programs.items()]
run_stages(stages, Record(), Files(folder / "run.json", folder / "run.log", folder / "lines"), seconds=600.0)
"""


def test_a_killed_run_leaves_its_record_and_no_process(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    record = tmp_path / "run.json"
    try:
        until(lambda: record.exists() and load(record).profiles)
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        run.kill()
        run.wait()
    until(lambda: none_is_left(tmp_path))
    left = load(record)
    assert [stage.name for stage in left.stages] == ["first"]
    assert left.profiles == [{"op": "norm"}], "what a stage has measured so far is kept"


def test_the_state_of_the_device_is_recorded(tmp_path: Path) -> None:
    state = {"clocks.sm": "1980 MHz", "power.draw": "[N/A]"}
    (outcome,) = ran(tmp_path, python("waits", "import time; time.sleep(0.3)"), state=lambda: state).stages
    assert outcome.device_state["clocks.sm"] == {"min": 1980.0, "max": 1980.0, "last": "1980 MHz"}
    assert outcome.device_state["power.draw"] == ["[N/A]"]


def test_tests_that_were_all_skipped_have_not_passed(tmp_path: Path) -> None:
    (outcome,) = ran(tmp_path, python("tests", "print('a.py::test_b SKIPPED (no GPU) [100%]')", tests=True)).stages
    assert outcome.status == "failed" and outcome.tests is not None and outcome.tests.skipped == ["a.py::test_b"]


FAULTY = """
import torch
def test_first(): pass
def test_faults():
    def lost():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost
    assert False, "the assertion of the test that is at fault"
def test_next(): pass
def test_last(): pass
"""


@pytest.mark.parametrize("processes", ["1", "0"])
def test_a_lost_device_costs_one_test(tmp_path: Path, processes: str) -> None:
    (tmp_path / "test_faulty.py").write_text(FAULTY)
    options = ["-p", "tests.conftest", "-n", processes, "-c", os.devnull]
    done = run("-m", "pytest", *options, str(tmp_path), PYTHONPATH=str(ROOT))
    assert done.returncode != 0
    assert "the assertion of the test that is at fault" in done.stdout, done.stdout + done.stderr
    if processes == "1":
        # A new process runs the tests after it.
        assert "3 passed" in done.stdout and "test_faulty.py::test_faults" in done.stdout, done.stdout
    else:
        assert "1 passed" in done.stdout and "lost the GPU" in done.stdout + done.stderr
