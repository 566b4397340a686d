"""The head and its loss, forward and backward: ours by both its rows' steps, PyTorch's plain form, and others' own.

Every candidate is first compared with float64, with the size that is timed: what is wrong is not timed. Beside them
stand the three matmuls alone, which is what all of them do at least. `evaluation` is the forward pass without
gradients. On a GPU the peak of memory says as much as the time: the plain form holds the logits several times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops.budget import Yardstick
from bench.ops.contests import Candidate, Contest, Function, ours, peers, rotate
from bench.ops.shapes import CUDA, DEVICE
from bench.roofline import Work
from bench.timing import REPLAY, Call, input_sets
from fastgpt2.kernels.loss import linear_cross_entropy_reference

Drawn = tuple[Tensor, Tensor, Tensor]
"""hidden (N, C) and weight (V, C), which require gradients, and targets (N,)."""


@dataclass(frozen=True)
class HeadShape:
    """N tokens of C channels, V rows of the weight."""

    N: int
    C: int
    V: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Bytes: hidden, weight and targets read, in training the two gradients written; logits need not pass through
        memory. Exponentials: one a logit for the sum, in training another for the gradient."""
        passes = {"training": 2, "evaluation": 1}[direction]
        matmuls = {"training": 3, "evaluation": 1}[direction]
        moved = passes * (self.N + self.V) * self.C * self.dtype.itemsize + 8 * self.N
        flops = 2.0 * matmuls * self.N * self.C * self.V
        return Work(
            self.N, flops, moved, passes * self.N * self.V, FLOPS[direction], "what it is given and gives, once"
        )


FLOPS = {"training": "6 N C V (three matmuls)", "evaluation": "2 N C V (one matmul)"}
if CUDA:
    SHAPES = [HeadShape(N, C, 50304, torch.bfloat16) for N, C in ((65536, 768), (4096, 768))]
    # The logits of 65,536 tokens and their gradients don't leave room for much else: fewer tokens of the wide ones.
    SHAPES += [HeadShape(16384, C, 50304, torch.bfloat16) for C in (1024, 1280, 1600)]
else:
    SHAPES = [HeadShape(64, 32, 1024, torch.float32)]
MATMULS = "matmuls-alone"
NAMES = ["triton", "chunked", *peers("linear_cross_entropy"), MATMULS]


class HeadContest(Contest):
    def __init__(self, size: HeadShape, direction: str) -> None:
        self.size, self.direction = size, direction
        self.op, self.dtype = f"linear_cross_entropy {direction}", str(size.dtype).removeprefix("torch.")
        self.work = size.work(direction)
        self.candidates = {
            **{name: Candidate(functools.partial(self._ours, name), "ours") for name in ("triton", "chunked")},
            **peers("linear_cross_entropy"),
            MATMULS: Candidate(lambda: matmuls, "floor"),
        }

    def _ours(self, name: str) -> Function:
        return functools.partial(ours("loss", name, self.size.dtype), vocab_size=self.size.V)

    def shape(self) -> dict[str, Any]:
        return {"N": self.size.N, "C": self.size.C, "V": self.size.V}

    def draw(self) -> list[Drawn]:
        return [draw(self.size, seed) for seed in range(input_sets(DEVICE, int(self.work.bytes or 0)))]

    def prepare(self, name: str, function: Function, sets: Sequence[Drawn]) -> Call:
        if name == MATMULS:
            return rotate([functools.partial(matmuls, self.direction, hidden, weight) for hidden, weight, _ in sets])
        call = {"training": training, "evaluation": evaluation}[self.direction]
        return rotate([functools.partial(call, function, *inputs) for inputs in sets])

    @functools.cached_property
    def _kept(self) -> slice:
        """Every so manieth row counts, 512 in all: the float64 of 65536 wouldn't fit."""
        return slice(None, None, max(1, self.size.N // 512))

    @functools.cached_property
    def _yardstick(self) -> Yardstick:
        plain = functools.partial(self._results, linear_cross_entropy_reference, self._kept)
        return Yardstick(
            ("loss", "dhidden", "dweight"),
            functools.partial(plain, torch.float64),
            functools.partial(plain, self.size.dtype),
        )

    def _results(self, head: Function, rows: slice, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
        """The loss and its gradients, of the rows that count, which are among those that the head is given."""
        hidden, weight, targets = draw(self.size, seed)
        few = torch.full_like(targets, -100)
        few[self._kept] = targets[self._kept]
        given = [x.detach().to(dtype).requires_grad_() for x in (hidden[rows], weight)]
        loss = head(given[0], given[1], few[rows])
        dhidden, dweight = torch.autograd.grad(loss, given)
        return [loss.detach(), dhidden if rows == self._kept else dhidden[self._kept], dweight]

    def check(self, name: str, function: Function) -> None:
        if name == MATMULS:
            return
        self._yardstick.check(self._results(function, slice(None), self.size.dtype))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", list(FLOPS))
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"N{size.N}-C{size.C}")
def test_linear_cross_entropy(
    compete: Callable[[Contest, str], None], size: HeadShape, direction: str, name: str
) -> None:
    compete(HeadContest(size, direction), name)


def draw(size: HeadShape, seed: int) -> Drawn:
    """Of logits of standard deviation 1."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    hidden, weight = (torch.randn(rows, size.C, device=DEVICE, generator=generator) for rows in (size.N, size.V))
    targets = torch.randint(size.V, (size.N,), device=DEVICE, generator=generator)
    weight /= math.sqrt(size.C)
    return hidden.to(size.dtype).requires_grad_(), weight.to(size.dtype).requires_grad_(), targets


def training(head: Function, hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(head(hidden, weight, targets), (hidden, weight))


@torch.no_grad()
def evaluation(head: Function, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return head(hidden, weight, targets)


@torch.no_grad()
def matmuls(direction: str, hidden: Tensor, weight: Tensor) -> object:
    """hidden W^T, and in training G W and G^T hidden, each in one piece."""
    logits = hidden @ weight.T
    return (logits @ weight, logits.T @ hidden) if direction == "training" else logits
