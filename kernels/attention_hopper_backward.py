"""Flash attention, backward, for Hopper: attention.py's maths with a warp that loads and two warpgroups that multiply.

Written in Gluon, as the forward is: attention_hopper.py explains producer, consumers, rings and barriers. Two kernels:

    dq, delta   attention_hopper_dq.py. A program has 128 queries, 64 a consumer. Tiles of 64 keys (k, v) pass by, from
                key 0 to the diagonal
    dk, dv      attention_hopper_dkdv.py. A program has 128 keys, 64 a consumer. Tiles of 64 queries (q, do, lse, delta)
                pass by, from the last to the diagonal

S and dP are transposed for dk and dv: P^T and dS^T are then left operands, straight from registers. A slot of a ring
holds a tile of everything and has two barriers, full and empty.

Order of a consumer's products for tile i, and what is computed while they run. All have ended when the next tile's
begin: the assembler serialises them if one runs on (NOTES.md).

    dq        issue dP_i                          P_i = 2^(c S_i - lse)
              issue S_(i+1), wait for dP_i        dS_i = P_i * (dP_i - delta)
              issue dq += dS_i k_i, wait for all
    dk, dv    issue dP_i                          P_i
              issue dv += P_i do_i and S_(i+1), wait for dP_i    dS_i
              issue dk += dS_i q_i, wait for all

The wait for tile i + 1 is a branch, which the assembler moves no exponential past. dq has it after P_i, which would
otherwise be computed when dP_i has ended; dk, dv before, as P_i would otherwise be computed before dP_i is issued.

A consumer's last tile is its diagonal and the only one that is masked. The two consumers' diagonals are one tile apart:
one of them skips the program's last tile. Copies fill rows past T with zeros: a query past T has q = do = delta = 0 and
adds 0. A copy takes 16 bytes, so rows of lse and delta are as long as the next multiple of 4.

Memory is attention.py's. FLOPs executed, at T = 1024: 6% more than the causal half, for the diagonals.

Causal, without documents and dropout, bfloat16 and float16, D = 64. attention.py calls these kernels where it is asked
for, and its own for all else.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastgpt2.kernels.attention_hopper import CONSUMERS, ROWS, copied_by_tiles, descriptor
from fastgpt2.kernels.attention_hopper_dkdv import attention_backward_dkdv_hopper_kernel
from fastgpt2.kernels.attention_hopper_dq import attention_backward_dq_hopper_kernel
from fastgpt2.kernels.launch import on
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

HEAD_DIM = 64


def takes(*tensors: Tensor) -> bool:
    """Whether the kernels take these (B, T, H, D)."""
    return tensors[0].size(-1) == HEAD_DIM and copied_by_tiles(*tensors)


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    scale: float,
    want_bias: bool,
    dq_config: LaunchConfig | None = None,
    dkdv_config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns dqkv (B, T, 3, H, D), contiguous, and its sum over B and T: (3 H D,) in float32.

    Args:
        do, q, k, v, o: (B, T, H, D), not empty, with shapes and strides that `takes` accepts.
        lse: (B, H, T), contiguous, as are the other arguments of attention.py's attention_backward.
    """
    B, T, H, D = q.shape
    precision = precision_name(q.dtype)
    dq_config = dq_config or lookup("attention_backward_dq_hopper", precision, D, q.device)
    dkdv_config = dkdv_config or lookup("attention_backward_dkdv_hopper", precision, D, q.device)
    dqkv = torch.empty((B, T, 3, H, D), dtype=q.dtype, device=q.device)
    lse = F.pad(lse, (0, -T % 4)) if T % 4 else lse
    delta = torch.empty_like(lse)
    # Not torch.empty: k's sums stay 0.
    shape = (triton.cdiv(T, ROWS.value), B, 3, H, D)
    sums = torch.zeros(shape, dtype=lse.dtype, device=q.device) if want_bias else None
    tiles = {name: descriptor(x, ROWS.value) for name, x in (("q", q), ("k", k), ("v", v), ("do", do), ("o", o))}
    programs = B * H * triton.cdiv(T, ROWS.value * CONSUMERS.value)
    with on(q.device):
        attention_backward_dq_hopper_kernel[(programs,)](
            *(tiles[name] for name in ("q", "k", "v", "do", "o")),
            lse,
            delta,
            dqkv,
            sums,
            T,
            H,
            scale,
            D=D,
            **dq_config.arguments(),
        )
        attention_backward_dkdv_hopper_kernel[(programs,)](
            *(tiles[name] for name in ("q", "k", "v", "do")),
            row_descriptor(lse),
            row_descriptor(delta),
            dqkv,
            sums,
            T,
            H,
            scale,
            D=D,
            **dkdv_config.arguments(),
        )
    return dqkv, lse.new_empty(0) if sums is None else sums.sum((0, 1)).view(-1)


def row_descriptor(x: Tensor) -> TensorDescriptor:
    """What a copy of one number for each of a tile's tokens needs. x: (B, H, tokens)."""
    rows = x.flatten(0, 1)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, ROWS.value], row_layout())


def row_layout() -> gl.NVMMASharedLayout:
    """A row of float32."""
    return gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
