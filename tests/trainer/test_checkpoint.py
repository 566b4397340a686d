"""A checkpoint: what it holds, and how damage is detected."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.metrics import read_json_lines
from tests.trainer.runs import FILES, MODEL, SMALL, STATE, SUMS, Watch, edit_state, names, save, step

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = dataclasses.replace(SMALL, dropout=0.1)


def with_(out: Path, **changes: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, out=out, **changes)


def test_a_checkpoint_of_the_same_step_is_replaced(out: Path) -> None:
    before = (step(out, 6) / MODEL).read_bytes()
    save(out, 6)
    assert names(out) == ["step-00000004", "step-00000006"] and checkpoint.damage(step(out, 6)) is None
    assert (step(out, 6) / MODEL).read_bytes() != before


def test_the_sums_are_those_that_sha256sum_reads(out: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("needs sha256sum")
    done = subprocess.run([program, "-c", SUMS], cwd=step(out, 6), capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"{name}: OK" for name in FILES]


@pytest.mark.parametrize("number", [1, 2])
def test_a_checkpoint_of_an_older_format_is_resumed_and_told(out: Path, number: int) -> None:
    """Formats 1 and 2 also had the states of generators, which nothing reads now, damaged or not."""
    whole = train(with_(out.parent / "whole", steps=8))
    folder = step(out, 6)
    (folder / "rng.safetensors").write_bytes(b"states")
    edit_state(folder, lambda state: (state.update(format=number), state.pop("processes")))
    (folder / "rng.safetensors").write_bytes(b"")
    if number == 1:
        (folder / SUMS).unlink()
    watch = Watch()
    assert train(with_(out, steps=8, resume=True), reporters=[watch]).losses == whole.losses[6:]
    told = "an older version wrote the checkpoint: dropout masks differ from those it would have drawn"
    assert told in watch.notes and "continuing after step 6" in watch.notes
    unchecked = f"{folder} has no SHA256SUMS and was not checked: an older version wrote it"
    assert (unchecked in watch.notes) == (number == 1)


# --------------------------------------------------------------------------------------------------------------- damage


def flip(place: float) -> Callable[[bytes], bytes]:
    """Flip one bit; place 0 is the first byte, 1 the last."""

    def flipped(data: bytes) -> bytes:
        at = round(place * (len(data) - 1))
        return data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :]

    return flipped


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "first bit": flip(0.0),
    "bit in the middle": flip(0.5),
    "bit near the end": flip(0.9),
    "last bit": flip(1.0),
    "cut by a byte": lambda data: data[:-1],
    "cut in half": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "zeroed block": lambda data: data[: len(data) // 3] + bytes(min(4096, len(data) // 3)) + data[
        len(data) // 3 + min(4096, len(data) // 3) :
    ],
    "a byte more": lambda data: data + b"\0",
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_a_damaged_file_is_found_and_an_older_checkpoint_resumed(out: Path, name: str, damage: str) -> None:
    assert checkpoint.to_resume(out) == (step(out, 6), [])
    path = step(out, 6) / name
    intact = path.read_bytes()
    path.write_bytes(DAMAGE[damage](intact))
    if name == SUMS and damage in ("cut by a byte", "a byte more"):  # only the final newline
        assert checkpoint.damage(step(out, 6)) is None
        return
    problem = checkpoint.damage(step(out, 6))
    assert problem is not None and "\n" not in problem
    if name != SUMS:
        assert problem == f"{path} is damaged: its SHA-256 is not the one in SHA256SUMS"
    found, notes = checkpoint.to_resume(out)
    assert found == step(out, 4) and notes == [f"{problem}; set aside as damaged-step-00000006"]
    # The checkpoint set aside is unchanged and no longer counts as one of the run's.
    assert (out / "checkpoints" / "damaged-step-00000006" / name).read_bytes() == DAMAGE[damage](intact)
    assert checkpoint.checkpoints(out) == [step(out, 4)]


@pytest.mark.parametrize("name", [*FILES, SUMS])
def test_a_missing_file_is_damage(out: Path, name: str) -> None:
    (step(out, 6) / name).unlink()
    found, notes = checkpoint.to_resume(out)
    assert found == step(out, 4)
    assert notes == [f"can't read {step(out, 6) / name}: No such file or directory; set aside as damaged-step-00000006"]


def test_a_run_goes_on_past_a_damaged_checkpoint_with_the_same_bits(out: Path) -> None:
    whole = train(with_(out.parent / "whole", steps=8))
    path = step(out, 6) / "optimizer.safetensors"
    path.write_bytes(flip(0.7)(path.read_bytes()))
    watch = Watch()
    rest = train(with_(out, steps=8, resume=True), reporters=[watch])
    assert rest.losses == whole.losses[4:]
    assert watch.notes[1].startswith(f"{path} is damaged: ")
    assert "continuing after step 4" in watch.notes
    assert names(out) == ["damaged-step-00000006", "step-00000006", "step-00000008"]
    logged = [
        [(r["step"], r["loss"]) for r in read_json_lines(o / "metrics.jsonl")] for o in (out, out.parent / "whole")
    ]
    assert logged[0] == logged[1]


def test_without_an_intact_checkpoint_nothing_is_resumed_or_moved(out: Path) -> None:
    for number in (4, 6):
        (step(out, number) / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"step-00000006/model\.safetensors is damaged: .*; no other checkpoint of "):
        train(with_(out, resume=True))
    assert names(out) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("name", [MODEL, STATE])
def test_what_only_reads_a_checkpoint_names_one_that_is_intact(out: Path, name: str) -> None:
    path = step(out, 6) / name
    path.write_bytes(flip(0.5)(path.read_bytes()))
    with pytest.raises(ConfigError) as error:
        checkpoint.load_model(out)
    assert str(error.value) == (
        f"{path} is damaged: its SHA-256 is not the one in SHA256SUMS; {step(out, 4)} is intact: use that one"
    )
    (step(out, 4) / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"no other checkpoint of .* is intact"):
        checkpoint.load_model(out)
