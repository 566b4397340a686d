"""The validation loss over several processes: the one process's bits on each, and nobody waits for ever."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.fsdp import fully_shard

from fastgpt2.config import ModelConfig
from fastgpt2.data import DataError, DummyTokens
from fastgpt2.evaluate import evaluate
from fastgpt2.model import GPT
from fastgpt2.parallel import Ranks, joined
from tests import ranks

SHAPE = ModelConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, vocab_size=97, dropout=0.5)
BATCHES = (1, 2, 3, 7)


def source() -> DummyTokens:
    return DummyTokens(97, 3, 8, sequences=21)


def model() -> GPT:
    torch.manual_seed(0)
    return GPT(SHAPE)


class Failing(DummyTokens):
    """Damaged data, seen by one rank."""

    def tokens(self, step: int) -> Tensor:
        raise DataError("cut short")

    def check(self) -> None:
        raise DataError("damaged")


def _evaluate(sharded: bool) -> dict[str, Any]:
    with joined("cpu", 60) as own:
        called, passes = model(), []
        if sharded:
            for block in called.h:
                fully_shard(block)
            fully_shard(called)
        called.register_forward_hook(lambda *_: passes.append(1))
        losses, counts = [], []
        for batches in BATCHES:
            passes.clear()
            losses.append(evaluate(called, source(), batches, "cpu", own, stop=lambda: False))
            counts.append(len(passes))
        return {"losses": losses, "passes": counts, **_failures(called, own)}


def _failures(called: GPT, own: Ranks) -> dict[str, Any]:
    """What becomes of each rank when one can't read, when one finds damage at the end, and when one is stopped."""
    found: dict[str, Any] = {}
    for name, method in (("read", "tokens"), ("verified", "check")):
        one_bad = source()
        if own.rank == 1:
            setattr(one_bad, method, getattr(Failing(97, 3, 8, sequences=21), method))
        with pytest.raises(DataError) as error:
            evaluate(called, one_bad, 7, "cpu", own)
        found[name] = str(error.value)
    asked: list[int] = []
    stops = own.rank == 1
    found["stopped"] = evaluate(called, source(), 7, "cpu", own, stop=lambda: bool(asked.append(1)) or stops)
    found["asked"] = len(asked)
    return found


@pytest.mark.parametrize(("world", "sharded"), [(2, True), (3, False)])
def test_every_rank_has_the_loss_of_one_process(world: int, sharded: bool) -> None:
    expected = [evaluate(model(), source(), batches, "cpu") for batches in BATCHES]
    assert len(set(expected)) == len(BATCHES)
    for found in ranks.call(world, "tests.trainer.test_evaluate:_evaluate", sharded):
        assert found["losses"] == expected
        assert found["passes"] == [math.ceil(batches / world) for batches in BATCHES]
        assert found["read"] == f"process 1 of {world}: cut short"
        assert found["verified"] == f"process 1 of {world}: damaged"
        assert math.isnan(found["stopped"]) and found["asked"] == 1
