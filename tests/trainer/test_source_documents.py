"""The documents in the files, and their split: validation is whole documents, and shares none with training."""

from __future__ import annotations

import errno
import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from fastgpt2.config import ConfigError
from fastgpt2.preparation import prepare
from fastgpt2.sources import assign
from fastgpt2.sources import texts as texts_of
from tests.trainer.preparing import MARK, config, documents_of, found_in, readable, run


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
