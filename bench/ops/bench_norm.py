"""Benchmark of the residual add and the layer norm after it, forward and backward, in mixed precision on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.contest import CUDA, DEVICE, Contest, Function
from bench.ops.op_contest import ONCE, Drawn, SlotContest
from bench.roofline import Work
from bench.timing import REPLAY

FLOPS = {"forward": "8 N C", "backward": "14 N C"}


@dataclass(frozen=True)
class NormShape:
    """N tokens of C channels. `dtype` is the branch's and y's; the stream is float32."""

    N: int
    C: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Each tensor once. Forward: x and y in dtype, residual and sum. Backward: dy and dx in dtype, the sum, its
        gradient and the residual's, which is dx itself if the dtypes agree. Parameters are nothing beside them."""
        narrow = self.dtype.itemsize
        apart = 4 if self.dtype != torch.float32 else 0
        moved = self.N * self.C * {"forward": 2 * narrow + 8, "backward": 2 * narrow + 8 + apart}[direction]
        flops = self.N * self.C * {"forward": 8.0, "backward": 14.0}[direction]
        return Work(self.N, flops, moved, 0, FLOPS[direction], ONCE)


if CUDA:
    SHAPES = [NormShape(65536, C, torch.bfloat16) for C in (768, 1024, 1280, 1600)]
    SHAPES += [NormShape(4096, 768, torch.bfloat16)]
else:
    SHAPES = [NormShape(512, 64, torch.float32)]


class NormContest(SlotContest):
    slot, title = "norm", "add_layer_norm"
    names = ("y", "sum", "dx", "dresidual", "dw", "db")
    size: NormShape

    def load(self, name: str) -> Function:
        """Ours returns y in autocast's dtype; for others the cast is counted that the next matmul would do."""
        norm = super().load(name)

        def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != residual.dtype):
                y, total = norm(x, residual, weight, bias)
            return y.to(x.dtype), total

        return add_layer_norm

    def draw_set(self, seed: int) -> Drawn:
        """x, residual, weight and bias, and the gradients of y and of the sum."""
        generator, N, C = torch.Generator(DEVICE).manual_seed(seed), self.size.N, self.size.C

        def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.randn(shape, device=DEVICE, dtype=dtype, generator=generator)

        inputs = [normal(N, C, dtype=self.size.dtype), normal(N, C), 1 + 0.3 * normal(C), normal(C)]
        return [t.requires_grad_() for t in inputs], [normal(N, C, dtype=self.size.dtype), normal(N, C)]


CONTEST = NormContest


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("direction", list(FLOPS))
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"C{size.C}-N{size.N}")
def test_add_layer_norm(
    compete: Callable[[Contest, str], None], outside: list[str], size: NormShape, direction: str, name: str
) -> None:
    compete(NormContest(size, direction, outside), name)
