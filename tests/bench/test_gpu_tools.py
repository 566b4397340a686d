"""A stage whose tool is missing, and a device that is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.stages import Files, Stage, run_stages
from bench.timing import ROOT


def test_a_stage_whose_tool_is_missing_is_listed(tmp_path: Path) -> None:
    files = Files(tmp_path / "run.json", tmp_path / "run.log", tmp_path / "lines")
    files.results.write_text("")
    write = f'open({str(files.results)!r}, \'a\').write(\'{{"kind": "profile", "op": "x"}}\' + chr(10))'
    stages = [
        Stage("counters", [sys.executable, "-c", write], 30.0),
        Stage("checked", [sys.executable, "-c", ""], 30.0, missing="no such tool"),
    ]
    record = run_stages(stages, {}, files, seconds=60.0)
    assert [stage["name"] for stage in record["stages"]] == ["counters"]
    assert record["not_done"] == [{"name": "checked", "reason": "no such tool"}]
    assert record["profiles"] == [{"stage": "counters", "op": "x"}] and record["results"] == []


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
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", processes, str(tmp_path), "-c", os.devnull],
        cwd=ROOT, env={**inherited, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "the assertion of the test that is at fault" in done.stdout, done.stdout + done.stderr
    if processes == "1":
        # The process that computes nothing any more is replaced, and the tests after it run.
        assert "3 passed" in done.stdout and "test_faulty.py::test_faults" in done.stdout, done.stdout
    else:
        assert "1 passed" in done.stdout and "lost the GPU" in done.stdout + done.stderr
