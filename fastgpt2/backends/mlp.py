"""The MLP in plain PyTorch: op(x, w_fc, b_fc, w_proj, b_proj) -> y."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def torch_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """gelu(x w_fc^T + b_fc) w_proj^T + b_proj with GPT-2's tanh GELU; x (..., C), w_fc (4C, C), w_proj (C, 4C)."""
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)
