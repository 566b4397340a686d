"""The MLP's forward, backward and both: ours beside PyTorch's plain form, as it is and compiled, and other packages'.

Every candidate is first compared with float64, in the precision and with the size that is timed: what is wrong is not
timed. Inputs require gradients, so that the forward also saves what the backward needs. FLOPs are those of the matmuls.
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
from bench.ops.shapes import CUDA, DEVICE
from bench.roofline import Work
from bench.timing import REPLAY, Call, input_sets
from fastgpt2.backends.mlp import torch_mlp


@dataclass(frozen=True)
class MlpShape:
    """B sequences of T tokens of C channels, 4 C hidden ones."""

    B: int
    T: int
    C: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Two matmuls forward, four backward. At the least each tensor is read or written once: with F = 4 C, a token

        forward: reads x; writes pre, which the backward needs, and y (6 C); weights and biases are read.
        backward: reads x, pre and dy; writes dx (7 C); weights are read, all gradients written.
        """
        tokens, C = self.B * self.T, self.C
        matmul, weights, hidden = 2 * tokens * C * 4 * C, 8 * C**2 + 5 * C, tokens * 4 * C
        forward = (2 * matmul, 6 * tokens * C + weights, hidden)
        backward = (4 * matmul, 7 * tokens * C + 2 * weights, hidden)
        both = tuple(map(sum, zip(forward, backward, strict=True)))
        flops, numbers, tanhs = {"forward": forward, "backward": backward, "forward+backward": both}[direction]
        moved = numbers * self.dtype.itemsize
        return Work(tokens, flops, moved, tanhs, FLOPS[direction], "what it is given, gives and keeps, once")


FLOPS = {
    "forward": "2 * 2 N C F",
    "backward": "2 * 2 * 2 N C F",
    "forward+backward": "3 * 2 * 2 N C F",
}
"""The matmuls', in words: N tokens, F = 4 C hidden channels."""
if CUDA:
    SHAPES = [MlpShape(64, 1024, C, torch.bfloat16) for C in (768, 1024, 1280, 1600)]
    SHAPES += [MlpShape(4, 1024, 768, torch.bfloat16)]
else:
    SHAPES = [MlpShape(2, 64, 64, torch.float32)]
NAMES = ["triton", *peers("mlp")]


class MlpContest(Contest):
    def __init__(self, size: MlpShape, direction: str) -> None:
        self.size, self.direction = size, direction
        self.op, self.dtype = f"mlp {direction}", str(size.dtype).removeprefix("torch.")
        self.work, self.retains = size.work(direction), direction != "forward+backward"
        self.candidates = {"triton": Candidate(lambda: ours("mlp", "triton", size.dtype), "ours"), **peers("mlp")}

    def shape(self) -> dict[str, Any]:
        return {"B": self.size.B, "T": self.size.T, "C": self.size.C}

    def draw(self) -> list[tuple[list[Tensor], Tensor]]:
        each = self.size.B * self.size.T * self.size.C * self.size.dtype.itemsize
        return [draw(self.size, seed) for seed in range(input_sets(DEVICE, each))]

    def prepare(self, name: str, function: Function, sets: Sequence[tuple[list[Tensor], Tensor]]) -> Call:
        if self.direction == "forward":
            return rotate([functools.partial(function, *inputs) for inputs, _ in sets])
        if self.direction == "backward":
            return rotate([backward_of(function, inputs, dy) for inputs, dy in sets])
        return rotate([functools.partial(differentiate, function, inputs, dy) for inputs, dy in sets])

    @functools.cached_property
    def _yardstick(self) -> Yardstick:
        def exact(seed: int) -> tuple[Tensor, ...]:
            inputs, dy = draw(self.size, seed)
            return differentiate(torch_mlp, [t.detach().double().requires_grad_() for t in inputs], dy.double())

        names = ("y", "dx", "dw_fc", "db_fc", "dw_proj", "db_proj")
        return Yardstick(names, exact, lambda seed: differentiate(torch_mlp, *draw(self.size, seed)))

    def check(self, name: str, function: Function) -> None:
        self._yardstick.check(differentiate(function, *draw(self.size)))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", list(FLOPS))
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"C{size.C}-B{size.B}")
def test_gelu_mlp(compete: Callable[[Contest, str], None], size: MlpShape, direction: str, name: str) -> None:
    compete(MlpContest(size, direction), name)


def draw(size: MlpShape, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """x, w_fc, b_fc, w_proj and b_proj, which require gradients, and dy."""
    generator, C = torch.Generator(DEVICE).manual_seed(seed), size.C

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, device=DEVICE, generator=generator)).to(size.dtype)

    x, dy = (normal(size.B, size.T, C) for _ in range(2))
    w_fc, w_proj = normal(4 * C, C, scale=C**-0.5), normal(C, 4 * C, scale=(4 * C) ** -0.5)
    return [t.requires_grad_() for t in (x, w_fc, normal(4 * C), w_proj, normal(C))], dy


def differentiate(mlp: Function, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = mlp(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy))
