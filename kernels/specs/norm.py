"""The LayerNorm kernels, as inspect, bounds and tune see them: compiled for training under autocast.

The branch x and y have 16 bits; the residual stream and the parameters are float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import triton
from torch import Tensor

from fastgpt2.kernels.norm import (
    BRANCH_CHANNELS,
    WARPS,
    layer_norm_backward,
    layer_norm_forward,
)
from fastgpt2.kernels.norm_device import layer_norm_backward_kernel, layer_norm_forward_kernel
from fastgpt2.kernels.specs.records import CHANNELS, H100_MULTIPROCESSORS, TOKENS, Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tuning import LaunchConfig

EXAMPLE_ROWS = TOKENS
"""Rows that the tuner times."""

_FLOAT32_POINTERS = (
    *("residual_ptr", "weight_ptr", "bias_ptr", "total_ptr", "mean_ptr", "rstd_ptr"),
    *("dtotal_ptr", "dresidual_ptr", "sums_ptr"),
)
_TYPES = {**dict.fromkeys(_FLOAT32_POINTERS, "*fp32"), "eps": "fp32"}


def _constants(precision: str, size: int) -> dict[str, object]:
    return {"C": size}


def _backward_constants(precision: str, size: int) -> dict[str, object]:
    absent = ("residual_ptr", "dresidual_ptr") if precision == "float32" else ("residual_ptr",)
    return {"C": size, "SUMS": 3 if size <= BRANCH_CHANNELS else 2, **dict.fromkeys(absent)}


def _forward_work(precision: str, size: int, config: LaunchConfig) -> Work:
    element = 16 if precision == "float32" else 12
    tiles = triton.cdiv(TOKENS, config.block_m)
    return Work(CHANNELS, 0.0, 0.0, bytes=element * TOKENS * CHANNELS, programs=tiles)


def _backward_work(precision: str, size: int, config: LaunchConfig) -> Work:
    # The programs of an H100: what they do outside the loop is negligible.
    programs = H100_MULTIPROCESSORS * max(1, WARPS // config.num_warps)
    tiles = triton.cdiv(TOKENS, config.block_m)
    return Work(CHANNELS, 0.0, 0.0, bytes=16 * TOKENS * CHANNELS, programs=programs, loops=(Loop(tiles),))


KERNELS = {
    "layer_norm_forward": Kernel(
        layer_norm_forward_kernel,
        _constants,
        _TYPES,
        ("x_stride", "residual_stride"),
        variants={
            "alone": {"residual_ptr": None, "total_ptr": None},
            "last": {"total_ptr": None},
            "stream of 16 bits": {"residual_ptr": "*{}", "total_ptr": "*{}"},
        },
        work=_forward_work,
    ),
    "layer_norm_backward": Kernel(
        layer_norm_backward_kernel,
        _backward_constants,
        _TYPES,
        ("dy_stride", "dtotal_stride", "total_stride", "residual_stride"),
        variants={
            "alone": {"dtotal_ptr": None, "dresidual_ptr": None, "SUMS": 2},
            "last": {"dtotal_ptr": None, "residual_ptr": ...},
            "no branch bias": {"SUMS": 2},
            "gradient of 16 bits": {"dtotal_ptr": "*{}", "dresidual_ptr": None},
            "stream of 16 bits": {"total_ptr": "*{}", "dtotal_ptr": "*{}", "dresidual_ptr": None},
            "sum unused": {"dtotal_ptr": None, "SUMS": 2},
        },
        work=_backward_work,
    ),
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    """Tiles of 4 to 64 elements a thread."""
    columns = triton.next_power_of_2(size)
    pairs = [(rows, warps) for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8, 16)]
    return [LaunchConfig(r, num_warps=w) for r, w in pairs if 4 <= r * columns // (32 * w) <= 64]


def _draw(precision: str, size: int, device: torch.device, seed: int) -> tuple[Tensor, ...]:
    """x, residual, weight, bias, dy and dtotal, as in training under autocast."""
    generator, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, precision)
    draw = functools.partial(torch.randn, device=device, generator=generator)
    x, dy = (draw(EXAMPLE_ROWS, size, dtype=dtype) for _ in range(2))
    residual, dtotal = (draw(EXAMPLE_ROWS, size) for _ in range(2))
    return x, residual, 1 + 0.3 * draw(size), draw(size), dy, dtotal


def _example_forward(
    precision: str, size: int, device: torch.device, seed: int
) -> Callable[[LaunchConfig], tuple[Tensor, ...]]:
    x, residual, weight, bias, _, _ = _draw(precision, size, device, seed)
    return lambda config: layer_norm_forward(x, residual, weight, bias, 1e-5, x.dtype, config)


def _example_backward(
    precision: str, size: int, device: torch.device, seed: int
) -> Callable[[LaunchConfig], tuple[Tensor, ...]]:
    x, residual, weight, bias, dy, dtotal = _draw(precision, size, device, seed)
    _, total, mean, rstd = layer_norm_forward(x, residual, weight, bias, 1e-5, x.dtype)
    dtypes = x.dtype, residual.dtype
    return lambda config: layer_norm_backward(dy, dtotal, total, mean, rstd, weight, *dtypes, config, want_branch=True)


TUNING = {
    "layer_norm_forward": Tuning(_candidates, _example_forward),
    "layer_norm_backward": Tuning(_candidates, _example_backward),
}
