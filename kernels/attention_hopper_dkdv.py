"""The kernel of dk and dv for Hopper. attention_hopper_backward.py explains and launches it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastgpt2.kernels.attention_device import LOG2_E
from fastgpt2.kernels.attention_hopper import (
    CONSUMER_REGISTERS,
    CONSUMERS,
    PRODUCER_REGISTERS,
    ROWS,
    copy_tile,
    make_barriers,
    make_tiles,
    matrix,
    place_program,
    store_column_sums,
    store_gradient,
    turn,
)
from fastgpt2.kernels.launch import hash_callees_first


@gluon.jit
def produce_queries(
    descriptors,  # of q, k, v, do, lse and delta
    tiles,  # in shared memory: q (num_stages, ...), k and v (CONSUMERS, ...), do, lse and delta (num_stages, ...)
    barriers,  # k and v are full (one); a slot is full, is empty (num_stages each)
    place,  # batch, head, the program's first key, how many tiles of queries
    H,
    num_stages: gl.constexpr,
):
    """The producer of dk and dv: k and v, then one tile of queries after the other, from the last to the diagonal."""
    q_descriptor, k_descriptor, v_descriptor, do_descriptor, lse_descriptor, delta_descriptor = descriptors
    q_tiles, k_tiles, v_tiles, do_tiles, lse_tiles, delta_tiles = tiles
    own_full, full, empty = barriers
    b, h, start, steps = place
    b, h = b.to(gl.int32), h.to(gl.int32)
    mbarrier.expect(own_full.index(0), 2 * CONSUMERS * k_descriptor.block_type.nbytes)
    for consumer in gl.static_range(CONSUMERS):
        key = start + ROWS * consumer
        copy_tile(k_descriptor, [b, key, h, 0], own_full.index(0), k_tiles.index(consumer))
        copy_tile(v_descriptor, [b, key, h, 0], own_full.index(0), v_tiles.index(consumer))
    for i in range(steps):
        slot, parity = turn(i, num_stages)
        query = start + (steps - 1 - i) * ROWS
        mbarrier.wait(empty.index(slot), parity ^ 1)
        mbarrier.expect(full.index(slot), 2 * (q_descriptor.block_type.nbytes + lse_descriptor.block_type.nbytes))
        copy_tile(q_descriptor, [b, query, h, 0], full.index(slot), q_tiles.index(slot))
        copy_tile(do_descriptor, [b, query, h, 0], full.index(slot), do_tiles.index(slot))
        copy_tile(lse_descriptor, [b * H + h, query], full.index(slot), lse_tiles.index(slot))
        copy_tile(delta_descriptor, [b * H + h, query], full.index(slot), delta_tiles.index(slot))


@gluon.jit
def add_queries(
    dk,  # (ROWS, D)
    dv,  # (ROWS, D)
    s,  # (ROWS, ROWS), this tile's scores: keys down, queries across
    i,  # which tile of the ring
    tiles,
    barriers,
    c,
    CONSUMER: gl.constexpr,
    LAST: gl.constexpr,
    num_stages: gl.constexpr,
):
    """dk + dS^T q and dv + P^T do of one tile, and the next one's scores. LAST: as in add_keys."""
    q_tiles, k_tiles, v_tiles, do_tiles, lse_tiles, delta_tiles = tiles
    _, full, empty = barriers
    COLUMNS: gl.constexpr = q_tiles.shape[-1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    slot, _ = turn(i, num_stages)
    following, parity = turn(i + 1, num_stages)
    do = matrix(do_tiles, slot)
    dp = warpgroup_mma(matrix(v_tiles, CONSUMER), do.permute((1, 0)), nothing, use_acc=False, is_async=True)
    if not LAST:
        mbarrier.wait(full.index(following), parity)
    p = gl.exp2(s * c - lse_tiles.index(slot).load(SCORES))
    if LAST:
        key = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        query = gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
        p = gl.where(query[None, :] >= key[:, None], p, 0.0)
    dv = warpgroup_mma(gl.convert_layout(p.to(do_tiles.dtype), LEFT), do, dv, is_async=True)
    if LAST:
        dp = warpgroup_mma_wait(1, deps=(dp,))
    else:
        k, q = matrix(k_tiles, CONSUMER), matrix(q_tiles, following)
        s = warpgroup_mma(k, q.permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(2, deps=(dp,))
    ds = (p * (dp - delta_tiles.index(slot).load(SCORES))).to(q_tiles.dtype)
    dk = warpgroup_mma(gl.convert_layout(ds, LEFT), matrix(q_tiles, slot), dk, is_async=True)
    if LAST:
        dk, dv = warpgroup_mma_wait(0, deps=(dk, dv))
    else:
        dk, dv, s = warpgroup_mma_wait(0, deps=(dk, dv, s))
        mbarrier.arrive(empty.index(slot))
    return dk, dv, s


@gluon.jit
def consume_queries(
    CONSUMER: gl.constexpr,
    tiles,  # as in produce_queries
    barriers,
    dqkv_ptr,  # (B, T, 3, H, D) contiguous
    sums_ptr,  # (tiles of ROWS, B, 3, H, D) for dv's column sums, or None
    place,
    sizes,  # T, H, scale
    D: gl.constexpr,
    num_stages: gl.constexpr,
):
    """A consumer of dk and dv: ROWS keys with all queries that see them."""
    q_tiles, k_tiles, _, _, _, _ = tiles
    own_full, full, _ = barriers
    b, h, start, steps = place
    T, H, scale = sizes
    COLUMNS: gl.constexpr = q_tiles.shape[-1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    c = scale * LOG2_E
    # At least 1: if all its keys are past T, it computes what is not stored.
    steps = gl.maximum(steps - CONSUMER, 1)
    start = start + ROWS * CONSUMER

    dk = gl.zeros([ROWS, COLUMNS], gl.float32, OUTPUT)
    dv = gl.zeros([ROWS, COLUMNS], gl.float32, OUTPUT)
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    mbarrier.wait(own_full.index(0), 0)
    mbarrier.wait(full.index(0), 0)
    q = matrix(q_tiles, 0).permute((1, 0))
    s = warpgroup_mma(matrix(k_tiles, CONSUMER), q, nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    for i in range(steps - 1):
        dk, dv, s = add_queries(dk, dv, s, i, tiles, barriers, c, CONSUMER, False, num_stages)
    dk, dv, s = add_queries(dk, dv, s, steps - 1, tiles, barriers, c, CONSUMER, True, num_stages)
    dqkv_ptr += ((b * T + start) * 3 * H + h) * D
    store_gradient(dqkv_ptr + H * D, dk * scale, start, T, H, D)
    store_gradient(dqkv_ptr + 2 * H * D, dv, start, T, H, D)
    if sums_ptr is not None:
        store_column_sums(sums_ptr, 2, dv, b, h, start, T, H, D)


@hash_callees_first
@gluon.jit(do_not_specialize=["H"])
def attention_backward_dkdv_hopper_kernel(
    q_descriptor,  # of (B, T, H, D), for tiles of ROWS tokens of one head
    k_descriptor,
    v_descriptor,
    do_descriptor,
    lse_descriptor,  # of (B H, T rounded up to a multiple of 4), for rows of ROWS tokens
    delta_descriptor,
    dqkv_ptr,  # from here on as in consume_queries
    sums_ptr,
    T,
    H,
    scale,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    num_stages: gl.constexpr,
):
    """One program: dk and dv of BLOCK_N keys of one head, with all queries that see them."""
    gl.static_assert(BLOCK_N == ROWS * CONSUMERS, "BLOCK_N must be the consumers' keys")
    gl.static_assert(BLOCK_M == ROWS, "BLOCK_M must be a consumer's keys: one tile holds its diagonal")
    gl.static_assert(num_stages >= 2, "num_stages must be at least 2: a consumer holds tile i while it waits for i + 1")
    b, h, start = place_program(T, H, D, BLOCK_N, dqkv_ptr.dtype.element_ty.primitive_bitwidth // 8, False)
    place, sizes = (b, h, start, gl.cdiv(T - start, BLOCK_M)), (T, H, scale)
    descriptors = (q_descriptor, k_descriptor, v_descriptor, do_descriptor, lse_descriptor, delta_descriptor)
    tiles = (
        make_tiles(num_stages, q_descriptor),
        make_tiles(CONSUMERS, k_descriptor),
        make_tiles(CONSUMERS, v_descriptor),
        make_tiles(num_stages, do_descriptor),
        make_tiles(num_stages, lse_descriptor),
        make_tiles(num_stages, delta_descriptor),
    )
    barriers = (make_barriers(1, 1), make_barriers(num_stages, 1), make_barriers(num_stages, CONSUMERS))
    fence_async_shared()
    gl.warp_specialize(
        [
            (consume_queries, (0, tiles, barriers, dqkv_ptr, sums_ptr, place, sizes, D, num_stages)),
            (consume_queries, (1, tiles, barriers, dqkv_ptr, sums_ptr, place, sizes, D, num_stages)),
            (produce_queries, (descriptors, tiles, barriers, place, H, num_stages)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
