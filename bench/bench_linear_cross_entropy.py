"""The head and its loss, forward and backward: ours by both its rows' steps, PyTorch's plain form, and PyTorch's own.

Every candidate is first compared with float64, with the size that is timed: what is wrong is not timed. Beside them
stand the three matmuls alone, which is what all of them do at least. `evaluation` is the forward pass without
gradients. On a GPU the peak of memory says as much as the time: the plain form holds the logits several times.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.budget import assert_within_budget
from bench.shapes import CUDA, DEVICE, SECONDS
from bench.timing import input_sets, peak_memory, rates, time_call
from kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference

Head = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(hidden (N, C), weight (V, C), targets (N,)) -> the mean loss"""
Record = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class HeadShape:
    """N tokens of C channels, V rows of the weight."""

    N: int
    C: int
    V: int
    dtype: torch.dtype

    def flops(self, direction: str) -> float:
        return {"training": 6.0, "evaluation": 2.0}[direction] * self.N * self.C * self.V

    def bytes(self, direction: str) -> int:
        """Logits that pass through memory, in dtype: written, read and made a gradient, read twice; or written and
        read. Inputs and gradients are little beside them."""
        return {"training": 5, "evaluation": 2}[direction] * self.N * self.V * self.dtype.itemsize


FLOPS = {"training": "6 N C V (three matmuls)", "evaluation": "2 N C V (one matmul)"}
if CUDA:
    SHAPES = [HeadShape(N, C, 50304, torch.bfloat16) for N, C in ((65536, 768), (8192, 768), (16384, 1600))]
else:
    SHAPES = [HeadShape(64, 32, 1024, torch.float32)]


def torchs_own(options: Any) -> Head:
    if not hasattr(F, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy: from 2.13 on")
    return functools.partial(F.linear_cross_entropy, options=options)


def torchs_own_in_chunks() -> Head:
    return torchs_own(torch.nn.LinearCrossEntropyOptions() if hasattr(F, "linear_cross_entropy") else None)


CANDIDATES: dict[str, Callable[[], Head]] = {
    "torch": lambda: linear_cross_entropy_reference,
    "torch-compiled": lambda: torch.compile(linear_cross_entropy_reference, fullgraph=True),
    "torch-linear-cross-entropy": lambda: torchs_own(None),
    "torch-linear-cross-entropy-chunks": torchs_own_in_chunks,
    "chunked": lambda: functools.partial(linear_cross_entropy, implementation="chunked"),
    "triton": lambda: functools.partial(linear_cross_entropy, implementation="triton"),
}
MATMULS = "matmuls-alone"

every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"N{shape.N}-C{shape.C}")


@pytest.mark.parametrize("direction", ["training", "evaluation"])
@pytest.mark.parametrize("name", [*CANDIDATES, MATMULS])
@every_shape
def test_linear_cross_entropy(benchmark: Any, record: Record, shape: HeadShape, name: str, direction: str) -> None:
    if name == "triton" and DEVICE.type == "cpu":
        pytest.skip("Triton on a CPU is interpreted: its time would say nothing about the kernel")
    try:
        if name == MATMULS:
            call = matmuls(shape, direction)
        else:
            head = CANDIDATES[name]()
            check(name, head, shape)
            call = prepare(head, shape, direction)
        measure(benchmark, record, shape, name, direction, call)
    except torch.cuda.OutOfMemoryError:
        pytest.skip(f"out of memory on {torch.cuda.get_device_name()}")


def measure(
    benchmark: Any, record: Record, shape: HeadShape, name: str, direction: str, call: Callable[[int], object]
) -> None:
    """Time a call and record it with its size."""
    benchmark.group = f"head and loss, {direction}, {shape.N} tokens, C={shape.C}"
    dtype = str(shape.dtype).removeprefix("torch.")
    timing = time_call(benchmark, call, DEVICE, seconds=SECONDS)
    record(
        {
            "op": f"linear_cross_entropy {direction}",
            "backend": name,
            "dtype": dtype,
            "shape": {"N": shape.N, "C": shape.C, "V": shape.V},
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "bytes": shape.bytes(direction),
            "bytes_formula": "logits in dtype: 5 N V in training, 2 N V in evaluation",
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


def draw(shape: HeadShape, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """hidden and weight, which require gradients, for logits of standard deviation 1, and targets."""
    generator = torch.Generator(DEVICE).manual_seed(seed)
    hidden, weight = (torch.randn(rows, shape.C, device=DEVICE, generator=generator) for rows in (shape.N, shape.V))
    targets = torch.randint(shape.V, (shape.N,), device=DEVICE, generator=generator)
    weight /= math.sqrt(shape.C)
    return hidden.to(shape.dtype).requires_grad_(), weight.to(shape.dtype).requires_grad_(), targets


def prepare(head: Head, shape: HeadShape, direction: str) -> Callable[[int], object]:
    """The call that is timed, on inputs that rotate."""
    sets = [draw(shape, seed) for seed in range(input_sets(DEVICE, shape.bytes(direction)))]

    def training(i: int) -> object:
        hidden, weight, targets = sets[i % len(sets)]
        return torch.autograd.grad(head(hidden, weight, targets), (hidden, weight))

    @torch.no_grad()
    def evaluation(i: int) -> object:
        return head(*sets[i % len(sets)])

    return training if direction == "training" else evaluation


@torch.no_grad()
def matmuls(shape: HeadShape, direction: str) -> Callable[[int], object]:
    """hidden W^T, and in training G W and G^T hidden, each in one piece."""
    sets = [[x.detach() for x in draw(shape, seed)[:2]] for seed in range(input_sets(DEVICE, shape.bytes(direction)))]
    logits = torch.empty(shape.N, shape.V, dtype=shape.dtype, device=DEVICE)

    def call(i: int) -> object:
        hidden, weight = sets[i % len(sets)]
        torch.mm(hidden, weight.T, out=logits)
        return (logits @ weight, logits.T @ hidden) if direction == "training" else None

    return call


_checked: set[tuple[str, HeadShape]] = set()


def check(name: str, head: Head, shape: HeadShape) -> None:
    """Fail where the loss or a gradient is off from float64's by more than twice what the plain form is off, and four
    units in the last place of the tensor's scale. The candidate is given all rows, of which every so manieth counts,
    512 in all: the float64 of 65536 wouldn't fit. A candidate that has passed with a shape is not compared again."""
    if (name, shape) in _checked:
        return
    hidden, weight, targets = draw(shape, seed=0)
    kept = slice(None, None, max(1, shape.N // 512))
    few = torch.full_like(targets, -100)
    few[kept] = targets[kept]

    def results(head: Head, rows: slice = kept, dtype: torch.dtype = shape.dtype) -> list[Tensor]:
        given = [x.detach().to(dtype).requires_grad_() for x in (hidden[rows], weight)]
        loss = head(given[0], given[1], few[rows])
        dhidden, dweight = torch.autograd.grad(loss, given)
        return [loss.detach(), dhidden if rows == kept else dhidden[kept], dweight]

    truth = results(linear_cross_entropy_reference, dtype=torch.float64)
    trio = zip(results(head, slice(None)), results(linear_cross_entropy_reference), truth, strict=True)
    for what, (mine, theirs, exact) in zip(("loss", "dhidden", "dweight"), trio, strict=True):
        assert_within_budget(what, mine, theirs, exact)
    _checked.add((name, shape))
