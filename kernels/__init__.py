"""Triton kernels for training transformers. They know nothing of the model they serve.

Shapes: B batch, T tokens, H heads, D head size, C = H D channels, V vocabulary.

    flash_attention_qkv(qkv (B, T, 3, H, D)) -> (B, T, H, D)
    flash_attention(q, k, v (B, T, H, D)) -> (B, T, H, D)
    gelu_mlp(x (..., C), w_fc (4C, C), b_fc (4C,), w_proj (C, 4C), b_proj (C,)) -> (..., C)
    layer_norm(x (..., C), weight (C,), bias (C,), residual=None or (..., C)) -> (..., C)
    add_layer_norm(x (..., C), residual (..., C), weight (C,), bias (C,)) -> (y (..., C), x + residual (..., C))
    linear_cross_entropy(hidden (..., C), weight (V, C), targets (...)) -> the mean loss

Each function is imported on first use, so `import fastgpt2.kernels` works without Triton.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.kernels.attention import flash_attention, flash_attention_qkv
    from fastgpt2.kernels.loss import linear_cross_entropy
    from fastgpt2.kernels.mlp import gelu_mlp
    from fastgpt2.kernels.norm import add_layer_norm, layer_norm

__all__ = ["add_layer_norm", "flash_attention", "flash_attention_qkv", "gelu_mlp", "layer_norm", "linear_cross_entropy"]

_HOME = {
    "add_layer_norm": "fastgpt2.kernels.norm",
    "flash_attention": "fastgpt2.kernels.attention",
    "flash_attention_qkv": "fastgpt2.kernels.attention",
    "gelu_mlp": "fastgpt2.kernels.mlp",
    "layer_norm": "fastgpt2.kernels.norm",
    "linear_cross_entropy": "fastgpt2.kernels.loss",
}


def __getattr__(name: str) -> Any:
    """Import a public function on first use."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
