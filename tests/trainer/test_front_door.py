"""`fastgpt2` and `python -m fastgpt2`: the list of commands, and each command as under its own module."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastgpt2
from bench.__main__ import COMMANDS as BENCH
from fastgpt2.__main__ import COMMANDS
from tests import forked

ROOT = Path(__file__).parents[2]
MODULE = [sys.executable, "-m", "fastgpt2"]
SCRIPT = [sys.executable, "-c", "import sys; sys.argv[0] = '/bin/fastgpt2'; from fastgpt2.__main__ import main; main()"]
"""As the script that pip writes."""


def run(*words: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", **environment}
    return subprocess.run(words, cwd=cwd, env=settings, capture_output=True, text=True, check=False)


def test_the_list_names_every_command_and_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    for program, command in [("fastgpt2", SCRIPT), ("python -m fastgpt2", MODULE)]:
        shown = run(*command, cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
        assert (shown.returncode, shown.stderr) == (0, "")
        assert shown.stdout.startswith(f"usage: {program} COMMAND [flags]\n")
        assert all(re.search(rf"^  {name} +[A-Z].*\.$", shown.stdout, re.MULTILINE) for name in COMMANDS)
        assert all(len(line) <= 80 for line in shown.stdout.splitlines())
        assert shown.stdout == run(*command, "--help", cwd=tmp_path).stdout
    assert run(*SCRIPT, "--version", cwd=tmp_path).stdout == f"fastgpt2 {fastgpt2.__version__}\n"


def test_every_module_that_is_a_command_is_in_a_list() -> None:
    def modules(folder: Path) -> set[str]:
        files = (path for path in folder.rglob("*.py") if '\nif __name__ == "__main__":' in path.read_text())
        names = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files}
        return {name.removesuffix(".__main__") for name in names} - {"fastgpt2", "bench"}

    assert set(COMMANDS.values()) == modules(ROOT / "fastgpt2") | {
        f"fastgpt2.{name}" for name in modules(ROOT / "kernels")
    }
    assert set(BENCH.values()) == modules(ROOT / "bench") - {"bench.tied"}  # only other commands start it
    assert all(find_spec(module) for module in (COMMANDS | BENCH).values())


def test_the_script_that_pip_installs_is_the_front_door() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert settings["project"]["scripts"] == {"fastgpt2": "fastgpt2.__main__:main"}


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["trian"], "unknown command 'trian'; did you mean 'train'?"),
        ([""], "unknown command ''"),
        (["caf\n"], r"unknown command 'caf\n'"),
        (["-x"], "the command comes first, got '-x'"),
        (["--hlep"], "the command comes first, got '--hlep'; did you mean '--help'?"),
    ],
)
def test_an_unknown_command_is_a_line_with_status_2(words: list[str], line: str, tmp_path: Path) -> None:
    done = run(*SCRIPT, *words, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {line} (fastgpt2 --help lists the commands)\n"


def test_a_command_is_called_what_the_user_called_it(tmp_path: Path) -> None:
    for program, command in [
        ("fastgpt2 train", [*SCRIPT, "train"]),
        ("python -m fastgpt2 train", [*MODULE, "train"]),
        ("python -m fastgpt2.train", [sys.executable, "-m", "fastgpt2.train"]),
    ]:
        done = run(*command, "--stpes", "5", cwd=tmp_path)
        hint = f"did you mean '--steps'? ({program} --help shows every flag)"
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: unknown flag '--stpes'; {hint}\n")
        shown = run(*command, "--help", cwd=tmp_path).stdout
        assert shown.startswith(f"usage: {program} [flags]\n") and f"\n    {program} --data stdlib" in shown


def test_train_answers_signals_before_its_imports(tmp_path: Path) -> None:
    """A file in torch's place sends the signal."""
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGTERM)")
    done = run(*SCRIPT, "train", cwd=tmp_path, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "")
    assert done.stderr == "stopped by SIGTERM: no step was being computed, so there is nothing to save\n"


def test_a_run_is_the_same_by_either_name(tmp_path: Path) -> None:
    flags = ["--model", "tiny", "--batch-size", "2", "--device", "cpu", "--steps", "3", "--log-every", "1"]
    for out, command in [("module", ["-m", "fastgpt2.train"]), ("script", [*SCRIPT[1:], "train"])]:
        done = forked.run(*command, *flags, "--out", out, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "3 of 3" in done.stdout
    losses = [
        re.findall(r'"loss": [\d.]+', (tmp_path / out / "metrics.jsonl").read_text()) for out in ("module", "script")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 3


@pytest.mark.parametrize("command", ["evaluate", "sample", "prepare", "verify"])
def test_a_command_for_one_process_is_refused_under_torchrun(command: str, tmp_path: Path) -> None:
    words = {"evaluate": ["--from", "x"], "sample": ["--from", "x"], "prepare": ["x", "--out", "y"], "verify": []}[
        command
    ]
    environment = {**os.environ, "WORLD_SIZE": "2", "RANK": "0"}
    done = forked.run("-m", f"fastgpt2.{command}", *words, cwd=tmp_path, environment=environment)
    line = f"WORLD_SIZE is 2, but python -m fastgpt2.{command} runs in one process: start it without torchrun"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"error: {line}\n")
