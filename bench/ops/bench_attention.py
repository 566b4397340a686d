"""Benchmark of the attention, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from bench.contest import CUDA, DEVICE, Candidate, Contest, Function, Unavailable
from bench.ops.budget import assert_within_budget
from bench.ops.op_contest import ONCE, Drawn, SlotContest
from bench.roofline import Work
from bench.timing import REPLAY, Call
from fastgpt2.accuracy import attention_problem, error_and_budget

LONGEST_PLAIN = 2048
"""The plain form keeps all scores. At 65,536 tokens, 12 heads and T = 2048 they take 10 GB, at 2 T twice that."""
FLOPS = {"forward": "4 B H T^2 D / 2 (causal)", "backward": "2.5 * 4 B H T^2 D / 2 (causal)"}


@dataclass(frozen=True)
class AttentionShape:
    """B sequences of T tokens, H heads of D channels."""

    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Forward: two matmuls, 4 B H T^2 D FLOPs, halved because half the pairs are masked. Backward: 2.5 times that.

        One exponential a pair that is not masked, in each direction. Bytes: forward qkv, o and each row's log-sum-exp
        (float32); backward these, do and dqkv.
        """
        pairs, rows = self.B * self.H * self.T**2 / 2, self.B * self.H * self.T
        flops = {"forward": 4.0, "backward": 10.0}[direction] * pairs * self.D
        moved = {"forward": 4, "backward": 8}[direction] * rows * self.D * self.dtype.itemsize + 4 * rows
        return Work(self.B * self.T, flops, moved, pairs, FLOPS[direction], ONCE)


if CUDA:
    # The same 65,536 tokens at every length, so that only the attention's T^2 grows.
    SHAPES = [AttentionShape(65536 // T, T, 12, 64, torch.bfloat16) for T in (1024, 2048, 4096, 8192)]
    # The widths of the larger models, and few tokens, where launching takes longer than computing.
    SHAPES += [AttentionShape(64, 1024, H, 64, torch.bfloat16) for H in (16, 20, 25)]
    SHAPES += [AttentionShape(4, 1024, 12, 64, torch.bfloat16)]
else:
    SHAPES = [AttentionShape(2, 256, 4, 64, torch.float32)]


def too_long() -> Function:
    raise Unavailable(f"keeps T^2 scores a head: timed up to T = {LONGEST_PLAIN}")


class AttentionContest(SlotContest):
    slot, title = "attn", "attention"
    size: AttentionShape

    def __init__(self, size: AttentionShape, direction: str, outside: Sequence[str] = ()) -> None:
        super().__init__(size, direction, outside)
        if size.T > LONGEST_PLAIN:
            self.candidates |= dict.fromkeys((self.plain, f"{self.plain}-compiled"), Candidate("peer", too_long))

    def draw_set(self, seed: int) -> Drawn:
        """qkv (B, T, 3, H, D), and the gradient of the output (B, T, H, D)."""
        B, T, H, D = self.size.B, self.size.T, self.size.H, self.size.D
        generator = torch.Generator(DEVICE).manual_seed(seed)
        draw = functools.partial(torch.randn, device=DEVICE, dtype=self.size.dtype, generator=generator)
        return [draw(B, T, 3, H, D).requires_grad_()], [draw(B, T, H, D)]

    def prepare(self, name: str, function: Function, sets: Sequence[Drawn]) -> Call:
        if self.candidates[name].role == "floor":  # it takes q, k and v, each (B, H, T, D)
            sets = [(unpack(inputs[0]), gradients) for inputs, gradients in sets]
        return super().prepare(name, function, sets)

    def check(self, name: str, function: Function) -> None:
        """Compare one head of one sequence, the last of each: all of them would not fit in float64.

        The others hold other random numbers, so a kernel that reads the wrong rows is found out. The budget is
        fastgpt2.accuracy's, relative to naive and sdpa.
        """
        B, T, H, D = self.size.B, self.size.T, self.size.H, self.size.D
        rest = torch.randn(B, T, 3, H, D, device=DEVICE, dtype=self.size.dtype)

        def last_head(qkv: Tensor) -> Tensor:
            full = rest.clone()
            full[-1:, :, :, -1:] = qkv
            inputs = full.permute(2, 0, 3, 1, 4).unbind(0) if self.candidates[name].role == "floor" else [full]
            return function(*inputs)[-1:, :, -1:]

        problem = attention_problem((1, T, 1, D))
        assert_within_budget(error_and_budget(last_head, problem, self.size.dtype, DEVICE, once=True))


def unpack(qkv: Tensor) -> list[Tensor]:
    """Views into the packed projection, each with a gradient of its own."""
    return [x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0)]


CONTEST = AttentionContest


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("direction", list(FLOPS))
@pytest.mark.parametrize("size", SHAPES, ids=lambda size: f"C{size.H * size.D}-T{size.T}-B{size.B}")
def test_attention(
    compete: Callable[[Contest, str], None], outside: list[str], size: AttentionShape, direction: str, name: str
) -> None:
    compete(AttentionContest(size, direction, outside), name)
