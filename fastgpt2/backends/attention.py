"""The attention in PyTorch: the plain reference, and PyTorch's own kernels. All are called alike:

    op(qkv (B, T, 3, H, D), dropout_p=0.0, documents=None) -> (B, T, H, D)

qkv is the packed projection. dropout_p is the probability of dropping an attention weight. documents, (2, B, T) int32
from `fastgpt2.documents.document_bounds`, holds the first position of each token's document and one past its last: a
position then attends only within its own document. The softmax is at least float32; the result has qkv's dtype.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.attention.flex_attention import flex_attention as flex

from fastgpt2.documents import visible

CUDNN = SDPBackend.CUDNN_ATTENTION
BLOCK = 128
"""Positions a side of a block of flex_attention's mask, PyTorch's default."""


def naive_attention(qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None) -> Tensor:
    """Causal attention as two matmuls around a masked softmax: softmax(q k^T / sqrt(D) + mask) v."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    T, D = q.shape[-2:]
    scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(D))
    scores = scores.masked_fill(~visible(T, documents, qkv.device), float("-inf"))
    statistics = torch.promote_types(scores.dtype, torch.float32)
    weights = F.softmax(scores, dim=-1, dtype=statistics).to(v.dtype)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0.0)
    return (weights @ v).transpose(1, 2)


def sdpa_attention(qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None) -> Tensor:
    """Causal attention by `F.scaled_dot_product_attention`, which picks the kernel.

    Documents need a mask of B T^2 elements, which its flash kernel doesn't take: on CUDA the memory-efficient kernel
    then computes every tile.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = None if documents is None else visible(q.size(-2), documents, qkv.device)
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=documents is None)
    return o.transpose(1, 2)


def sdpa_picks(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, dropout_p: float = 0.0) -> SDPBackend:
    """The kernel that PyTorch picks in training for `sdpa_attention`, by its version, the device and its settings now.

    shape: of qkv, (B, T, 3, H, D).
    """
    qkv = torch.empty(shape, dtype=dtype, device=device, requires_grad=True)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return SDPBackend(torch._fused_sdp_choice(q, k, v, dropout_p=dropout_p, is_causal=True))


def cudnn_attention(qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None) -> Tensor:
    """Causal attention by cuDNN alone, through `F.scaled_dot_product_attention`.

    With documents it adds a bias of B T^2 elements and computes every tile. Its backward is not deterministic: PyTorch
    refuses it under `torch.use_deterministic_algorithms(True)` unless warn_only=True.
    """
    with sdpa_kernel(CUDNN):
        return sdpa_attention(qkv, dropout_p, documents)


def flex_attention(qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None) -> Tensor:
    """Causal attention by PyTorch's flex_attention, which skips the blocks that the mask hides. It has no dropout."""
    if dropout_p:
        raise ValueError(f"flex attention has no dropout, got {dropout_p}")
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    compiling = torch.compiler.is_compiling()
    if documents is None and not compiling:
        mask = _causal_block_mask(q.size(-2), qkv.device)
    else:
        mask = block_mask(q.size(-2), documents, qkv.device)
    # Not compiled, it stores all scores; inside a compiled model it is compiled with the rest.
    call: Any = flex if compiling or qkv.device.type != "cuda" else _compiled_flex()
    return call(q, k, v, block_mask=mask).transpose(1, 2)


@functools.cache
def _compiled_flex() -> Any:
    return torch.compile(flex, dynamic=False)


@functools.cache
def _causal_block_mask(T: int, device: torch.device) -> BlockMask:
    return block_mask(T, None, device)


def block_mask(T: int, documents: Tensor | None, device: torch.device) -> BlockMask:
    """What flex_attention needs to know of `visible`, from a few bounds a block rather than from T^2 elements."""
    key = torch.arange(0, T, BLOCK, device=device)
    query = key[:, None]
    if documents is None:
        first_query_sees = last_query_sees = torch.zeros((1, 1, key.numel(), 1), dtype=torch.int32, device=device)
    else:
        first = documents[0][:, None, :, None]
        first_query_sees, last_query_sees = first[:, :, key], first[:, :, (key + BLOCK - 1).clamp(max=T - 1)]
    some = (key <= query) & (key + BLOCK > first_query_sees)
    # Blocks where every query sees every key need no mask: those before the diagonal, within one document.
    every = (key < query) & (key >= last_query_sees) & (query + BLOCK <= T)

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k if documents is None else (q >= k) & (k >= documents[0][b, q])

    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every), *_ordered(every), BLOCK_SIZE=BLOCK, mask_mod=mask_mod, seq_lengths=(T, T)
    )


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row are set, and the columns, those first: (B, 1, rows) and (B, 1, rows, columns)."""
    set_first = blocks.to(torch.int32)
    columns = set_first.argsort(dim=-1, descending=True, stable=True)
    return set_first.sum(-1, dtype=torch.int32), columns.to(torch.int32)


def cudnn_why_not(device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float) -> str | None:
    """Say in one line why cuDNN's attention can't train with this; None if it can.

    Args:
        dtype: what it computes in, which is autocast's where that is on.
    """
    if reason := _cuda_why_not("cudnn", device):
        return reason
    if dtype not in (torch.bfloat16, torch.float16):
        return f"cudnn attention computes in bfloat16 or float16, got {dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"cudnn attention's head size must be a multiple of 8 and at most 128, got {head_dim}"
    version = torch.backends.cudnn.version() or 0
    if dropout and 91100 < version < 91400:
        return f"cuDNN {version} has no dropout in its attention, other versions have"
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "cudnn attention adds in any order, which deterministic algorithms forbid"
    return None


def flex_why_not(device: torch.device, head_dim: int, dropout: float) -> str | None:
    """Say in one line why flex_attention can't train with this; None if it can."""
    if reason := _cuda_why_not("flex", device):
        return reason
    if head_dim < 16:
        return f"flex attention's head size must be at least 16, got {head_dim}"
    if dropout:
        return f"flex attention has no dropout, got {dropout}"
    return None


def _cuda_why_not(name: str, device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"{name} attention trains on a CUDA GPU only, got {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{name} attention needs compute capability 8.0, which {device} lacks"
    return None
