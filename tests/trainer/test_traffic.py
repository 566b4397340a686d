"""The bytes that a step moves between processes, by PyTorch's flight recorder, are those of the closed forms."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch

from fastgpt2.model import GPT
from fastgpt2.parallel import joined
from fastgpt2.run import build
from tests import ranks
from tests.trainer.runs import tiny

BYTES = {"Float": 4, "BFloat16": 2}


def counted(changes: dict[str, Any]) -> dict[str, int]:
    """Bytes of one step by collective operation: those of the gathered tensor, and of the one that is reduced."""
    with joined("cpu", 60):
        run = build(tiny(**changes))
        for step in range(2):  # DistributedDataParallel forms its buckets anew after the first
            run.step(step, run.next_tokens(step))
        before = len(_recorded())
        run.step(2, run.next_tokens(2))
        found: Counter[str] = Counter()
        for entry in _recorded()[before:]:
            sizes = entry["output_sizes"]  # where an operation has inputs of other sizes, its output is the gathered
            found[entry["profiling_name"]] += sum(
                math.prod(size) * BYTES[dtype] for size, dtype in zip(sizes, entry["input_dtypes"], strict=True)
            )
        return dict(found)


def _recorded() -> list[dict[str, Any]]:
    return json.loads(torch._C._distributed_c10d._dump_fr_trace_json())["entries"]


def expected(changes: dict[str, Any], world: int) -> dict[str, int]:
    """The closed forms. Each parameter is padded along its rows to a multiple of the S processes that shard it.

    ddp: the gradients are all-reduced in float32, once a step.
    fsdp: a micro-step gathers the root once and each block twice, or once if it is kept, matrices and biases in the
    products' type and norms in float32. A step reduces the gradients in float32 once, to shards on NCCL; gloo
    all-reduces them and takes its part.
    hsdp: as fsdp over S processes; then the shards, 1/S of the gradients, are all-reduced over the groups.
    """
    config = tiny(**changes)
    model = GPT(build(config).model.config)
    if config.parallel == "ddp":
        return {"gloo:all_reduce": 4 * sum(p.numel() for p in model.parameters())}
    shards = config.shard_size or world
    size = {"norms": 0, "blocks": 0, "root": 0}
    for name, parameter in model.named_parameters():
        kind = "root" if not name.startswith("h.") else "norms" if ".ln_" in name else "blocks"
        size[kind] += math.ceil(parameter.size(0) / shards) * shards * parameter[0].numel()
    product = 2 if config.dtype == "bfloat16" else 4
    times = 2 if config.reshard else 1
    gathered = 4 * size["root"] + times * (product * size["blocks"] + 4 * size["norms"])
    reduced = 4 * sum(size.values())
    if shards < world:
        reduced += reduced // shards
    return {"gloo:all_gather": gathered * (config.grad_accum or 1), "gloo:all_reduce": reduced}


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"grad_accum": 2}),
        (2, {"parallel": "fsdp"}),
        (2, {"parallel": "fsdp", "grad_accum": 2, "dtype": "bfloat16"}),
        (2, {"parallel": "fsdp", "reshard": False}),
        (4, {"parallel": "fsdp", "n_embd": 10, "block_size": 3}),
        (4, {"parallel": "hsdp", "shard_size": 2, "dtype": "bfloat16"}),
    ],
    ids=str,
)
def test_a_step_moves_the_bytes_of_the_closed_form(world: int, changes: dict[str, Any]) -> None:
    for found in ranks.call(world, "tests.trainer.test_traffic:counted", changes):
        assert found == expected(changes, world)
