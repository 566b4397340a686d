"""What the tests of prepare share: calls, and what a folder of shards holds."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from fastgpt2 import prepare as prepare_module
from fastgpt2.config import ConfigError
from fastgpt2.console import run_command
from fastgpt2.data import ShardTokens, open_shard
from fastgpt2.preparation import PrepareConfig
from fastgpt2.sources import Found, find

ROOT = Path(__file__).resolve().parents[2]


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


RECORDS = '{"text": "a document"}\n' * 20


MARK = "<|endoftext|>"


def readable(out: Path) -> bool:
    """Whether a folder can be trained on."""
    try:
        for split in ("train", "val"):
            ShardTokens(out, split, batch_size=1, block_size=8)
    except ConfigError:
        return False
    return True


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Status, stdout and stderr of the command, run in this process: importing torch anew takes seconds."""
    monkeypatch.setattr(sys, "argv", ["prepare", *map(str, arguments)])
    with pytest.raises(SystemExit) as exit_:
        run_command(prepare_module.main)
    return exit_.value.code, *capsys.readouterr()
