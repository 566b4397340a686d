"""The command for a GPU: its plan finds what it runs, and PyTorch's forms replace what is wrong."""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType

from bench import contest, gpu, kernel_profile, smoke
from bench.gpu import ALONE, SESSIONS, Run, gpu_test_sessions, programme
from bench.record import Smoke, StepKernels, load
from bench.stages import Stage
from bench.step.steps import STEPS, Kernels
from bench.timing import ROOT
from fastgpt2.console import run_command
from fastgpt2.fields import ConfigError
from fastgpt2.kernels.tools import tune
from fastgpt2.kernels.tuning import TABLES
from fastgpt2.slots import TORCH
from tests.bench.programme import commands, python, ran, run, run_in

BLOCKED = ("rich", "safetensors", "matplotlib", "tiktoken", "transformers")
SM_90 = (TABLES / "sm_90.json").resolve()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
@pytest.mark.parametrize(("module", "option"), [("bench.gpu", "--out=."), ("bench.smoke", "--failed=x")])
def test_without_a_gpu_the_command_is_one_line_and_status_2(tmp_path: Path, module: str, option: str) -> None:
    done = run("-m", module, option.replace("=", f"={tmp_path}/"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "needs a CUDA GPU" in done.stderr
    assert not any(tmp_path.iterdir())


def test_every_gpu_test_is_in_one_session() -> None:
    sessions = gpu_test_sessions()
    files = [path for name, session in sessions.items() if name != gpu.LARGE for path in session]
    assert set(sessions[gpu.LARGE]) < set(sessions["operations"])
    assert len(files) == len(set(files)) >= 14
    for name, stems in (SESSIONS | {ALONE: ("cuda_tools", "gpu", "smoke", "step", "timing", "tune")}).items():
        found = {path.stem.removeprefix("test_") for path in sessions[name]}
        assert found == {Path(stem).stem.removeprefix("test_") for stem in stems}, name


def test_every_stage_finds_what_it_runs_and_can_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "find_tool", lambda name: f"/toolkit/{name}")
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


def test_pytorchs_form_takes_the_place_of_another_form_alone() -> None:
    without = Kernels(("attn-hopper",))
    attention = {name: step.with_kernels(without).settings.get("attn") for name, step in STEPS.items()}
    assert attention["ours-attn-triton-hopper"] == attention["ours-auto"] == TORCH["attn"]
    assert attention["ours-triton"] == attention["ours-attn-triton"] == "triton"


@pytest.mark.parametrize(
    "failed", [wrong for count in range(len(gpu.TUNED_OPS)) for wrong in itertools.combinations(gpu.TUNED_OPS, count)]
)
def test_what_is_right_is_tuned_whatever_else_is_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: tuple[str, ...]
) -> None:
    run = run_in(tmp_path)
    smoke.write_failed(run.failed, failed)
    _, _, module, *arguments = commands(run)["tune"]
    assert module == tune.__name__
    asked: list[tune.Key] = []
    monkeypatch.setattr(tune, "compiled", lambda arch, table, keys: (asked.append(key) for key in keys))
    monkeypatch.setattr(tune, "_this_arch", lambda: "sm_90")
    monkeypatch.setattr(tune, "_present", lambda: (None, {}))
    monkeypatch.setattr(tune, "tune", lambda arch, made, *rest: list(made))
    assert tune.main(arguments) == 0
    right = {kernels for slot, kernels in gpu.TUNED_OPS.items() if slot not in failed}
    assert {(op, key.size) for key in asked for op, _ in gpu.TUNED_OPS.values() if key.op.startswith(op)} == right
    assert {key.precision for key in asked} == {"bfloat16"}


def test_a_kernel_that_is_known_to_fail_is_not_run(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    smoke.write_failed(run.failed, ["attn", "loss"])
    assert run.kernels() == Kernels(("attn", "loss"))
    run.table.touch()
    assert run.kernels().table == run.table
    assert run.options("--") == ["--without=attn", "--without=loss", f"--table={run.table}"]


def step_kernels(ms: float, kernels: list[tuple[str, float, float]]) -> StepKernels:
    return StepKernels(step="ours", shape={}, compiled=True, table=False, slots=None, ms=ms, kernels=kernels)


def play_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "read_environment", lambda: {"device": "A GPU", "compute_capability": "9.0"})


def test_the_command_leaves_few_files_and_says_what_it_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command on a GPU that isn't there, with stages that write what real ones would."""

    def stages(run: Run, part: int | None, only: object = None) -> list[Stage]:
        tried = {"1 stage": Smoke(slot="mlp", status="ok")}
        smoked = Smoke(slot="mlp", status="wrong", right_with="1 stage", changes=tried)
        lines = "".join(
            json.dumps({"kind": kind, **asdict(line)}) + "\n"
            for kind, line in (("smoke", smoked), ("kernels", step_kernels(2.0, [("a_kernel", 12.0, 1.5)])))
        )
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
    assert record.stages[2].output_tail == "True\n"
    out = capsys.readouterr().out
    assert "smoke: mlp: wrong; right with 1 stage" in out and "a_kernel" in out and "75.0%" in out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--only", "smoke", "nosuch"], "no stage's name contains 'nosuch'; there are ceilings, smoke, "),
        (["--minutes", "0"], "--minutes must be above 0, got 0"),
        (["--minutes", "nan"], "--minutes must be a finite number, got nan"),
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
        run_command(lambda: gpu.main([*arguments, "--out", str(tmp_path)]))
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
    assert found == (11.0, [("long", 12.0, 10.0), ("short", 1.0, 1.0)])
    table = kernel_profile.table(step_kernels(*found))
    assert "11.00 ms" in table and "90.9%" in table


TINY = ["--model", "tiny", "--n-layer", "1", "--B", "1", "--T", "16", "--dtype", "float32", "--eager"]


def test_a_profile_is_of_the_step_that_the_options_say(monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[str, Any] = {}

    def make(**arguments: Any) -> Callable[[int], None]:
        built.update(arguments)
        return lambda index: None

    monkeypatch.setattr(contest, "import_module", lambda name: SimpleNamespace(make_ours=make))
    kernel_profile.main(["ours-auto", *TINY, "--warm", "--without", "mlp", "--table", str(SM_90)])
    tiny = {"model": "tiny", "n_layer": 1, "batch_size": 1, "block_size": 16, "dtype": "float32", "compile": False}
    assert built["settings"].items() >= {**tiny, "mlp": "torch"}.items() and built["table"] == str(SM_90)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--table", "tuned.json"], "--table: tuned.json is not named after an architecture"),
        *[([flag, "0"], f"{flag} must be at least 1, got 0") for flag in ("--B", "--T", "--n-layer")],
    ],
)
def test_a_profile_that_cannot_be_names_the_flag(arguments: list[str], reason: str) -> None:
    with pytest.raises(ConfigError, match=f"^{reason}"):
        kernel_profile.main(["plain", *arguments])


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


BLOCKER = f"""
import importlib.abc, sys
class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ModuleNotFoundError("not installed on a GPU machine: " + name, name=name)
sys.meta_path.insert(0, Blocker())
"""
"""A sitecustomize: it is in every Python process of a run."""
HELP = """
import os, runpy, sys
import torch

for module in sys.argv[1:]:
    if child := os.fork():
        assert os.waitpid(child, 0)[1] == 0, module
        continue
    sys.argv = [module, "--help"]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        os._exit(end.code or 0)
"""
"""Starts each module with --help, forked from a process that has imported PyTorch."""


def test_the_stages_processes_need_only_torch_triton_numpy_and_pytest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{ROOT}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    modules: dict[str, list[str]] = {}
    for argv in commands(run_in(tmp_path)).values():
        modules.setdefault(argv[2], argv[:3])
    tests = [*modules.pop("pytest"), "bench", "--collect-only", "-q"]
    ours = [*modules["bench.kernel_profile"], "ours-torch", *TINY, "--jsonl", str(tmp_path / "lines")]
    modules["bench.gpu"] = [sys.executable, "-m", "bench.gpu"]
    assert {"bench.smoke", "fastgpt2.verify"} <= modules.keys()
    stages = [Stage("start", [sys.executable, "-c", HELP, *modules], 200.0), Stage("collects", tests, 100.0)]
    stages += [Stage("a step of ours", ours, 100.0), python("blocked", "import rich")]
    record = ran(tmp_path, *stages, seconds=900.0)
    outcomes = {stage.name: (stage.status, stage.output_tail[-1500:]) for stage in record.stages}
    assert outcomes.pop("blocked")[0] == "failed"
    assert all(status == "passed" for status, _ in outcomes.values()), outcomes
    (seen,) = record.step_kernels
    assert seen.slots is not None and seen.slots["attn"] == "sdpa" and not seen.compiled
    milliseconds = [ms for _, _, ms in seen.kernels]
    assert 0 < len(milliseconds) <= kernel_profile.KEPT and milliseconds == sorted(milliseconds, reverse=True)
    assert sum(milliseconds) <= seen.ms * 1.001 and any("mm" in name for name, _, _ in seen.kernels)


COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["bench", "--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


@functools.cache
def collected(*options: str) -> list[str]:
    """The benchmarks that there are on a GPU."""
    listed = run("-c", COLLECT, *options).stdout
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
    hopper = [name for name in every if "-triton-hopper]" in name]
    assert hopper and set(hopper) == set(every) - set(collected(TUNED, "--bench-without=attn-hopper"))


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
