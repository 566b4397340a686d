"""Benchmark of the MLP: forward, backward, and both. FLOPs are the matmuls'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.contest import CUDA, DEVICE, Contest
from bench.ops.op_contest import ONCE, Drawn, SlotContest
from bench.roofline import Work
from bench.timing import REPLAY

FLOPS = {
    "forward": "2 * 2 N C F",
    "backward": "2 * 2 * 2 N C F",
    "forward+backward": "3 * 2 * 2 N C F",
}
"""The matmuls', in words: N tokens, F = 4 C hidden channels."""


@dataclass(frozen=True)
class MlpShape:
    """B sequences of T tokens of C channels, 4 C hidden ones."""

    B: int
    T: int
    C: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Two matmuls forward, four backward. Each tensor is read or written at least once. For a token, with F = 4 C:

        forward: reads x; writes pre, which the backward needs, and y (6 C); weights and biases are read.
        backward: reads x, pre and dy; writes dx (7 C); weights are read, all gradients written.
        """
        tokens, C = self.B * self.T, self.C
        matmul, weights, hidden = 2 * tokens * C * 4 * C, 8 * C**2 + 5 * C, tokens * 4 * C
        forward = (2 * matmul, 6 * tokens * C + weights, hidden)
        backward = (4 * matmul, 7 * tokens * C + 2 * weights, hidden)
        both = tuple(map(sum, zip(forward, backward, strict=True)))
        flops, numbers, tanhs = {"forward": forward, "backward": backward, "forward+backward": both}[direction]
        return Work(tokens, flops, numbers * self.dtype.itemsize, tanhs, FLOPS[direction], ONCE)


if CUDA:
    SHAPES = [MlpShape(64, 1024, C, torch.bfloat16) for C in (768, 1024, 1280, 1600)]
    SHAPES += [MlpShape(4, 1024, 768, torch.bfloat16)]
else:
    SHAPES = [MlpShape(2, 64, 64, torch.float32)]


class MlpContest(SlotContest):
    slot, title = "mlp", "mlp"
    names = ("y", "dx", "dw_fc", "db_fc", "dw_proj", "db_proj")
    size: MlpShape

    def draw_set(self, seed: int) -> Drawn:
        """x, w_fc, b_fc, w_proj and b_proj, and dy."""
        generator, size, C = torch.Generator(DEVICE).manual_seed(seed), self.size, self.size.C

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, device=DEVICE, generator=generator)).to(size.dtype)

        x, dy = (normal(size.B, size.T, C) for _ in range(2))
        w_fc, w_proj = normal(4 * C, C, scale=C**-0.5), normal(C, 4 * C, scale=(4 * C) ** -0.5)
        return [t.requires_grad_() for t in (x, w_fc, normal(4 * C), w_proj, normal(C))], [dy]


CONTEST = MlpContest


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("direction", list(FLOPS))
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"C{size.C}-B{size.B}")
def test_gelu_mlp(
    compete: Callable[[Contest, str], None], outside: list[str], size: MlpShape, direction: str, name: str
) -> None:
    compete(MlpContest(size, direction, outside), name)
