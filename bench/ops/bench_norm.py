"""Residual add and LayerNorm, forward and backward: ours beside PyTorch's plain form, as it is and compiled, and other
packages'.

On a GPU as in training under bfloat16 autocast: the branch and y are 2 bytes, the stream and the parameters float32.
Every candidate is first compared with float64, with the size that is timed: what is wrong is not timed. Inputs require
gradients, so that the forward also saves what the backward needs. It is memory that takes the time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops.budget import Yardstick
from bench.ops.contests import Candidate, Contest, Function, backward_of, ours, peers, rotate
from bench.ops.peers import torch_add_layer_norm
from bench.ops.shapes import CUDA, DEVICE
from bench.roofline import Work
from bench.timing import REPLAY, Call, input_sets

Drawn = tuple[list[Tensor], tuple[Tensor, Tensor]]
"""x, residual, weight and bias, which require gradients, and the gradients of y and of the sum."""


@dataclass(frozen=True)
class NormShape:
    """N tokens of C channels; `dtype` is the branch's and y's, the stream is float32."""

    N: int
    C: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Each tensor once. Forward: x, y in dtype, residual and sum. Backward: dy and dx in dtype, the sum, its
        gradient and the residual's, which is dx itself where the dtypes agree. Parameters are nothing beside them."""
        narrow = self.dtype.itemsize
        apart = 4 if self.dtype != torch.float32 else 0
        moved = self.N * self.C * {"forward": 2 * narrow + 8, "backward": 2 * narrow + 8 + apart}[direction]
        flops = self.N * self.C * {"forward": 8.0, "backward": 14.0}[direction]
        return Work(self.N, flops, moved, 0, FLOPS[direction], "what it is given, gives and keeps, once")


FLOPS = {"forward": "8 N C", "backward": "14 N C"}
if CUDA:
    SHAPES = [NormShape(65536, C, torch.bfloat16) for C in (768, 1024, 1280, 1600)]
    SHAPES += [NormShape(4096, 768, torch.bfloat16)]
else:
    SHAPES = [NormShape(512, 64, torch.float32)]
NAMES = ["triton", *peers("add_layer_norm")]


def fused(dtype: torch.dtype) -> Function:
    """Ours, which gives y in autocast's dtype."""
    norm = ours("norm", "triton", dtype)

    def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != residual.dtype):
            return norm(x, residual, weight, bias)

    return add_layer_norm


class NormContest(Contest):
    def __init__(self, size: NormShape, direction: str) -> None:
        self.size, self.direction = size, direction
        self.op, self.dtype = f"add_layer_norm {direction}", str(size.dtype).removeprefix("torch.")
        self.work, self.retains = size.work(direction), True
        self.candidates = {"triton": Candidate(lambda: fused(size.dtype), "ours"), **peers("add_layer_norm")}

    def shape(self) -> dict[str, Any]:
        return {"N": self.size.N, "C": self.size.C}

    def draw(self) -> list[Drawn]:
        return [draw(self.size, seed) for seed in range(input_sets(DEVICE, int(self.work.bytes or 0)))]

    def prepare(self, name: str, function: Function, sets: Sequence[Drawn]) -> Call:
        if self.direction == "forward":
            return rotate([functools.partial(function, *inputs) for inputs, _ in sets])
        return rotate([backward_of(function, inputs, gradients) for inputs, gradients in sets])

    @functools.cached_property
    def _yardstick(self) -> Yardstick:
        plain = functools.partial(self._results, torch_add_layer_norm)
        return Yardstick(
            ("y", "sum", "dx", "dresidual", "dw", "db"), functools.partial(plain, dtype=torch.float64), plain
        )

    def _results(self, norm: Function, seed: int = 0, dtype: torch.dtype | None = None) -> list[Tensor]:
        inputs, gradients = draw(self.size, seed)
        given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        outputs = norm(*given)
        received = [g.to(dtype or g.dtype) for g in gradients]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, given, received)]

    def check(self, name: str, function: Function) -> None:
        self._yardstick.check(self._results(function))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", list(FLOPS))
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"C{size.C}-N{size.N}")
def test_add_layer_norm(compete: Callable[[Contest, str], None], size: NormShape, direction: str, name: str) -> None:
    compete(NormContest(size, direction), name)


def draw(size: NormShape, seed: int) -> Drawn:
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, device=DEVICE, dtype=dtype, generator=generator)

    N, C = size.N, size.C
    inputs = [normal(N, C, dtype=size.dtype), normal(N, C), 1 + 0.3 * normal(C), normal(C)]
    return [t.requires_grad_() for t in inputs], (normal(N, C, dtype=size.dtype), normal(N, C))
