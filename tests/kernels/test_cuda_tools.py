"""sanitize and profile, with stand-ins that print what compute-sanitizer and Nsight Compute print."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux")

from bench.timing import ROOT
from fastgpt2.fields import ConfigError
from fastgpt2.kernels.specs import all_kernels, tunings
from fastgpt2.kernels.tools import profile, sanitize
from fastgpt2.kernels.tools.toolkit import find_tool


def stand_in(folder: Path, name: str, program: str) -> str:
    """Write a program of that name, a Python script."""
    path = folder / name
    path.write_text(f"#!{sys.executable}\nimport sys\n{program}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


SANITIZER = """
tool = sys.argv[sys.argv.index("--tool") + 1]
case = sys.argv[sys.argv.index("--run") + 1]
found = FOUND.get((tool, case), 4 if case == "planted fault" else 0)
words = {"memcheck": "ERROR SUMMARY: {} errors", "racecheck": "RACECHECK SUMMARY: {} hazards displayed (0 warnings)"}
print("========= COMPUTE-SANITIZER")
if found is not None:
    print("========= " + words[tool].format(found))
sys.exit(STATUS.get(case, 0))
"""


def sanitizer(folder: Path, found: dict | None = None, status: dict | None = None) -> str:
    program = f"FOUND = {found or {}}\nSTATUS = {status or {}}\n{SANITIZER}"
    return stand_in(folder, "compute-sanitizer", program)


def test_no_fault_but_the_planted_ones_is_right(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # What is planted for memcheck ends the program.
    program = sanitizer(tmp_path, status={"planted fault": 1})
    assert sanitize.report(program, ["memcheck", "racecheck"], ["layer norm"]) == 0
    out = capsys.readouterr().out
    assert out.count("planted fault") == 2 and out.count("layer norm, odd channels") == 2
    assert "6 checks, 0 not as expected" in out


@pytest.mark.parametrize(
    ("found", "status", "printed"),
    [
        ({("racecheck", "layer norm"): 1}, {}, "1  WRONG"),
        ({("memcheck", "planted fault"): 0}, {}, "0  WRONG"),
        ({("memcheck", "layer norm"): None}, {}, "no summary  WRONG"),
        ({}, {"layer norm": 1}, "no summary  WRONG"),
    ],
    ids=["a fault", "the planted one missed", "no summary", "the case itself failed"],
)
def test_anything_else_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], found: dict, status: dict, printed: str
) -> None:
    assert sanitize.report(sanitizer(tmp_path, found, status), ["memcheck", "racecheck"], ["layer norm"]) == 1
    assert printed in capsys.readouterr().out


def test_every_kernel_is_watched_and_tensors_are_the_drivers(tmp_path: Path) -> None:
    program = stand_in(tmp_path, "tool", "import os; print(sys.argv, os.environ['PYTORCH_NO_CUDA_MEMORY_CACHING'])")
    said = sanitize.check(program, "memcheck", "attention").report
    for kernel in all_kernels().values():
        assert f"'--kernel-name', 'kns={kernel.function.__name__}'" in said
    assert said.rstrip().endswith(" 1"), "without it memcheck sees blocks, not tensors"


@pytest.mark.parametrize(
    "case", ["attention, one token", "gelu_mlp, odd channels", "layer norm, odd channels", "linear cross-entropy"]
)
def test_a_case_computes(case: str) -> None:
    sanitize.run_case(case, "memcheck")


@pytest.mark.gpu
@pytest.mark.skipif(find_tool(sanitize.NAME) is None, reason="compute-sanitizer is not installed")
def test_the_sanitizer_finds_what_is_planted_and_nothing_in_the_layer_norm() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt2.kernels.tools.sanitize", "--only", "layer norm"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


REPORT = """==PROF== Connected to process 7
"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread",\
"sm__inst_executed_pipe_xu.avg.pct_of_peak_sustained_active","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio","smsp__average_warps_issue_stalled_math_per_issue_active.ratio"
"","","us","register/thread","%","%","inst","inst"
"0","attention_forward_kernel","1,310.5","117","40.1","61.2","0.5","2.25"
"""


def test_counters_are_read_by_name() -> None:
    counters = profile.parse(REPORT)
    assert counters["gpu__time_duration.sum"] == pytest.approx(1.3105)
    assert counters["launch__registers_per_thread"] == 117
    assert "Kernel Name" not in counters
    row = profile.row({"op": "attention_forward", "precision": "bfloat16", "tile": "128x64", "counters": counters})
    assert row[">ms"] == "1.310" and row[">registers"] == "117" and row[">DRAM, %"] == ""
    assert row["<busiest pipes, %"] == "tensor 61, xu 40"
    assert row["<warps stalled for"] == "math 2.2, wait 0.5"


def test_kernels_are_read_one_by_one_and_a_refusal_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    refusal = "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission"
    program = stand_in(
        tmp_path,
        "ncu",
        f"""
log, kernel = (sys.argv[sys.argv.index(name) + 1] for name in ("--log-file", "--kernel-name"))
assert sys.argv[sys.argv.index("--clock-control") + 1] == "none"
open(log, "w").write({REPORT!r} if "forward" in kernel else {refusal!r})
""",
    )
    lines = tmp_path / "lines"
    ops = ["attention_forward", "attention_backward_dq"]
    assert profile.report(program, ops, "bfloat16", lines, torch.device("cpu")) == 1
    out = capsys.readouterr().out
    assert "attention_backward_dq: ==ERROR== ERR_NVGPUCTRPERM" in out
    assert "tensor 61" in out
    (kept,) = map(json.loads, lines.read_text().splitlines())
    assert kept["kind"] == "profile" and kept["op"] == "attention_forward"
    assert kept["counters"]["gpu__time_duration.sum"] == pytest.approx(1.3105)


@pytest.mark.parametrize("module", [profile, sanitize])
def test_without_a_gpu_or_the_tool_the_command_says_so(module: object) -> None:
    if torch.cuda.is_available() and find_tool(module.NAME):  # type: ignore[attr-defined]
        pytest.skip("this machine has both")
    with pytest.raises(ConfigError, match=r"^no CUDA GPU here: |is not installed"):
        module.main([])  # type: ignore[attr-defined]


@pytest.mark.parametrize(("major", "form"), [(8, ""), (9, "_tma")])
def test_only_what_the_gpu_launches_is_read(major: int, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile, "find_tool", lambda name: "ncu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, 0))
    monkeypatch.setattr(profile, "report", lambda program, ops, *_: ops)
    assert profile.main(["--op", "gelu_mlp"]) == [f"gelu_mlp_{way}{form}" for way in ("forward", "backward")]


def test_every_tuned_kernel_has_a_size_of_gpt2() -> None:
    for op in tunings():
        assert profile.size_of(op) in (64, 768, 50304)


def test_a_tool_is_found_in_cudas_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bin").mkdir()
    path = stand_in(tmp_path / "bin", "a-tool-of-cudas", "")
    assert find_tool("a-tool-of-cudas") is None
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_tool("a-tool-of-cudas") == path
