"""A step moves between the processes what docs/several-gpus.md says, to the byte: PyTorch's flight recorder counts."""

from __future__ import annotations

import collections
import json
import math
from typing import Any

import pytest
import torch

from fastgpt2.parallel import joined
from fastgpt2.run import build
from tests import ranks
from tests.trainer.test_equal import with_

SIZES = {"Float": 4, "BFloat16": 2}
ACCUM = 2


def entries() -> list[dict[str, Any]]:
    return json.loads(torch._C._distributed_c10d._dump_fr_trace_json())["entries"]


def moved(changes: dict[str, Any]) -> tuple[dict[str, int], int, int, int]:
    """The third step's bytes by operation and group; the parameters, those of blocks, those of the blocks' norms."""
    with joined("cpu", 60):
        run = build(with_(grad_accum=ACCUM, grad_clip=0.0, **changes))
        tokens = torch.zeros(ACCUM, 2, run.config.block_size + 1, dtype=torch.int64)
        for step in range(3):  # in the second DDP arranges its buckets anew
            before = len(entries())
            run.step(step, tokens)
        found = collections.Counter[str]()
        for entry in entries()[before:]:
            whole = max(
                sum(math.prod(shape) * SIZES[kind] for shape, kind in zip(shapes, kinds, strict=True))
                for shapes, kinds in (
                    (entry["input_sizes"], entry["input_dtypes"]),
                    (entry["output_sizes"], entry["output_dtypes"]),
                )
            )
            found[f"{entry['profiling_name'].partition(':')[2]} {entry['process_group'][1]}"] += whole
        blocks = {name: p.numel() for block in run.model.h for name, p in block.named_parameters(prefix=str(id(block)))}
        norms = sum(count for name, count in blocks.items() if ".ln_" in name)
        return dict(found), sum(p.numel() for p in run.model.parameters()), sum(blocks.values()), norms


@pytest.mark.parametrize(
    ("world", "changes"),
    [
        (2, {"parallel": "ddp"}),
        (2, {"parallel": "fsdp"}),
        (2, {"parallel": "fsdp", "dtype": "bfloat16"}),
        (2, {"parallel": "fsdp", "dtype": "bfloat16", "reshard": False}),
        (4, {"parallel": "hsdp", "dtype": "bfloat16", "shard_size": 2}),
    ],
    ids=["ddp", "fsdp", "fsdp-bfloat16", "fsdp-kept", "hsdp"],
)
def test_a_step_moves_the_bytes_of_the_closed_form(world: int, changes: dict[str, Any]) -> None:
    (found, count, blocks, norms), *others = ranks.call(world, "tests.trainer.test_traffic:moved", changes)
    assert all(other[0] == found for other in others)
    if changes["parallel"] == "ddp":
        assert found == {"all_reduce default_pg": 4 * count}
        return
    width, times = (2 if "dtype" in changes else 4), (2 if changes.get("reshard", True) else 1)
    gathered = ACCUM * (times * (width * (blocks - norms) + 4 * norms) + 4 * (count - blocks))
    group = "default_pg" if changes["parallel"] == "fsdp" else "mesh_shard"
    expected = {f"all_gather {group}": gathered, f"all_reduce {group}": 4 * count}  # gloo's reduce-scatter
    if changes["parallel"] == "hsdp":
        expected["all_reduce mesh_replicate"] = 4 * count // changes["shard_size"]
    assert found == expected
