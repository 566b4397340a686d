"""Shards and their meta.json: the format, what is read as which split, and what is wrong in one line, never a crash."""

from __future__ import annotations

import json
import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from fastgpt2 import shards
from fastgpt2.config import ConfigError
from fastgpt2.data import ShardTokens, data_vocab_size
from fastgpt2.shards import open_shard, read_meta, split_of, write_shard, write_shards
from tests.trainer.shard_folders import make_folder, source_of


def test_shard_bytes_are_llm_c_s(tmp_path):
    write_shard(tmp_path / "a_train.bin", np.array([1, 258, 50256]))
    raw = (tmp_path / "a_train.bin").read_bytes()
    assert len(raw) == 1024 + 6
    assert raw[:12] == (20240520).to_bytes(4, "little") + (1).to_bytes(4, "little") + (3).to_bytes(4, "little")
    assert raw[12:1024] == bytes(1012)
    assert raw[1024:] == b"\x01\x00\x02\x01\x50\xc4"
    assert open_shard(tmp_path / "a_train.bin", 50257).tolist() == [1, 258, 50256]


def broken(folder: Path, contents: bytes) -> Path:
    make_folder(folder)
    (folder / "some_train_000000.bin").write_bytes(contents)
    return folder


def header(magic=20240520, version=1, count=0) -> bytes:
    return np.array([magic, version, count] + [0] * 253, dtype="<i4").tobytes()


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", r"some_train_000000\.bin is empty"),
        (b"\x28", r"some_train_000000\.bin is truncated: 1 bytes, the header alone has 1024"),
        (header(count=9)[:500], r"some_train_000000\.bin is truncated: 500 bytes, the header alone has 1024"),
        (header(count=9) + bytes(17), r"truncated: its header's 9 tokens need 1042 bytes, the file has 1041"),
        (header(count=9) + bytes(20), r"too long: its header's 9 tokens need 1042 bytes, the file has 1044"),
        (header(count=-1) + bytes(20), r"holds no tokens: its header says -1"),
        (header(count=0), r"some_train_000000\.bin holds no tokens"),
        (
            header(magic=20240801, count=9) + bytes(18),
            r"no token shard: it is llm\.c's shard for Llama 3, of uint32 tokens; the magic 20240520",
        ),
        (header(count=2**31 - 1) + bytes(20), r"truncated: its header's 2147483647 tokens need 4294968318 bytes"),
        (b"once upon a time" * 100, r"some_train_000000\.bin is no token shard: it begins with 1701015151, not"),
        (header(version=7, count=9) + bytes(18), r"some_train_000000\.bin is a shard of version 7: only version 1"),
    ],
)
def test_a_shard_that_is_none(tmp_path, contents, message):
    with pytest.raises(ConfigError, match=message) as error:
        ShardTokens(broken(tmp_path / "d", contents), "train", 2, 8)
    assert "\n" not in str(error.value)


def test_a_token_outside_the_vocabulary(tmp_path, monkeypatch):
    folder = make_folder(tmp_path / "d", vocab_size=257)
    tokens = np.zeros(1000, dtype=np.int64)
    tokens[[777, 900]] = 257, 60000
    write_shard(folder / "some_train_000000.bin", tokens)
    for chunk in (1 << 24, 100):
        monkeypatch.setattr(shards, "SCAN_TOKENS", chunk)
        with pytest.raises(ConfigError, match=r"some_train_000000\.bin: token 777 has id 257, .* vocabulary of 257"):
            ShardTokens(folder, "train", 2, 8)
    (folder / "meta.json").write_text('{"vocab_size": 65536}')
    assert ShardTokens(folder, "train", 2, 8).vocab_size == 65536


def test_without_meta_the_vocabulary_is_gpt_2s(tmp_path):
    write_shard(tmp_path / "train.bin", [50256] * 20)
    assert source_of(tmp_path).vocab_size == 50257
    write_shard(tmp_path / "train.bin", [*[50256] * 20, 50257])
    with pytest.raises(
        ConfigError, match=r'train\.bin: token 20 has id 50257, .* give their "vocab_size" in meta\.json'
    ):
        source_of(tmp_path)


def test_every_shard_is_checked_not_the_first_alone(tmp_path):
    folder = make_folder(tmp_path / "d", train=(100, 100))
    path = folder / "some_train_000001.bin"
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(ConfigError, match=r"some_train_000001\.bin is truncated"):
        ShardTokens(folder, "train", 2, 8)


def test_no_shard_in_the_folder(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no train shard in .*: no \.bin file has the word train .*; python -m fastgpt2\.prepare"
    ):
        ShardTokens(tmp_path, "train", 2, 8)
    with pytest.raises(ConfigError, match=r"no val shard .* \(it has some_train_000000\.bin\)"):
        ShardTokens(make_folder(tmp_path / "d", val=()), "val", 2, 8)


def test_a_listed_shard_that_is_missing(tmp_path):
    folder = make_folder(tmp_path / "d")
    shards = {"some_train_000000.bin": {}, "some_train_000001.bin": {}, "some_val_000000.bin": {}}
    (folder / "meta.json").write_text(json.dumps({"vocab_size": 50257, "shards": shards}))
    with pytest.raises(ConfigError, match=r"lacks some_train_000001\.bin, which its meta\.json lists"):
        ShardTokens(folder, "train", 2, 8)
    assert ShardTokens(folder, "val", 2, 8).token_count == 200


@pytest.mark.parametrize("split", ["train", "val"])
def test_what_is_no_file(tmp_path, split):
    """A pipe would wait for a writer; none is passed over, or part of the data is missing without a word."""
    folder = make_folder(tmp_path / "d")
    path = folder / f"more_{split}.bin"
    for make, reason in (
        (os.mkfifo, "Not a regular file"),
        (Path.mkdir, "Not a regular file"),
        (lambda path: path.symlink_to(path), "Too many levels of symbolic links"),
        (lambda path: path.symlink_to("nowhere"), "No such file or directory"),
        (lambda path: path.symlink_to("/dev/zero"), "Not a regular file"),
    ):
        make(path)
        with pytest.raises(ConfigError, match=rf"can't read .*more_{split}\.bin: {reason}"):
            source_of(folder, split)
        path.rmdir() if path.is_dir() else path.unlink()
    assert len(source_of(folder, split).shards) == 1


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.bin", "train"),
        ("val.bin", "val"),
        ("fineweb_train_000001.bin", "train"),
        ("fineweb_val_000000.bin", "val"),
        ("tiny_shakespeare_val.bin", "val"),
        ("train0.bin", "train"),
        ("my-validation-0.bin", "val"),
        ("valid.0001.bin", "val"),
        ("TRAIN_1.bin", "train"),
        ("medieval_train_0.bin", "train"),
        ("train_of_thought_val.bin", "val"),
        ("val_2_train.bin", "train"),
        ("médiéval_train.bin", "train"),
        ("me\u0301die\u0301val.bin", None),  # as macOS writes it
        ("strain.bin", None),
        ("retrieval.bin", None),
        ("trainval.bin", None),
        ("0001.bin", None),
    ],
)
def test_a_split_is_a_word_of_the_name(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize("stem", ["x", "medieval", "strain", "retrieval"])
def test_a_split_is_read_without_the_other(tmp_path, stem):
    for split, token in (("train", 1), ("val", 2)):
        write_shard(tmp_path / f"{stem}_{split}_0.bin", np.full(100, token))
    assert source_of(tmp_path).tokens(0).unique().tolist() == [1]
    assert source_of(tmp_path, "val").tokens(0).unique().tolist() == [2]


def test_files_of_neither_split_are_said(tmp_path):
    folder = make_folder(tmp_path / "d")
    for name in ("retrieval_1.bin", "retrieval_2.bin", "._some_train_0.bin"):
        (folder / name).write_bytes(b"")
    source = source_of(folder)
    assert source.notes == [
        f"not read, with neither train nor val as a word of its name: retrieval_1.bin and 1 more in {folder}",
        f"read but not verified, since no meta.json has sums: the shards in {folder}",
    ]
    assert source.token_count == 1000
    assert source_of(folder, "val").notes == []


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("[]", "expected a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"vocab_size": ' + "9" * 5000 + "}", "a number is too long"),
        (b'{"vocab_size": "\xff"}', "utf-8"),
        (" " * (shards.read_json.__globals__["JSON_BYTES"] + 1), "bytes"),
        ("{}", 'needs a "vocab_size" from 1 to 65536, got None'),
        ('{"vocab_size": "many"}', "'many'"),
        ('{"vocab_size": 65537}', "65537"),
        ('{"vocab_size": 0}', "got 0"),
        ('{"vocab_size": true}', "got True"),
        ('{"vocab_size": 257.0}', "257.0"),
        ('{"vocab_size": NaN}', "nan"),
        ('{"vocab_size": 257, "end_of_text": 257}', 'meta.json: "end_of_text" must be a token from 0 to 256, got 257'),
        ('{"vocab_size": 257, "end_of_text": -1}', "got -1"),
        ('{"vocab_size": 257, "end_of_text": "end"}', "got 'end'"),
        ('{"vocab_size": 257, "tokenizer": ["byte"]}', '"tokenizer" must be a name'),
        ('{"vocab_size": 257, "shards": ["a"]}', '"shards" must be an object'),
        ('{"vocab_size": 257, "shards": null}', '"shards" must be an object'),
        ('{"vocab_size": 257, "shards": {"a_train.bin": 7}}', "'a_train.bin' with 7 where an object is due"),
        ('{"vocab_size": 257, "shards": {"../a_train.bin": {}}}', "not the name of a file"),
        ('{"vocab_size": 257, "shards": {"a_train\\n.bin": {}}}', "not the name of a file"),
        ('{"vocab_size": 257, "shards": {"a_train.bin": {"tokens": -1}}}', 'with -1 for its "tokens"'),
        ('{"vocab_size": 257, "shards": {"a_train.bin": {"tokens": 1e400}}}', 'with inf for its "tokens"'),
        ('{"vocab_size": 257, "shards": {"a_train.bin": {"sha256": "00"}}}', "64 hexadecimal digits"),
        ('{"vocab_size": 257, "shards": {"a_train.bin": {"sha256": null}}}', "64 hexadecimal digits"),
    ],
    ids=range(28),
)
def test_a_meta_that_is_none(tmp_path, meta, message):
    folder = make_folder(tmp_path / "d")
    (folder / "meta.json").write_bytes(meta if isinstance(meta, bytes) else meta.encode())
    with pytest.raises(ConfigError, match=r"meta\.json") as error:
        data_vocab_size(str(folder))
    assert message in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_meta_that_is_no_file(tmp_path):
    path = tmp_path / "meta.json"
    for make in (os.mkfifo, Path.mkdir, lambda path: path.symlink_to(path), lambda path: path.symlink_to("nowhere")):
        make(path)
        with pytest.raises(ConfigError, match=r"can't read .*meta\.json: "):
            read_meta(tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    assert read_meta(tmp_path) == {"vocab_size": 50257, "end_of_text": 50256}


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([0, 65536], "a token is from 0 to 65535, got 65536"),
        ([-1, 70000], "got -1"),
        (np.array([2**63], dtype=np.uint64), "got 9223372036854775808"),
        ([1.0, 2.0], "tokens are integers, got float64"),
        ([True], "tokens are integers, got bool"),
        (["a"], "tokens are integers, got <U1"),
        ([], r"from 1 to 2\*\*31 - 1 tokens, got shape \(0,\)"),
        ([[1, 2]], r"got shape \(1, 2\)"),
        (7, r"got shape \(\)"),
        (np.broadcast_to(np.uint16(1), 1 << 31), r"got shape \(2147483648,\)"),
    ],
    ids=str,
)
def test_what_no_shard_can_hold_is_not_written(tmp_path, tokens, message):
    path = tmp_path / "train.bin"
    write_shard(path, [7])
    with pytest.raises(ConfigError, match=rf"can't write .*train\.bin: .*{message}"):
        write_shard(path, tokens)
    assert open_shard(path, 8).tolist() == [7]


@pytest.mark.parametrize("tokens", [[0, 65535], torch.tensor([0, 65535]), np.array([0, 65535], dtype=">i8")], ids=repr)
def test_what_a_shard_can_hold_is_written(tmp_path, tokens):
    write_shard(str(tmp_path / "train.bin"), tokens)
    assert open_shard(tmp_path / "train.bin", 65536).tolist() == [0, 65535]


def test_a_writer_that_is_killed_leaves_the_old_shard(tmp_path, monkeypatch):
    path = tmp_path / "train.bin"
    write_shard(path, [7])
    child = os.fork()
    if child == 0:
        shards.sync = lambda path: os.kill(os.getpid(), signal.SIGKILL)
        write_shard(path, np.arange(1000))
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert open_shard(path, 8).tolist() == [7]
    assert [p.name for p in tmp_path.glob("*.bin")] == ["train.bin"]

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shards, "sync", full)
    with pytest.raises(OSError, match="No space"):
        write_shard(path, np.arange(1000))
    assert open_shard(path, 8).tolist() == [7]
    assert list(tmp_path.glob(".*.writing")) == []


@pytest.mark.parametrize("inside", [False, True])
def test_raw_tokens_become_shards_by_the_line_that_is_said(tmp_path, monkeypatch, inside):
    """nanoGPT's train.bin has no header."""
    folder = tmp_path / "it's raw"
    folder.mkdir()
    monkeypatch.chdir(folder if inside else tmp_path)
    folder = Path() if inside else folder
    for name, tokens in (("train.bin", np.arange(3000)), ("val.bin", np.arange(100))):
        tokens.astype(np.uint16).tofile(folder / name)
    for split in ("train", "val"):
        with pytest.raises(ConfigError, match=r"is no token shard: .* as nanoGPT writes them, .* by: ") as error:
            source_of(folder, split)
        program, option, code = shlex.split(str(error.value).split(" by: ")[1])
        assert (program, option) == ("python", "-c")
        exec(code, {})
        (shard,) = source_of(tmp_path / "it's raw-shards", split).shards
        assert np.array_equal(shard.tokens(), np.fromfile(folder / f"{split}.bin", np.uint16))


def test_many_tokens_become_several_shards(tmp_path):
    write_shards(tmp_path / "new", "val", np.arange(25), shard_tokens=10)
    parts = [open_shard(path, 25).tolist() for path in sorted((tmp_path / "new").iterdir())]
    assert parts == [list(range(10)), list(range(10, 20)), list(range(20, 25))]
