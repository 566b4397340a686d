"""Checkpoints that outlive the process, the disk's mistakes and a full disk."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from fastgpt2 import ConfigError, TrainConfig, checkpoint, train
from fastgpt2.durable import OutputError, write_text
from fastgpt2.metrics import JsonLines, read_json_lines
from fastgpt2.reporter import Reporter
from fastgpt2.run import build

pytest.importorskip("safetensors", reason="checkpoints need safetensors")

CONFIG = TrainConfig(
    n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=33, batch_size=2, steps=6, lr=1e-2, dropout=0.1,
    device="cpu", dtype="float32", save_every=2, log_every=1,
)  # fmt: skip


class Notes(Reporter):
    """Keeps what the user is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def with_(out: Path, **changes: object) -> TrainConfig:
    return TrainConfig(**{**vars(CONFIG), "out": out, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with the checkpoints of its fourth and its last."""
    out = tmp_path_factory.mktemp("trained")
    train(with_(out))
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def step(out: Path, number: int) -> Path:
    return out / "checkpoints" / f"step-{number:08d}"


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------------- damage


def flip(place: float) -> Callable[[bytes], bytes]:
    """Turn over one bit at a place between 0, the first byte, and 1, the last."""

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
@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.SUMS])
def test_a_damaged_file_is_found_and_an_older_checkpoint_resumed(out: Path, name: str, damage: str) -> None:
    assert checkpoint.to_resume(out) == (step(out, 6), [])
    path = step(out, 6) / name
    intact = path.read_bytes()
    path.write_bytes(DAMAGE[damage](intact))
    if name == checkpoint.SUMS and damage in ("cut by a byte", "a byte more"):  # after the last line's end
        assert checkpoint.damage(step(out, 6)) is None
        return
    problem = checkpoint.damage(step(out, 6))
    assert problem is not None and "\n" not in problem
    if name != checkpoint.SUMS:
        assert problem == f"{path} is damaged: its SHA-256 is not the one in SHA256SUMS"
    found, notes = checkpoint.to_resume(out)
    assert found == step(out, 4) and notes == [f"{problem}; set aside as damaged-step-00000006"]
    # What was set aside is as it was, and no longer the run's.
    assert (out / "checkpoints" / "damaged-step-00000006" / name).read_bytes() == DAMAGE[damage](intact)
    assert checkpoint.checkpoints(out) == [step(out, 4)]


@pytest.mark.parametrize("name", [*checkpoint.FILES, checkpoint.SUMS])
def test_a_missing_file_is_damage(out: Path, name: str) -> None:
    (step(out, 6) / name).unlink()
    found, notes = checkpoint.to_resume(out)
    assert found == step(out, 4)
    assert notes == [f"can't read {step(out, 6) / name}: No such file or directory; set aside as damaged-step-00000006"]


def test_the_sums_are_those_that_sha256sum_reads(out: Path) -> None:
    program = shutil.which("sha256sum")
    if program is None:
        pytest.skip("needs sha256sum")
    done = subprocess.run([program, "-c", checkpoint.SUMS], cwd=step(out, 6), capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.splitlines() == [f"{name}: OK" for name in checkpoint.FILES]


def test_a_run_goes_on_past_a_damaged_checkpoint_with_the_same_bits(out: Path) -> None:
    whole = train(with_(out.parent / "whole", steps=8))
    path = step(out, 6) / "optimizer.safetensors"
    path.write_bytes(flip(0.7)(path.read_bytes()))
    notes = Notes()
    rest = train(with_(out, steps=8, resume=True), notes)
    assert rest.losses == whole.losses[4:]
    assert notes.texts[1].startswith(f"{path} is damaged: ")
    assert "continuing after step 4" in notes.texts
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


@pytest.mark.parametrize("name", [checkpoint.MODEL, checkpoint.STATE])
def test_what_only_reads_a_checkpoint_names_one_that_is_intact(out: Path, name: str) -> None:
    path = step(out, 6) / name
    path.write_bytes(flip(0.5)(path.read_bytes()))
    with pytest.raises(ConfigError) as error:
        checkpoint.load_model(out)
    assert str(error.value) == (
        f"{path} is damaged: its SHA-256 is not the one in SHA256SUMS; {step(out, 4)} is intact: give that one"
    )
    (step(out, 4) / "state.json").unlink()
    with pytest.raises(ConfigError, match=r"no other checkpoint of .* is intact"):
        checkpoint.load_model(out)


def test_settings_that_are_not_the_saved_ones_are_named(out: Path) -> None:
    """A bit of config.toml that turned over is seen, where it is still TOML."""
    notes = Notes()
    train(with_(out, resume=True), notes)
    assert not any("changed since" in text for text in notes.texts)
    train(with_(out, resume=True, lr=0.03, steps=7), notes)
    assert "changed since the checkpoint: --steps 7 (was 6), --lr 0.03 (was 0.01)" in notes.texts


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"dropout": 0.25}, "--dropout 0.25 (was 0.1)"),
        ({"document_mask": True, "end_of_text": 3}, "--document-mask True (was False), --end-of-text 3 (was None)"),
    ],
)
def test_what_no_tensor_depends_on_may_be_changed(out: Path, changes: dict[str, object], note: str) -> None:
    notes = Notes()
    model = train(with_(out, steps=7, resume=True, **changes), notes).model
    assert model.config.dropout == changes.get("dropout", 0.1)
    assert model.config.end_of_text == changes.get("end_of_text")
    assert any(text.startswith("changed since the checkpoint: ") and note in text for text in notes.texts)


def test_the_generator_of_the_runs_gpu_is_saved_and_restored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the CPU's memory for a GPU's and a generator that is a table."""
    gpu, generators = torch.device("cuda:1"), {}
    run = build(with_(tmp_path))
    run.step(0, run.next_tokens(0))
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device="cuda": torch.tensor([device == gpu, 7]).byte())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device="cuda": generators.update({device: state}))
    monkeypatch.setattr(run.state, "device", gpu)
    read = checkpoint.read_tensors
    monkeypatch.setattr(checkpoint, "read_tensors", lambda path, device: read(path, "cpu"))
    saved = checkpoint.save(tmp_path, 1, run.config, run.state)
    checkpoint.restore(saved, run.state)
    assert {device: state.tolist() for device, state in generators.items()} == {gpu: [1, 7]}


def test_a_checkpoint_of_the_same_step_is_replaced(out: Path) -> None:
    run = build(with_(out.parent / "other"))
    run.step(0, run.next_tokens(0))
    before = (step(out, 6) / checkpoint.MODEL).read_bytes()
    checkpoint.save(out, 6, run.config, run.state)
    assert names(out) == ["step-00000004", "step-00000006"] and checkpoint.damage(step(out, 6)) is None
    assert (step(out, 6) / checkpoint.MODEL).read_bytes() != before


def test_a_checkpoint_from_before_there_were_sums_is_resumed_with_a_note(out: Path) -> None:
    state = step(out, 6) / "state.json"
    (step(out, 6) / checkpoint.SUMS).unlink()
    state.write_text(json.dumps(json.loads(state.read_text()) | {"format": 1}))
    notes = Notes()
    result = train(with_(out, steps=7, resume=True), notes)
    assert result.steps_done == 7 and len(result.losses) == 1
    assert notes.texts[1] == f"{step(out, 6)} has no SHA256SUMS to check it by: it was written before there were any"


# -------------------------------------------------------------------------------------- killed and cut off

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
checkpoint.save(here / "first", 8, run.config, run.state)  # imports what it needs


def save():
    checkpoint.save(out, 8, run.config, run.state)


def killed(action, moment=0, byte=None):
    '''Fork, and have the child kill itself at the moment-th call that concerns files, or as a file gets to a size.'''
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
        (out / "checkpoints/step-00000006/rng.safetensors").write_bytes(b"")


def check(steps, damaged=False):
    '''What has a checkpoint's name is one, the newest of them is resumed from, and nothing else is left.'''
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


# ---------------------------------------------------------------------------------------------- power cuts


def save_a_checkpoint(folder: Path) -> None:
    run = build(with_(folder / "run"))
    run.step(0, run.next_tokens(0))
    checkpoint.save(folder / "run", 1, run.config, run.state)


def prepare_shards(folder: Path) -> None:
    prepare = pytest.importorskip("fastgpt2.prepare", reason="preparing data needs rich")
    (folder / "text.txt").write_text("Some words. " * 100)
    prepare.prepare(prepare.PrepareConfig(sources=(folder / "text.txt",), out=folder / "run", tokenizer="byte"))


@pytest.mark.parametrize(
    ("write", "names"),
    [
        (lambda folder: write_text(folder / "run" / "text", "text"), {"text"}),
        (lambda folder: JsonLines(folder / "run" / "metrics.jsonl").close(), {"metrics.jsonl"}),
        (save_a_checkpoint, {"step-00000001"}),
        (prepare_shards, {"meta.json", "train_000000.bin", "val_000000.bin"}),
    ],
    ids=["text", "records", "checkpoint", "shards"],
)
def test_a_file_is_on_the_disk_before_it_has_its_name(
    write: Callable[[Path], None], names: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And its name before the call returns. Contents and entries are told by their inodes."""
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
    """But for a folder on a file system that can't do it at all, which says EINVAL."""

    def fail(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode) == folder:
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    fine = folder and number == errno.EINVAL
    with contextlib.nullcontext() if fine else pytest.raises(OutputError, match=os.strerror(number)):
        write_text(tmp_path / "text", "text")


# ---------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond a size, as where a disk is full: the write that would fails (with EFBIG, not ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_without_room_is_one_line_and_leaves_everything_as_it_was(out: Path, tmp_path: Path) -> None:
    sizes = {name: (step(out, 6) / name).stat().st_size for name in (*checkpoint.FILES, checkpoint.SUMS)}
    run = build(with_(tmp_path / "other"))
    run.step(0, run.next_tokens(0))
    largest = max(sizes.values())
    for size in (0, 1, 100, largest // 2, *(size - 1 for size in sizes.values())):
        with room_for(size), pytest.raises(OutputError) as error:
            checkpoint.save(out, 7, run.config, run.state)
        assert str(error.value).startswith(f"can't save the checkpoint of step 7 in {out / 'checkpoints'}: ")
        assert "File too large" in str(error.value) and "\n" not in str(error.value)
        assert str(error.value).endswith(f"; the last good one is {step(out, 6)}")
        assert names(out) == ["step-00000004", "step-00000006"]
        assert checkpoint.to_resume(out) == (step(out, 6), [])
    with room_for(largest + 4096):
        checkpoint.save(out, 7, run.config, run.state)
    assert checkpoint.to_resume(out) == (step(out, 7), [])


def test_a_run_that_has_no_room_goes_on_and_says_what_is_missing(tmp_path: Path) -> None:
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); "
        "import fastgpt2.loop; fastgpt2.loop.LAST_TRIES_S = (); "
        "from fastgpt2.command import main; sys.exit(main())"
    )
    flags = ["--model", "tiny", "--steps", "5", "--save-every", "2", "--device", "cpu", "--out", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", program, *flags], capture_output=True, text=True)
    assert done.returncode == 1
    reason = "Error while serializing: I/O error: File too large (os error 27); none had been saved"
    for number, then in ((2, "going on, next try after step 4"), (4, "going on, next try after step 5"),
                         (5, "going on, next try at the end"), (5, "this was the last try")):  # fmt: skip
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


def test_records_that_a_disk_has_damaged_are_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"st\xe5p": 2}\n{"step": 3}\n{"step" 4}\n7\n{"step": 5}\n{"st')
    assert [record["step"] for record in read_json_lines(path)] == [1, 3, 5]
    JsonLines(path, keep_up_to_step=3).close()
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'
