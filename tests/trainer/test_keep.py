"""Which checkpoints are kept and deleted, and what happens to those that can't be read."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.durable import OutputError
from fastgpt2.loop import Loop
from fastgpt2.outputs import Outputs
from fastgpt2.reporter import Reporters
from fastgpt2.run import build
from fastgpt2.state_json import Progress
from tests.trainer.runs import FILES, MODEL, SMALL, SUMS, edit_state, names, save, step

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = dataclasses.replace(SMALL, batch_size=3, steps=4)


def with_(**changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **changes)


def test_the_newest_checkpoint_that_has_not_diverged_is_kept(tmp_path: Path) -> None:
    kept = []
    for number, diverged in enumerate([False, False, True, True, True, False, False], 1):
        save(tmp_path, number, Progress(diverged=diverged))
        kept.append([int(name[5:]) for name in names(tmp_path)])
    assert kept == [[1], [1, 2], [2, 3], [2, 3, 4], [2, 4, 5], [5, 6], [6, 7]]


def test_what_is_not_known_to_be_good_takes_no_good_one_away(tmp_path: Path) -> None:
    for number, diverged in ((1, False), (2, False), (3, True)):
        save(tmp_path, number, Progress(diverged=diverged))
    (step(tmp_path, 2) / "state.json").write_bytes(b"")
    shutil.copytree(step(tmp_path, 3), step(tmp_path, 1))
    edit_state(step(tmp_path, 1), lambda state: state.update(step=1, progress={"diverged": False}))
    for number in (4, 5):
        save(tmp_path, number, Progress(diverged=True))
    assert names(tmp_path) == ["step-00000001", "step-00000004", "step-00000005"]


def test_a_run_that_diverged_is_good_again_when_its_loss_is_near_the_last_good_one(tmp_path: Path) -> None:
    """Across resumes too. A loss that is still far off leaves the run diverged and the good checkpoint in place."""
    save(tmp_path, 1, Progress(loss=1.0))
    save(tmp_path, 2, Progress(loss=9.0, diverged=True))
    for loss, keeps in ((2.9, [1, 3]), (1.9, [4])):
        run = build(with_(out=tmp_path, resume=True, keep_checkpoints=1))
        loop = Loop(run, Reporters(), Outputs(run, print), 0.0)
        assert (loop.diverged, loop.good_loss) == (True, 1.0)
        loop.done += 1
        loop.meter.losses, loop.meter.interval = [loss], [loss]
        loop._watch()
        loop._save("")
        assert [int(name[5:]) for name in names(tmp_path)] == keeps


def test_resuming_what_had_diverged_names_the_last_good_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2, Progress(diverged=True))
    latest, notes = checkpoint.to_resume(tmp_path)
    assert latest == step(tmp_path, 2)
    assert notes == [
        f"the loss had diverged when {step(tmp_path, 2)} was saved; the last good one is {step(tmp_path, 1)}: "
        "move newer ones away to go back"
    ]


def test_a_save_that_fails_leaves_the_others_whatever_keep_says(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_tensors", full)
    with pytest.raises(OutputError, match="No space left on device"):
        save(out, 9)
    assert names(out) == ["step-00000002", "step-00000004"]


def test_copies_are_neither_resumed_nor_counted_nor_deleted(out: Path) -> None:
    others = ("step-best", "step-final", "step-", "step-4x", "step-00000004-copy", "damaged-step-00000001")
    for name in others:
        shutil.copytree(step(out, 2), out / "checkpoints" / name)
    (out / "checkpoints" / "step-00000099").touch()  # not a folder
    assert train(with_(out=out, steps=8, resume=True)).steps_done == 8
    assert names(out) == sorted([*others, "step-00000006", "step-00000008", "step-00000099"])


def test_steps_are_compared_as_numbers(out: Path) -> None:
    for name, number in (("step-10", 10), ("step-9", 9)):
        edit_state(
            Path(shutil.copytree(step(out, 4), out / "checkpoints" / name)), lambda s, n=number: s.update(step=n)
        )
    assert [path.name for path in checkpoint.checkpoints(out)][-2:] == ["step-9", "step-10"]


def test_a_link_is_deleted_and_what_it_leads_to_stays(out: Path, tmp_path: Path) -> None:
    archive = Path(shutil.move(step(out, 2), tmp_path / "archive"))
    step(out, 2).symlink_to(archive)
    train(with_(out=out, steps=8, resume=True))
    assert names(out) == ["step-00000006", "step-00000008"] and (archive / "state.json").exists()


# ----------------------------------------------------------------------------------------------------------- unreadable


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_an_unreadable_file_is_not_damaged(out: Path, name: str) -> None:
    """After an input/output error of a disk or network the contents may still be right."""
    path = step(out, 4) / name
    path.unlink()
    path.symlink_to("/proc/self/mem")  # reading its first byte fails
    message = f"can't read .*{name}: Input/output error; fix that, or move {step(out, 4)} away to use the one before it"
    with pytest.raises(ConfigError, match=message):
        train(with_(out=out, resume=True))
    assert names(out) == ["step-00000002", "step-00000004"]
    shutil.move(step(out, 4), out / "elsewhere")
    assert train(with_(out=out, resume=True)).steps_done == 4


def test_an_unreadable_folder_is_not_an_empty_one(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint.os, "scandir", denied)
    for resume in (True, "auto", False):
        with pytest.raises(ConfigError, match=r"can't read .*checkpoints: Permission denied"):
            train(with_(out=out, resume=resume))


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_is_no_file_is_damage_and_is_not_waited_for(out: Path, make: Callable[[Path], object]) -> None:
    for name in (MODEL, SUMS):
        (step(out, 4) / name).unlink()
        make(step(out, 4) / name)
    latest, notes = checkpoint.to_resume(out)
    assert latest == step(out, 2) and len(notes) == 1 and notes[0].endswith("; set aside as damaged-step-00000004")


def test_a_damaged_checkpoint_that_can_not_be_renamed_is_said(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (step(out, 4) / MODEL).write_bytes(b"")

    def read_only(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(checkpoint.os, "replace", read_only)
    latest, notes = checkpoint.to_resume(out)
    assert latest == step(out, 2)
    assert notes[0].endswith("; can't set it aside as damaged-step-00000004: Read-only file system")


def test_a_second_damaged_checkpoint_of_a_step_keeps_the_first(out: Path) -> None:
    for _ in range(2):
        (step(out, 4) / MODEL).write_bytes(b"")
        checkpoint.to_resume(out)
        train(with_(out=out, resume=True))
    assert names(out) == [
        "damaged-step-00000004", "damaged-step-00000004-2", "step-00000002", "step-00000004",
    ]  # fmt: skip
