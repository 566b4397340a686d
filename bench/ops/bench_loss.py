"""Benchmark of the output head and its loss: training (loss and both gradients) and evaluation (loss only)."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.contest import CUDA, DEVICE, Candidate, Contest, Function
from bench.ops.op_contest import Drawn, SlotContest, differentiate
from bench.roofline import Work
from bench.timing import REPLAY, Call

FLOPS = {"training": "6 N C V (three matmuls)", "evaluation": "2 N C V (one matmul)"}


@dataclass(frozen=True)
class HeadShape:
    """N tokens of C channels, V rows of the weight."""

    N: int
    C: int
    V: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Bytes: hidden, weight and targets are read, and in training the two gradients written; logits need not pass
        through memory. Exponentials: one a logit for the sum, in training another for the gradient."""
        passes = {"training": 2, "evaluation": 1}[direction]
        matmuls = {"training": 3, "evaluation": 1}[direction]
        moved = passes * (self.N + self.V) * self.C * self.dtype.itemsize + 8 * self.N
        flops = 2.0 * matmuls * self.N * self.C * self.V
        special = passes * self.N * self.V
        return Work(self.N, flops, moved, special, FLOPS[direction], "what it is given and gives, once")


if CUDA:
    SHAPES = [HeadShape(N, C, 50304, torch.bfloat16) for N, C in ((65536, 768), (4096, 768))]
    # The logits of 65,536 tokens and their gradients leave little memory: fewer tokens of the wide ones.
    SHAPES += [HeadShape(16384, C, 50304, torch.bfloat16) for C in (1024, 1280, 1600)]
else:
    SHAPES = [HeadShape(64, 32, 1024, torch.float32)]


class HeadContest(SlotContest):
    slot, title = "loss", "linear_cross_entropy"
    names = ("loss", "dhidden", "dweight")
    size: HeadShape

    def __init__(self, size: HeadShape, direction: str, outside: Sequence[str] = ()) -> None:
        super().__init__(size, direction, outside)
        self.candidates["matmuls-alone"] = Candidate("floor", lambda: functools.partial(matmuls, direction))

    def load(self, name: str) -> Function:
        return functools.partial(super().load(name), vocab_size=self.size.V)

    def draw_set(self, seed: int) -> Drawn:
        """hidden (N, C), weight (V, C) and targets (N,); logits have a standard deviation of 1."""
        size, generator = self.size, torch.Generator(DEVICE).manual_seed(seed)
        hidden, weight = (torch.randn(rows, size.C, device=DEVICE, generator=generator) for rows in (size.N, size.V))
        targets = torch.randint(size.V, (size.N,), device=DEVICE, generator=generator)
        weight /= math.sqrt(size.C)
        return [hidden.to(size.dtype).requires_grad_(), weight.to(size.dtype).requires_grad_(), targets], None

    def prepare(self, name: str, function: Function, sets: Sequence[Drawn]) -> Call:
        if self.candidates[name].role == "floor":
            return lambda i: function(*sets[i % len(sets)][0])
        return super().prepare(name, function, sets)

    def results(self, function: Function, seed: int = 0, *, plain_in: torch.dtype | None = None) -> Sequence[Tensor]:
        """Loss and gradients of every k-th row, 512 in all: 65,536 would not fit in float64. A candidate is given all
        rows and must ignore the others' targets; the plain form is given only these rows."""
        every = slice(None, None, max(1, self.size.N // 512))
        (hidden, weight, targets), _ = self.draw_set(seed)
        kept = torch.full_like(targets, -100)
        kept[every] = targets[every]
        rows = every if plain_in else slice(None)
        given = [x.detach().to(plain_in or self.size.dtype).requires_grad_() for x in (hidden[rows], weight)]
        loss, dhidden, dweight = differentiate(function, [*given, kept[rows]], None)
        return [loss, dhidden if rows == every else dhidden[every], dweight]

    def check(self, name: str, function: Function) -> None:
        if self.candidates[name].role != "floor":
            super().check(name, function)


CONTEST = HeadContest


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("direction", list(FLOPS))
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"N{size.N}-C{size.C}")
def test_linear_cross_entropy(
    compete: Callable[[Contest, str], None], outside: list[str], size: HeadShape, direction: str, name: str
) -> None:
    compete(HeadContest(size, direction, outside), name)


@torch.no_grad()
def matmuls(direction: str, hidden: Tensor, weight: Tensor, targets: Tensor) -> object:
    """hidden W^T, and in training G W and G^T hidden, each in one piece."""
    logits = hidden @ weight.T
    return (logits @ weight, logits.T @ hidden) if direction == "training" else logits
