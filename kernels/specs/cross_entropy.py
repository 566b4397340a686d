"""The cross-entropy kernel, as inspect, bounds and tune see it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fastgpt2.kernels.cross_entropy import cross_entropy_kernel, cross_entropy_rows
from fastgpt2.kernels.launch import statistics
from fastgpt2.kernels.specs.records import TOKENS, Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tuning import LaunchConfig

EXAMPLE_ROWS = 16384
"""Rows that the tuner times: a chunk of 65536 tokens of GPT-2 in bfloat16 on a card of 80 GB."""

_TYPES = {"targets_ptr": "*i64", "loss_ptr": "*fp32", "lse_ptr": "*fp32", "upstream_ptr": "*fp32"}
_VARIANTS: dict[str, dict[str, object]] = {
    "evaluation": {"GRADIENT": False},
    "upstream": {"FORWARD": False, "upstream_ptr": ...},
}


def _constants(precision: str, size: int) -> dict[str, object]:
    return {"FORWARD": True, "GRADIENT": True, "upstream_ptr": None}


def _work(precision: str, size: int, config: LaunchConfig) -> Work:
    """GPT-2's vocabulary in a padded row."""
    vocab_size, stride = 50257, 50304
    block, element = config.block_n or 1, 4 if precision == "float32" else 2
    whole = vocab_size // block
    # In the order of the code: maximum and sum of whole blocks, of the last block; gradient of the last, of whole ones.
    loops = tuple(Loop(runs, special=block) for runs in (whole * TOKENS, TOKENS, TOKENS, whole * TOKENS))
    return Work(stride, 0.0, 0.0, bytes=2 * element * TOKENS * stride, programs=TOKENS, loops=loops)


KERNELS = {
    "cross_entropy": Kernel(cross_entropy_kernel, _constants, _TYPES, ("stride",), variants=_VARIANTS, work=_work)
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    """Blocks of 8 to 32 columns a thread."""
    pairs = [(block, warps) for block in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8, 16, 32)]
    return [LaunchConfig(block_n=b, num_warps=w) for b, w in pairs if 8 <= b // (32 * w) <= 32 and b <= 2 * size]


def _example(
    precision: str, size: int, device: torch.device, seed: int
) -> Callable[[LaunchConfig], tuple[Tensor, ...]]:
    """A chunk to time, and 16 rows whose results can be compared.

    Each launch overwrites the chunk with the gradient of what the last launch left in it. The 16 rows are copied anew.
    """
    generator, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, precision)
    logits = torch.randn(EXAMPLE_ROWS, size, device=device, dtype=dtype, generator=generator)
    targets = torch.randint(size, (EXAMPLE_ROWS,), device=device, generator=generator)
    losses, lse = torch.empty(2, EXAMPLE_ROWS, device=device, dtype=statistics(dtype))
    few = logits[:16].clone()

    def launch(config: LaunchConfig) -> tuple[Tensor, ...]:
        cross_entropy_rows(logits, targets, losses, lse, None, size, -100, True, config)
        rows, results = few.clone(), torch.empty(2, len(few), device=device, dtype=lse.dtype)
        cross_entropy_rows(rows, targets, results[0], results[1], None, size, -100, True, config)
        return rows, results

    return launch


TUNING = {"cross_entropy": Tuning(_candidates, _example)}
