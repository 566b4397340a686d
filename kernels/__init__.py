"""Triton kernels for training transformers, usable by anyone: they know nothing of the model they serve.

Shapes: B batch, T tokens, H heads, D head size, C = H D channels, V vocabulary.

    flash_attention_qkv(qkv (B, T, 3, H, D)) -> (B, T, H, D)
    flash_attention(q, k, v (B, T, H, D)) -> (B, T, H, D)
    gelu_mlp(x (..., C), w_fc (4C, C), b_fc (4C,), w_proj (C, 4C), b_proj (C,)) -> (..., C)
    layer_norm(x (..., C), weight (C,), bias (C,), residual=None or (..., C)) -> (..., C)
    add_layer_norm(x (..., C), residual (..., C), weight (C,), bias (C,)) -> (y (..., C), x + residual (..., C))
    linear_cross_entropy(hidden (..., C), weight (V, C), targets (...)) -> the mean loss

A function is imported when it is first asked for, so that `import kernels` works without Triton. Where a function has
its module's name, `kernels.<name>` is the function, whatever was imported before; `from kernels.<name> import ...`
reaches into the module.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

# transformers takes any importable package named `kernels` whose version it knows for one of its own
# dependencies: this number must stay outside the range it asks for (0.18.2 to 0.19).
__version__ = "0.1.0"

_HOME = {
    "add_layer_norm": "kernels.layer_norm",
    "flash_attention": "kernels.attention",
    "flash_attention_qkv": "kernels.attention",
    "gelu_mlp": "kernels.gelu_mlp",
    "layer_norm": "kernels.layer_norm",
    "linear_cross_entropy": "kernels.linear_cross_entropy",
}

__all__ = ["add_layer_norm", "flash_attention", "flash_attention_qkv", "gelu_mlp", "layer_norm", "linear_cross_entropy"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]


class _Package(ModuleType):
    """Importing a submodule binds it in its package: not so where the name is a function's."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _HOME or not isinstance(value, ModuleType):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
