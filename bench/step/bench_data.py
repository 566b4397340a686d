"""Benchmark of drawing a batch: the trainer's token sources beside nanoGPT's, on the host's clock.

On a GPU the batch is also pinned and its copy to the device started, as in the trainer. A step that trains on 600,000
tokens a second must draw as many, on the thread that launches its work. The shards are in the system's page cache, as
after the first epoch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.contest import CUDA, DEVICE, Candidate, Contest, Function
from bench.ops.op_contest import OpContest
from bench.roofline import Work
from bench.timing import REPLAY, Call
from fastgpt2.data import GPT2_VOCAB_SIZE, HEADER_BYTES, open_data, split, write_shard

NEEDED_TOKENS_PER_S = 600_000
TOKENS = 1 << 23
SIZES = [(32, 1024), (4, 1024), (8, 8192)] if CUDA else [(8, 256)]
"""(B, T)"""


def draw_from(data: str, B: int, T: int) -> Function:
    source = open_data(data, vocab_size=GPT2_VOCAB_SIZE, batch_size=B, block_size=T)

    def batch(step: int) -> tuple[Tensor, Tensor]:
        tokens = source.tokens(step)
        if CUDA:
            tokens = tokens.pin_memory().to(DEVICE, non_blocking=True)
        return split(tokens[0])

    return batch


def nanogpt(shard: Path, B: int, T: int) -> Function:
    """A new memory map for each batch, B random windows of it, inputs and targets apart."""

    def batch(step: int) -> tuple[Tensor, Tensor]:
        tokens = np.memmap(shard, dtype=np.uint16, mode="r", offset=HEADER_BYTES)
        starts = torch.randint(len(tokens) - T, (B,)).tolist()

        def windows(shift: int) -> Tensor:
            rows = [torch.from_numpy(tokens[i + shift : i + shift + T].astype(np.int64)) for i in starts]
            out = torch.stack(rows)
            return out.pin_memory().to(DEVICE, non_blocking=True) if CUDA else out

        return windows(0), windows(1)

    return batch


class DataContest(OpContest):
    op, dtype, clock = "data loading", "int64", torch.device("cpu")

    def __init__(self, B: int, T: int, folder: Path) -> None:
        self.B, self.T, self.folder = B, T, folder
        self.candidates = {
            "shards": Candidate("ours", lambda: draw_from(str(folder), B, T)),
            "dummy": Candidate("floor", lambda: draw_from("dummy", B, T)),
            "nanogpt-memmap": Candidate("peer", lambda: nanogpt(folder / SHARD, B, T)),
        }
        self.work = Work(B * T, 0.0, 10.0 * B * (T + 1), 0, "none", "uint16 read, int64 written")

    def shape(self) -> dict[str, Any]:
        return {"B": self.B, "T": self.T}

    def draw(self) -> Sequence[Any]:
        return []

    def prepare(self, name: str, function: Function, sets: Sequence[Any]) -> Call:
        return function

    def check(self, name: str, function: Function) -> None:
        """The shard counts upwards: a token's target is the next number. Dummy tokens are only in the vocabulary."""
        inputs, targets = (x.cpu() for x in function(0))
        assert inputs.shape == targets.shape == (self.B, self.T), f"not timed: the batch is {tuple(inputs.shape)}"
        right = targets < GPT2_VOCAB_SIZE if name == "dummy" else targets == (inputs + 1) % GPT2_VOCAB_SIZE
        assert right.all(), f"not timed: {(~right).sum()} of {right.numel()} targets are wrong"
        if name != "dummy":
            again, _ = (x.cpu() for x in function(1))
            assert not torch.equal(inputs, again), "not timed: the second batch is the first"


SHARD = "train_000000.bin"


def write_counting_shard(folder: Path) -> Path:
    """A shard, as fastgpt2.prepare writes them, of tokens that count upwards."""
    write_shard(folder / SHARD, np.arange(TOKENS) % GPT2_VOCAB_SIZE)
    return folder


@pytest.fixture(scope="module")
def shards() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        yield write_counting_shard(Path(folder))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", ["shards", "dummy", "nanogpt-memmap"])
@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"B{size[0]}-T{size[1]}")
def test_data(compete: Callable[[Contest, str], None], shards: Path, size: tuple[int, int], name: str) -> None:
    compete(DataContest(*size, shards), name)
