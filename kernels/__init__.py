"""Triton kernels for training transformers, usable by anyone: they know nothing of the model they serve.

Shapes: B batch, T tokens, H heads, D head size, C = H D channels, V vocabulary.

    flash_attention_qkv(qkv (B, T, 3, H, D)) -> (B, T, H, D)
    flash_attention(q, k, v (B, T, H, D)) -> (B, T, H, D)

A function is imported when it is first asked for, so that `import kernels` works without Triton.
"""

from importlib import import_module
from typing import Any

# transformers takes any importable package named `kernels` whose version it knows for one of its own
# dependencies: this number must stay outside the range it asks for (0.18.2 to 0.19).
__version__ = "0.1.0"

_HOME = {
    "flash_attention": "kernels.attention",
    "flash_attention_qkv": "kernels.attention",
}

__all__ = ["flash_attention", "flash_attention_qkv"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}; it has {', '.join(sorted(_HOME))}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOME]
