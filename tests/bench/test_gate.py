"""The gate flags what got slower or larger, and neither noise nor a machine that got slower as a whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.report.gate import main
from bench.report.results import RecordError
from bench.timing import ROOT
from tests.bench.records import GPU, write_record

STEP = "training_step[modelgpt2-n_layer12-B32-T1024-bfloat16-compiled-ours-triton]"
ATTENTION = "attention_backward[B64-T1024-H12-D64-bfloat16-triton]"
ALONE = "optimizer_step[modelgpt2-bfloat16-fused-adamw]"
NEW = {"commit": "b" * 40, "started": "2030-01-02T00:00:00+00:00", "seed": 1}


def judged(tmp_path: Path, capsys: pytest.CaptureFixture[str], **what: object) -> tuple[int, list[str]]:
    """The exit status, and the lines that are flagged."""
    status = main([str(write_record(tmp_path, **NEW, **what)), "--against", str(write_record(tmp_path))])
    return status, [line for line in capsys.readouterr().out.splitlines() if line.startswith(("slower", "larger"))]


def test_a_slowdown_of_five_percent_is_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, flagged = judged(tmp_path, capsys, slower={STEP: 1.05, ATTENTION: 1.05, ALONE: 1.08})
    assert status == 1
    assert [line.split("  ")[1].strip() for line in flagged] == [
        "training step gpt2 n_layer=12 B=32 T=1024 bfloat16 compiled",
        "attention backward B=64 T=1024 H=12 D=64 bfloat16",
        "optimizer step gpt2 bfloat16",
    ]
    assert " plain " in flagged[0] and "sdpa-cudnn" in flagged[1] and "all peers' median" in flagged[2]
    for line, slower in zip(flagged, (1.05, 1.05, 1.08), strict=True):
        measured = float(next(word for word in line.split() if word.startswith("-") and word.endswith("%"))[:-1])
        assert measured == pytest.approx(100 * (1 / slower - 1), abs=1.0)


@pytest.mark.parametrize("seed", range(2, 12))
def test_noise_is_not_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    assert judged(tmp_path, capsys) == (0, [])
    noisy = write_record(tmp_path, commit="c" * 40, noise=0.01, seed=seed)
    assert main([str(noisy), "--against", str(write_record(tmp_path, noise=0.01))]) == 0


@pytest.mark.parametrize("machine", [1.15, 0.9])
def test_a_machine_that_got_slower_as_a_whole_is_not_flagged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], machine: float
) -> None:
    assert judged(tmp_path, capsys, machine=machine) == (0, [])
    # And it hides nothing.
    status, flagged = judged(tmp_path, capsys, machine=machine, slower={STEP: 1.05})
    assert status == 1 and len(flagged) == 1


def test_what_is_larger_is_flagged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(tmp_path, capsys, memory=1.009) == (0, [])
    status, flagged = judged(tmp_path, capsys, memory=1.02)
    assert status == 1 and all(line.startswith("larger") for line in flagged)
    assert "30.00 -> 30.60" in flagged[0]


def test_what_is_faster_or_smaller_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert judged(tmp_path, capsys, slower={STEP: 0.8}, memory=0.5) == (0, [])


def test_other_versions_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = write_record(tmp_path), write_record(tmp_path, **NEW)
    record = json.loads(new.read_text())
    record["environment"] |= {"torch": "3.0.0", "packages": {"quack-kernels": "1.0"}}
    new.write_text(json.dumps(record))
    assert main([str(new), "--against", str(old)]) == 0
    assert "looks like a slowdown of ours: torch 2.99.0 -> 3.0.0\n" in capsys.readouterr().out


def test_the_newest_stored_record_of_another_commit_is_the_default(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stored = tmp_path / "stored"
    command = [str(write_record(tmp_path, **NEW)), "--results", str(stored)]
    with pytest.raises(RecordError, match=f"no record of {GPU} and another commit"):
        main(command)
    write_record(stored, commit="c" * 40, started="2029-05-01T00:00:00+00:00", slower={STEP: 0.5})
    write_record(stored, commit="d" * 40, started="2029-06-01T00:00:00+00:00")
    write_record(stored, **NEW)
    write_record(stored, device="Synthetic other", commit="e" * 40, started="2029-07-01T00:00:00+00:00")
    assert main(command) == 0
    assert f"commit {'b' * 12} against {'d' * 12}" in capsys.readouterr().out


def test_what_cannot_be_compared_is_an_error_of_one_line(tmp_path: Path) -> None:
    gpu, other, cpu = (str(write_record(tmp_path, device=d)) for d in (GPU, "Synthetic other", "cpu"))
    for name in (other, cpu):
        with pytest.raises(RecordError, match="compare runs of one device"):
            main([gpu, "--against", name])
    broken, old = tmp_path / "broken.json", tmp_path / "old.json"
    broken.write_text('{"format": 2,')
    old.write_text('{"format": 1}')
    for path, said in ((broken, "can't read"), (old, "has format 1"), (tmp_path / "none.json", "No such file")):
        with pytest.raises(RecordError, match=said) as error:
            main([str(path), "--against", gpu])
        assert "\n" not in str(error.value)
    done = subprocess.run(
        [sys.executable, "-m", "bench.report.gate", str(broken)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("error: can't read")
