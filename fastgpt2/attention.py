"""The attention in plain PyTorch: the reference, and PyTorch's own fused forms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Causal attention as two matmuls around a masked softmax: softmax(q k^T / sqrt(D) + mask) v.

    Args:
        qkv: (B, T, 3, H, D), the packed projection.
        dropout_p: probability of dropping an attention weight.

    Returns:
        (B, T, H, D), in qkv's dtype. The softmax is in float32 for 16-bit inputs.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    T, D = q.shape[-2:]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    future = torch.ones(T, T, dtype=torch.bool, device=qkv.device).triu(1)
    scores = scores.masked_fill(future, float("-inf"))
    statistics = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=statistics).to(v.dtype)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0.0)
    return (weights @ v).transpose(1, 2)


def sdpa_attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    """Causal attention by `F.scaled_dot_product_attention`; arguments and result as naive_attention."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout_p, is_causal=True).transpose(1, 2)
