"""The kernel of dq and delta for Hopper. attention_hopper_backward.py explains and launches it."""

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
def produce_keys(
    descriptors,  # of q, k, v, do and o
    tiles,  # in shared memory: q (CONSUMERS, ...), k and v (num_stages, ...), do and o (CONSUMERS, ...)
    barriers,  # q, do and o are full (one); a slot is full, is empty (num_stages each)
    place,  # batch, head, the program's first query, how many tiles of keys
    num_stages: gl.constexpr,
):
    """The producer of dq: q, do and o, then k and v of one tile after the other, from key 0 to the diagonal."""
    q_descriptor, k_descriptor, v_descriptor, do_descriptor, o_descriptor = descriptors
    q_tiles, k_tiles, v_tiles, do_tiles, o_tiles = tiles
    own_full, full, empty = barriers
    b, h, start, steps = place
    b, h = b.to(gl.int32), h.to(gl.int32)
    mbarrier.expect(own_full.index(0), 3 * CONSUMERS * q_descriptor.block_type.nbytes)
    for consumer in gl.static_range(CONSUMERS):
        query = start + ROWS * consumer
        copy_tile(q_descriptor, [b, query, h, 0], own_full.index(0), q_tiles.index(consumer))
        copy_tile(do_descriptor, [b, query, h, 0], own_full.index(0), do_tiles.index(consumer))
        copy_tile(o_descriptor, [b, query, h, 0], own_full.index(0), o_tiles.index(consumer))
    for i in range(steps):
        slot, parity = turn(i, num_stages)
        mbarrier.wait(empty.index(slot), parity ^ 1)
        mbarrier.expect(full.index(slot), 2 * k_descriptor.block_type.nbytes)
        copy_tile(k_descriptor, [b, i * ROWS, h, 0], full.index(slot), k_tiles.index(slot))
        copy_tile(v_descriptor, [b, i * ROWS, h, 0], full.index(slot), v_tiles.index(slot))


@gluon.jit
def add_keys(
    dq,  # (ROWS, D)
    s,  # (ROWS, ROWS), this tile's scores
    own,  # q, do (tiles in shared memory), lse and delta (ROWS,)
    i,  # which tile of the ring
    tiles,
    barriers,
    c,
    LAST: gl.constexpr,
    num_stages: gl.constexpr,
):
    """dq + dS k of one tile, and the next one's scores. LAST: it lies on the diagonal, and there is no next one."""
    q, do, lse, delta = own
    _, k_tiles, v_tiles, _, _ = tiles
    _, full, empty = barriers
    COLUMNS: gl.constexpr = k_tiles.shape[-1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    slot, _ = turn(i, num_stages)
    following, parity = turn(i + 1, num_stages)
    dp = warpgroup_mma(do, matrix(v_tiles, slot).permute((1, 0)), nothing, use_acc=False, is_async=True)
    p = gl.exp2(s * c - lse[:, None])
    if LAST:
        query = gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
        key = gl.arange(0, ROWS, gl.SliceLayout(0, SCORES))
        p = gl.where(query[:, None] >= key[None, :], p, 0.0)
        dp = warpgroup_mma_wait(0, deps=(dp,))
    else:
        mbarrier.wait(full.index(following), parity)
        s = warpgroup_mma(q, matrix(k_tiles, following).permute((1, 0)), nothing, use_acc=False, is_async=True)
        dp = warpgroup_mma_wait(1, deps=(dp,))
    ds = (p * (dp - delta[:, None])).to(k_tiles.dtype)
    left = gl.convert_layout(ds, gl.DotOperandLayout(0, OUTPUT, 2))
    dq = warpgroup_mma(left, matrix(k_tiles, slot), dq, is_async=True)
    if LAST:
        dq = warpgroup_mma_wait(0, deps=(dq,))
    else:
        dq, s = warpgroup_mma_wait(0, deps=(dq, s))
        mbarrier.arrive(empty.index(slot))
    return dq, s


@gluon.jit
def consume_keys(
    CONSUMER: gl.constexpr,
    tiles,  # as in produce_keys
    barriers,
    pointers,  # as in attention_backward_dq_hopper_kernel
    place,
    sizes,  # T, H, scale
    D: gl.constexpr,
    num_stages: gl.constexpr,
):
    """A consumer of dq: ROWS queries with all keys that they see."""
    q_tiles, k_tiles, _, do_tiles, o_tiles = tiles
    own_full, full, _ = barriers
    lse_ptr, delta_ptr, dqkv_ptr, sums_ptr = pointers
    b, h, start, steps = place
    T, H, scale = sizes
    COLUMNS: gl.constexpr = q_tiles.shape[-1]
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    c = scale * LOG2_E
    steps = gl.minimum(steps, start // ROWS + CONSUMER + 1)
    start = start + ROWS * CONSUMER

    mbarrier.wait(own_full.index(0), 0)
    q, do = matrix(q_tiles, CONSUMER), matrix(do_tiles, CONSUMER)
    o = matrix(o_tiles, CONSUMER).load(OUTPUT).to(gl.float32)
    delta = gl.convert_layout(gl.sum(do.load(OUTPUT).to(gl.float32) * o, 1), gl.SliceLayout(1, SCORES))
    query = start + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    length = gl.cdiv(T, 4) * 4
    row = (b * H + h) * length
    lse = gl.load(lse_ptr + row + query, mask=query < length, other=0.0)
    gl.store(delta_ptr + row + query, delta, mask=query < length)

    own = (q, do, lse, delta)
    dq = gl.zeros([ROWS, COLUMNS], gl.float32, OUTPUT)
    nothing = gl.zeros([ROWS, ROWS], gl.float32, SCORES)
    mbarrier.wait(full.index(0), 0)
    s = warpgroup_mma(q, matrix(k_tiles, 0).permute((1, 0)), nothing, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=(s,))
    for i in range(steps - 1):
        dq, s = add_keys(dq, s, own, i, tiles, barriers, c, False, num_stages)
    dq, s = add_keys(dq, s, own, steps - 1, tiles, barriers, c, True, num_stages)
    dq *= scale
    store_gradient(dqkv_ptr + ((b * T + start) * 3 * H + h) * D, dq, start, T, H, D)
    if sums_ptr is not None:
        store_column_sums(sums_ptr, 0, dq, b, h, start, T, H, D)


@hash_callees_first
@gluon.jit(do_not_specialize=["H"])
def attention_backward_dq_hopper_kernel(
    q_descriptor,  # of (B, T, H, D), for tiles of ROWS tokens of one head
    k_descriptor,
    v_descriptor,
    do_descriptor,
    o_descriptor,
    lse_ptr,  # (B, H, T rounded up to a multiple of 4)
    delta_ptr,  # as lse, written
    dqkv_ptr,  # (B, T, 3, H, D) contiguous
    sums_ptr,  # (tiles of ROWS, B, 3, H, D) for dq's column sums, or None
    T,
    H,
    scale,
    D: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    num_stages: gl.constexpr,
):
    """One program: dq of BLOCK_M queries of one head, and their delta, which the other pass reads."""
    gl.static_assert(BLOCK_M == ROWS * CONSUMERS, "BLOCK_M must be the consumers' queries")
    gl.static_assert(BLOCK_N == ROWS, "BLOCK_N must be a consumer's queries: one tile holds its diagonal")
    gl.static_assert(num_stages >= 2, "num_stages must be at least 2: a consumer holds tile i while it waits for i + 1")
    b, h, start = place_program(T, H, D, BLOCK_M, dqkv_ptr.dtype.element_ty.primitive_bitwidth // 8, True)
    place, sizes = (b, h, start, gl.cdiv(gl.minimum(start + BLOCK_M, T), BLOCK_N)), (T, H, scale)
    descriptors = (q_descriptor, k_descriptor, v_descriptor, do_descriptor, o_descriptor)
    tiles = (
        make_tiles(CONSUMERS, q_descriptor),
        make_tiles(num_stages, k_descriptor),
        make_tiles(num_stages, v_descriptor),
        make_tiles(CONSUMERS, do_descriptor),
        make_tiles(CONSUMERS, o_descriptor),
    )
    barriers = (make_barriers(1, 1), make_barriers(num_stages, 1), make_barriers(num_stages, CONSUMERS))
    fence_async_shared()
    pointers = (lse_ptr, delta_ptr, dqkv_ptr, sums_ptr)
    gl.warp_specialize(
        [
            (consume_keys, (0, tiles, barriers, pointers, place, sizes, D, num_stages)),
            (consume_keys, (1, tiles, barriers, pointers, place, sizes, D, num_stages)),
            (produce_keys, (descriptors, tiles, barriers, place, num_stages)),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )
