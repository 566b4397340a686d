"""A run's folder: whose it is, what it already holds, and what is written into it beside the checkpoints."""

from __future__ import annotations

import dataclasses
import json
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastgpt2
from fastgpt2 import ConfigError, TrainConfig, checkpoint, record, train
from fastgpt2.command import main
from fastgpt2.durable import LOCK_NAME, OutputError, locked
from fastgpt2.folder import new_folder
from fastgpt2.metrics import NonFiniteLossError, read_json_lines
from fastgpt2.reporter import Reporter
from fastgpt2.run import Run, build

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = TrainConfig(
    n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=33, batch_size=3, steps=4, lr=1e-2,
    device="cpu", save_every=1000, log_every=1,
)  # fmt: skip


class Cut(BaseException):
    """Stands for whatever ends a process. An Exception would only drop the reporter that raises it."""


class Watch(Reporter):
    """Keeps what the user is told, and calls something after a step."""

    def __init__(self, at: int = 0, then: Callable[[], object] = lambda: None) -> None:
        self.texts: list[str] = []
        self.at, self.then = at, then

    def note(self, text: str) -> None:
        self.texts.append(text)

    def stepped(self, done: int) -> None:
        if done == self.at:
            self.then()


def cut() -> None:
    raise Cut


def with_(out: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, out=out, **changes)


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_json_lines(path)]


@pytest.fixture(scope="module")
def losses() -> list[float]:
    """The losses of an uninterrupted run."""
    return train(CONFIG).losses


@pytest.fixture
def unsaved(tmp_path: Path) -> Path:
    """The folder of a run that was cut after its third step, before its first checkpoint."""
    out = tmp_path / "run"
    with pytest.raises(Cut):
        train(with_(out), reporters=[Watch(3, cut)])
    assert {"config.toml", "metrics.jsonl"} <= {path.name for path in out.iterdir()}
    assert steps_of(out / "metrics.jsonl") == [1, 2] and not (out / "checkpoints").exists()
    return out


# ------------------------------------------------------------------------------------------------ no dead end


def test_a_new_run_takes_no_records_away(unsaved: Path) -> None:
    before = (unsaved / "metrics.jsonl").read_bytes()
    message = "already holds a run: continue it with --resume, from its beginning since it has no checkpoint, or choose"
    with pytest.raises(ConfigError, match=message):
        train(with_(unsaved))
    assert (unsaved / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("resume", [True, "auto"])
def test_what_was_cut_before_its_first_checkpoint_starts_from_its_beginning(
    unsaved: Path, resume: Any, losses: list[float]
) -> None:
    watch = Watch(2, cut)
    with pytest.raises(Cut):
        train(with_(unsaved, resume=resume), reporters=[watch])
    begins = f"the run in {unsaved} has no checkpoint: starting from its beginning; its records so far are kept as "
    assert f"{begins}metrics-1.jsonl" in watch.texts
    watch = Watch()
    assert train(with_(unsaved, resume=resume), reporters=[watch]).losses == losses
    assert f"{begins}metrics-2.jsonl" in watch.texts
    found = [steps_of(unsaved / name) for name in ("metrics-1.jsonl", "metrics-2.jsonl", "metrics.jsonl")]
    assert found == [[1, 2], [1], [1, 2, 3, 4]]


@pytest.mark.parametrize("resume", [False, True, "auto"])
@pytest.mark.parametrize("empty", [False, True], ids=["no records", "an empty file of records"])
def test_where_nothing_would_be_lost_a_run_starts(
    tmp_path: Path, resume: Any, empty: bool, losses: list[float]
) -> None:
    (tmp_path / "config.toml").write_text(CONFIG.to_toml())
    if empty:
        (tmp_path / "metrics.jsonl").touch()
    watch = Watch()
    assert train(with_(tmp_path, resume=resume), reporters=[watch]).losses == losses
    assert (f"the run in {tmp_path} has no checkpoint: starting from its beginning" in watch.texts) == bool(resume)
    assert not list(tmp_path.glob("metrics-*"))


@pytest.mark.parametrize("folder", ["missing", "empty", "of something else"])
def test_resuming_what_is_no_run_is_an_error_and_auto_starts_it(tmp_path: Path, folder: str) -> None:
    out = tmp_path / "run"
    if folder != "missing":
        out.mkdir()
    if folder == "of something else":
        (out / "thesis.tex").write_text("all of it")
    before = sorted(out.iterdir()) if out.exists() else None
    with pytest.raises(ConfigError, match=r"no checkpoint under .*run, nor a config.toml: no run began there"):
        train(with_(out, resume=True))
    assert (sorted(out.iterdir()) if out.exists() else None) == before
    watch = Watch()
    assert train(with_(out, resume="auto"), reporters=[watch]).steps_done == 4
    assert not any("beginning" in text for text in watch.texts)


def test_auto_is_one_command_however_often_it_is_cut(tmp_path: Path, losses: list[float]) -> None:
    seen: list[list[int]] = []
    for at in (1, 2, 4, 3, 0, 0):
        watch = Watch(at, cut)
        config = with_(tmp_path, resume="auto", save_every=2)
        if at:
            with pytest.raises(Cut):
                train(config, reporters=[watch])
        else:
            rest = train(config, reporters=[watch])
            assert rest.losses == losses[4 - len(rest.losses) :]
        seen.append([int(path.name[5:]) for path in checkpoint.checkpoints(tmp_path)])
    assert seen == [[], [], [2], [2], [2, 4], [2, 4]]
    assert "nothing to do: --steps 4 is not above the 4 steps already done" in watch.texts
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2, 3, 4]


def test_a_run_that_never_saves_is_not_resumed(tmp_path: Path) -> None:
    train(with_(tmp_path, save_every=0))
    with pytest.raises(ConfigError, match=r"saves no checkpoints \(--save-every 0\), so there is nothing to resume"):
        train(with_(tmp_path, save_every=0, resume=True))
    assert not list(tmp_path.glob("metrics-*"))
    assert train(with_(tmp_path, save_every=2, resume=True)).steps_done == 4
    assert steps_of(tmp_path / "metrics-1.jsonl") == [1, 2, 3, 4] and len(checkpoint.checkpoints(tmp_path)) == 2


# ----------------------------------------------------------------------------------------------------- lock


@pytest.mark.parametrize("resume", [False, True, "auto"])
def test_a_run_keeps_others_out_of_its_folder_as_long_as_it_lives(tmp_path: Path, resume: Any) -> None:
    refused: list[str] = []

    def second() -> None:
        before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ConfigError) as error:
            train(with_(tmp_path, resume=resume, steps=9))
        assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
        refused.append(str(error.value))

    train(with_(tmp_path, save_every=1), reporters=[Watch(3, second)])
    holder = f"process {os.getpid()} on {os.uname().nodename}"
    assert refused == [f"--out {tmp_path} is in use by another run ({holder})"]
    assert train(with_(tmp_path, resume=True, steps=5)).steps_done == 5


def test_however_a_run_ends_its_folder_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def free() -> bool:
        with locked(tmp_path) as held:
            return held

    build(with_(tmp_path))
    assert free()
    with pytest.raises(Cut):
        train(with_(tmp_path), reporters=[Watch(1, cut)])
    assert free()
    with monkeypatch.context() as patch, pytest.raises(NonFiniteLossError):
        patch.setattr(Run, "step", lambda *_, **__: (torch.tensor(torch.nan), torch.zeros(())))
        train(with_(tmp_path, resume=True))
    assert free()
    train(with_(tmp_path, resume=True))
    assert free()
    with pytest.raises(ConfigError, match="another shape"):
        train(with_(tmp_path, resume=True, n_embd=32))
    assert free()


def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    watch = Watch()
    train(with_(tmp_path), reporters=[watch])
    assert f"the file system of {tmp_path} has no locks: nothing keeps a second run out of this folder" in watch.texts


# ------------------------------------------------------------------------------------- folders that can't be


def a_file(path: Path) -> Path:
    path.touch()
    return path


def a_link(path: Path, target: str) -> Path:
    path.symlink_to(target)
    return path


NO_FOLDERS: dict[str, tuple[Callable[[Path], Path], str]] = {
    "a file": (lambda tmp: a_file(tmp / "run"), "it is a file; give a folder"),
    "under a file": (lambda tmp: a_file(tmp / "file") / "run", "Not a directory"),
    "a name too long": (lambda tmp: tmp / ("x" * 300), "File name too long"),
    "a link that leads nowhere": (lambda tmp: a_link(tmp / "run", "nowhere"), "it is a link that leads nowhere; give"),
    "a link to itself": (lambda tmp: a_link(tmp / "run", "run"), "it is a link that leads nowhere; give"),
    "no file system to write": (lambda tmp: Path("/proc/fastgpt2/run"), "No such file or directory"),
    "a folder for the lock": (lambda tmp: tmp / "locked", "Is a directory"),
}


@pytest.mark.parametrize("resume", [False, True, "auto"])
@pytest.mark.parametrize("name", NO_FOLDERS)
def test_a_folder_that_can_not_be_is_one_line(tmp_path: Path, name: str, resume: Any) -> None:
    (tmp_path / "locked" / LOCK_NAME).mkdir(parents=True)
    (tmp_path / "locked" / "config.toml").write_text(CONFIG.to_toml())
    make, reason = NO_FOLDERS[name]
    out = make(tmp_path)
    with pytest.raises(ConfigError) as error:
        train(with_(out, resume=resume))
    text = str(error.value)
    assert "\n" not in text and str(out) in text
    # --resume looks for a run before it looks at the folder.
    assert reason in text or (resume is True and ("no run began there" in text or "can't read" in text))


@pytest.mark.parametrize("method", ["mkdir", "touch"])
@pytest.mark.parametrize("number", [13, 30, 28])
def test_a_folder_that_can_not_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, number: int
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(ConfigError, match=f"can't write to --out {tmp_path}: {os.strerror(number)}"):
        train(with_(tmp_path))


def test_two_runs_of_one_second_have_two_folders(tmp_path: Path) -> None:
    class Now:
        @staticmethod
        def now() -> Now:
            return Now()

        def strftime(self, form: str) -> str:
            return "2026-01-02-030405"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastgpt2.folder.datetime", Now)
        with new_folder(tmp_path / "runs") as one, new_folder(tmp_path / "runs") as two:
            names = [one.name, two.name]
            for folder in (one, two):
                (folder / "config.toml").touch()
    assert names == ["2026-01-02-030405", "2026-01-02-030405-2"]
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == names


def test_a_new_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with new_folder(tmp_path / "runs"):
        pass
    assert not (tmp_path / "runs").exists()
    (tmp_path / "runs").mkdir()
    with new_folder(tmp_path / "runs"):
        pass
    assert list(tmp_path.iterdir()) == [tmp_path / "runs"]
    with pytest.raises(ConfigError, match=r"can't make a folder in .*file: File exists; give --out"):
        new_folder(a_file(tmp_path / "file")).__enter__()


FLAGS = ["--n-layer", "1", "--n-embd", "16", "--steps", "1", "--device", "cpu"]


def test_a_command_that_is_refused_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError):
        main([*FLAGS, "--data", "nowhere"])
    assert list(tmp_path.iterdir()) == []
    assert main(FLAGS) == 0
    (out,) = (tmp_path / "runs").iterdir()
    assert (out / "config.toml").exists()


@pytest.mark.parametrize("world", ["2", "16"])
def test_half_of_torchruns_variables_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", world)
    monkeypatch.delattr(sys.modules["fastgpt2.command"], "new_folder")  # it would be made, and removed again
    message = rf"^WORLD_SIZE is {world}, but these are not set: RANK, .*; start the processes by torchrun, or take .*$"
    for call in (lambda: main(FLAGS), lambda: main([*FLAGS, "--out", "run"]), lambda: train(with_(tmp_path / "run"))):
        with pytest.raises(ConfigError, match=message):
            call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("world", ["1", "", "many", "²"])
def test_one_process_of_torchrun_is_a_run_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, world: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert train(with_(tmp_path)).steps_done == 4


# ------------------------------------------------------------------------------------------------ what ran


@pytest.fixture
def _anew() -> Iterator[None]:
    """Ask git again, and once more after the test."""
    record._commit_once.cache_clear()
    yield
    record._commit_once.cache_clear()


def starts(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / record.NAME).read_text().splitlines()]


def test_every_start_is_recorded_with_what_ran(tmp_path: Path) -> None:
    train(with_(tmp_path))
    train(with_(tmp_path, resume=True, steps=6, lr=0.5))
    first, second = starts(tmp_path)
    assert first["implementations"] == {"attn": "sdpa", "mlp": "torch", "norm": "torch", "loss": "chunked"}
    assert (first["step"], second["step"]) == (0, 4)
    assert first["config"] == json.loads(json.dumps(vars(build(CONFIG).config), default=str)) | {"out": str(tmp_path)}
    assert (second["config"]["lr"], second["config"]["steps"]) == (0.5, 6)
    versions = {"torch": torch.__version__, "python": sys.version.split()[0], "fastgpt2": fastgpt2.__version__}
    assert {name: first[name] for name in versions} == versions
    assert first["command"] == sys.orig_argv and first["device"] == "cpu" and first["compute_capability"] is None
    assert first["world_size"] == 1 and first["host"] == os.uname().nodename and first["time"].endswith("+00:00")
    assert set(first["commit"]) == {"id", "dirty"}


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path: Path) -> None:
    path = tmp_path / record.NAME
    for line in ("{}", "[]"):
        path.write_bytes(b'{"time": "20')
        record._append(path, line)
        record._append(path, line)
        assert path.read_text() == f'{{"time": "20\n{line}\n{line}\n'


def test_a_record_that_can_not_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / record.NAME).mkdir()
    with pytest.raises(OutputError, match=r"^can't write .*starts\.jsonl: Is a directory$"):
        train(with_(tmp_path))


def git(folder: Path, *arguments: str) -> str:
    who = {f"GIT_{role}_{what}": "x" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    argv = ["git", "-c", "commit.gpgsign=false", *arguments]
    return subprocess.run(argv, cwd=folder, env=os.environ | who, capture_output=True, text=True, check=True).stdout


def test_the_commit_is_that_of_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-qm", "one")
    monkeypatch.setattr(record, "ROOT", tmp_path)
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert record.commit() == {"id": head, "dirty": False}
    (tmp_path / "untracked").touch()
    assert record.commit() == {"id": head, "dirty": False}
    (tmp_path / "file").write_text("b")
    assert record.commit() == {"id": head, "dirty": True}
    (tmp_path / "installed").mkdir()  # within a repository that isn't the code's
    monkeypatch.setattr(record, "ROOT", tmp_path / "installed")
    assert record.commit() == {"id": "unknown", "dirty": None}


@pytest.mark.parametrize("program", [None, "exit 1", "exec sleep 60"], ids=["missing", "failing", "slow"])
def test_a_git_that_is_missing_fails_or_takes_long_holds_up_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None
) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / "bin").mkdir()
    if program is not None:
        (tmp_path / "bin" / "git").write_text(f"#!/bin/sh\nPATH=/bin:/usr/bin\n{program}\n")
        (tmp_path / "bin" / "git").chmod(0o755)
    monkeypatch.setattr(record, "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert record.commit(seconds=0.2) == {"id": "unknown", "dirty": None}


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002, 0o077])
def test_every_file_has_the_mode_that_the_umask_gives(
    tmp_path: Path, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare = pytest.importorskip("fastgpt2.preparation", reason="preparing data needs rich")
    (tmp_path / "text.txt").write_text("Some words. " * 100)
    before = os.umask(mask)
    try:
        assert main([*FLAGS, "--out", str(tmp_path / "run")]) == 0
        config = prepare.PrepareConfig(sources=(tmp_path / "text.txt",), out=tmp_path / "data", tokenizer="byte")
        prepare.prepare(config)
    finally:
        os.umask(before)
    modes = {path: stat.S_IMODE(path.stat().st_mode) for out in ("run", "data") for path in (tmp_path / out).rglob("*")}
    wrong = {path: oct(mode) for path, mode in modes.items() if mode != (0o777 if path.is_dir() else 0o666) & ~mask}
    assert wrong == {} and {"model.safetensors", "loss.png", "meta.json"} <= {path.name for path in modes}
