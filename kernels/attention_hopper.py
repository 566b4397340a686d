"""Flash attention, forward, for Hopper: attention.py's maths with one warp that loads and two warpgroups that multiply.

Written in Gluon, the lower level of Triton, which lets a program give its warps different code:

    producer     one warp: copies q, then the tiles of k and v, last keys first, into a ring of STAGES slots (TMA)
    consumers    two warpgroups of four warps, 64 queries each: S = q k^T, softmax, o += P v (wgmma)

Barriers in shared memory (mbarriers) order them. A slot of k and one of v have two each:

    full     one arrival, the producer's, and the bytes of its copy: consumers may read the slot
    empty    two arrivals, one a consumer: the producer may overwrite it

A wait names the parity of the phase that must have ended. Use number i of a ring has slot i mod STAGES and parity
(i div STAGES) mod 2. A producer waits for the other parity: an empty slot's first wait passes at once.

Order of a consumer's products, so that the matrix units always have one while the exponentials are computed:

    S_i = q k_i^T, o += P_(i-1) v_(i-1)     both issued
    wait for S_i, then P_i = softmax(S_i)    while P_(i-1) v_(i-1) runs
    wait for v_i                             see below
    wait for o, then scale it by 2^(m_(i-1) - m_i)

The wait for v_i comes one iteration early: it is a branch, and the assembler moves no exponential past it. Without it
the assembler computes all of them after the wait for o, when no product runs (NOTES.md). v_(i-1) is still held then, so
a ring needs two slots.

The first tile is the one on the diagonal and the only one that is masked. It is as wide as a program's queries are
many: with narrower tiles the first consumer would see only masked keys. Copies fill rows past T and channels past D
with zeros; no query before T sees a key past T, and nothing past T or D is stored.

Memory and FLOPs are attention.py's. FLOPs executed include the masked half of the diagonal tiles: at T = 1024 89% of
the pairs computed count. D = 80 and 96 are computed as 128.

Causal, without documents and dropout, bfloat16 and float16. attention.py calls this kernel where it is asked for, and
its own kernel for all else.

Papers: FlashAttention-3 (Shah et al. 2024, arXiv:2407.08608).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from fastgpt2.kernels import attention_device
from fastgpt2.kernels.attention_device import LOG2_E
from fastgpt2.kernels.launch import hash_callees_first, on
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

ROWS = gl.constexpr(64)
"""Queries of a consumer: what one warpgroup's product takes."""
CONSUMERS = gl.constexpr(2)
# Registers a thread. The three warpgroups (the producer's is padded with idle warps) have 504 to share.
CONSUMER_REGISTERS = gl.constexpr(240)
PRODUCER_REGISTERS = gl.constexpr(24)

# The same source as the Triton kernels', which the interpreter runs.
place_program = gluon.jit(attention_device.place.fn)
update_softmax = gluon.jit(attention_device.update_softmax.fn)
# Triton 3.6 has the second name, later versions the first.
copy_tile: Any = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns o (B, T, H, D), contiguous, and the base-2 lse (B, H, T) in float32.

    Args:
        q, k, v: (B, T, H, D), not empty, with strides that `copied_by_tiles` accepts.
        config: used instead of the table's.
    """
    B, T, H, D = q.shape
    config = config or lookup("attention_forward_hopper", precision_name(q.dtype), D, q.device)
    assert config.block_m is not None and config.block_n is not None
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    with on(q.device):
        attention_forward_hopper_kernel[(B * H * triton.cdiv(T, config.block_m),)](
            descriptor(q, ROWS.value),
            descriptor(k, config.block_n),
            descriptor(v, config.block_n),
            o,
            lse,
            T,
            H,
            scale,
            D=D,
            **config.arguments(),
        )
    return o, lse


def copied_by_tiles(*tensors: Tensor) -> bool:
    """Whether the hardware can copy tiles of these (B, T, H, D): addresses and strides are multiples of 16 bytes."""
    return all(
        x.data_ptr() % 16 == 0
        and x.stride(-1) == 1
        and all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in x.stride()[:-1])
        for x in tensors
    )


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """What a copy of `rows` tokens of one head of x (B, T, H, D) needs."""
    box = tile(rows, x.size(-1))
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout(x.itemsize))


def tile(rows: int, head_dim: int) -> list[int]:
    """The shape of a copy; channels past the head's become zeros."""
    return [1, rows, 1, triton.next_power_of_2(head_dim)]


def layout(itemsize: int) -> gl.NVMMASharedLayout:
    """Rows of 128 bytes, swizzled as products read them."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * itemsize, rank=4)


@gluon.jit
def turn(i, STAGES: gl.constexpr):
    """The slot of a ring's use number i, and the parity of its phase."""
    return i % STAGES, (i // STAGES) & 1


@gluon.jit
def matrix(tiles, slot):
    """One slot of a ring as (rows, channels)."""
    x = tiles.index(slot)
    return x.reshape([x.shape[1], x.shape[3]])


@gluon.jit
def make_tiles(COUNT: gl.constexpr, descriptor):
    """Shared memory for as many copies."""
    SHAPE: gl.constexpr = [COUNT] + descriptor.block_type.shape  # noqa: RUF005 - Triton has no starred elements
    return gl.allocate_shared_memory(descriptor.dtype, SHAPE, descriptor.layout)


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers whose phase ends after so many arrivals."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def store_gradient(ptr, x, start, T, H, D: gl.constexpr):
    """Write x (ROWS, columns), tokens from `start` on, to a head of (T, 3, H, D). ptr: the place of the first."""
    COLUMNS: gl.constexpr = x.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    row = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))[:, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))[None, :]
    gl.store(ptr + (row * (3 * H * D) + column), x, mask=(start + row < T) & (column < D))


@gluon.jit
def store_column_sums(sums_ptr, part, x, b, h, start, T, H, D: gl.constexpr):
    """Write the column sums of x, a consumer's tile, to its place in (tiles, B, 3, H, D). part: 0, 1, 2 for q, k, v.

    No other consumer writes there: the launcher adds the tiles in a fixed order.
    """
    COLUMNS: gl.constexpr = x.shape[1]
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    B = gl.num_programs(0) // (gl.cdiv(T, ROWS * CONSUMERS) * H)
    sums_ptr += (((start // ROWS * B + b) * 3 + part) * H + h) * D
    gl.store(sums_ptr + column, gl.sum(x, 0), mask=(column < D) & (start < T))


@gluon.jit
def produce(
    descriptors,  # of q, k and v
    tiles,  # in shared memory: q (CONSUMERS, ...), k and v (num_stages, ...)
    barriers,  # q is full (one); k is full, v is full, k is empty, v is empty (num_stages each)
    place,  # batch, head, the program's first query, how many tiles of keys
    BLOCK_N: gl.constexpr,
    num_stages: gl.constexpr,
):
    """The producer: q, then k and v of one tile after the other, from the diagonal to key 0."""
    q_descriptor, k_descriptor, v_descriptor = descriptors
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, v_full, k_empty, v_empty = barriers
    b, h, start, steps = place
    b, h = b.to(gl.int32), h.to(gl.int32)
    mbarrier.expect(q_full.index(0), CONSUMERS * q_descriptor.block_type.nbytes)
    for consumer in gl.static_range(CONSUMERS):
        copy_tile(q_descriptor, [b, start + ROWS * consumer, h, 0], q_full.index(0), q_tiles.index(consumer))
    for i in range(steps):
        slot, parity = turn(i, num_stages)
        key = (steps - 1 - i) * BLOCK_N
        mbarrier.wait(k_empty.index(slot), parity ^ 1)
        mbarrier.expect(k_full.index(slot), k_descriptor.block_type.nbytes)
        copy_tile(k_descriptor, [b, key, h, 0], k_full.index(slot), k_tiles.index(slot))
        mbarrier.wait(v_empty.index(slot), parity ^ 1)
        mbarrier.expect(v_full.index(slot), v_descriptor.block_type.nbytes)
        copy_tile(v_descriptor, [b, key, h, 0], v_full.index(slot), v_tiles.index(slot))


@gluon.jit
def consume(
    CONSUMER: gl.constexpr,
    tiles,  # as in produce
    barriers,
    o_ptr,  # (B, T, H, D) contiguous
    lse_ptr,  # (B, H, T)
    place,
    sizes,  # T, H, c
    D: gl.constexpr,
    BLOCK_N: gl.constexpr,
    num_stages: gl.constexpr,
):
    """A consumer: ROWS queries with all keys that they see."""
    q_tiles, k_tiles, v_tiles = tiles
    q_full, k_full, v_full, k_empty, v_empty = barriers
    b, h, start, steps = place
    T, H, c = sizes
    COLUMNS: gl.constexpr = q_tiles.shape[-1]
    ELEMENT: gl.constexpr = q_tiles.dtype
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    start = start + ROWS * CONSUMER
    query = start + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    key = (steps - 1) * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))
    nothing = gl.zeros([ROWS, BLOCK_N], gl.float32, SCORES)

    mbarrier.wait(q_full.index(0), 0)
    q = matrix(q_tiles, CONSUMER)
    mbarrier.wait(k_full.index(0), 0)
    s = warpgroup_mma(q, matrix(k_tiles, 0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_empty.index(0))
    s = gl.where(query[:, None] >= key[None, :], s, float("-inf"))
    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, SCORES))
    p, shrink, m, total = update_softmax(s, m, total, c)
    left = gl.convert_layout(p.to(ELEMENT), LEFT)
    o = gl.zeros([ROWS, COLUMNS], gl.float32, OUTPUT)
    mbarrier.wait(v_full.index(0), 0)

    for i in range(1, steps):
        slot, parity = turn(i, num_stages)
        before, _ = turn(i - 1, num_stages)
        mbarrier.wait(k_full.index(slot), parity)
        s = warpgroup_mma(q, matrix(k_tiles, slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
        o = warpgroup_mma(left, matrix(v_tiles, before), o, is_async=True)
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_empty.index(slot))
        p, shrink, m, total = update_softmax(s, m, total, c)
        following = gl.convert_layout(p.to(ELEMENT), LEFT)
        mbarrier.wait(v_full.index(slot), parity)
        o, left = warpgroup_mma_wait(0, deps=(o, following))
        mbarrier.arrive(v_empty.index(before))
        o = o * gl.convert_layout(shrink, gl.SliceLayout(1, OUTPUT))[:, None]

    slot, parity = turn(steps - 1, num_stages)
    o = warpgroup_mma(left, matrix(v_tiles, slot), o, is_async=True)
    o = warpgroup_mma_wait(0, deps=(o,))
    o = o / gl.convert_layout(total, gl.SliceLayout(1, OUTPUT))[:, None]
    row = gl.arange(0, ROWS, gl.SliceLayout(1, OUTPUT))[:, None]
    column = gl.arange(0, COLUMNS, gl.SliceLayout(0, OUTPUT))[None, :]
    o_ptr += ((b * T + start) * H + h) * D
    gl.store(o_ptr + (row * (H * D) + column), o.to(ELEMENT), mask=(start + row < T) & (column < D))
    gl.store(lse_ptr + (b * H + h) * T + query, m + gl.log2(total), mask=query < T)


@hash_callees_first
@gluon.jit(do_not_specialize=["H"])
def attention_forward_hopper_kernel(
    q_descriptor,  # of (B, T, H, D), for tiles of ROWS tokens of one head
    k_descriptor,  # for tiles of BLOCK_N tokens
    v_descriptor,
    o_ptr,  # (B, T, H, D) contiguous
    lse_ptr,  # (B, H, T)
    T,
    H,
    scale,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    num_stages: gl.constexpr,
):
    """One program: BLOCK_M queries of one head, with all keys that they see."""
    gl.static_assert(BLOCK_M == ROWS * CONSUMERS, "BLOCK_M must be the consumers' queries")
    gl.static_assert(BLOCK_N == BLOCK_M, "BLOCK_N must be BLOCK_M: one tile holds the diagonal")
    gl.static_assert(num_stages >= 2, "num_stages must be at least 2: a consumer holds v_(i-1) while it waits for v_i")
    b, h, start = place_program(T, H, D, BLOCK_M, o_ptr.dtype.element_ty.primitive_bitwidth // 8, True)
    steps = gl.cdiv(gl.minimum(start + BLOCK_M, T), BLOCK_N)
    tiles = (
        make_tiles(CONSUMERS, q_descriptor),
        make_tiles(num_stages, k_descriptor),
        make_tiles(num_stages, v_descriptor),
    )
    barriers = (
        make_barriers(1, 1),
        make_barriers(num_stages, 1),
        make_barriers(num_stages, 1),
        make_barriers(num_stages, CONSUMERS),
        make_barriers(num_stages, CONSUMERS),
    )
    fence_async_shared()
    place, sizes = (b, h, start, steps), (T, H, scale * LOG2_E)
    descriptors = (q_descriptor, k_descriptor, v_descriptor)
    gl.warp_specialize(
        [
            (consume, (0, tiles, barriers, o_ptr, lse_ptr, place, sizes, D, BLOCK_N, num_stages)),
            (consume, (1, tiles, barriers, o_ptr, lse_ptr, place, sizes, D, BLOCK_N, num_stages)),
            (produce, (descriptors, tiles, barriers, place, BLOCK_N, num_stages)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
