"""The smoke finds a kernel that is wrong, tries it otherwise, and outlives one that dies or hangs."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import smoke
from bench.record import Record, Smoke
from bench.smoke import CHANGES
from bench.timing import ROOT
from fastgpt2.backends.norm import torch_norm
from fastgpt2.fields import ConfigError
from fastgpt2.kernels import tuning
from tests.bench.programme import none_is_left, until


def attempts(right: dict[tuple[str, str | None], str]) -> tuple[list[tuple[str, str | None]], Any]:
    """A smoke's comparisons by stand-ins, which are wrong where `right` doesn't say otherwise; and those made."""
    made: list[tuple[str, str | None]] = []

    def attempt(slot: str, change: str | None) -> Smoke:
        made.append((slot, change))
        return Smoke(slot=slot, status=right.get((slot, change), "wrong"))

    return made, attempt


def test_a_slot_that_is_not_right_is_tried_otherwise() -> None:
    right = {("norm", None): "ok", ("mlp", "pointers"): "ok", ("mlp", "4 warps"): "ok", ("loss", None): "timed out"}
    made, attempt = attempts(right)
    reports: dict[str, list[Smoke]] = {}
    smoke.examine(smoke.SLOTS, attempt, lambda found: reports.setdefault(found.slot, []).append(found), pytest.fail)
    plain = [name for name in CHANGES if name != "pointers"]
    tried = {slot: {change for s, change in made if s == slot} for slot in smoke.SLOTS}
    assert tried == {"norm": {None}, "mlp": {None, *CHANGES}, "attn": {None, *plain}, "loss": {None, *plain}}
    assert [found.status for found in reports["norm"]] == ["ok"]
    first, final = reports["mlp"]
    assert first.status == "wrong" and not first.changes, "known at once"
    assert final.right_with == "4 warps" and final.changes["1 stage"].status == "wrong"
    assert reports["attn"][1].right_with is None and reports["loss"][1].status == "timed out"


def test_a_smoke_finds_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("at the size for Triton's interpreter")
    found = smoke.compare("norm", "1 stage", device="cpu")
    assert found.status == "ok", found

    def wrong(*inputs: torch.Tensor, last: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        y, total = torch_norm(*inputs, last=last)
        return 1.05 * y, total

    module = import_module("fastgpt2.kernels.norm")
    monkeypatch.setattr(module, "stream_norm", wrong)
    found = smoke.compare("norm", device="cpu")
    assert found.status == "wrong" and found.error is not None and found.budget is not None
    assert found.error > found.budget
    monkeypatch.delattr(module, "stream_norm")
    assert smoke.compare("norm", device="cpu").status == "failed"


def test_a_form_for_another_gpu_is_skipped() -> None:
    found = smoke.compare("attn-hopper", device="cpu")
    assert found.status == "skipped" and "needs an H100 or H200" in str(found.reason)


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
    assert smoke.compare("norm", device="cpu").status == status


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
    assert found.status == "ok", found


@pytest.mark.parametrize("options", [["--change", "1 stage"], ["--slot", "norm", "--change", "pointers"]])
def test_a_change_needs_a_slot_that_it_makes_sense_for(options: list[str]) -> None:
    with pytest.raises(ConfigError, match="needs --slot"):
        smoke.main(options)


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
print(json.dumps({"slot": slot, "status": "ok" if right else "wrong", "worst": "y", "error": 2.0, "budget": 1.0}))
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
    assert smoke.read_failed(failed) == ("mlp", "norm", "loss", "attn-hopper")
    record = Record()
    for line in lines.read_text().splitlines():
        record.add(json.loads(line))
    found = {smoked.slot: smoked for smoked in record.smokes}
    assert len(record.smokes) == 5 and found["attn"].status == "ok" and not found["attn"].changes
    assert (found["attn-hopper"].status, found["attn-hopper"].changes) == ("wrong", {}), "noted, and left at that"
    mlp, norm, loss = found["mlp"], found["norm"], found["loss"]
    assert (mlp.status, mlp.worst, mlp.right_with) == ("wrong", "y", "4 warps")
    statuses = {name: tried.status for name, tried in mlp.changes.items()}
    assert statuses == dict.fromkeys(CHANGES, "wrong") | {"4 warps": "ok"}
    assert (norm.status, norm.reason, norm.right_with) == ("died", "exit status 3", None)
    assert (loss.status, loss.right_with) == ("timed out", "4 warps"), "some time was left for the changes"
    assert loss.reason == f"no result within {smoke.SHARE * 10:.0f} s"
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

    def attempt(slot: str, change: str | None) -> Smoke:
        made.append((slot, change))
        without_memory = slot == "mlp" and not warmed.exists()
        return Smoke(slot=slot, status="out of memory" if without_memory else again if slot == "mlp" else "ok")

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


@pytest.mark.gpu
@pytest.mark.parametrize("form", smoke.FORMS)
def test_a_smoke_on_a_gpu(form: str) -> None:
    found = smoke.in_a_process(form, None)
    assert found.status == "ok" or (form in smoke.OTHERS and found.status == "skipped")
