"""The command `python -m fastgpt2.train`: its output, its files, its config file and its exit status."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt2 import ConfigError
from fastgpt2.arguments import parse
from fastgpt2.command import main
from fastgpt2.metrics import read_json_lines

SMALL = ["--model", "tiny", "--device", "cpu", "--batch-size", "2"]
PATIENCE_S = 300
"""Importing PyTorch takes minutes on a machine whose cores are busy."""


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """`python -m fastgpt2.train`, without Triton's interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    line = [sys.executable, "-m", "fastgpt2.train", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(line, cwd=cwd, stdout=pipe, stderr=pipe, text=True, env=environment)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_command_shows_and_writes_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--steps", "12", "--out", "run"]) == 0
    shown = capsys.readouterr().out
    for text in (
        "ln 256 = 5.5452",
        "final loss",
        "tokens/s",
        "peak memory",
        "run/metrics.jsonl",
        "run/loss.png",
        "12 of 12",
    ):
        assert text in shown, text
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(read_json_lines(tmp_path / "run" / "metrics.jsonl")) == 3
    # --out is enough to continue: the other settings are the run's.
    assert main(["--resume", "--out", "run", "--steps", "20"]) == 0
    assert "continuing after step 12" in capsys.readouterr().out
    assert [r["step"] for r in read_json_lines(tmp_path / "run" / "metrics.jsonl")] == [1, 10, 12, 13, 20]


def test_a_diverged_run_names_the_step_and_what_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--steps", "60", "--lr", "1e30", "--save-every", "1", "--out", "run"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: the loss of step ") and "--lr" in line


def test_interrupted_once_it_saves_and_resumes(tmp_path: Path) -> None:
    process = start(*SMALL, "--steps", "100000", "--out", "run", "--log-every", "1", cwd=tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + PATIENCE_S
    while len(read_json_lines(metrics)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, output + errors
    assert "continue with --resume --out run" in output
    last = read_json_lines(metrics)[-1]["step"]
    state = json.loads((tmp_path / "run" / "checkpoints" / f"step-{last:08d}" / "state.json").read_text())
    assert state["step"] == last
    assert main(["--resume", "--out", "run", "--steps", str(last + 2)]) == 0


def test_triton_without_cuda_or_the_interpreter_says_what_to_do(tmp_path: Path) -> None:
    process = start("--attn", "triton", "--device", "cpu", cwd=tmp_path)
    output, errors = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, output) == (2, "")
    assert not list(tmp_path.iterdir())
    assert "--attn sdpa" in errors and "TRITON_INTERPRET=1" in errors
    assert errors.count("\n") == 1


def test_a_config_file_gives_way_to_flags_and_refuses_unknown_keys(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('model = "tiny"\nlr = 0.5\nbatch-size = 4\ncompile = true\n')
    config = parse(["--config", str(file), "--lr", "0.25", "--no-compile"])
    assert (config.model, config.lr, config.batch_size, config.compile) == ("tiny", 0.25, 4, False)
    file.write_text("learning_rate = 1.0\nwarmup_step = 3\n")
    with pytest.raises(ConfigError, match="unknown key 'learning_rate'"):
        parse(["--config", str(file)])
    file.write_text("warmup_step = 3\n")
    with pytest.raises(ConfigError, match="unknown key 'warmup_step'; did you mean 'warmup_steps'"):
        parse(["--config", str(file)])
    file.write_text('steps = "many"\n')
    with pytest.raises(ConfigError, match=r"run\.toml: steps must be a whole number, got 'many'"):
        parse(["--config", str(file), "--steps", "3"])  # refused even though the flag overrides it
    with pytest.raises(ConfigError, match="can't read --config"):
        parse(["--config", str(tmp_path / "none.toml")])
