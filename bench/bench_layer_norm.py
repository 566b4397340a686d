"""Residual add and LayerNorm, forward and backward: ours beside PyTorch's plain form, as it is and compiled.

On a GPU as in training under bfloat16 autocast: the branch and y are 2 bytes, the stream and the parameters float32.
Every candidate is first compared with float64, with the size that is timed: what is wrong is not timed. Inputs require
gradients, so that the forward also saves what the backward needs. It is memory that takes the time: beside the time
stand the bytes that must move, and the rate as a fraction of a device copy's, measured in the same session.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor

from bench.budget import assert_within_budget
from bench.shapes import CUDA, DEVICE, SECONDS
from bench.timing import ceilings, input_sets, peak_memory, rates, time_call

Norm = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(x, residual, weight, bias) -> (y, the sum)"""
Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class NormShape:
    """N tokens of C channels; `dtype` is the branch's and y's, the stream is float32."""

    N: int
    C: int
    dtype: torch.dtype

    def bytes(self, direction: str) -> int:
        """Each tensor once. Forward: x, y in dtype, residual and sum. Backward: dy and dx in dtype, the sum, its
        gradient and the residual's, which is dx itself where the dtypes agree. Parameters are nothing beside them."""
        narrow = self.dtype.itemsize
        apart = 4 if self.dtype != torch.float32 else 0
        return self.N * self.C * {"forward": 2 * narrow + 8, "backward": 2 * narrow + 8 + apart}[direction]

    def flops(self, direction: str) -> float:
        return self.N * self.C * {"forward": 8.0, "backward": 14.0}[direction]


FLOPS = {"forward": "8 N C", "backward": "14 N C"}
if CUDA:
    SHAPES = [NormShape(65536, C, torch.bfloat16) for C in (768, 1024, 1280, 1600)]
    SHAPES += [NormShape(4096, 768, torch.bfloat16)]
else:
    SHAPES = [NormShape(512, 64, torch.float32)]


def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The add, PyTorch's LayerNorm in float32 as under autocast, and the cast that the next matmul would do."""
    total = residual + x
    return F.layer_norm(total, weight.shape, weight, bias).to(x.dtype), total


def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    from kernels.layer_norm import add_layer_norm

    with torch.autocast(x.device.type, x.dtype, enabled=x.dtype != residual.dtype):
        return add_layer_norm(x, residual, weight, bias)


CANDIDATES: dict[str, Callable[[], Norm]] = {
    "torch": lambda: plain,
    "torch-compiled": lambda: torch.compile(plain, fullgraph=True),
    "triton": lambda: fused,
}


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"C{shape.C}-N{shape.N}")
def test_add_layer_norm(benchmark: Any, record: Record, shape: NormShape, name: str, direction: str) -> None:
    if name == "triton" and DEVICE.type == "cpu":
        pytest.skip("Triton on a CPU is interpreted: its time would say nothing about the kernel")
    # Compiled code may reuse what it saved for the backward, which can then be run once: not where that alone is timed.
    with functorch_config.patch(donated_buffer=direction != "backward"):
        norm = CANDIDATES[name]()
        check(name, norm, shape)
        measure(benchmark, record, shape, name, direction, prepare(norm, shape, direction))


def measure(
    benchmark: Any, record: Record, shape: NormShape, name: str, direction: str, call: Callable[[int], object]
) -> None:
    """Time a call and record it with its size."""
    benchmark.group = f"add + LayerNorm {direction}, {shape.N} tokens, C={shape.C}"
    dtype = str(shape.dtype).removeprefix("torch.")
    timing = time_call(benchmark, call, DEVICE, seconds=SECONDS)
    moved = shape.bytes(direction)
    per_second = moved * 1e3 / timing["ms_median"] if timing else None
    copy = copy_rate()
    record(
        {
            "op": f"add_layer_norm {direction}",
            "backend": name,
            "dtype": dtype,
            "shape": {"N": shape.N, "C": shape.C},
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "bytes": moved,
            "bytes_formula": "what the function is given, gives and keeps, read or written once",
            "bytes_per_s": per_second,
            "copy_bytes_per_s": copy,
            "copy_fraction": per_second / copy if per_second and copy else None,
            **timing,
            **rates(
                timing,
                tokens=shape.N,
                flops=shape.flops(direction),
                formula=FLOPS[direction],
                dtype=dtype,
                device=DEVICE,
            ),
            **peak_memory(lambda: call(0), DEVICE),
        }
    )


@functools.cache
def copy_rate() -> float | None:
    """Bytes a second of a large device copy, read and written; None on a CPU."""
    return 1e12 * ceilings()["copy_tb_per_s"] if CUDA else None


def draw(shape: NormShape, seed: int) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """x, residual, weight and bias, which require gradients, and the gradients of y and of the sum."""
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=dtype, generator=generator)

    N, C = shape.N, shape.C
    inputs = [normal(N, C, dtype=shape.dtype), normal(N, C), 1 + 0.3 * normal(C), normal(C)]
    return [t.requires_grad_() for t in inputs], (normal(N, C, dtype=shape.dtype), normal(N, C))


def prepare(norm: Norm, shape: NormShape, direction: str) -> Callable[[int], object]:
    """The call that is timed, on inputs that rotate."""
    sets = [draw(shape, seed) for seed in range(input_sets(DEVICE, shape.bytes(direction)))]
    if direction == "forward":
        return lambda i: norm(*sets[i % len(sets)][0])
    outputs = [norm(*inputs) for inputs, _ in sets]

    def backward(i: int) -> object:
        inputs, gradients = sets[i % len(sets)]
        return torch.autograd.grad(outputs[i % len(sets)], inputs, gradients, retain_graph=True)

    return backward


_checked: set[tuple[str, NormShape]] = set()


def check(name: str, norm: Norm, shape: NormShape) -> None:
    """Fail where a result or gradient is off from float64's by more than twice what the plain form is off, and four
    units in the last place of the tensor's scale. A candidate that has passed with a shape is not compared again."""
    if (name, shape) in _checked:
        return
    inputs, gradients = draw(shape, seed=0)

    def results(norm: Norm, dtype: torch.dtype | None = None) -> list[Tensor]:
        given = [t.detach().to(dtype or t.dtype).requires_grad_() for t in inputs]
        outputs = norm(*given)
        return [*outputs, *torch.autograd.grad(outputs, given, [g.to(dtype or g.dtype) for g in gradients])]

    names = ("y", "sum", "dx", "dresidual", "dw", "db")
    truth = results(plain, torch.float64)
    for what, mine, theirs, exact in zip(names, results(norm), results(plain), truth, strict=True):
        assert_within_budget(what, mine, theirs, exact)
    _checked.add((name, shape))
