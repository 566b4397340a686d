"""prepare: the same files give the same shards, and a folder is never left half written; faults are one line."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastgpt2 import preparation
from fastgpt2.config import ConfigError
from fastgpt2.data import ShardTokens, open_shard, unigram_entropy
from fastgpt2.durable import locked
from fastgpt2.preparation import PrepareConfig, prepare
from fastgpt2.sources import ASIDE, assign
from fastgpt2.tokenizer import BPE_FILES, load_tokenizer
from tests.trainer.preparing import config, found_in, names, readable, run


def test_offline_without_files_says_what_to_do(texts, tmp_path, monkeypatch):
    def unreachable(*args):
        raise ConnectionError("a page of text")

    monkeypatch.setattr("tiktoken.load.read_file_cached", unreachable)
    with pytest.raises(ConfigError, match=r"neither in tiktoken's cache nor reachable: give --bpe .* --tokenizer byte"):
        prepare(config(texts, out=tmp_path / "out", tokenizer="gpt2"))
    assert not names(tmp_path / "out")


@pytest.mark.parametrize("output", ["full", "closed"])
def test_a_summary_that_cannot_be_printed(output, texts, tmp_path):
    """The shards are there all the same."""
    command = [sys.executable, "-m", "fastgpt2.prepare", texts, "--out", tmp_path / "out", "--tokenizer", "byte"]
    reading, writing = os.pipe() if output == "closed" else (None, os.open("/dev/full", os.O_WRONLY))
    if reading is not None:
        os.close(reading)
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, f"can't print the summary; {tmp_path / 'out'} is complete\n")
    assert readable(tmp_path / "out")


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x9bb", "a\u202eb", "it's\ta\\ b"])
def test_no_name_steers_the_terminal(name, tmp_path, monkeypatch, capsys):
    """Escaped where it is told, as a shell takes it in the command to go on with."""
    monkeypatch.chdir(tmp_path)
    for i in range(2):
        Path(name).with_suffix(f".{i}").write_text("text\n" * 100)
    sources_ = [str(Path(name).with_suffix(f".{i}")) for i in range(2)]
    command = [*sources_, "--out", name, "--tokenizer", "byte"]
    status, stdout, stderr = run(monkeypatch, capsys, *command)
    assert status == 0 and "warning: 1 copy of" in stderr
    refused, _, error = run(monkeypatch, capsys, *command)
    assert refused == 2 and "already holds" in error
    for text in (stdout, stderr, error):
        assert not set(text) & set("\x1b\x9b\u202e\t")
    assert (stdout.count("\n"), stderr.count("\n"), error.count("\n")) == (10, 1, 1)
    word = stdout.rstrip().partition(" --data ")[2]
    shell = subprocess.run(["bash", "-c", f"printf %s {word}"], capture_output=True, env={"LC_ALL": "C.UTF-8"})
    assert shell.stdout.decode() == name


def test_the_same_files_give_the_same_bytes(texts, tmp_path, bpe):
    for tokenizer, files in (("byte", None), ("gpt2", bpe)):
        a, b = tmp_path / f"{tokenizer}-a", tmp_path / f"{tokenizer}-b"
        prepare(config(texts, out=a, tokenizer=tokenizer, bpe=files))
        prepare(config(texts, out=b, tokenizer=tokenizer, bpe=files))
        assert names(a) == names(b)
        assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names(a))


def test_shards_are_cut_and_described(texts, tmp_path, monkeypatch):
    prepare(config(texts, out=tmp_path / "whole"))
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 1000)
    meta = prepare(config(texts, out=tmp_path / "cut"))
    assert meta == json.loads((tmp_path / "cut" / "meta.json").read_text())
    paths = sorted((tmp_path / "cut").glob("train_*.bin"))
    shards = [open_shard(path, 257) for path in paths]
    assert [p.name for p in paths] == [f"train_{i:06d}.bin" for i in range(len(paths))]
    assert {len(shard) for shard in shards[:-1]} == {1000}
    assert 0 < len(shards[-1]) <= 1000
    (whole,) = (tmp_path / "whole").glob("train_*.bin")
    assert np.array_equal(np.concatenate(shards), open_shard(whole, 257))
    assert sum(map(len, shards)) == meta["tokens"]["train"]
    for path, shard in zip(paths, shards, strict=True):
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        assert meta["shards"][path.name] == {"tokens": len(shard), "sha256": sha256}


def test_the_entropies_in_meta(texts, tmp_path):
    meta = prepare(config(texts, out=tmp_path / "out"))
    shards = (open_shard(tmp_path / "out" / f"{split}_000000.bin", 257) for split in ("train", "val"))
    train, val = (np.bincount(shard, minlength=257) for shard in shards)
    assert meta["unigram_nats_per_token"]["val"] == unigram_entropy(val)
    assert meta["unigram_nats_per_token"]["val_under_train"] == unigram_entropy(val, train)
    assert 2.0 < unigram_entropy(val) < unigram_entropy(val, train) < 4.0


def test_the_folder_is_self_contained(texts, tmp_path, bpe):
    meta = prepare(config(texts, out=tmp_path / "out", tokenizer="gpt2", bpe=bpe, val_fraction=0.1))
    source = ShardTokens(tmp_path / "out", "val", batch_size=1, block_size=8)
    assert source.vocab_size == meta["vocab_size"] == 50257
    assert meta["tokenizer"] == "gpt2"
    tokenizer = load_tokenizer(meta["tokenizer"], tmp_path / "out", sha256=meta["tokenizer_sha256"])
    shard = source.shards[0].tokens().tolist()
    assert shard.count(50256) == meta["documents"]["val"]
    assert sorted(tokenizer.decode(shard).decode().splitlines(True)) == sorted(
        document.path.read_text() for document in assign(found_in(texts), 0.1)["val"]
    )


def test_other_bpe_files_are_taken_with_a_warning(texts, tmp_path, bpe, capsys):
    shutil.copytree(bpe, tmp_path / "bpe")
    with (tmp_path / "bpe" / "encoder.json").open("a") as file:
        file.write("\n")
    prepare(config(texts, out=tmp_path / "out", tokenizer="gpt2", bpe=tmp_path / "bpe"))
    warnings = " ".join(capsys.readouterr().err.split())
    assert warnings.count("is not GPT-2's published one") == 1
    assert "encoder.json" in warnings


# Replacing


def test_shards_are_replaced_only_when_told(texts, tmp_path):
    out = tmp_path / "out"
    prepare(config(texts, out=out))
    (out / "fineweb_train_000001.bin").write_bytes(b"an older shard")
    (out / "notes.txt").write_text("the user's")
    before = (out / "meta.json").read_bytes()
    with pytest.raises(ConfigError, match=r"already holds meta\.json: give --overwrite"):
        prepare(config(texts, out=out, val_fraction=0.3))
    assert (out / "meta.json").read_bytes() == before
    prepare(config(texts, out=out, val_fraction=0.3, overwrite=True))
    assert names(out) == ["meta.json", "notes.txt", "train_000000.bin", "val_000000.bin"]
    assert (out / "meta.json").read_bytes() != before


def test_a_failure_leaves_the_old_shards(texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(config(texts, out=out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def disk_full(path, tokens):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(preparation, "write_shard", disk_full)
    with pytest.raises(ConfigError, match=r"can't write .*train_000000\.bin: No space left on device"):
        prepare(config(texts, out=out, overwrite=True))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


class PowerCuts:
    """Plays a disk on which what was done to a folder since it was synced may be lost, in any combination.

    Attributes:
        states: every content (bytes by name) that the folder can have after a power cut at any time.
    """

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.done = out, []
        self.on_disk = self.now()
        self.states = [self.on_disk]
        replace, unlink, sync = os.replace, Path.unlink, preparation.sync

        def played_sync(path: Path) -> None:
            sync(path)
            if path == out:
                self.on_disk, self.done = self.now(), []

        monkeypatch.setattr(preparation, "sync", played_sync)
        monkeypatch.setattr(preparation.os, "replace", lambda old, new: self.do(new, lambda: replace(old, new)))
        monkeypatch.setattr(Path, "unlink", lambda path, **_: self.do(path, lambda: unlink(path)))

    def now(self) -> dict[str, bytes]:
        return {name: (self.out / name).read_bytes() for name in names(self.out) if name != ASIDE}

    def do(self, path: Path, change: Callable[[], None]) -> None:
        change()
        if path.parent != self.out:
            return
        self.done.append((path.name, self.now().get(path.name)))
        for kept in itertools.product((True, False), repeat=len(self.done)):
            state = self.on_disk | dict(itertools.compress(self.done, kept))
            state = {name: contents for name, contents in state.items() if contents is not None}
            if state not in self.states:
                self.states.append(state)


@pytest.mark.parametrize("replaced", [None, "byte", "gpt2"])
def test_a_power_cut_leaves_the_old_shards_the_new_ones_or_none_that_train(
    replaced, texts, tmp_path, monkeypatch, request
):
    """Half of the old files have names of the new ones; vocabularies and merges differ."""
    out = tmp_path / "out"
    out.mkdir()
    if replaced:
        files = request.getfixturevalue("bpe") if replaced == "gpt2" else None
        prepare(config(texts / "part0", out=out, tokenizer=replaced, bpe=files))
        shutil.copy(out / "train_000000.bin", out / "older_train_000001.bin")
    monkeypatch.setattr(preparation, "SHARD_TOKENS", 3000)
    with monkeypatch.context() as patch:
        cuts = PowerCuts(out, patch)
        prepare(config(texts, out=out, overwrite=True))
    old, new = cuts.states[0], cuts.now()
    assert new in cuts.states and len(cuts.states) > 20
    assert readable(out)
    for number, state in enumerate(cuts.states):
        folder = tmp_path / str(number)
        folder.mkdir()
        for name, contents in state.items():
            (folder / name).write_bytes(contents)
        merges = {name: state[name] for name in BPE_FILES if name in state}
        assert not readable(folder) or state == old or state == new | merges


def test_a_prepare_that_was_cut_while_publishing_is_done_again(texts, tmp_path, monkeypatch):
    """By the same command, without --overwrite."""
    out, replace = tmp_path / "out", os.replace
    moved = []

    def killed(source, target):
        if target.parent != out:  # a shard that is finished aside
            return replace(source, target)
        if moved:
            raise KeyboardInterrupt
        moved.append(shutil.move(source, target))
        return None

    with monkeypatch.context() as patch:
        patch.setattr(preparation.os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(texts, out=out))
    assert names(out) == ["meta.json"]
    with pytest.raises(ConfigError, match=r"lacks train_unfinished\.bin"):
        ShardTokens(out, "train", 1, 8)
    prepare(config(texts, out=out))
    assert readable(out)


def test_a_folder_made_anew_is_on_the_disk(texts, tmp_path, monkeypatch):
    synced = set()
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: (fsync(file), synced.add(os.fstat(file).st_ino)))
    prepare(config(texts, out=tmp_path / "a" / "b" / "out"))
    folders = (tmp_path, tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "out")
    assert {folder.stat().st_ino for folder in folders} <= synced


def test_files_have_the_modes_of_the_umask(texts, tmp_path, bpe):
    before = os.umask(0o027)
    try:
        prepare(config(texts, out=tmp_path / "a" / "out", tokenizer="gpt2", bpe=bpe))
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a" / "out").iterdir()} == {0o640}
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "a", tmp_path / "a" / "out")} == {0o750}


# Two at once, signals, full disks


def test_a_second_prepare_into_the_same_folder_is_one_line(texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    with locked(out):
        status, stdout, stderr = run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte")
    assert (status, stdout) == (2, "")
    assert stderr == f"error: --out {out} is in use by another process: wait for it or give another\n"
    assert names(out) == []
    assert run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte")[0] == 0


def test_a_killed_prepare_leaves_nothing_that_stops_the_next(texts, tmp_path):
    out = tmp_path / "out"
    program = (
        "import os, signal, sys; from fastgpt2 import preparation, prepare; "
        "kill = lambda path, tokens: (path.write_bytes(b'half'), os.kill(os.getpid(), signal.SIGKILL)); "
        "preparation.write_shard = kill; prepare.main()"
    )
    arguments = [str(texts), "--out", str(out), "--tokenizer", "byte"]
    assert subprocess.run([sys.executable, "-c", program, *arguments]).returncode == -signal.SIGKILL
    assert names(out) == [ASIDE]
    prepare(config(texts, out=out))
    assert readable(out) and ASIDE not in names(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("function", ["write_shard", "_describe"], ids=["in a shard", "before publishing"])
def test_a_signal_ends_it_in_one_line(number, function, texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    monkeypatch.setattr(preparation, function, lambda *_: signal.raise_signal(number))
    before = signal.getsignal(number)
    status, stdout, stderr = run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte")
    assert (status, stdout) == (128 + number, "")
    assert stderr == f"stopped by {number.name}: nothing is half written, start again\n"
    assert names(out) == []
    assert signal.getsignal(number) == before


def test_a_signal_while_publishing_waits_for_its_end(texts, tmp_path, monkeypatch, capsys):
    out, replace = tmp_path / "out", os.replace

    def signalled(old, new):
        if new.parent == out:
            signal.raise_signal(signal.SIGTERM)
        replace(old, new)

    monkeypatch.setattr(os, "replace", signalled)
    assert run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte")[0] == 128 + signal.SIGTERM
    assert readable(out)


def test_what_nohup_ignores_stays_ignored(texts, tmp_path, monkeypatch, capsys):
    describe = preparation._describe
    monkeypatch.setattr(preparation, "_describe", lambda *a: (signal.raise_signal(signal.SIGHUP), describe(*a))[1])
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run(monkeypatch, capsys, texts, "--out", tmp_path / "out", "--tokenizer", "byte")[0] == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_disk_without_room_is_one_line_and_leaves_the_old_shards(texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    prepare(config(texts / "part0", out=out))
    before = {name: (out / name).read_bytes() for name in names(out)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, limits[1]))
    try:
        status, _, stderr = run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte", "--overwrite")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (status, stderr) == (2, f"error: can't write {out}: File too large\n")
    assert {name: (out / name).read_bytes() for name in names(out)} == before


# Faults


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "give at least one text file or folder"),
        ({"sources": (Path("/nowhere/at/all"),)}, "no such file or folder: /nowhere/at/all"),
        ({"val_fraction": 0.0}, "--val-fraction must be over 0 and at most 0.5, got 0.0"),
        ({"val_fraction": float("nan")}, "--val-fraction must be over 0"),
        ({"bpe": Path("x")}, "no use with --tokenizer byte"),
        ({"ext": ("",)}, "--ext takes endings such as .txt, got ''"),
        ({"ext": ("*.py",)}, r"--ext takes endings such as \.txt, got '\*\.py'"),
        ({"document_separator": ""}, "--document-separator is empty"),
        ({"document_separator": "\udcff"}, r"--document-separator must be UTF-8, got '\\udcff'"),
        ({"sources": (Path("x" * 300),)}, "can't read x*: File name too long"),
        ({"sources": (Path("a\0b"),)}, "can't read .*null byte"),
        ({"sources": (Path("~no such user/x"),)}, "no such file or folder: ~no such user/x"),
        ({"out": Path("x" * 300)}, "can't write --out x*: File name too long"),
        ({"out": Path("/dev/null/out")}, "can't write --out /dev/null/out: Not a directory"),
        ({"out": Path("/proc/out")}, "can't write --out /proc/out: No such file or directory"),
        ({"ext": (".rs",)}, r"nothing to read in .*texts with --ext \.rs: .* 104 with another ending"),
    ],
)
def test_bad_requests(texts, tmp_path, changes, message):
    arguments = {"sources": (texts,), "out": tmp_path / "out", "tokenizer": "byte", **changes}
    with pytest.raises(ConfigError, match=message) as error:
        prepare(PrepareConfig(**arguments))
    assert "\n" not in str(error.value)


def test_an_out_that_is_a_file_or_under_one(texts, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"^--out .*file is a file: give a folder"):
        prepare(config(texts, out=tmp_path / "file"))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"^--out .*link is a link to nothing: give a folder"):
        prepare(config(texts, out=tmp_path / "link"))
    with pytest.raises(ConfigError, match=r"can't write --out .*: Not a directory"):
        prepare(config(texts, out=tmp_path / "file" / "out"))


@pytest.mark.parametrize("arguments", [["--out", ""], ["--out="], ["--out", "out", "--ext", ""], ["", "--out", "x"]])
def test_empty_arguments(arguments, texts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, stdout, stderr = run(monkeypatch, capsys, texts, *arguments)
    assert (status, stdout) == (2, "")
    assert stderr.endswith(" must be a string that is not empty, got ''\n") and stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [texts]


def test_a_home_that_the_shell_did_not_write_out(texts, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    prepare(config(Path("~/texts"), out=Path("~/out")))
    assert readable(tmp_path / "out")


def test_a_folder_in_the_place_of_a_shard(texts, tmp_path):
    out = tmp_path / "out"
    prepare(config(texts, out=out))
    before = {name: (out / name).read_bytes() for name in names(out)}
    (out / "val_000001.bin").mkdir()
    prepare(config(texts, out=out, overwrite=True))
    (out / "val_000001.bin").rmdir()
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    (out / "val_000000.bin").unlink()
    (out / "val_000000.bin").mkdir()
    with pytest.raises(ConfigError, match=r"has a folder val_000000\.bin, where a file is to be"):
        prepare(config(texts, out=out, overwrite=True))
    assert (out / "meta.json").read_bytes() == before["meta.json"]


def test_other_merges_in_out_are_not_replaced_unasked(texts, tmp_path, bpe):
    out = tmp_path / "out"
    out.mkdir()
    (out / "vocab.bpe").write_text("the user's")
    with pytest.raises(ConfigError, match=r"already holds another vocab\.bpe: give --overwrite"):
        prepare(config(texts, out=out, tokenizer="gpt2", bpe=bpe))
    assert (out / "vocab.bpe").read_text() == "the user's"
    prepare(config(texts, out=out, tokenizer="gpt2", bpe=bpe, overwrite=True))
    assert readable(out)


def test_the_command(texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    status, stdout, stderr = run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte", "--ext", ".txt")
    assert (status, stderr) == (0, "")
    assert (
        "skipped: 1 empty, 2 folders of packages and caches, 3 hidden, 1 not UTF-8, 2 with another ending\n" in stdout
    )
    assert stdout.endswith(f"wrote {out}; train on it: python -m fastgpt2.train --data {out}\n")
    meta = json.loads((out / "meta.json").read_text())
    rows = {line.split("  ")[0]: line.split()[-2:] for line in stdout.splitlines()}
    assert rows["documents"] == [str(meta["documents"][split]) for split in ("train", "val")]
    assert rows["tokens"] == [f"{meta['tokens'][split]:,}" for split in ("train", "val")]
    assert rows["vocabulary"] == ["byte", "257"]
    assert rows["unigram nats/token, val's own"][1] == f"{meta['unigram_nats_per_token']['val']:.4f}"
