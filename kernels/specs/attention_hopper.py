"""The attention for Hopper, as inspect, bounds and tune see it: as GPT-2's training runs it, with a bias's sums."""

from __future__ import annotations

from functools import partial

from fastgpt2.kernels.attention_hopper import CONSUMERS, ROWS, attention_forward_hopper_kernel, layout, tile
from fastgpt2.kernels.attention_hopper_backward import row_layout
from fastgpt2.kernels.attention_hopper_dkdv import attention_backward_dkdv_hopper_kernel
from fastgpt2.kernels.attention_hopper_dq import attention_backward_dq_hopper_kernel
from fastgpt2.kernels.specs.attention import EXAMPLE, HEAD_DIM, example
from fastgpt2.kernels.specs.records import Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tuning import LaunchConfig


def _tiles(size: int, rows: int | None) -> str:
    return f"tensordesc<{{}}{tile(rows or 1, size)},{layout(2)!r}>"


def _descriptors(precision: str, size: int, config: LaunchConfig) -> dict[str, str]:
    keys = _tiles(size, config.block_n)
    return {"q_descriptor": _tiles(size, ROWS.value), "k_descriptor": keys, "v_descriptor": keys}


def _backward_descriptors(precision: str, size: int, config: LaunchConfig) -> dict[str, str]:
    rows = f"tensordesc<fp32[1, {ROWS.value}],{row_layout()!r}>"
    tiles = {f"{name}_descriptor": _tiles(size, ROWS.value) for name in ("q", "k", "v", "do", "o")}
    return tiles | {"lse_descriptor": rows, "delta_descriptor": rows}


def _work(precision: str, size: int, config: LaunchConfig) -> Work:
    """The tiles before the diagonal in the loops of the two consumers and the producer; those on it outside."""
    (B, T, C), D = EXAMPLE, HEAD_DIM
    assert config.block_m is not None and config.block_n is not None
    heads, programs, tile = B * C // D, T // config.block_m, config.block_m * config.block_n
    before = heads * programs * (programs - 1) // 2
    consumer = Loop(before, special=tile // 2)
    return Work(
        size=D,
        flops=heads * 2 * T * T * D,
        executed_flops=(before + heads * programs) * 2 * 2 * tile * D,
        bytes=B * T * (4 * C * 2 + 4 * C // D),
        programs=heads * programs,
        loops=(consumer, consumer, Loop((before + heads * programs) / config.num_warps)),  # one warp loads
    )


def _backward_work(matmuls: int, precision: str, size: int, config: LaunchConfig) -> Work:
    """The tiles beside a consumer's diagonal in the consumers' loops, which run equally often but for one tile.

    matmuls: of the 7 that both kernels execute.
    """
    (B, T, C), D = EXAMPLE, HEAD_DIM
    heads, diagonals, tile = B * C // D, T // ROWS.value, ROWS.value**2
    programs = diagonals // CONSUMERS.value
    beside = heads * diagonals * (diagonals - 1) // 2
    loaded = heads * sum(CONSUMERS.value * n for n in range(1, programs + 1))
    consumer = Loop(beside / CONSUMERS.value, special=tile)
    return Work(
        size=D,
        flops=heads * 5 * matmuls / 7 * T * T * D,
        executed_flops=(beside + heads * diagonals) * matmuls * 2 * tile * D,
        bytes=B * T * (6 * C * 2 + 8 * C // D),
        programs=heads * programs,
        loops=(consumer, consumer, Loop(loaded / config.num_warps)),  # one warp loads
    )


KERNELS = {
    "attention_forward_hopper": Kernel(
        attention_forward_hopper_kernel,
        lambda precision, size: {"D": size},
        {"lse_ptr": "*fp32", "scale": "fp32"},
        multiples_of_16=("T",),
        products=3,
        work=_work,
        descriptors=_descriptors,
    ),
    "attention_backward_dq_hopper": Kernel(
        attention_backward_dq_hopper_kernel,
        lambda precision, size: {"D": size},
        {"lse_ptr": "*fp32", "delta_ptr": "*fp32", "sums_ptr": "*fp32", "scale": "fp32"},
        multiples_of_16=("T",),
        products=6,
        variants={"no bias": {"sums_ptr": None}},
        work=partial(_backward_work, 3),
        descriptors=_backward_descriptors,
    ),
    "attention_backward_dkdv_hopper": Kernel(
        attention_backward_dkdv_hopper_kernel,
        lambda precision, size: {"D": size},
        {"sums_ptr": "*fp32", "scale": "fp32"},
        multiples_of_16=("T",),
        products=8,
        variants={"no bias": {"sums_ptr": None}},
        work=partial(_backward_work, 4),
        descriptors=_backward_descriptors,
    ),
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    """Two or three tiles of keys in shared memory; a third of 128 channels doesn't fit."""
    return [LaunchConfig(128, 128, num_warps=4, num_stages=stages) for stages in ((2, 3) if size <= 64 else (2,))]


def _backward_candidates(m: int, n: int, precision: str, size: int) -> list[LaunchConfig]:
    """A ring's slots. Powers of two: the remainder by another number takes a dozen instructions a tile."""
    return [LaunchConfig(m, n, num_warps=4, num_stages=stages) for stages in (2, 4)]


def _on_hopper(major: int) -> bool:
    return major == 9


TUNING = {
    "attention_forward_hopper": Tuning(_candidates, partial(example, None, hopper=True), _on_hopper),
    "attention_backward_dq_hopper": Tuning(
        partial(_backward_candidates, 128, 64), partial(example, "dq_config", hopper=True), _on_hopper
    ),
    "attention_backward_dkdv_hopper": Tuning(
        partial(_backward_candidates, 64, 128), partial(example, "dkdv_config", hopper=True), _on_hopper
    ),
}
