"""Kernels of other packages that fastgpt2 is compared with. What is not installed says so and is not timed.

One that is not here is timed without a change: `pytest bench/ --attn mypackage.module:function`.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from bench.contest import CUDA, Unavailable
from fastgpt2.kernels import launch


def package_module(module: str, package: str, *, triton: bool = False) -> Any:
    """A package's module.

    Args:
        package: the name that pip knows.
        triton: its kernels are Triton's. In Triton's interpreter they need no GPU.

    Raises:
        Unavailable: it is not installed, can't be imported, or needs a GPU.
    """
    if not CUDA and not (triton and launch.interpreting()):
        raise Unavailable(f"{package} needs a CUDA GPU")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise Unavailable(f"{package} is not installed: pip install {package}") from None
        raise Unavailable(f"{package} can't be imported: {error}") from None
    except Exception as error:  # built against other versions: a missing symbol, an attribute that has moved
        line = str(error).partition("\n")[0]
        raise Unavailable(f"{package} can't be imported with torch {torch.__version__}: {line}") from None


def flash_attn_2() -> Callable[..., Tensor]:
    # Not from flash_attn itself, a name that version 4 has as well.
    flash = package_module("flash_attn.flash_attn_interface", "flash-attn").flash_attn_qkvpacked_func
    return lambda qkv: flash(qkv, causal=True)


def flash_attn_3() -> Callable[..., Tensor]:
    flash = package_module("flash_attn_interface", "flash-attn-3").flash_attn_qkvpacked_func

    def attention(qkv: Tensor) -> Tensor:
        result = flash(qkv, causal=True)
        return result[0] if isinstance(result, tuple) else result  # some versions add the softmax's statistics

    return attention


def liger_norm() -> Callable[..., tuple[Tensor, Tensor]]:
    """Liger's LayerNorm after PyTorch's add: it has none with the add inside."""
    function = package_module("liger_kernel.ops.layer_norm", "liger-kernel", triton=True).LigerLayerNormFunction

    def norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        total = residual + x
        return function.apply(total, weight, bias, 1e-5).to(x.dtype), total

    return norm


def liger_loss() -> Callable[..., Tensor]:
    """Liger's head and loss; the weight's gradient is summed in float32 over its chunks."""
    module = package_module("liger_kernel.transformers.functional", "liger-kernel", triton=True)

    def loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # it asks the tensors alone, and would make gradients that nobody takes
            hidden, weight = hidden.detach(), weight.detach()
        return module.liger_fused_linear_cross_entropy(
            hidden, weight, targets, reduction="mean", accum_dtype=torch.float32
        )

    return loss
