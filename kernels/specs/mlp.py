"""The GELU-MLP kernels, as inspect, bounds and tune see them.

Each direction has three entries in the tables: by pointers, by descriptors (_tma), and by pointers for widths that
ALIGNED does not divide (_odd).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt2.kernels.mlp import (
    DESCRIPTORS,
    gelu_matmul_backward,
    gelu_matmul_forward,
    gelu_mlp_backward_kernel,
    gelu_mlp_forward_kernel,
    kernel_constants,
    programs_a_multiprocessor,
)
from fastgpt2.kernels.specs.records import CHANNELS, H100_MULTIPROCESSORS, TOKENS, Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tuning import LaunchConfig, architectures, read_table

EXAMPLE_ROWS = TOKENS // 2
"""Rows that the tuner times: half of a micro-step's tokens, to leave room in memory."""
FORMS = ("", "_tma", "_odd")


def _constants(form: str, more: dict[str, object], precision: str, size: int) -> dict[str, object]:
    return more | kernel_constants(precision, form == "_tma", form != "_odd")


def _work(form: str, tensors: int, precision: str, size: int, config: LaunchConfig) -> Work:
    """One product of 2 M C F. Beside the (M, C) tensor and the weight, `tensors` of (M, F) are read or written."""
    M, C, F = TOKENS, CHANNELS, 4 * CHANNELS
    assert config.block_m and config.block_n and config.block_k
    tiles, element = (M // config.block_m) * (F // config.block_n), 4 if precision in ("float32", "tf32") else 2
    runs, programs = tiles * (C // config.block_k), tiles
    loops: tuple[Loop, ...] = (Loop(tiles), Loop(runs))
    if form == "_tma":
        # The flattened loop over tiles and K holds the epilogue behind an `if`. What a program does outside it is
        # negligible, so an H100's number of programs serves every card.
        loops = (Loop(runs, conditional=tiles),)
        programs = H100_MULTIPROCESSORS * programs_a_multiprocessor(config)
    return Work(
        size=C,
        flops=2.0 * M * C * F,
        executed_flops=2.0 * M * C * F,
        bytes=element * (M * C + tensors * M * F + F * C),
        programs=programs,
        loops=loops,
    )


def _kernels(
    direction: str,
    function: Any,
    constants: dict[str, object],
    types: dict[str, str],
    multiples_of_16: tuple[str, ...],
    variants: dict[str, dict[str, Any]],
    tensors: int,
) -> dict[str, Kernel]:
    """A direction's entries, one a form."""
    return {
        f"gelu_mlp_{direction}{form}": Kernel(
            function,
            partial(_constants, form, constants),
            types,
            multiples_of_16=() if form == "_odd" else multiples_of_16,
            products=1,
            variants=variants,
            work=None if form == "_odd" else partial(_work, form, tensors),
        )
        for form in FORMS
    }


KERNELS = {
    **_kernels(
        "forward",
        gelu_mlp_forward_kernel,
        constants={"KEEP": True},
        types={},
        multiples_of_16=("HIDDEN", "C"),
        variants={"evaluation": {"KEEP": False}},
        tensors=2,
    ),
    **_kernels(
        "backward",
        gelu_mlp_backward_kernel,
        constants={},
        types={"partial_ptr": "*fp32"},
        multiples_of_16=("HIDDEN", "N"),
        variants={},
        tensors=3,
    ),
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    """Of tiles that divide GPT-2's widths, modded-nanogpt's 128x256x64 among them, those whose loads fit."""
    most = max(read_table(arch)["shared_memory"] for arch in architectures())
    element = 4 if precision in ("float32", "tf32") else 2
    if precision == "float32":
        tiles = [(m, n, 16) for m in (32, 64) for n in (64, 128)]
    else:
        depths = (32, 64) if precision == "tf32" else (64, 128)
        tiles = [(m, n, k) for m, n in ((128, 256), (128, 128), (64, 256), (256, 128)) for k in depths]
    stages = (1,) if precision == "float32" else (2, 3, 4, 5)
    return [
        LaunchConfig(m, n, k, num_warps=w, num_stages=s)
        for m, n, k in tiles
        for w in (4, 8)
        for s in stages
        if s * (m + n) * k * element <= most
    ]


def _example(
    direction: str, form: str, precision: str, size: int, device: torch.device, seed: int
) -> Callable[[LaunchConfig], tuple[Tensor, ...]]:
    """The fused product alone; its K is `size`."""
    tf32, tma, generator = precision == "tf32", form == "_tma", torch.Generator(device).manual_seed(seed)
    dtype = torch.float32 if tf32 else getattr(torch, precision)
    M, HIDDEN = EXAMPLE_ROWS, 4 * size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    if direction == "forward":
        x, w_fc, b_fc = draw(M, size), draw(HIDDEN, size) * size**-0.5, draw(HIDDEN)
        return lambda config: gelu_matmul_forward(x, w_fc, b_fc, True, tf32, config, tma)
    dy, w_proj, pre = draw(M, size), draw(size, HIDDEN) * size**-0.5, draw(M, HIDDEN)
    return lambda config: gelu_matmul_backward(dy, w_proj, pre, tf32, config, tma)


def _launched(form: str, major: int) -> bool:
    return (form == "_tma") == (major in DESCRIPTORS)


TUNING = {
    f"gelu_mlp_{direction}{form}": Tuning(
        _candidates,
        partial(_example, direction, form),
        partial(_launched, form),
    )
    for direction in ("forward", "backward")
    for form in ("", "_tma")
}
