"""Which files prepare reads: nothing is left out without a word, and a format it does not read is refused by name."""

from __future__ import annotations

import bz2
import errno
import gzip
import inspect
import lzma
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt2 import preparation, sources
from fastgpt2.config import ConfigError
from fastgpt2.preparation import prepare
from fastgpt2.sources import NOT_TEXT, assign
from fastgpt2.tokenizer import BPE_FILES
from tests.trainer.preparing import RECORDS, ROOT, config, documents_of, found_in, names, readable, run


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
    with pytest.raises(
        ConfigError,
        match=r"take .*x\.json as text: .*; extract the texts .* \(python -m fastgpt2\.prepare --ext \.json takes",
    ):
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

    monkeypatch.setattr(preparation, "assign", assign_and_change)
    with pytest.raises(ConfigError, match=r"000\.txt changed while it was read"):
        prepare(config(texts, out=tmp_path / "out"))
    assert names(tmp_path / "out") == []


def test_nothing_but_binaries(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.x").write_bytes(b"\0\1")
    (tmp_path / "in" / "b.txt").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"nothing to read in .*: 1 binary, 1 not UTF-8"):
        prepare(config(tmp_path / "in", out=tmp_path / "out"))


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
