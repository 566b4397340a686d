"""The attention's forward and backward, each backend beside PyTorch's own kernels.

Every candidate is first compared with float64, in the very call that is timed: what is wrong is not timed. Inputs
require gradients, so that the forward also saves what the backward needs. PyTorch's global numerics are at their
defaults here, so its kernels may add in any order, which is fastest; `deterministic` records it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.shapes import (
    APART,
    ATTENTION_FLOPS,
    ATTENTION_SHAPES,
    DEVICE,
    OURS,
    PEERS,
    SECONDS,
    AttentionShape,
    Candidate,
)
from bench.timing import input_sets, peak_memory, rates, time_call
from fastgpt2.compare import attention_problem, error_and_budget

CANDIDATES = {**OURS, **PEERS, **APART}

every_shape = pytest.mark.parametrize("shape", ATTENTION_SHAPES, ids=lambda shape: f"T{shape.T}")
every_candidate = pytest.mark.parametrize("name", CANDIDATES)
Record = Callable[[dict[str, Any]], None]


@every_candidate
@every_shape
def test_attention_forward(benchmark: Any, record: Record, shape: AttentionShape, name: str) -> None:
    candidate = CANDIDATES[name]
    op = candidate.op(DEVICE, shape.dtype, shape.D)
    with candidate.selected():
        check_attention(name, op, shape)
        function, sets = prepare(candidate, op, shape)
        measure(benchmark, record, "forward", shape, name, lambda i: function(*sets[i % len(sets)][0]))


@every_candidate
@every_shape
def test_attention_backward(benchmark: Any, record: Record, shape: AttentionShape, name: str) -> None:
    candidate = CANDIDATES[name]
    op = candidate.op(DEVICE, shape.dtype, shape.D)
    with candidate.selected():
        check_attention(name, op, shape)
        function, sets = prepare(candidate, op, shape)
        outputs = [function(*inputs) for inputs, _ in sets]

        def backward(i: int) -> object:
            inputs, grad_output = sets[i % len(sets)]
            return torch.autograd.grad(outputs[i % len(sets)], inputs, grad_output, retain_graph=True)

        measure(benchmark, record, "backward", shape, name, backward)


def measure(
    benchmark: Any, record: Record, direction: str, shape: AttentionShape, name: str, call: Callable[[int], object]
) -> None:
    """Time a call and record it with its size."""
    benchmark.group = f"attention {direction}, T={shape.T}"
    dtype = str(shape.dtype).removeprefix("torch.")
    timing = time_call(benchmark, call, DEVICE, seconds=SECONDS)
    record(
        {
            "op": f"attention {direction}",
            "backend": name,
            "dtype": dtype,
            "shape": {"B": shape.B, "T": shape.T, "H": shape.H, "D": shape.D},
            "packed": CANDIDATES[name].packed,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            **timing,
            **rates(
                timing,
                tokens=shape.B * shape.T,
                flops=shape.flops(direction),
                formula=ATTENTION_FLOPS[direction],
                dtype=dtype,
                device=DEVICE,
            ),
            **peak_memory(lambda: call(0), DEVICE),
        }
    )


def prepare(
    candidate: Candidate, op: Callable[..., Tensor], shape: AttentionShape
) -> tuple[Callable[..., Tensor], list[tuple[tuple[Tensor, ...], Tensor]]]:
    """The function that is timed, and the sets (inputs, grad_output (B, T, H, D)) that it is given in turn.

    The inputs are qkv (B, T, 3, H, D), or q, k and v (B, H, T, D) as views into one.
    """
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=DEVICE, dtype=shape.dtype, generator=generator)

    sets: list[tuple[tuple[Tensor, ...], Tensor]] = []
    for _ in range(input_sets(DEVICE, B * T * 3 * H * D * shape.dtype.itemsize)):
        qkv = draw(B, T, 3, H, D)
        inputs = (qkv,) if candidate.packed else qkv.permute(2, 0, 3, 1, 4).unbind(0)
        sets.append((tuple(x.detach().requires_grad_() for x in inputs), draw(B, T, H, D)))
    return (op if candidate.packed else _sdpa_apart), sets


def _sdpa_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


_checked: set[tuple[str, AttentionShape]] = set()


def check_attention(name: str, op: Callable[..., Tensor], shape: AttentionShape) -> None:
    """Fail where the attention, called with the size that is timed, errs more than the budget allows.

    One head of one sequence, the last of each, is compared; the others hold random numbers of their own, so a
    kernel that reads the wrong rows is found out. The budget is fastgpt2.compare's, relative to naive and sdpa.
    A candidate that has passed with a shape is not compared again.
    """
    if (name, shape) in _checked:
        return
    B, T, H, D = shape.B, shape.T, shape.H, shape.D
    rest = torch.randn(B, T, 3, H, D, device=DEVICE, dtype=shape.dtype)

    def last_head(qkv: Tensor) -> Tensor:
        full = rest.clone()
        full[-1:, :, :, -1:] = qkv
        return op(full)[-1:, :, -1:]

    problem = attention_problem((1, T, 1, D))
    for tensor, (error, budget) in error_and_budget(last_head, problem, shape.dtype, DEVICE, [0]).items():
        assert error <= budget, f"not timed: {tensor} is off by {error:.2e}, {budget:.2e} is allowed"
    _checked.add((name, shape))
