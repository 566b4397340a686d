"""Other ways to compute a slot, PyTorch's and other packages', beside those in fastgpt2.slots.

Each is called as the slot's plain form is, so that one check and one clock serve all; "-apart" takes q, k and v, each
(B, H, T, D). One that can't run raises Unavailable: when it is loaded, or when it sees the inputs.
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
from bench.ops import packages
from fastgpt2.backends.attention import sdpa_attention


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    if not CUDA and shutil.which(cxx := os.environ.get("CXX", "g++")) is None:
        raise Unavailable(f"torch.compile on a CPU needs a C++ compiler and {cxx} is not found")
    return torch.compile(function, fullgraph=True, dynamic=False)


def _sdpa_apart(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


def _held(kernel: SDPBackend, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
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


def _torchs_linear_cross_entropy(*, chunks: bool) -> Callable[..., Tensor]:
    if not hasattr(F, "linear_cross_entropy"):
        raise Unavailable("this torch has no linear_cross_entropy: from 2.13 on")
    return functools.partial(F.linear_cross_entropy, options=torch.nn.LinearCrossEntropyOptions() if chunks else None)


def _load_held(kernel: SDPBackend, *, apart: bool) -> Callable[[], Callable[..., Tensor]]:
    return functools.partial(_held, kernel, _sdpa_apart if apart else sdpa_attention)


PEERS: dict[str, dict[str, Candidate]] = {
    "attn": {
        "sdpa-flash": Candidate("peer", _load_held(SDPBackend.FLASH_ATTENTION, apart=False)),
        "sdpa-efficient": Candidate("peer", _load_held(SDPBackend.EFFICIENT_ATTENTION, apart=False)),
        "sdpa-cudnn-apart": Candidate("floor", _load_held(SDPBackend.CUDNN_ATTENTION, apart=True)),
        "sdpa-flash-apart": Candidate("floor", _load_held(SDPBackend.FLASH_ATTENTION, apart=True)),
        "flash-attn": Candidate("peer", packages.flash_attn_2),
        "flash-attn-3": Candidate("peer", packages.flash_attn_3),
    },
    "norm": {"liger": Candidate("peer", packages.liger_norm)},
    "loss": {
        "liger": Candidate("peer", packages.liger_loss),
        "torch-linear-cross-entropy": Candidate("peer", lambda: _torchs_linear_cross_entropy(chunks=False)),
        "torch-linear-cross-entropy-chunks": Candidate("peer", lambda: _torchs_linear_cross_entropy(chunks=True)),
    },
}
"""By slot and name. "-apart" is a floor: q, k, v and their gradients are separate tensors, and the copy that packs the
gradient is left out."""
