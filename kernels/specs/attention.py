"""The attention kernels, as inspect, bounds and tune see them: as GPT-2's training runs them.

Causal, without documents and dropout; the backward with the sums of a bias's gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import triton

from fastgpt2.kernels.attention import attention_backward, attention_forward, kernel_constants
from fastgpt2.kernels.attention_device import (
    WEIGHTS,
    attention_backward_dkdv_kernel,
    attention_backward_dq_kernel,
    attention_forward_kernel,
)
from fastgpt2.kernels.specs.records import Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tuning import LaunchConfig

EXAMPLE = (64, 1024, 768)
"""(B, T, C) that the tuner times: a micro-step of GPT-2 124M on an 80 GB card."""
HEAD_DIM = 64
"""GPT-2 124M's."""

_TYPES = {
    "qkv_ptrs": ("*{}",) * 3,
    "qkv_strides": (("i32",) * 3,) * 3,
    "lse_ptr": "*fp32",
    "delta_ptr": "*fp32",
    "limit_ptr": "*i32",
    "seed_ptr": "*i64",
    "sums_ptr": "*fp32",
    "scale": "fp32",
}
_DROPOUT: dict[str, object] = {"DROP": WEIGHTS.value // 10, "seed_ptr": ...}
_DOCUMENTS: dict[str, object] = {"limit_ptr": ...}
_VARIANTS: dict[str, dict[str, object]] = {
    "full": {"CAUSAL": False},
    "dropout": _DROPOUT,
    "documents": _DOCUMENTS,
    "both": _DROPOUT | _DOCUMENTS,
}
_BACKWARD_VARIANTS = _VARIANTS | {"no bias": {"sums_ptr": None}}


def _constants(precision: str, size: int) -> dict[str, object]:
    return kernel_constants(precision, size) | {"limit_ptr": None, "seed_ptr": None}


def _work(
    matmuls: int,
    credited: float,
    tensors: int,
    runs: list[int],
    precision: str,
    config: LaunchConfig,
    programs: int,
) -> Work:
    """The work of all heads.

    Args:
        matmuls: executed for a tile.
        credited: those of them that attention.py's formula counts.
        tensors: of (B, T, H, D), read or written.
        runs: how often each loop runs for a head.
        programs: for a head.
    """
    (B, T, C), D = EXAMPLE, HEAD_DIM
    heads, tile = B * C // D, (config.block_m or 1) * (config.block_n or 1)
    element = 4 if precision in ("float32", "tf32") else 2
    return Work(
        size=D,
        flops=heads * credited * T * T * D,  # half of 2 T^2 D: causal
        executed_flops=heads * sum(runs) * matmuls * 2 * tile * D,
        bytes=B * T * (tensors * C * element + 8 * C // D),
        programs=heads * programs,
        loops=tuple(Loop(heads * n, special=tile) for n in runs),
    )


def _work_by_queries(matmuls: int, credited: float, tensors: int) -> Callable[[str, int, LaunchConfig], Work]:
    """The forward and dq: key tiles before the diagonal, then those on it."""

    def work(precision: str, size: int, config: LaunchConfig) -> Work:
        T, m, n = EXAMPLE[1], config.block_m or 1, config.block_n or 1
        starts = range(0, T, m)
        whole = sum(start // n for start in starts)
        edge = sum(triton.cdiv(min(start + m, T) - start // n * n, n) for start in starts)
        return _work(matmuls, credited, tensors, [whole, edge], precision, config, len(starts))

    return work


def _work_by_keys(precision: str, size: int, config: LaunchConfig) -> Work:
    """dk and dv: query tiles on the diagonal, those after it, and none past T."""
    T, m, n = EXAMPLE[1], config.block_m or 1, config.block_n or 1
    starts = range(0, T, n)
    edges = [triton.cdiv(start + n, m) * m for start in starts]
    on_diagonal = sum((min(edge, T) - start // m * m) // m for start, edge in zip(starts, edges, strict=True))
    runs = [on_diagonal, sum((T - edge) // m for edge in edges), 0]
    return _work(4, 5 * 4 / 7, 6, runs, precision, config, len(starts))


KERNELS = {
    "attention_forward": Kernel(
        attention_forward_kernel,
        _constants,
        _TYPES,
        multiples_of_16=("T",),
        products=4,
        variants=_VARIANTS,
        work=_work_by_queries(2, 2, 4),
    ),
    "attention_backward_dq": Kernel(
        attention_backward_dq_kernel,
        _constants,
        _TYPES,
        multiples_of_16=("T",),
        products=6,
        variants=_BACKWARD_VARIANTS,
        work=_work_by_queries(3, 5 * 3 / 7, 6),
    ),
    "attention_backward_dkdv": Kernel(
        attention_backward_dkdv_kernel,
        _constants,
        _TYPES,
        multiples_of_16=("T",),
        products=12,
        variants=_BACKWARD_VARIANTS,
        work=_work_by_keys,
    ),
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    exact = precision == "float32"
    tiles = (16, 32, 64) if exact else (32, 64, 128)
    return [
        LaunchConfig(m, n, num_warps=warps, num_stages=stages)
        for m in tiles
        for n in tiles
        for warps in (4, 8)
        for stages in ((1,) if exact else (1, 2, 3))
    ]


def draw_qkv(
    precision: str,
    size: int,
    device: torch.device,
    seed: int,
) -> tuple[torch.Tensor, torch.Generator]:
    """The example's packed projection, (B, T, 3, H, size), and the generator that goes on."""
    B, T, C = EXAMPLE
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(B, T, 3, C // size, size, dtype=dtype, device=device, generator=generator), generator


_MORE_BLOCKS = {
    "attention_backward_dq": (
        LaunchConfig(128, 64, num_warps=8, num_stages=3, max_registers=128),
        LaunchConfig(64, 64, num_warps=4, num_stages=2, max_registers=128),
    ),
    "attention_backward_dkdv": (LaunchConfig(32, 64, num_warps=4, num_stages=3, max_registers=168),),
}
"""Tiles that spill nothing in fewer registers than the compiler takes: one more block fits on a multiprocessor."""


def _backward_candidates(op: str) -> Callable[[str, int], list[LaunchConfig]]:
    return lambda precision, size: [*_candidates(precision, size), *_MORE_BLOCKS[op]]


def example(
    tuned: str | None, precision: str, size: int, device: torch.device, seed: int, hopper: bool = False
) -> Callable[[LaunchConfig], object]:
    """On packed inputs: the forward, or the backward with the configuration of its argument `tuned`.

    hopper: by the kernels for Hopper.
    """
    qkv, generator = draw_qkv(precision, size, device, seed)
    q, k, v = qkv.unbind(2)
    options = True, size**-0.5, precision == "tf32"
    if tuned is None:
        return lambda config: attention_forward(q, k, v, *options, hopper=hopper, config=config)
    o, lse = attention_forward(q, k, v, *options)
    do = torch.randn(o.shape, dtype=o.dtype, device=device, generator=generator)
    backward: Callable[..., object] = partial(attention_backward, do, q, k, v, o, lse, *options)
    return lambda config: backward(want_bias=True, hopper=hopper, **{tuned: config})


TUNING = {
    "attention_forward": Tuning(_candidates, partial(example, None)),
    "attention_backward_dq": Tuning(_backward_candidates("attention_backward_dq"), partial(example, "dq_config")),
    "attention_backward_dkdv": Tuning(_backward_candidates("attention_backward_dkdv"), partial(example, "dkdv_config")),
}
