"""Dropout of a (queries, keys) matrix that is never stored: each weight's position decides whether it is kept.

Philox4x32-7 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3": seven rounds are the fewest that
pass BigCrush) makes 128 random bits from a 64-bit key, the seed, and a counter: the head's number in the batch and the
weight's query and key, 32 bits each. Every kernel gets the same answer for a weight, whatever its tiles. No two
weights of one seed share bits.

A call gives eight numbers of 16 bits, and each weight takes one. Eight weights share a call: queries that differ in bit
3 and keys that differ in bits 3 and 4. On sm_80 and sm_90 the matrix units write these eight weights of a tile of S to
one thread, and the compiler merges the eight calls into one. This affects speed only.

Nothing runs on the host: the seed is a tensor on the device, drawn there from torch's generator.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels.launch import on

ROUNDS = tl.constexpr(7)
BITS = 16
TILE = 128


@triton.jit
def kept(stream, query, key, QUERIES: tl.constexpr, KEYS: tl.constexpr, DROP: tl.constexpr):
    """Which weights of a tile are kept, (QUERIES, KEYS): those whose 16 random bits are at least DROP.

    stream: the seed, and the head's number in the batch. query, key: the tile's first, multiples of QUERIES and KEYS,
    which are powers of two and at least 16.
    """
    seed, head = stream
    q, k = tl.arange(0, QUERIES)[:, None], tl.arange(0, KEYS)[None, :]
    half = k & 16
    if KEYS == 16:
        half, key = key & 16, key & ~16
    # The counter of the eight: clear their three bits. Subtract them one by one, within the tile: LLVM then sees that
    # the eight counters are equal. With masks it still makes up to four calls.
    q, row, k, column = q - (q & 8), q & 8, k - (k & 8) - (k & 16), k & 8
    a, b, c, d = tl.philox(seed, query + q, key + k, tl.cast(head, tl.int32), 0, ROUNDS)
    word = tl.where(row == 0, tl.where(column == 0, a, b), tl.where(column == 0, c, d))
    # Move the weight's half to the top. The bits below it are beyond the threshold's last place.
    return tl.where(half == 0, word << 16, word) >= tl.full((), DROP << 16, tl.uint32)


@triton.jit
def _dropout_mask_kernel(seed_ptr, mask_ptr, T, DROP: tl.constexpr, TILE: tl.constexpr):
    tiles = tl.cdiv(T, TILE)
    head = tl.program_id(0) // (tiles * tiles)
    query, key = tl.program_id(0) // tiles % tiles * TILE, tl.program_id(0) % tiles * TILE
    keep = kept((tl.load(seed_ptr), head), query, key, TILE, TILE, DROP)
    query, key = query + tl.arange(0, TILE)[:, None], key + tl.arange(0, TILE)[None, :]
    tl.store(mask_ptr + (tl.cast(head, tl.int64) * T + query) * T + key, keep, mask=(query < T) & (key < T))


def weights_to_drop(p: float) -> int:
    """How many of 2^16 weights to drop for a probability p; 0 only for p = 0.

    This rounds p to a multiple of 2^-16 from 2^-16 to 1 - 2^-16. The kept weights are scaled by the rounded
    probability, so the expectation is exact.
    """
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {p}")
    return min(max(round(p * 2**BITS), 1), 2**BITS - 1) if p else 0


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed, one int64, from torch's generator on the device: each replay of a CUDA graph draws a new one."""
    return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device=device)


def dropout_mask(seed: Tensor, p: float, B: int, H: int, T: int) -> Tensor:
    """The weights that attention keeps with a seed: (B, H, T, T), True where kept, on the seed's device.

    For tests, and for replaying a step; attention itself never stores it.
    """
    mask = torch.empty((B, H, T, T), dtype=torch.bool, device=seed.device)
    with on(seed.device):
        _dropout_mask_kernel[(B * H * triton.cdiv(T, TILE) ** 2,)](seed, mask, T, weights_to_drop(p), TILE)
    return mask
