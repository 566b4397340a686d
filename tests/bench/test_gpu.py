"""The command for a GPU outlives stages that crash or hang, and every stage finds what it runs."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from bench import gpu, kernel_profile, smoke
from bench.gpu import ALONE, SESSIONS, Run, gpu_test_sessions, programme
from bench.report.results import Record, load, summary
from bench.smoke import CHANGES
from bench.stages import Files, NotNow, Stage, exit_status, run_stages
from bench.step.steps import STEPS, Kernels
from bench.timing import ROOT
from fastgpt2.backends.norm import torch_norm
from fastgpt2.kernels import tuning

BLOCKED = ("rich", "safetensors", "matplotlib", "tiktoken", "transformers")
SM_90 = (tuning.TABLES / "sm_90.json").resolve()


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
@pytest.mark.parametrize(("module", "option"), [("bench.gpu", "--out"), ("bench.smoke", "--failed")])
def test_without_a_gpu_the_command_is_one_line_and_status_2(tmp_path: Path, module: str, option: str) -> None:
    done = run("-m", module, option, str(tmp_path))
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
    "role": "peer",
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
    assert record["stages"][1]["returncode"] == 128 + signal.SIGABRT
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
    stage = Stage("tests", argv, 100.0, junit=tmp_path / "tests.xml")
    (outcome,) = run_stages([stage], {}, files_in(tmp_path), seconds=100.0)["stages"]
    tests = outcome["tests"]
    assert tests["run"] == 12 and len(tests["failure"] + tests["error"]) == 4, outcome["output_tail"]


def test_every_gpu_test_is_in_one_session() -> None:
    sessions = gpu_test_sessions()
    files = [path for name, session in sessions.items() if name != gpu.LARGE for path in session]
    assert set(sessions[gpu.LARGE]) < set(sessions["operations"])
    assert len(files) == len(set(files)) >= 14
    for name, stems in (SESSIONS | {ALONE: ("cuda_tools", "gpu", "smoke", "step", "timing", "tune")}).items():
        found = {path.stem.removeprefix("test_") for path in sessions[name]}
        assert found == {Path(stem).stem.removeprefix("test_") for stem in stems}, name


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
    assert "not done: third: the minutes were used up" in summary(Record.from_json(record))
    assert exit_status(record, ["second"]) == 1, "what was not verified is not right"
    assert exit_status(record, []) == 0


def test_a_stage_knows_when_it_is_stopped(tmp_path: Path) -> None:
    program = "import time; from bench.timing import stage_ends; print('left', stage_ends() - time.monotonic())"
    stage = python("asks", program, seconds_limit=250.0)
    (outcome,) = run_stages([stage], {}, files_in(tmp_path), seconds=600.0)["stages"]
    assert 0.0 < float(outcome["output_tail"].split("left")[1]) < 250.0


def test_none_starts_that_cannot_end_or_has_nothing_to_do(tmp_path: Path) -> None:
    def nothing() -> list[str]:
        raise NotNow("nothing was tuned")

    stages = [python("long", "", seconds_needed=90.0), Stage("tuned", nothing, 30.0), python("short", "")]
    record = run_stages(stages, {}, files_in(tmp_path), seconds=60.0)
    assert [stage["name"] for stage in record["stages"]] == ["short"]
    reasons = {missing["name"]: missing["reason"] for missing in record["not_done"]}
    assert reasons == {"long": "it needs 90 s, and 60 s were left", "tuned": "nothing was tuned"}


KILLED = """
import json, sys
from pathlib import Path
from bench.stages import Files, Stage, run_stages

folder = Path(sys.argv[1])
line = json.dumps({"kind": "smoke", "slot": "norm"}) + chr(10)
write = f"open({str(folder / 'lines')!r}, 'a').write({line!r})"
sleep = f"import os, time; open({str(folder)!r} + '/' + str(os.getpid()) + '.pid', 'w'); time.sleep(600)"
child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {sleep!r}])"
programs = {"first": "", "second": f"{write}; {child}; {sleep}"}
stages = [Stage(name, [sys.executable, "-c", program], 600.0) for name, program in programs.items()]
run_stages(stages, {}, Files(folder / "run.json", folder / "run.log", folder / "lines"), seconds=600.0)
"""


def until(done: Callable[[], object]) -> None:
    ends = time.monotonic() + 60
    while not done():
        assert time.monotonic() < ends
        time.sleep(0.05)


def none_is_left(folder: Path) -> bool:
    """Whether the processes that left their number in a file have ended."""
    return not any(Path("/proc", path.stem).exists() for path in folder.glob("*.pid"))


def test_a_killed_run_leaves_its_record_and_no_process(tmp_path: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT)
    record = tmp_path / "run.json"
    try:
        until(lambda: record.exists() and json.loads(record.read_text())["smokes"])
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        run.kill()
        run.wait()
    until(lambda: none_is_left(tmp_path))
    left = json.loads(record.read_text())
    assert [stage["name"] for stage in left["stages"]] == ["first"]
    assert left["smokes"] == [{"stage": "second", "slot": "norm"}], "what a stage has measured so far is kept"


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


def run_in(folder: Path, **what: Any) -> Run:
    return Run(folder, folder / "lines", "abc", folder / "sm_90.json", **what)


def commands(run: Run, part: int | None = None) -> dict[str, list[str]]:
    """Each stage's command, where it has one now."""
    found = {}
    for stage in programme(run, part):
        with contextlib.suppress(NotNow):
            found[stage.name] = stage.argv() if callable(stage.argv) else stage.argv
    return found


def test_every_stage_finds_what_it_runs_and_can_end(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    run.table.touch()
    stages = programme(run, None)
    assert commands(run).keys() == {stage.name for stage in stages}
    for name, argv in commands(run).items():
        for part in argv:
            if part.endswith(".py"):
                assert (ROOT / part).is_file(), f"{name}: {part}"
    for stage in stages:
        assert 0 < stage.seconds_needed <= stage.seconds_limit <= 300, stage.name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ceilings", "smoke"),
        ("smoke", "step, B=64"),
        # Minute 4.
        ("the step's kernels: plain", "gpu tests: operations"),
        ("loss, 64k tokens", "gpu tests: operations"),
        # Minute 8.
        ("tune", "step, B=64, tuned"),
        ("the step's kernels: ours, tuned", "step, one slot changed"),
        # Minute 12.
        ("gpu tests: graphs and equal bits", "step, CUDA graphs, B=1, eager"),
        ("step, CUDA graphs, B=1", "verify"),
    ],
)
def test_a_cut_leaves_what_is_worth_most(tmp_path: Path, before: str, after: str) -> None:
    names = [stage.name for stage in programme(run_in(tmp_path), None)]
    assert names.index(before) < names.index(after)
    needed = sum(stage.seconds_needed for stage in programme(run_in(tmp_path), 1))
    assert needed < 60 * gpu.PARTS[1], "part 1 can end"


def test_a_part_has_a_smoke_of_its_own_and_both_have_one(tmp_path: Path) -> None:
    for part in (1, 2, None):
        names = [stage.name for stage in programme(run_in(tmp_path), part)]
        assert names[:2] == ["ceilings", "smoke"] and len(names) == len(set(names))
    assert [stage.name for stage in programme(run_in(tmp_path), 1, ["B=64", "tests: op"])] == [
        "step, B=64", "gpu tests: operations", "step, B=64, tuned",
    ]  # fmt: skip


# ------------------------------------------------------------------------------- a kernel that is not right


def attempts(right: dict[tuple[str, str | None], str]) -> tuple[list[tuple[str, str | None]], Any]:
    """A smoke's comparisons by stand-ins, which are wrong where `right` doesn't say otherwise; and those made."""
    made: list[tuple[str, str | None]] = []

    def attempt(slot: str, change: str | None) -> dict[str, Any]:
        made.append((slot, change))
        return {"status": right.get((slot, change), "wrong")}

    return made, attempt


def test_a_slot_that_is_not_right_is_tried_otherwise() -> None:
    right = {("norm", None): "ok", ("mlp", "pointers"): "ok", ("mlp", "4 warps"): "ok", ("loss", None): "timed out"}
    made, attempt = attempts(right)
    reports: dict[str, list[dict[str, Any]]] = {}
    smoke.examine(smoke.SLOTS, attempt, lambda slot, found: reports.setdefault(slot, []).append(found), pytest.fail)
    plain = [name for name in CHANGES if name != "pointers"]
    tried = {slot: {change for s, change in made if s == slot} for slot in smoke.SLOTS}
    assert tried == {"norm": {None}, "mlp": {None, *CHANGES}, "attn": {None, *plain}, "loss": {None, *plain}}
    assert reports["norm"] == [{"status": "ok"}]
    first, final = reports["mlp"]
    assert first == {"status": "wrong"}, "known at once"
    assert final["right_with"] == "4 warps" and final["changes"]["1 stage"] == {"status": "wrong"}
    assert reports["attn"][1]["right_with"] is None and reports["loss"][1]["status"] == "timed out"


@pytest.mark.parametrize("failed", [(), ("mlp",), smoke.SLOTS])
def test_pytorchs_form_takes_the_place_of_a_slot_that_is_not_right(tmp_path: Path, failed: tuple[str, ...]) -> None:
    run = run_in(tmp_path)
    before = commands(run)
    assert not any("without" in part for argv in before.values() for part in argv)
    smoke.write_failed(run.failed, failed)
    for name, argv in commands(run).items():
        given = [part.partition("without=")[2] for part in argv if "without=" in part]
        kernels = any(name.startswith(prefix) for prefix in ("step", "the step's", "attention T", "first"))
        assert set(given) == set(failed) or not kernels, name
    assert ("gelu_mlp" in commands(run).get("tune", [])) == ("mlp" not in failed)
    assert ("tune" in commands(run)) == (failed != smoke.SLOTS)
    for name in ("ours-triton", "ours-auto"):
        settings = STEPS[name].with_kernels(run.kernels()).settings
        assert settings.get("mlp") == ("torch" if "mlp" in failed else STEPS[name].settings.get("mlp"))
    assert STEPS["plain"].with_kernels(run.kernels()) == STEPS["plain"]


def test_a_kernel_that_is_known_to_fail_is_not_run(tmp_path: Path) -> None:
    run = run_in(tmp_path, without=("loss",))
    smoke.write_failed(run.failed, ["attn"])
    assert run.kernels() == Kernels(("attn", "loss"))
    run.table.touch()
    assert run.kernels().table == run.table
    assert run.options("--") == ["--without=attn", "--without=loss", f"--table={run.table}"]


def test_a_smoke_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("at the size for Triton's interpreter")
    found = smoke.compare("norm", "1 stage", device="cpu")
    assert found["status"] == "ok", found

    def wrong(*inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y, total = torch_norm(*inputs)
        return 1.05 * y, total

    module = import_module("fastgpt2.kernels.norm")
    monkeypatch.setattr(module, "add_layer_norm", wrong)
    found = smoke.compare("norm", device="cpu")
    assert found["status"] == "wrong" and found["error"] > found["budget"]
    monkeypatch.delattr(module, "add_layer_norm")
    assert smoke.compare("norm", device="cpu")["status"] == "failed"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out of memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out of memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out of memory"),
        (RuntimeError("out of resource: shared memory, Required: 262144, Hardware limit: 232448"), "failed"),
    ],
)
def test_a_kernel_without_memory_is_not_called_wrong(
    monkeypatch: pytest.MonkeyPatch, error: Exception, status: str
) -> None:
    def raises(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("fastgpt2.ops.make_ops", raises)
    assert smoke.compare("norm", device="cpu")["status"] == status


def test_a_change_is_every_configurations() -> None:
    was = tuning.configuration("sm_90", "gelu_mlp_forward", "bfloat16", 768)
    with smoke._changed(CHANGES["4 warps"]):
        changed = tuning.configuration("sm_90", "gelu_mlp_forward", "bfloat16", 768)
    assert changed.num_warps == 4 != was.num_warps and changed.block_m == was.block_m
    assert tuning.configuration("sm_90", "gelu_mlp_forward", "bfloat16", 768) == was


def test_a_change_is_pointers_in_place_of_descriptors() -> None:
    if torch.cuda.is_available():
        pytest.skip("at the size for Triton's interpreter")
    module, matrix = import_module("fastgpt2.kernels.mlp"), torch.zeros(16, 16)
    assert module._descriptors(matrix)
    with smoke._changed(CHANGES["pointers"]):
        assert not module._descriptors(matrix)
    assert module._descriptors(matrix)
    found = smoke.compare("mlp", "pointers", device="cpu")
    assert found["status"] == "ok", found


@pytest.mark.parametrize("options", [["--change", "1 stage"], ["--slot", "norm", "--change", "pointers"]])
def test_a_change_needs_a_slot_that_it_makes_sense_for(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        smoke.main(options)
    assert refused.value.code == 2 and "needs --slot" in capsys.readouterr().err


STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path

_, _, slot, *change = sys.argv
os.chdir(Path(__file__).parent)
assert slot in json.loads(Path("failed.json").read_text()), "not known to be right yet"
if slot == "norm":
    sys.exit(3)
if slot == "loss" and not change:
    if os.fork() == 0:
        signal.signal(signal.SIGABRT, signal.SIG_IGN)
    Path(f"{os.getpid()}.pid").touch()
    time.sleep(600)
right = slot == "attn" or change == ["--change", "4 warps"]
print("compiled")
print(json.dumps({"status": "ok" if right else "wrong", "worst": "y", "error": 2.0, "budget": 1.0}))
"""
"""A comparison that is right for attention, wrong for the MLP, dies for the norm and hangs for the loss."""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The comparison's program, on a GPU that isn't there."""
    program = tmp_path / "stand_in.py"
    program.write_text(STAND_IN)
    monkeypatch.setattr(smoke, "COMPARE", (sys.executable, str(program)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return program


def test_a_smoke_outlives_comparisons_that_die_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Path
) -> None:
    began = time.monotonic()
    monkeypatch.setenv("BENCH_STAGE_ENDS", str(began + smoke.ENDING_S + 10))
    failed, lines = tmp_path / "failed.json", tmp_path / "lines"
    assert smoke.main(["--failed", str(failed), "--jsonl", str(lines)]) == 1
    assert time.monotonic() - began < smoke.ENDING_S + 10
    assert smoke.read_failed(failed) == ("mlp", "norm", "loss")
    written = [json.loads(line) for line in lines.read_text().splitlines()]
    assert [line["kind"] for line in written] == 4 * ["smoke"]
    found = {line["slot"]: line for line in written}
    assert found["attn"]["status"] == "ok" and "changes" not in found["attn"]
    mlp, norm, loss = found["mlp"], found["norm"], found["loss"]
    assert (mlp["status"], mlp["worst"], mlp["right_with"]) == ("wrong", "y", "4 warps")
    statuses = {name: tried["status"] for name, tried in mlp["changes"].items()}
    assert statuses == dict.fromkeys(CHANGES, "wrong") | {"4 warps": "ok"}
    assert (norm["status"], norm["reason"], norm["right_with"]) == ("died", "exit status 3", None)
    assert (loss["status"], loss["right_with"]) == ("timed out", "4 warps"), "some time was left for the changes"
    assert loss["reason"] == f"no result within {smoke.SHARE * 10:.0f} s"
    assert len(list(tmp_path.glob("*.pid"))) == 2
    until(lambda: none_is_left(tmp_path))


def test_a_killed_smoke_leaves_no_process(tmp_path: Path, stand_in: Path) -> None:
    smoke.write_failed(tmp_path / "failed.json", ["loss"])
    program = f"from bench import smoke; smoke.COMPARE = {smoke.COMPARE}; smoke.in_a_process('loss', None)"
    killed = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    try:
        until(lambda: len(list(tmp_path.glob("*.pid"))) == 2)
    finally:
        killed.kill()
        killed.wait()
    until(lambda: none_is_left(tmp_path))


@pytest.mark.parametrize("again", ["ok", "out of memory"])
def test_a_slot_without_memory_is_tried_again_when_the_warm_steps_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stand_in: Path, again: str
) -> None:
    warmed, made = tmp_path / "warmed", []

    def attempt(slot: str, change: str | None) -> dict[str, Any]:
        made.append((slot, change))
        if slot != "mlp":
            return {"status": "ok"}
        return {"status": again if warmed.exists() else "out of memory"}

    program = f"import time; time.sleep(0.5); open({str(warmed)!r}, 'w')"
    monkeypatch.setattr(smoke, "WARM", (sys.executable, "-c", program))
    monkeypatch.setattr(smoke, "in_a_process", attempt)
    failed = tmp_path / "failed.json"
    status = smoke.main(["--failed", str(failed), "--warm", "plain"])
    assert warmed.exists() and made.count(("mlp", None)) == 2
    assert (status, smoke.read_failed(failed)) == ((0, ()) if again == "ok" else (1, ("mlp",)))


def test_warm_steps_that_do_not_end_leave_time_for_another_try(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BENCH_STAGE_ENDS", str(time.monotonic() + smoke.ENDING_S + 2))
    warm = {
        name: subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) for name in ("ours", "plain")
    }
    smoke._end(warm, share=smoke.SHARE)
    assert all(process.returncode == -signal.SIGKILL for process in warm.values()) and smoke._left() > 0.3


USES = """
import json, sys
from pathlib import Path
from fastgpt2.kernels import tuning

key = ("sm_90", "attention_forward", "bfloat16", 64)
print(tuning.configuration(*key).block_m)
table = tuning.read_table("sm_90")
for entry in table["entries"]:
    entry["config"]["block_m"] = 7
path = Path(sys.argv[1]) / "sm_90.json"
path.write_text(json.dumps(table))
tuning.use_table(path)
print(tuning.configuration(*key).block_m, tuning.configuration("sm_80", *key[1:]).block_m)
"""


def test_a_tuned_table_takes_the_place_of_the_architectures_own(tmp_path: Path) -> None:
    done = run("-c", USES, str(tmp_path))
    own, tuned, other = done.stdout.split()
    assert tuned == "7" != own and other != "7", done.stderr


NO_TABLES = {
    "tuned.json": ('{"entries": [], "shared_memory": 1}', "not named after an architecture: sm_80"),
    "sm_90.json": ("", "can't be read as a table"),
    "sm_80.json": ("[]", "is not a table: it has no entries"),
    "sm_100.json": (None, "can't be read as a table"),
}


@pytest.mark.parametrize("name", NO_TABLES)
def test_a_file_that_is_no_table_is_refused(name: str, tmp_path: Path) -> None:
    path, (text, reason) = tmp_path / name, NO_TABLES[name]
    if text is not None:
        path.write_text(text)
    with pytest.raises(ValueError, match=reason) as refused:
        tuning.use_table(path)
    assert "\n" not in str(refused.value) and path not in tuning._instead.values()


# --------------------------------------------------------------------------------------------- the command


def play_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "read_environment", lambda: {"device": "A GPU", "compute_capability": "9.0"})


def test_the_command_leaves_few_files_and_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command on a GPU that isn't there, with stages that write what real ones would."""

    def stages(run: Run, part: int | None, only: object) -> list[Stage]:
        smoked = {"kind": "smoke", "slot": "mlp", "status": "wrong", "right_with": "1 stage", "changes": {}}
        seen = {"kind": "kernels", "step": "plain", "ms": 2.0, "kernels": [["a_kernel", 12.0, 1.5]]}
        lines = "".join(json.dumps(line) + "\n" for line in (smoked, seen))
        write = f"open({str(run.results)!r}, 'a').write({lines!r})"
        return [
            python("smoke", write),
            Stage("tune", lambda: [sys.executable, "-c", f"open({str(run.table)!r}, 'w')"], 30.0),
            Stage("tuned", lambda: [sys.executable, "-c", f"print({run.kernels().table is not None})"], 30.0),
        ]

    play_a_gpu(monkeypatch)
    monkeypatch.setattr(gpu, "programme", stages)
    assert gpu.main(["--part", "1", "--minutes", "1", "--out", str(tmp_path), "--commit", "abc"]) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".json", ".log"] and tmp_path / "sm_90.json" in files
    record = load(next(path for path in files if path.parent.name == "a-gpu" and path.suffix == ".json"))
    assert record.stages[2]["output_tail"] == "True\n"
    assert record.smokes[0]["slot"] == "mlp" and record.step_kernels[0]["ms"] == 2.0
    out = capsys.readouterr().out
    assert "smoke: mlp: wrong; right with 1 stage" in out and "a_kernel" in out and "75.0%" in out


@pytest.mark.parametrize(
    ("part", "minutes", "pace"),
    [("1", "4.65", 1.0), ("1", "18.6", 2.0), ("2", "30", 1.0), (None, "24.6", 2.0)],
)
def test_the_commands_options_reach_the_stages(
    part: str | None, minutes: str, pace: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned: dict[str, Stage] = {}

    def plan(stages: Iterable[Stage], *_: object, **__: object) -> None:
        planned.update({s.name: replace(s, argv=s.argv() if callable(s.argv) else s.argv) for s in stages})

    play_a_gpu(monkeypatch)
    monkeypatch.setattr(gpu, "run_stages", plan)
    number = [] if part is None else ["--part", part]
    known = ["--without", "loss", "--table", str(SM_90)]
    given = [*number, "--minutes", minutes, "--out", str(tmp_path), "--commit", "abc", *known]
    assert gpu.main(given) == 1, "nothing ran"
    first = {stage.name for stage in programme(run_in(tmp_path), 1)} if part != "2" else set()
    for stage in programme(run_in(tmp_path), part and int(part)):
        limit = stage.seconds_limit * (pace if stage.name in first else 1.0)
        assert planned[stage.name].seconds_limit == limit, stage.name
    for name, stage in planned.items():
        for prefix, module in (("--", "bench.kernel_profile"), ("--bench-", "pytest")):
            if stage.argv[2] == module and "gpu tests" not in name:
                assert {f"{prefix}without=loss", f"{prefix}table={SM_90}"} <= {*stage.argv}, name
    if part != "2":
        argv = planned["tune"].argv
        assert argv[argv.index("--minutes") + 1] == str(pace) and argv[argv.index("--out") + 1] == str(SM_90)
        assert "gelu_mlp" in argv and "cross_entropy" not in argv
        assert "the step's kernels: ours" in planned


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "smoke", "nosuch"], "no stage's name contains nosuch; there are ceilings, smoke, "),
        (["--minutes", "0"], "--minutes must be positive, got 0"),
        (["--minutes", "nan"], "--minutes must be positive, got nan"),
        (["--table", "sm_90.json"], "sm_90.json can't be read as a table"),
        (["--table", str(SM_90.with_name("sm_80.json"))], "--table must be named sm_90.json"),
    ],
)
def test_arguments_that_name_nothing_are_refused(
    arguments: list[str],
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    play_a_gpu(monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        gpu.main([*arguments, "--out", str(tmp_path)])
    assert reason in capsys.readouterr().err.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_steps_kernels_are_the_devices_own() -> None:
    def event(key: str, where: DeviceType, ms: float, count: int, *, note: bool = False) -> SimpleNamespace:
        times = {"self_device_time_total": 1e3 * ms, "self_cpu_time_total": 1e3 * ms}
        return SimpleNamespace(key=key, device_type=where, count=count, is_user_annotation=note, **times)

    events = [
        event("short", DeviceType.CUDA, 3.0, 3),
        event("long", DeviceType.CUDA, 30.0, 36),
        event("Torch-Compiled Region: 0/0", DeviceType.CUDA, 33.0, 3, note=True),
        event("cudaLaunchKernel", DeviceType.CPU, 9.0, 39),
    ]
    found = kernel_profile.longest(events, DeviceType.CUDA)
    assert found == {"ms": 11.0, "kernels": [["long", 12.0, 10.0], ["short", 1.0, 1.0]]}
    table = kernel_profile.table({"step": "ours", **found})
    assert "11.00 ms" in table and "90.9%" in table


TINY = ["--model", "tiny", "--n-layer", "1", "--B", "1", "--T", "16", "--dtype", "float32", "--eager"]


def test_a_profile_is_of_the_step_that_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, Any] = {}

    def make(**arguments: Any) -> Callable[[int], None]:
        built.update(arguments)
        return lambda index: None

    monkeypatch.setattr(kernel_profile, "import_module", lambda name: SimpleNamespace(make_ours=make))
    kernel_profile.main(["ours-auto", *TINY, "--warm", "--without", "mlp", "--table", str(SM_90)])
    tiny = {"model": "tiny", "n_layer": 1, "batch_size": 1, "block_size": 16, "dtype": "float32", "compile": False}
    assert built["settings"].items() >= {**tiny, "mlp": "torch"}.items() and built["table"] == str(SM_90)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--model", "nosuch"], "argument --model: invalid choice: 'nosuch'"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["--table", "tuned.json"], "--table: tuned.json is not named after an architecture"),
        *[([flag, "0"], f"argument {flag}: must be at least 1, got 0") for flag in ("--B", "--T", "--n-layer")],
    ],
)
def test_a_profile_that_cannot_be_names_the_flag(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        kernel_profile.main(["plain", *arguments])
    assert reason in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_a_step_that_needs_a_gpu_is_one_line() -> None:
    done = run("-m", "bench.kernel_profile", "plain-cudnn")
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: plain-cudnn: ")


@pytest.mark.gpu
def test_a_gpus_kernels_are_seen(tmp_path: Path) -> None:
    done = run("-m", "bench.kernel_profile", "ours-torch", *TINY, "--jsonl", str(tmp_path / "lines"))
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads((tmp_path / "lines").read_text())
    assert seen["ms"] > 0 and len(seen["kernels"]) > 10
    assert not any(name.startswith(("aten::", "cuda")) for name, _, _ in seen["kernels"])


@pytest.mark.gpu
@pytest.mark.parametrize("slot", smoke.SLOTS)
def test_a_smoke_on_a_gpu(slot: str) -> None:
    assert smoke.in_a_process(slot, None)["status"] == "ok"


BLOCKER = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError("not installed on a GPU machine: " + name, name=name)
sys.meta_path.insert(0, Blocker())
"""
"""A sitecustomize: it is in every Python process of a run."""


def test_the_stages_processes_need_only_torch_triton_numpy_and_pytest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    files = files_in(tmp_path)
    modules: dict[str, list[str]] = {}
    for argv in commands(run_in(tmp_path)).values():
        modules.setdefault(argv[2], argv[:3])
    tests = [*modules.pop("pytest"), "bench", "--collect-only", "-q"]
    ours = [*modules["bench.kernel_profile"], "ours-torch", *TINY, "--jsonl", str(files.results)]
    modules["bench.gpu"] = [sys.executable, "-m", "bench.gpu"]
    stages = [Stage(name, [*argv, "--help"], 100.0) for name, argv in modules.items()]
    stages += [Stage("collects", tests, 100.0), Stage("a step of ours", ours, 100.0), python("blocked", "import rich")]
    record = run_stages(stages, {}, files, seconds=900.0)
    outcomes = {stage["name"]: (stage["status"], stage["output_tail"][-1500:]) for stage in record["stages"]}
    assert outcomes.pop("blocked")[0] == "failed" and {"bench.smoke", "fastgpt2.verify"} <= outcomes.keys()
    assert all(status == "passed" for status, _ in outcomes.values()), outcomes
    (seen,) = record["step_kernels"]
    assert seen["stage"] == "a step of ours" and seen["slots"]["attn"] == "sdpa" and not seen["compiled"]
    milliseconds = [ms for _, _, ms in seen["kernels"]]
    assert 0 < len(milliseconds) <= kernel_profile.KEPT and milliseconds == sorted(milliseconds, reverse=True)
    assert sum(milliseconds) <= seen["ms"] * 1.001 and any("mm" in name for name, _, _ in seen["kernels"])


COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["bench", "--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@functools.cache
def collected(option: str) -> list[str]:
    """The benchmarks that there are on a GPU."""
    listed = run("-c", COLLECT, option).stdout
    return [line for line in listed.splitlines() if line.startswith("bench/") and "::" in line]


TUNED = f"--bench-table={SM_90}"


def test_benchmarks_refuse_a_file_that_is_no_table() -> None:
    done = run("-m", "pytest", "bench", "--collect-only", "-p", "no:cacheprovider", "--bench-table=none/sm_90.json")
    assert done.returncode == pytest.ExitCode.USAGE_ERROR
    assert done.stderr.startswith("ERROR: --bench-table: none/sm_90.json can't be read as a table"), done.stderr


def test_benchmarks_leave_out_a_kernel_that_fails() -> None:
    every, left = collected(TUNED), collected("--bench-without=mlp")
    assert any("ours-triton-tuned" in name for name in every)
    assert not any("ours-triton-tuned" in name for name in left), "nothing was tuned"
    out = {name.rsplit("::")[-1] for name in set(every) - set(left) if "tuned" not in name}
    assert out and all("gelu_mlp" in name or "ours-mlp-triton" in name for name in out)
    assert not any("gelu_mlp" in name and name.endswith("-triton]") for name in left)
    assert any(name.endswith("compiled-first-ours-triton]") for name in left), "with PyTorch's form for that slot"


def test_the_stages_run_every_benchmark_that_there_is_on_a_gpu(tmp_path: Path) -> None:
    from _pytest.mark.expression import Expression

    day = run_in(tmp_path)
    day.table.touch()
    names = collected(TUNED)
    assert len(names) > 300
    times_run = dict.fromkeys(names, 0)
    for stage, argv in commands(day).items():
        files = [part for part in argv if part.startswith("bench/")]
        if not files:
            continue
        chosen = Expression.compile(argv[argv.index("-k") + 1])
        found = [
            name
            for name in names
            if name.startswith(f"{files[0]}::")
            and chosen.evaluate(lambda text, name=name, **_: text.lower() in name.lower())
        ]
        assert found, stage
        for name in found:
            times_run[name] += "repeated" not in stage
    # What the others of an ablation are compared with stands in both of its parts.
    expected = {name: 2 if "ablation-ours-torch" in name else 1 for name in names}
    assert times_run == expected
