"""Residual add and LayerNorm in plain PyTorch: op(x, residual, weight, bias, last=False) -> (y, new residual)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def torch_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, *, last: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Add x to the residual stream and normalise it over its last dimension (eps 1e-5, as GPT-2).

    Args:
        x: (B, T, C), what the last branch computed.
        residual: (B, T, C), the stream so far; None where x itself begins it.
        last: the stream ends here: no norm follows that adds to it.

    Returns:
        (LayerNorm(residual + x), residual + x, or None after the last norm).
    """
    if residual is not None:
        x = residual + x
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps=1e-5), None if last else x
