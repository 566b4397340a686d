"""Inputs of the GELU-MLP and its forms: ours, the oracle, and the peers that set the budget."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import gelu_mlp
from fastgpt2.kernels.mlp import gelu_mlp_reference
from tests.kernels.oracle import DEVICE, Oracle, Results, differentiate
from tests.seeds import generator

NAMES = ("y", "dx", "dw_fc", "db_fc", "dw_proj", "db_proj")
Shape = tuple[int, int, int, int]
"""Rows, C, HIDDEN, N."""


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, *, seed: int = 0, gain: float = 1.0) -> Results:
    """x, w_fc, b_fc, w_proj, b_proj and dy; gain is about the standard deviation of the pre-activation."""
    M, C, HIDDEN, N = shape
    rng = generator(seed, DEVICE)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=rng, dtype=torch.float64, device=DEVICE)).to(dtype)

    return (
        draw(M, C),
        draw(HIDDEN, C, scale=gain * C**-0.5),
        draw(HIDDEN),
        draw(N, HIDDEN, scale=HIDDEN**-0.5),
        draw(N),
        draw(M, N),
    )


def ours(*tensors: Tensor, **options) -> Results:
    *tensors, dy = tensors
    return differentiate(functools.partial(gelu_mlp, **options), tensors, (dy,))


def plain(*tensors: Tensor) -> Results:
    *tensors, dy = tensors
    return differentiate(gelu_mlp_reference, tensors, (dy,))


def exact(*tensors: Tensor) -> Results:
    return plain(*(x.double() for x in tensors))


def apart(*tensors: Tensor) -> Results:
    """The other plain form: biases added after the products."""

    def function(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
        return F.gelu(x @ w_fc.t() + b_fc, approximate="tanh") @ w_proj.t() + b_proj

    *tensors, dy = tensors
    return differentiate(function, tensors, (dy,))


ORACLE = Oracle(NAMES, exact, (plain, apart))
