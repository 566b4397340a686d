"""The seam: which implementation computes each slot of the model.

Modules own parameters, ops own compute. An `Ops` is handed to the model's constructor; the state_dict is
the same whatever it holds, so "the backends agree" means: same weights, other ops, same loss. A new
implementation is one function and one line in a table. Values are "module:function", imported when
chosen, so that neither Triton nor a kernel is imported by a run that doesn't use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.attention import sdpa_attention
from fastgpt2.config import ConfigError

ATTENTION: dict[str, str] = {
    "naive": "fastgpt2.attention:naive_attention",
    "sdpa": "fastgpt2.attention:sdpa_attention",
    "triton": "kernels.attention:flash_attention_qkv",
}

AttentionOp = Callable[..., Tensor]
MlpOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
NormOp = Callable[[Tensor, Tensor | None, Tensor, Tensor], tuple[Tensor, Tensor]]
LossOp = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def torch_mlp(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """gelu(x w_fc^T + b_fc) w_proj^T + b_proj with GPT-2's tanh GELU; x (..., C), w_fc (4C, C), w_proj (C, 4C)."""
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


def torch_norm(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Add x to the residual stream and normalise it over its last dimension (eps 1e-5, as GPT-2).

    Args:
        x: (B, T, C), what the last branch computed.
        residual: (B, T, C), the stream so far; None where x itself begins it.

    Returns:
        (LayerNorm(residual + x), residual + x).
    """
    if residual is not None:
        x = residual + x
    return F.layer_norm(x, (x.size(-1),), weight, bias, eps=1e-5), x


def torch_loss(hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int) -> Tensor:
    """Mean next-token cross-entropy in nats.

    Args:
        hidden: (B, T, C), after the last LayerNorm.
        weight: (padded vocabulary, C), the tied head; its rows from vocab_size on are outside the softmax.
        targets: (B, T) int64.

    Returns:
        A scalar, float32 at least.
    """
    # A bias of -inf takes the padding out of the softmax, gradient and all: exp(-inf) is exactly 0. Cutting the
    # logits instead would copy them, forward and backward (1.3x the time of this function on a CPU).
    padding = hidden.new_zeros(weight.size(0))
    padding[vocab_size:] = float("-inf")
    logits = F.linear(hidden, weight, padding).flatten(0, -2)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())


@dataclass(frozen=True)
class Ops:
    """One implementation a slot. The shapes are in the functions above, which are the plain forms."""

    attention: AttentionOp = sdpa_attention
    mlp: MlpOp = torch_mlp
    norm: NormOp = torch_norm
    loss: LossOp = torch_loss


def make_ops(
    attention: str = "auto",
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    dropout: float = 0.0,
    tf32: bool = False,
) -> tuple[Ops, dict[str, str]]:
    """The ops asked for, and what each choice became: {"attention": "sdpa"}.

    Args:
        attention: a key of ATTENTION, or "auto".
        device, dtype, head_dim, dropout: what the attention will be called with.
        tf32: float32 products on the matrix units in TF32 (10 bits of mantissa) rather than exactly.

    Raises:
        ConfigError: the implementation named can't run here; the message says why and what would.
    """
    device = torch.device(device)
    name = "sdpa" if attention == "auto" else attention
    # auto is SDPA until a measured table shows our kernel ahead on the GPU at hand: bench/results has none yet.
    if name not in ATTENTION:
        raise ConfigError(f"no attention {name!r}: there are auto, {', '.join(ATTENTION)}")
    if name == "triton":
        _check_triton(device, dtype, head_dim, dropout)
    function = _load(ATTENTION[name])
    if name == "triton":
        function = partial(function, allow_tf32=tf32)
    return Ops(attention=function), {"attention": name}


def _check_triton(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> None:
    try:
        kernel = import_module("kernels.attention")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ConfigError(
            "--attn triton needs the triton package, which this machine lacks (it is published for Linux): "
            "use --attn sdpa"
        ) from None
    reason = kernel.why_unsupported(device, dtype, head_dim, dropout)
    if reason:
        raise ConfigError(f"--attn triton can't run here: {reason}")


def _load(path: str) -> Callable[..., Tensor]:
    module, function = path.split(":")
    return getattr(import_module(module), function)
