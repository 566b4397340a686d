"""Who else computes what our operations compute: PyTorch's own forms, and packages if they are installed.

Each is called as our plain form is, so that one check and one clock serve all:

    attention              (qkv (B, T, 3, H, D)) -> (B, T, H, D); "-apart": (q, k, v), each (B, H, T, D)
    mlp                    (x (..., C), w_fc (4C, C), b_fc (4C,), w_proj (C, 4C), b_proj (C,)) -> (..., C)
    add_layer_norm         (x (N, C), residual (N, C), weight (C,), bias (C,)) -> (y, the sum)
    linear_cross_entropy   (hidden (N, C), weight (V, C), targets (N,)) -> the mean loss

A peer that can't run raises Unavailable: when it is loaded, or when it sees the inputs. Packages are called as their
own modules call them, untuned. A second setting that is more exact is a row of its own, because a candidate over its
error budget is not timed.
"""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable, Iterable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.contest import CUDA, NO_KERNEL, Candidate, Unavailable
from fastgpt2.backends.attention import flex_attention, flex_why_not, naive_attention, sdpa_attention
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.kernels import launch
from fastgpt2.kernels.loss import linear_cross_entropy_reference

AMPERE, HOPPER = (8, 0), (9, 0)


def torch_add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The plain form: the add, PyTorch's LayerNorm in the stream's dtype as under autocast, and the cast that the next
    matmul would do."""
    return _norm_of_sum(lambda total, w, b: F.layer_norm(total, w.shape, w, b), x, residual, weight, bias)


def _norm_of_sum(norm: Callable[..., Tensor], x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Any:
    total = residual + x
    return norm(total, weight, bias).to(x.dtype), total


# ------------------------------------------------------------------------------------------------ PyTorch's


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


# ------------------------------------------------------------------------------------------------ packages


def _package(
    module: str, package: str, capability: tuple[int, int], *, triton: bool = False, install: str | None = None
) -> Any:
    """Import a package's module.

    Args:
        package: the name that pip knows.
        capability: the least compute capability of a GPU that its kernels run on.
        triton: its kernels are Triton's: where Triton is interpreted, as in the tests, they need no GPU.
        install: how to get it, where that isn't `pip install` and its name.

    Raises:
        Unavailable: it is not installed, can't be imported, or there is no such GPU.
    """
    have = _capability()
    if have is None and not (triton and find_spec("triton") and launch.interpreting()):
        raise Unavailable(f"{package} needs a CUDA GPU")
    if have is not None and have < capability:
        raise Unavailable(f"{package} needs compute capability {_dotted(capability)}, this GPU has {_dotted(have)}")
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name and f"{module}.".startswith(f"{error.name}."):
            raise Unavailable(f"{package} is not installed: {install or f'pip install {package}'}") from None
        raise Unavailable(f"{package} can't be imported: {error}") from None
    except Exception as error:  # built against other versions: a missing symbol, an attribute that has moved
        line = str(error).partition("\n")[0]
        raise Unavailable(f"{package} can't be imported with torch {torch.__version__}: {line}") from None


def _capability() -> tuple[int, int] | None:
    return torch.cuda.get_device_capability() if CUDA else None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _flash_attn_2() -> Callable[..., Tensor]:
    # Not from flash_attn itself, a name that version 4 has as well.
    flash = _package("flash_attn.flash_attn_interface", "flash-attn", AMPERE).flash_attn_qkvpacked_func
    return lambda qkv: flash(qkv, causal=True)


def _flash_attn_3() -> Callable[..., Tensor]:
    install = "build it from the folder hopper of github.com/Dao-AILab/flash-attention"
    flash = _package("flash_attn_interface", "flash-attn-3", HOPPER, install=install).flash_attn_qkvpacked_func
    return lambda qkv: _first(flash(qkv, causal=True))


def _flash_attn_4() -> Callable[..., Tensor]:
    """It has no packed form: autograd packs the gradient."""
    flash = _package("flash_attn.cute", "flash-attn-4", HOPPER).flash_attn_func
    return lambda qkv: _first(flash(*qkv.unbind(2), causal=True))


def _first(result: Any) -> Tensor:
    """The output alone, of versions that give the softmax's statistics as well."""
    return result[0] if isinstance(result, tuple) else result


def _liger_linear_cross_entropy(*, sums: torch.dtype | None) -> Callable[..., Tensor]:
    """sums: what the weight's gradient is added up in over the chunks; None, its default, for the weight's dtype."""
    module = _package("liger_kernel.transformers.functional", "liger-kernel", AMPERE, triton=True)
    return lambda hidden, weight, targets: module.liger_fused_linear_cross_entropy(
        *_recorded(hidden, weight), targets, reduction="mean", accum_dtype=sums
    )


def _recorded(*inputs: Tensor) -> Iterable[Tensor]:
    """The inputs, where no gradient is recorded as ones that need none: some packages ask the tensors alone, and would
    make gradients that nobody takes."""
    return inputs if torch.is_grad_enabled() else (x.detach() for x in inputs)


def _liger_add_layer_norm() -> Callable[..., Any]:
    """It has no LayerNorm with the add inside."""
    function = _package("liger_kernel.ops.layer_norm", "liger-kernel", AMPERE, triton=True).LigerLayerNormFunction
    return functools.partial(_norm_of_sum, lambda total, w, b: function.apply(total, w, b, 1e-5))


def _cut_cross_entropy(*, filter_eps: str | None) -> Callable[..., Tensor]:
    """filter_eps: which blocks of the logits' gradient are taken for zero; "high" is its default, None for none."""
    module = _package("cut_cross_entropy", "cut-cross-entropy", AMPERE, triton=True)

    def head(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        if hidden.dtype.itemsize != 2:
            raise Unavailable(f"cut-cross-entropy has a backward in bfloat16 and float16 only, got {hidden.dtype}")
        return module.linear_cross_entropy(*_recorded(hidden, weight), targets, reduction="mean", filter_eps=filter_eps)

    return head


def _quack_linear_cross_entropy() -> Callable[..., Tensor]:
    module = _package("quack.linear_cross_entropy", "quack-kernels", HOPPER)
    return lambda hidden, weight, targets: module.chunked_linear_cross_entropy(
        hidden, weight, targets, reduction="mean"
    )


def _quack_mlp() -> Callable[..., Tensor]:
    """Its module leaves biases to PyTorch in training; the function beneath it takes them."""
    module = _package("quack.mlp", "quack-kernels", HOPPER)
    return lambda x, w_fc, b_fc, w_proj, b_proj: module.mlp_func(
        x, w_fc, w_proj, "gelu_tanh_approx", bias1=b_fc, bias2=b_proj
    )


def _quack_add_layer_norm() -> Callable[..., Any]:
    """Its LayerNorm has kernels for both directions, but no autograd around them and no add inside."""
    module = _package("quack.rmsnorm", "quack-kernels", HOPPER)

    class LayerNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y, rstd, mean = module.layernorm_fwd(x, weight, bias, eps=1e-5, return_rstd=True, return_mean=True)
            ctx.save_for_backward(x, weight, rstd, mean)
            return y

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, ...]:
            x, weight, rstd, mean = ctx.saved_tensors
            return module.layernorm_bwd(x, weight, dy.contiguous(), rstd, mean)

    return functools.partial(_norm_of_sum, LayerNorm.apply)


# ------------------------------------------------------------------------------------------------ the table

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
        "flash-attn": _flash_attn_2,
        "flash-attn-3": _flash_attn_3,
        "flash-attn-4": _flash_attn_4,
    },
    "mlp": {
        "torch": lambda: torch_mlp,
        "torch-compiled": lambda: _compiled(torch_mlp),
        "quack": _quack_mlp,
    },
    "add_layer_norm": {
        "torch": lambda: torch_add_layer_norm,
        "torch-compiled": lambda: _compiled(torch_add_layer_norm),
        "liger": _liger_add_layer_norm,
        "quack": _quack_add_layer_norm,
    },
    "linear_cross_entropy": {
        "torch": lambda: linear_cross_entropy_reference,
        "torch-compiled": lambda: _compiled(linear_cross_entropy_reference),
        "torch-linear-cross-entropy": lambda: _torchs_linear_cross_entropy(chunks=False),
        "torch-linear-cross-entropy-chunks": lambda: _torchs_linear_cross_entropy(chunks=True),
        "liger": lambda: _liger_linear_cross_entropy(sums=None),
        "liger-float32-sums": lambda: _liger_linear_cross_entropy(sums=torch.float32),
        "cut-cross-entropy": lambda: _cut_cross_entropy(filter_eps="high"),
        "cut-cross-entropy-unfiltered": lambda: _cut_cross_entropy(filter_eps=None),
        "quack": _quack_linear_cross_entropy,
    },
}
PEERS = {
    op: {name: Candidate("floor" if name.endswith("-apart") else "peer", load) for name, load in loaders.items()}
    for op, loaders in _LOADERS.items()
}
"""By operation and name. "-apart" is a floor: q, k, v and their gradients are separate tensors, and the copy that packs
the gradient is left out."""
