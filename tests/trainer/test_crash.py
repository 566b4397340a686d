"""Killed processes, power cuts and full disks: a checkpoint is complete or absent."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import TrainConfig, checkpoint, train
from fastgpt2.durable import OutputError, write_text
from fastgpt2.metrics import JsonLines, read_json_lines
from tests import forked
from tests.trainer.runs import FILES, SMALL, SUMS, names, save, step

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = dataclasses.replace(SMALL, dropout=0.1)


def with_(out: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, out=out, **changes)


# --------------------------------------------------------------------------------------------------------------- killed

KILLS = """
import os, shutil, signal, sys
from pathlib import Path
import resource
import torch
from safetensors.torch import load_file
from fastgpt2 import TrainConfig, checkpoint
from fastgpt2.metrics import JsonLines, read_json_lines
from fastgpt2.run import build

trained, here = map(Path, sys.argv[1:])
out = here / "run"
run = build(TrainConfig(**{**eval(CONFIG), "out": None, "keep_checkpoints": 1}))
run.step(0, run.next_tokens(0))
weights = {n: load_file(trained / f"checkpoints/step-0000000{n}/model.safetensors") for n in (4, 6)}
weights[8] = run.model.state_dict()
checkpoint.save(here / "first", 8, run.config, run.state)  # so that all imports are done


def save():
    checkpoint.save(out, 8, run.config, run.state)


def killed(action, moment=0, byte=None):
    '''Fork a child that dies at its moment-th file operation, or when a file reaches `byte` bytes.'''
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, status
        return os.WIFSIGNALED(status)
    seen = 0

    def hook(event, arguments):
        nonlocal seen
        if event == "open" or event.startswith(("os.", "shutil.")):
            seen += 1
            if seen == moment:
                os.kill(os.getpid(), signal.SIGKILL)

    if byte is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (byte, byte))
    sys.addaudithook(hook)
    action()
    os._exit(0)


def start(damaged):
    shutil.rmtree(out, ignore_errors=True)
    shutil.copytree(trained, out)
    if damaged:
        (out / "checkpoints/step-00000006/optimizer.safetensors").write_bytes(b"")


def check(steps, damaged=False):
    '''Every checkpoint is intact, the newest is resumed, and no temporary folders are left.'''
    if not damaged:
        assert [p for path in checkpoint.checkpoints(out) if (p := checkpoint.damage(path))] == []
    path, notes = checkpoint.to_resume(out)
    step = int(path.name[5:])
    assert step in steps, (step, steps)
    for name, weight in weights[step].items():
        assert torch.equal(load_file(path / "model.safetensors")[name], weight), name
    left = [p.name for p in (out / "checkpoints").iterdir()]
    assert all(name.startswith("step-") or damaged and name == "damaged-step-00000006" for name in left), left
    return step


def every_moment(action, steps, damaged=False):
    found = []
    while True:
        start(damaged)
        died = killed(action, len(found) + 1)
        found.append(check(steps, damaged))
        if not died:
            return found


saves = every_moment(save, (6, 8))
assert saves == sorted(saves) and saves[0] == 6 and saves[-1] == 8
print("save", len(saves))
print("resume", len(every_moment(lambda: checkpoint.to_resume(out), (4,), damaged=True)))

size = (here / "first/checkpoints/step-00000008/optimizer.safetensors").stat().st_size
for byte in (0, 1, 100, 5000, size // 2, size - 1):
    start(False)
    assert killed(save, byte=byte), byte
    assert check((6,)) == 6
start(False)
assert not killed(save, byte=size)

records = read_json_lines(trained / "metrics.jsonl")
moment, counts = 0, []
while True:
    start(False)
    moment += 1
    died = killed(lambda: JsonLines(out / "metrics.jsonl", keep_up_to_step=4), moment)
    counts.append(len(read_json_lines(out / "metrics.jsonl")))
    assert read_json_lines(out / "metrics.jsonl") == records[: counts[-1]]
    if not died:
        break
assert counts == sorted(counts, reverse=True) and {6, 4} == set(counts), counts
print("metrics", moment)
"""


def test_killed_at_any_moment_a_run_can_be_resumed(trained: Path, tmp_path: Path) -> None:
    program = f"CONFIG = {repr({**vars(CONFIG)})!r}\n{KILLS}"
    done = subprocess.run([sys.executable, "-c", program, trained, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    moments = dict(line.split() for line in done.stdout.splitlines())
    assert int(moments["save"]) > 20 and int(moments["resume"]) > 5 and int(moments["metrics"]) > 5, moments


def test_leftovers_are_removed_by_a_resume_and_by_a_save(out: Path) -> None:
    def leave() -> None:
        for name in (".writing-step-00000005", ".removing-step-00000002"):
            shutil.copytree(step(out, 4), out / "checkpoints" / name)

    leave()
    checkpoint.to_resume(out)
    assert names(out) == ["step-00000004", "step-00000006"]
    leave()
    train(with_(out, steps=7, resume=True))
    assert names(out) == ["step-00000006", "step-00000007"]


# ----------------------------------------------------------------------------------------------------------- power cuts


def prepare_shards(folder: Path) -> None:
    prepare = pytest.importorskip("fastgpt2.preparation", reason="preparing data needs rich")
    (folder / "text.txt").write_text("Some words. " * 100)
    prepare.prepare(prepare.PrepareConfig(sources=(folder / "text.txt",), out=folder / "run", tokenizer="byte"))


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (lambda folder: write_text(folder / "run" / "text", "text"), {"text"}),
        (lambda folder: JsonLines(folder / "run" / "metrics.jsonl").close(), {"metrics.jsonl"}),
        (lambda folder: save(folder / "run", 1), {"step-00000001"}),
        (prepare_shards, {"meta.json", "train_000000.bin", "val_000000.bin"}),
    ],
    ids=["text", "records", "checkpoint", "shards"],
)
def test_a_file_is_on_the_disk_before_it_has_its_name(
    write: Callable[[Path], None], names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contents are synced before the rename, and the folder before the call returns. Inodes tell what was synced."""
    out = tmp_path / "run"
    out.mkdir()
    named: dict[str, Path] = {}
    on_disk: set[int] = set()
    sync, replace = os.fsync, os.replace

    def missing(*paths: Path) -> set[str]:
        return {path.name for path in paths if path.stat().st_ino not in on_disk}

    def fsync(descriptor: int) -> None:
        sync(descriptor)
        on_disk.add(os.fstat(descriptor).st_ino)

    def rename(old: Path, new: Path) -> None:
        assert missing(old, *old.rglob("*")) == set()
        replace(old, new)
        named[new.name] = new.parent
        on_disk.discard(new.parent.stat().st_ino)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    write(tmp_path)
    assert set(named) == names
    assert missing(out, *named.values()) == set()


@pytest.mark.parametrize("folder", [False, True], ids=["a file", "a folder"])
@pytest.mark.parametrize("number", [errno.EIO, errno.EINVAL])
def test_what_cannot_be_brought_to_the_disk_is_not_taken_for_saved(
    number: int, folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Except a folder on a file system that can't sync folders at all: EINVAL."""

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folder:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    fine = folder and number == errno.EINVAL
    with contextlib.nullcontext() if fine else pytest.raises(OutputError, match=os.strerror(number)):
        write_text(tmp_path / "text", "text")


# ----------------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """Simulate a full disk: a write beyond `size` bytes in any file fails, with EFBIG instead of ENOSPC."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_without_room_is_one_line_and_leaves_everything_as_it_was(out: Path, tmp_path: Path) -> None:
    sizes = {name: (step(out, 6) / name).stat().st_size for name in (*FILES, SUMS)}
    largest = max(sizes.values())
    for size in (0, 1, 100, largest // 2, *(size - 1 for size in sizes.values())):
        with room_for(size), pytest.raises(OutputError) as error:
            save(out, 7)
        assert str(error.value).startswith(f"can't save the checkpoint of step 7 in {out / 'checkpoints'}: ")
        assert "File too large" in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith(f"; the last good one is {step(out, 6)}")
        assert names(out) == ["step-00000004", "step-00000006"]
        assert checkpoint.to_resume(out) == (step(out, 6), [])
    with room_for(largest + 4096):
        save(out, 7)
    assert checkpoint.to_resume(out) == (step(out, 7), [])


def test_a_run_that_has_no_room_goes_on_and_says_what_is_missing(tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "import fastgpt2.loop; fastgpt2.loop.LAST_TRIES_S = (); "
        "from fastgpt2.command import main; sys.exit(main())"
    )
    flags = ["--model", "tiny", "--steps", "5", "--save-every", "2", "--device", "cpu", "--out", str(tmp_path)]
    done = forked.run("-c", program, *flags, cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    reason = "Error while serializing: I/O error: File too large (os error 27); none had been saved"
    for number, then in ((2, "continuing, next try after step 4"), (4, "continuing, next try after step 5"),
                         (5, "continuing, next try at the end"), (5, "this was the last try")):  # fmt: skip
        failed = f"can't save the checkpoint of step {number} in {tmp_path / 'checkpoints'}: {reason}"
        assert f"warning: {failed}; {then}\n" in done.stdout
    assert "can't draw" in done.stdout
    assert [r["step"] for r in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 4, 5]
    assert done.stderr == f"error: the state after step 5 is not saved: {failed}\n"


def test_small_files_are_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.write({"step": 1})
    with room_for(path.stat().st_size + 5), pytest.raises(OutputError, match=r"can't write .*metrics\.jsonl: File too"):
        log.write({"step": 2})
    with room_for(1):
        with pytest.raises(OutputError, match=r"can't write .*metrics\.jsonl: File too large"):
            log.close()
        for write in (lambda: write_text(path, "text"), lambda: JsonLines(path, keep_up_to_step=1)):
            with pytest.raises(OutputError, match=r"can't write .*metrics\.jsonl: File too large"):
                write()
    assert read_json_lines(path) == [{"step": 1}]
    assert list(tmp_path.iterdir()) == [path]
