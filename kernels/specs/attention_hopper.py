"""The attention's forward for Hopper, as inspect, bounds and tune see it."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastgpt2.kernels.attention import attention_forward
from fastgpt2.kernels.attention_hopper import ROWS, attention_forward_hopper_kernel, layout, tile
from fastgpt2.kernels.specs.attention import EXAMPLE, HEAD_DIM, draw_qkv
from fastgpt2.kernels.specs.records import Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tuning import LaunchConfig


def _descriptors(precision: str, size: int, config: LaunchConfig) -> dict[str, str]:
    def kind(rows: int | None) -> str:
        return f"tensordesc<{{}}{tile(rows or 1, size)},{layout(2)!r}>"

    keys = kind(config.block_n)
    return {"q_descriptor": kind(ROWS.value), "k_descriptor": keys, "v_descriptor": keys}


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


KERNELS = {
    "attention_forward_hopper": Kernel(
        attention_forward_hopper_kernel,
        lambda precision, size: {"D": size},
        {"lse_ptr": "*fp32", "scale": "fp32"},
        multiples_of_16=("T",),
        products=3,
        work=_work,
        descriptors=_descriptors,
    )
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    """Two or three tiles of keys in shared memory; a third of 128 channels doesn't fit."""
    return [LaunchConfig(128, 128, num_warps=4, num_stages=stages) for stages in ((2, 3) if size <= 64 else (2,))]


def _example(precision: str, size: int, device: torch.device, seed: int) -> Callable[[LaunchConfig], object]:
    q, k, v = draw_qkv(precision, size, device, seed)[0].unbind(2)
    return lambda config: attention_forward(q, k, v, True, size**-0.5, False, hopper=True, config=config)


TUNING = {"attention_forward_hopper": Tuning(_candidates, _example, launched=lambda major: major == 9)}
