"""The MLP in plain PyTorch: op(x, w_fc, b_fc, w_proj, b_proj) -> y."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

K0 = 2.0 * math.sqrt(2.0 / math.pi)
K1 = 0.044715 * K0


def torch_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """gelu(x w_fc^T + b_fc) w_proj^T + b_proj with GPT-2's tanh GELU; x (..., C), w_fc (4C, C), w_proj (C, 4C)."""
    return F.linear(_gelu(F.linear(x, w_fc, b_fc)), w_proj, b_proj)


def _gelu(x: Tensor) -> Tensor:
    if torch.compiler.is_compiling() and x.device.type == "cpu":
        # (1 + tanh(z / 2)) / 2 is sigmoid(z), which Inductor's C++ computes in half the time.
        return x * torch.sigmoid(x * (K0 + K1 * x * x))
    return F.gelu(x, approximate="tanh")
