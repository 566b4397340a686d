"""Inputs of LayerNorm and its forms: ours, the oracle, and the peers that set the budget."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import add_layer_norm, layer_norm
from fastgpt2.kernels.norm import layer_norm_reference
from tests.kernels import oracle
from tests.kernels.oracle import DEVICE, Oracle, Results
from tests.seeds import generator

NAMES = ("y", "sum", "dx", "dresidual", "dw", "db")
# (x, residual, y); weight and bias are float32, as the trainer has them.
PRECISIONS = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16 autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
    "float16 autocast": (torch.float16, torch.float32, torch.float16),
}
every_precision = pytest.mark.parametrize("precision", PRECISIONS)

Norm = Callable[..., tuple[Tensor, Tensor]]
"""(x, residual, weight, bias, eps, y's dtype) -> (y, the sum)"""
Compute = Callable[["Case"], Results]


class Case(NamedTuple):
    """x, residual, weight, bias and the gradients of y and of the sum."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    dtotal: Tensor
    eps: float = 1e-5

    def leaves(self) -> list[Tensor]:
        """What has a gradient, apart from this case's tensors."""
        return [t.detach().requires_grad_() for t in self[:4]]

    def to(self, dtype: torch.dtype) -> Case:
        return Case(*(t.to(dtype) for t in self[:6]), self.eps)


def case(
    shape: tuple[int, ...], precision: str = "float32", *, seed: int = 0, mean: float = 0.0, eps: float = 1e-5
) -> Case:
    """Rows whose means lie around `mean`."""
    rng = generator(seed, DEVICE)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64, device=DEVICE)

    x_dtype, residual_dtype, y_dtype = PRECISIONS[precision]
    C = shape[-1]
    x, residual = draw(*shape).to(x_dtype), (draw(*shape) + mean).to(residual_dtype)
    weight, bias = (1 + 0.3 * draw(C)).float(), draw(C).float()
    dy, dtotal = draw(*shape).to(y_dtype), draw(*shape).to(torch.promote_types(x_dtype, residual_dtype))
    return Case(x, residual, weight, bias, dy, dtotal, eps)


def differentiate(norm: Norm, c: Case) -> Results:
    """(y, sum, dx, dresidual, dw, db)."""
    return oracle.differentiate(lambda *leaves: norm(*leaves, c.eps, c.dy.dtype), c[:4], (c.dy, c.dtotal))


def autocast(dtype: torch.dtype, x: Tensor, residual: Tensor) -> torch.autocast:
    """What gives y this dtype."""
    return torch.autocast(DEVICE, dtype, enabled=dtype != torch.promote_types(x.dtype, residual.dtype))


def fused(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype):
    with autocast(dtype, x, residual):
        return add_layer_norm(x, residual, weight, bias, eps=eps)


def alone(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype):
    """layer_norm of the sum, in add_layer_norm's terms."""
    total = x + residual
    with autocast(dtype, x, residual):
        return layer_norm(total, weight, bias, eps=eps), total


def last(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """layer_norm of a sum that isn't written."""
    with autocast(dtype, x, residual):
        return layer_norm(x, weight, bias, eps=eps, residual=residual)


def plain(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype):
    """PyTorch's own, in the weight's precision, as under autocast."""
    total = x + residual
    return F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps).to(dtype), total


assert_same = functools.partial(oracle.assert_same, units=8)
ours = functools.partial(differentiate, fused)
ours_alone = functools.partial(differentiate, alone)


def exact(c: Case) -> Results:
    return differentiate(layer_norm_reference, c.to(torch.float64))


ORACLE = Oracle(
    NAMES,
    exact,
    (functools.partial(differentiate, plain), functools.partial(differentiate, layer_norm_reference)),
)
"""Its inputs are one Case."""
