"""Who else computes what our operations compute: PyTorch's own forms. `pytest bench/ --attn module:function` adds others.

Each is called as our plain form is, so that one check and one clock serve all:

    attention              (qkv (B, T, 3, H, D)) -> (B, T, H, D); "-apart": (q, k, v), each (B, H, T, D)
    mlp                    (x (..., C), w_fc (4C, C), b_fc (4C,), w_proj (C, 4C), b_proj (C,)) -> (..., C)
    add_layer_norm         (x (N, C), residual (N, C), weight (C,), bias (C,)) -> (y, the sum)
    linear_cross_entropy   (hidden (N, C), weight (V, C), targets (N,)) -> the mean loss

A peer that can't run raises Unavailable: when it is loaded, or when it sees the inputs.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contest import CUDA, NO_KERNEL, Candidate, Unavailable
from fastgpt2.backends.attention import flex_attention, flex_why_not, naive_attention, sdpa_attention
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.kernels.loss import linear_cross_entropy_reference


def torch_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form: the add, PyTorch's LayerNorm in the stream's dtype as under autocast, and the next matmul's cast."""
    total = residual + x
    return F.layer_norm(total, weight.shape, weight, bias).to(x.dtype), total


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if not CUDA and shutil.which(cxx := os.environ.get("CXX", "g++")) is None:
        raise Unavailable(f"torch.compile on a CPU needs a C++ compiler and {cxx} is not found")
    return torch.compile(function, fullgraph=True, dynamic=False)


def _sdpa_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _held(kernel: SDPBackend, function: Callable[..., Tensor] = sdpa_attention) -> Callable[..., Tensor]:
    """SDPA held to one of its kernels, forward and backward."""
    if not CUDA:
        raise Unavailable("PyTorch's attention kernels are told apart on a CUDA GPU only")

    def attention(*inputs: Tensor) -> Tensor:
        try:
            with sdpa_kernel(kernel):
                return function(*inputs)
        except RuntimeError as error:
            if not any(sign in str(error) for sign in NO_KERNEL):
                raise
            raise Unavailable(f"PyTorch has no {kernel.name} kernel for these inputs here") from None

    return attention


def _flex() -> Callable[..., Tensor]:
    device = torch.device("cuda" if CUDA else "cpu")
    if reason := flex_why_not(device, 64, 0.0):
        raise Unavailable(reason)
    return flex_attention


def _torchs_linear_cross_entropy(*, chunks: bool) -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no linear_cross_entropy: from 2.13 on")
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions() if chunks else None)


_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
_LOADERS: dict[str, dict[str, Callable[[], Callable[..., Any]]]] = {
    "attention": {
        "naive": lambda: naive_attention,
        "sdpa": lambda: sdpa_attention,
        **{f"sdpa-{name}": functools.partial(_held, kernel) for name, kernel in _SDPA.items()},
        **{f"sdpa-{name}-apart": functools.partial(_held, _SDPA[name], _sdpa_apart) for name in ("cudnn", "flash")},
        "flex": _flex,
        "naive-compiled": lambda: _compiled(naive_attention),
    },
    "mlp": {
        "torch": lambda: torch_mlp,
        "torch-compiled": lambda: _compiled(torch_mlp),
    },
    "add_layer_norm": {
        "torch": lambda: torch_add_layer_norm,
        "torch-compiled": lambda: _compiled(torch_add_layer_norm),
    },
    "linear_cross_entropy": {
        "torch": lambda: linear_cross_entropy_reference,
        "torch-compiled": lambda: _compiled(linear_cross_entropy_reference),
        "torch-linear-cross-entropy": lambda: _torchs_linear_cross_entropy(chunks=False),
        "torch-linear-cross-entropy-chunks": lambda: _torchs_linear_cross_entropy(chunks=True),
    },
}
PEERS = {
    op: {name: Candidate("floor" if name.endswith("-apart") else "peer", load) for name, load in loaders.items()}
    for op, loaders in _LOADERS.items()
}
"""By operation and name. "-apart" is a floor: q, k, v and their gradients are separate tensors, and the copy that packs
the gradient is left out."""
