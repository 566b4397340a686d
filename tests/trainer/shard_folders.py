"""Folders of shards for the tests of what reads them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from fastgpt2.data import ShardTokens
from fastgpt2.shards import write_shard


def make_folder(folder: Path, train=(1000,), val=(200,), vocab_size=50257, sums=False) -> Path:
    """Shards that count upwards over a split, so that a token is its own position."""
    folder.mkdir(exist_ok=True)
    for name, sizes in (("train", train), ("val", val)):
        begin = 0
        for index, size in enumerate(sizes):
            write_shard(folder / f"some_{name}_{index:06d}.bin", np.arange(begin, begin + size))
            begin += size
    listed = {
        path.name: {
            "tokens": (path.stat().st_size - 1024) // 2,
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        }
        for path in folder.glob("*.bin")
    }
    (folder / "meta.json").write_text(json.dumps({"vocab_size": vocab_size} | ({"shards": listed} if sums else {})))
    return folder


def source_of(folder: Path, split="train") -> ShardTokens:
    return ShardTokens(folder, split, 2, 8)


def flip(path: Path, byte: int, bit: int = 0) -> None:
    """Another value of one bit, as a bad disk or a bad copy gives it: in the file, not in a copy of it."""
    with path.open("r+b") as file:
        file.seek(byte)
        value = file.read(1)[0] ^ 1 << bit
        file.seek(byte)
        file.write(bytes([value]))
