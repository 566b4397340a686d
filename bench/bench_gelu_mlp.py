"""The MLP's forward, backward and both: ours beside PyTorch's plain form, as it is and compiled.

Every candidate is first compared with float64, in the precision and with the size that is timed: what is wrong is not
timed. Inputs require gradients, so that the forward also saves what the backward needs. FLOPs are those of the matmuls.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch._functorch.config as functorch_config
from torch import Tensor

import kernels
from bench.budget import assert_within_budget
from bench.shapes import CUDA, DEVICE, SECONDS
from bench.timing import input_sets, peak_memory, rates, time_call
from fastgpt2.ops import torch_mlp
from kernels import launch

Mlp = Callable[..., Tensor]
Record = Callable[[dict[str, Any]], None]
FLOPS = {
    "forward": "2 * 2 N C F",
    "backward": "2 * 2 * 2 N C F",
    "forward+backward": "3 * 2 * 2 N C F",
}
"""MlpShape.flops in words: N tokens, F = 4 C hidden channels."""


@dataclass(frozen=True)
class MlpShape:
    """B sequences of T tokens of C channels, 4 C hidden ones."""

    B: int
    T: int
    C: int
    dtype: torch.dtype

    def flops(self, direction: str) -> float:
        """Two matmuls forward, twice as many backward."""
        forward = 2 * 2 * self.B * self.T * self.C * 4 * self.C
        return {"forward": 1.0, "backward": 2.0, "forward+backward": 3.0}[direction] * forward

    def bytes(self, direction: str) -> float:
        """What must be read and written at the least, each tensor once: with F = 4 C, tokens by

        forward: read x; write pre and y, both kept (6 C); weights and biases read.
        backward: read x, pre and dy; write dx (7 C); weights read, all gradients written.
        """
        tokens, weights = self.B * self.T * self.C, 8 * self.C**2 + 5 * self.C
        forward, backward = 6 * tokens + weights, 7 * tokens + 2 * weights
        both = forward + backward
        return {"forward": forward, "backward": backward, "forward+backward": both}[direction] * self.dtype.itemsize


if CUDA:
    SHAPES = [MlpShape(64, 1024, C, torch.bfloat16) for C in (768, 1024, 1280, 1600)]
    SHAPES += [MlpShape(4, 1024, 768, torch.bfloat16)]
else:
    SHAPES = [MlpShape(2, 64, 64, torch.float32)]
CANDIDATES = ["torch", "torch-compiled", "triton"]

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"C{shape.C}-B{shape.B}")
every_candidate = pytest.mark.parametrize("name", CANDIDATES)


@pytest.mark.parametrize("direction", list(FLOPS))
@every_candidate
@every_shape
def test_gelu_mlp(benchmark: Any, record: Record, shape: MlpShape, name: str, direction: str) -> None:
    # Compiled code may reuse what it saved for the backward, which can then be run once: not where that alone is timed.
    with functorch_config.patch(donated_buffer=direction != "backward"):
        mlp = select(name, shape)
        check_mlp(name, mlp, shape)
        measure(benchmark, record, shape, name, direction, mlp)


def measure(benchmark: Any, record: Record, shape: MlpShape, name: str, direction: str, mlp: Mlp) -> None:
    """Time a candidate and record it with its size."""
    benchmark.group = f"mlp {direction}, {shape.B * shape.T} tokens, C={shape.C}"
    dtype = str(shape.dtype).removeprefix("torch.")
    call = prepare(mlp, shape, direction)
    timing = time_call(benchmark, call, DEVICE, seconds=SECONDS)
    moved = shape.bytes(direction)
    record(
        {
            "op": f"mlp {direction}",
            "backend": name,
            "dtype": dtype,
            "shape": {"B": shape.B, "T": shape.T, "C": shape.C},
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "bytes": moved,
            "bytes_formula": "what the function is given, gives and keeps, read or written once",
            "bytes_per_s": 1e3 * moved / timing["ms_median"] if timing else None,
            **timing,
            **rates(
                timing,
                tokens=shape.B * shape.T,
                flops=shape.flops(direction),
                formula=FLOPS[direction],
                dtype=dtype,
                device=DEVICE,
            ),
            **peak_memory(lambda: call(0), DEVICE),
        }
    )


def select(name: str, shape: MlpShape) -> Mlp:
    """The MLP of a name; skips the benchmark where it can't run or its time means nothing."""
    if name == "torch-compiled":
        return torch.compile(torch_mlp, fullgraph=True)
    if name == "torch":
        return torch_mlp
    if DEVICE.type == "cpu":
        pytest.skip("Triton on a CPU is interpreted: its time would say nothing about the kernel")
    if reason := launch.why_unsupported("Triton's GELU-MLP", DEVICE, shape.dtype, "torch"):
        pytest.skip(reason)
    return kernels.gelu_mlp


def draw(shape: MlpShape, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """x, w_fc, b_fc, w_proj and b_proj, which require gradients, and dy."""
    generator, C = torch.Generator(DEVICE).manual_seed(seed), shape.C

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*size, device=DEVICE, generator=generator)).to(shape.dtype)

    x, dy = (normal(shape.B, shape.T, C) for _ in range(2))
    w_fc, w_proj = normal(4 * C, C, scale=C**-0.5), normal(C, 4 * C, scale=(4 * C) ** -0.5)
    return [t.requires_grad_() for t in (x, w_fc, normal(4 * C), w_proj, normal(C))], dy


def prepare(mlp: Mlp, shape: MlpShape, direction: str) -> Callable[[int], object]:
    """What is timed: a call of the index of its inputs, which rotate."""
    each = shape.B * shape.T * shape.C * shape.dtype.itemsize
    sets = [draw(shape, seed) for seed in range(input_sets(DEVICE, each))]
    if direction == "forward":
        return lambda i: mlp(*sets[i % len(sets)][0])
    outputs = [mlp(*inputs) for inputs, _ in sets] if direction == "backward" else None

    def backward(i: int) -> object:
        inputs, dy = sets[i % len(sets)]
        y = mlp(*inputs) if outputs is None else outputs[i % len(sets)]
        return torch.autograd.grad(y, inputs, dy, retain_graph=outputs is not None)

    return backward


_checked: set[tuple[str, MlpShape]] = set()


def check_mlp(name: str, mlp: Mlp, shape: MlpShape) -> None:
    """Fail where the result or a gradient errs more than the budget allows. A candidate that has passed with a shape
    is not compared again."""
    if (name, shape) in _checked:
        return
    inputs, dy = draw(shape)
    truth = differentiate(torch_mlp, [t.detach().double().requires_grad_() for t in inputs], dy.double())
    plain, ours = (differentiate(function, inputs, dy) for function in (torch_mlp, mlp))
    names = ("y", "dx", "dw_fc", "db_fc", "dw_proj", "db_proj")
    for tensor, mine, theirs, right in zip(names, ours, plain, truth, strict=True):
        assert_within_budget(tensor, mine, theirs, right)
    _checked.add((name, shape))


def differentiate(mlp: Mlp, inputs: list[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
    y = mlp(*inputs)
    return (y.detach(), *torch.autograd.grad(y, inputs, dy))
