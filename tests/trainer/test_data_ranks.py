"""The data of a run in several processes: one global batch, one validation loss, and a failure that only one sees."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastgpt2 import train
from fastgpt2.config import TrainConfig
from fastgpt2.data import DataError, ShardTokens
from fastgpt2.parallel import current, joined
from tests import ranks
from tests.trainer.runs import Watch
from tests.trainer.shard_folders import make_folder

CONFIG = TrainConfig(
    n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=256, steps=6, device="cpu", dtype="float32", lr=1e-2,
    eval_every=2, eval_sequences=9, log_every=1, global_batch=12,
)  # fmt: skip


def run(data: str, changes: dict[str, Any]) -> dict[str, Any]:
    """Train, and return what each step took and what it made of it."""
    taken: list[Tensor] = []
    tokens = ShardTokens.tokens

    def watched(source: ShardTokens, step: int) -> Tensor:
        batch = tokens(source, step)
        if not source.batches:
            taken.append(batch)
        return batch

    watch = Watch()
    with mock.patch.object(ShardTokens, "tokens", watched), joined("cpu", 60):
        result = train(TrainConfig(**vars(CONFIG) | changes | {"data": data}), reporters=[watch])
    return {
        "taken": taken,
        "losses": result.losses,
        "val_losses": result.val_losses,
        "batch": (result.config.batch_size, result.config.grad_accum, result.config.global_batch),
        "notes": [text for text in watch.notes if "changed since" in text],
    }


def rows_of(found: list[dict[str, Any]]) -> list[list[int]]:
    """The rows of each step, in their order: micro-step, process, place in the batch."""
    return [torch.stack(parts, dim=1).flatten().tolist() for parts in zip(*[f["taken"] for f in found], strict=True)]


def test_a_run_goes_on_with_its_global_batch_on_other_processes(tmp_path: Path) -> None:
    """2 -> 1 -> 3 processes: the rows of one process that was never cut, and its losses."""
    data = str(make_folder(tmp_path / "data", train=(8 * 31,), val=(100,), vocab_size=256))
    whole = run(data, {})
    assert whole["batch"] == (6, 2, 12)
    out = {"out": tmp_path / "run", "global_batch": None}
    first = ranks.call(2, "tests.trainer.test_data_ranks:run", data, out | {"steps": 2, "global_batch": 12})
    second = [run(data, out | {"steps": 4, "resume": True})]
    third = ranks.call(3, "tests.trainer.test_data_ranks:run", data, out | {"resume": True})
    assert [found[0]["batch"] for found in (first, second, third)] == [(6, 1, 12), (6, 2, 12), (4, 1, 12)]
    assert rows_of(first) + rows_of(second) + rows_of(third) == rows_of([whole])
    parts = [found[0] for found in (first, second, third)]
    assert [loss for part in parts for loss in part["losses"]] == pytest.approx(whole["losses"], rel=1e-6)
    val_losses = [loss for part in parts for _, loss in part["val_losses"]]
    assert val_losses == pytest.approx([loss for _, loss in whole["val_losses"]], rel=1e-6)
    assert all("batch" not in note for part in parts for note in part["notes"])


def _fails_on_1(data: str, out: Path) -> tuple[str, float]:
    """Train; the data of process 1 fails at its sixth read. Returns what the process ends with, and when."""
    tokens = ShardTokens.tokens

    def failing(source: ShardTokens, step: int) -> Tensor:
        if step == 5 and not source.batches and current().rank == 1:
            raise DataError("can't read it")
        return tokens(source, step)

    began = time.monotonic()
    try:
        with mock.patch.object(ShardTokens, "tokens", failing), joined("cpu", 60):
            train(TrainConfig(**vars(CONFIG) | {"data": data, "out": out, "save_every": 2, "steps": 50}))
    except Exception as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "no error", 0.0


def test_data_that_fails_in_one_process_ends_the_run(tmp_path: Path) -> None:
    """That process can't save with the others, which are in the middle of a step. They don't wait for the timeout."""
    data = str(make_folder(tmp_path / "data", train=(8 * 31,), val=(100,), vocab_size=256))
    (other, seconds), (failed, _) = ranks.call(2, "tests.trainer.test_data_ranks:_fails_on_1", data, tmp_path / "run")
    assert failed.startswith("DataError: can't read it; then continue after step-00000004 with --resume")
    assert "no error" not in other and seconds < 50
    assert sorted(os.listdir(tmp_path / "run/checkpoints")) == ["step-00000002", "step-00000004"]
