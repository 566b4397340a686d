"""The attention's forward and backward: ours beside the plain form, PyTorch's own kernels and other packages'.

Every candidate is first compared with float64, in the very call that is timed: what is wrong is not timed. Inputs
require gradients, so that the forward also saves what the backward needs. PyTorch's global numerics are at their
defaults here, so its kernels may add in any order, which is fastest; `deterministic` records it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.ops.budget import assert_within_budget
from bench.ops.contests import Candidate, Contest, Function, backward_of, ours, peers, rotate
from bench.ops.peers import PEERS, Unavailable
from bench.ops.shapes import ATTENTION_SHAPES, DEVICE, AttentionShape
from bench.timing import REPLAY, Call, input_sets
from fastgpt2.accuracy import attention_problem, error_and_budget
from fastgpt2.backends.attention import naive_attention, sdpa_attention

LONGEST_NAIVE = 2048
"""The plain form keeps all scores: at 65,536 tokens of 12 heads and T = 2048 some 10 GB for the backward, and with T
they double."""


def candidates(size: AttentionShape) -> dict[str, Candidate]:
    """By name; those whose inputs are apart do without the copy that packs the gradient, and are a floor."""
    table = {
        "triton": Candidate(lambda: ours("attn", "triton", size.dtype, size.D), "ours"),
        "naive": Candidate(lambda: naive_attention, "peer"),
        "sdpa": Candidate(lambda: sdpa_attention, "peer"),
        **peers("attention"),
    }
    if size.T > LONGEST_NAIVE:
        for name in ("naive", "naive-compiled"):
            table[name] = Candidate(too_long, "peer")
    return table


def too_long() -> Function:
    raise Unavailable(f"keeps T^2 scores a head: timed up to T = {LONGEST_NAIVE}")


NAMES = list(candidates(ATTENTION_SHAPES[0]))


class AttentionContest(Contest):
    def __init__(self, size: AttentionShape, direction: str) -> None:
        self.size, self.direction = size, direction
        self.op, self.dtype = f"attention {direction}", str(size.dtype).removeprefix("torch.")
        self.work, self.retains = size.work(direction), True
        self.candidates = candidates(size)

    def shape(self) -> dict[str, Any]:
        return {"B": self.size.B, "T": self.size.T, "H": self.size.H, "D": self.size.D}

    def draw(self) -> list[tuple[Tensor, Tensor]]:
        """qkv (B, T, 3, H, D), which requires a gradient, and that of the output (B, T, H, D)."""
        B, T, H, D, dtype = self.size.B, self.size.T, self.size.H, self.size.D, self.size.dtype
        generator = torch.Generator(DEVICE).manual_seed(0)
        draw = functools.partial(torch.randn, device=DEVICE, dtype=dtype, generator=generator)
        count = input_sets(DEVICE, B * T * 3 * H * D * dtype.itemsize)
        return [(draw(B, T, 3, H, D).requires_grad_(), draw(B, T, H, D)) for _ in range(count)]

    def prepare(self, name: str, function: Function, sets: Sequence[tuple[Tensor, Tensor]]) -> Call:
        given = [((qkv,) if packed(name) else unpack(qkv), do) for qkv, do in sets]
        if self.direction == "forward":
            return rotate([functools.partial(function, *inputs) for inputs, _ in given])
        return rotate([backward_of(function, inputs, do) for inputs, do in given])

    def check(self, name: str, function: Function) -> None:
        op = function if packed(name) else lambda qkv: function(*qkv.permute(2, 0, 3, 1, 4).unbind(0))
        check_attention(name, op, self.size)


def packed(name: str) -> bool:
    """Whether a candidate takes the packed projection, as the model needs it; else q, k and v, each (B, H, T, D)."""
    return name not in PEERS["attention"] or PEERS["attention"][name].packed


def unpack(qkv: Tensor) -> tuple[Tensor, ...]:
    """Views into the packed projection, each of which has a gradient of its own."""
    return tuple(x.detach().requires_grad_() for x in qkv.permute(2, 0, 3, 1, 4).unbind(0))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("size", ATTENTION_SHAPES, ids=lambda size: f"C{size.H * size.D}-T{size.T}-B{size.B}")
def test_attention(compete: Callable[[Contest, str], None], size: AttentionShape, direction: str, name: str) -> None:
    compete(AttentionContest(size, direction), name)


def check_attention(name: str, op: Callable[..., Tensor], size: AttentionShape) -> None:
    """Fail where the attention, called with the size that is timed, errs more than the budget allows.

    One head of one sequence, the last of each, is compared; the others hold random numbers of their own, so a
    kernel that reads the wrong rows is found out. The budget is fastgpt2.accuracy's, relative to naive and sdpa.
    """
    B, T, H, D = size.B, size.T, size.H, size.D
    rest = torch.randn(B, T, 3, H, D, device=DEVICE, dtype=size.dtype)

    def last_head(qkv: Tensor) -> Tensor:
        full = rest.clone()
        full[-1:, :, :, -1:] = qkv
        return op(full)[-1:, :, -1:]

    problem = attention_problem((1, T, 1, D))
    assert_within_budget(error_and_budget(last_head, problem, size.dtype, DEVICE, once=True))
