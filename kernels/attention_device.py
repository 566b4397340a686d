"""The attention kernels and the device functions that they share. attention.py has the maths and the symbols.

`limit_ptr` is None without documents. With them it points to (B, T) positions that never decrease along a row: for
queries the first position of their document, for keys one past its last.
`stream` is the dropout seed and the head's number in the batch.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastgpt2.kernels.dropout import BITS, kept
from fastgpt2.kernels.launch import hash_callees_first
from fastgpt2.kernels.tiles import cast, dot, load_row, load_tile, store_row, store_tile

LOG2_E = tl.constexpr(math.log2(math.e))
# Start of the running maximum where documents may hide all keys of a query's first tiles: -inf - -inf is NaN.
LOWEST = tl.constexpr(-3e38)
# DROP of every WEIGHTS weights are dropped; the rest are scaled by WEIGHTS / (WEIGHTS - DROP).
WEIGHTS = tl.constexpr(2**BITS)
# Room for k and v of the heads in flight: half the L2 of an A100 or H100, less what streams through.
L2_BYTES = tl.constexpr(16 * 2**20)


@triton.jit
def place(T, H, D: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's batch, head and first row.

    Heads are taken in groups whose k and v fit in L2. Within a group, the first tiles of all heads come before
    the second tiles. LAST_FIRST: start with the last rows of a sequence, which see the most keys.
    """
    tiles = tl.cdiv(T, BLOCK)
    heads = tl.num_programs(0) // tiles
    # A constexpr divided by a tensor stays a constexpr in the interpreter of Triton 3.7: make it a tensor first.
    group = tl.maximum(1, tl.cast(L2_BYTES // (2 * D * BYTES), tl.int32) // T)
    program = tl.program_id(0)
    first_head = program // (group * tiles) * group
    group = tl.minimum(group, heads - first_head)
    within = program - first_head * tiles
    head, tile = first_head + within % group, within // group
    if LAST_FIRST:
        tile = tiles - 1 - tile
    return tl.cast(head // H, tl.int64), tl.cast(head % H, tl.int64), tile * BLOCK


@triton.jit
def _head(ptr, b, h, strides):
    """A pointer to the first row of a batch's head. strides: of batch, token and head."""
    return ptr + (b * strides[0] + h * strides[2])


@triton.jit
def _visible(query, key, first, T, CAUSAL: tl.constexpr):
    """Whether each query sees each key. No query before T sees a key past T. Queries past T get any answer: they are
    not stored.

    first: the first position of each query's document, or None.
    """
    query, key = query[:, None], key[None, :]
    visible = (query >= key) if CAUSAL else (key < T)
    if first is not None:
        visible &= key >= first[:, None]
    return visible


@triton.jit
def _keys(start, limit_ptr, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, whole, edge, end): the ranges of keys for BLOCK_M queries from `start` on.

    All queries see the keys from whole to edge. Keys from begin to whole and from edge to end need a mask. No query
    sees any other key.
    """
    begin, whole = 0, 0
    if CAUSAL:
        edge, end = start // BLOCK_N * BLOCK_N, tl.minimum(start + BLOCK_M, T)
    else:
        edge, end = T // BLOCK_N * BLOCK_N, T
    if limit_ptr is not None:
        begin = tl.load(limit_ptr + start) // BLOCK_N * BLOCK_N
        whole = tl.minimum(tl.cdiv(tl.load(limit_ptr + end - 1), BLOCK_N) * BLOCK_N, edge)
    return begin, whole, edge, end


@triton.jit
def _queries(start, limit_ptr, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, edge, tail, end): the ranges of queries for BLOCK_N keys from `start` on.

    Queries from edge to tail see all keys. Queries from begin to edge and from tail to end need a mask. No other query
    sees any of the keys. edge may be greater than tail and end.
    """
    edge, tail, end = 0, T // BLOCK_M * BLOCK_M, T
    if limit_ptr is not None:
        tail = tl.load(limit_ptr + start) // BLOCK_M * BLOCK_M
        end = tl.load(limit_ptr + tl.minimum(start + BLOCK_N, T) - 1)
    if CAUSAL:
        edge = tl.cdiv(start + BLOCK_N, BLOCK_M) * BLOCK_M
    return start // BLOCK_M * BLOCK_M, edge, tail, end


@triton.jit
def update_softmax(s, m, total, c):
    """p = 2^(c s - m), the factor for what was summed under the old maximum, the new m and the new total."""
    m_new = tl.maximum(m, tl.max(s, 1) * c)
    p = tl.exp2(s * c - m_new[:, None])
    shrink = tl.exp2(m - m_new)
    return p, shrink, m_new, total * shrink + tl.sum(p, 1)


@triton.jit
def _attend(
    o,  # (BLOCK_M, D)
    m,  # (BLOCK_M,)
    total,  # (BLOCK_M,)
    q,  # (BLOCK_M, D)
    kv,  # pointers to k and v, their strides from token to token
    row,  # the first query
    first,  # (BLOCK_M,) the first position of each query's document, or None
    stream,
    begin,
    end,
    T,
    c,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Update o = sum_j M_j 2^(c S - m) v, m = max_j c S, total = sum_j 2^(c S - m) with the keys begin..end."""
    k_ptr, v_ptr, k_stride, v_stride = kv
    query = row + tl.arange(0, q.shape[0])
    for start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, start, k_stride, T, D, BLOCK_N, MASKED)
        s = dot(q, tl.trans(k), None, PRECISION)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            s = tl.where(_visible(query, key, first, T, CAUSAL), s, float("-inf"))
        # m is finite from the first tile on: either every query sees key 0, or m starts at LOWEST.
        p, shrink, m, total = update_softmax(s, m, total, c)
        if DROP:
            p = tl.where(kept(stream, row, start, q.shape[0], BLOCK_N, DROP), p, 0.0)
        v = load_tile(v_ptr, start, v_stride, T, D, BLOCK_N, MASKED)
        o = dot(cast(p, v.dtype), v, o * shrink[:, None], PRECISION)
    return o, m, total


@hash_callees_first
@triton.jit(do_not_specialize=["H"])
def attention_forward_kernel(
    qkv_ptrs,  # q, k, v: (B, T, H, D) each, any strides
    o_ptr,  # (B, T, H, D) contiguous
    lse_ptr,  # (B, H, T)
    limit_ptr,  # (B, T) of the queries, or None
    seed_ptr,  # one int64; None without dropout
    qkv_strides,  # of q, k, v: each of batch, token and head
    T,
    H,
    scale,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: BLOCK_M queries of one head, with all keys that they see."""
    q_ptr, k_ptr, v_ptr = qkv_ptrs
    q_strides, k_strides, v_strides = qkv_strides
    BYTES: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth // 8
    b, h, start = place(T, H, D, BLOCK_M, BYTES, CAUSAL)
    q_ptr = _head(q_ptr, b, h, q_strides)
    kv = _head(k_ptr, b, h, k_strides), _head(v_ptr, b, h, v_strides), k_strides[1], v_strides[1]

    SUM: tl.constexpr = lse_ptr.dtype.element_ty
    q = load_tile(q_ptr, start, q_strides[1], T, D, BLOCK_M, True)
    o = tl.zeros((BLOCK_M, triton.next_power_of_2(D)), SUM)
    m = tl.full((BLOCK_M,), float("-inf") if limit_ptr is None else LOWEST, SUM)
    total = tl.zeros((BLOCK_M,), SUM)
    c = scale * LOG2_E
    stream = (tl.load(seed_ptr) if DROP else 0, b * H + h)
    first = None
    if limit_ptr is not None:
        limit_ptr += b * T
        first = load_row(limit_ptr, start, T, BLOCK_M, True)

    bounds = _keys(start, limit_ptr, T, CAUSAL, BLOCK_M, BLOCK_N)
    for i in tl.static_range(1 if limit_ptr is None else 0, 3):  # masked, whole, masked
        o, m, total = _attend(
            o, m, total, q, kv, start, first, stream, bounds[i], bounds[i + 1], T, c,
            D, CAUSAL, DROP, i != 1, BLOCK_N, PRECISION,
        )  # fmt: skip

    o = o / total[:, None]
    if DROP:
        o *= WEIGHTS / (WEIGHTS - DROP)
    store_tile(o_ptr + (b * T * H + h) * D, o, start, H * D, T, D, BLOCK_M)
    store_row(lse_ptr + (b * H + h) * T, m + tl.log2(total), start, T, BLOCK_M)


@triton.jit
def _store_column_sums(sums_ptr, part, x, b, h, start, T, H, D: tl.constexpr):
    """Write the column sums of x, this program's tile, to its place in (tiles, B, 3, H, D). part: 0, 1, 2 for q, k, v.

    No other program writes there: the launcher adds the tiles in a fixed order.
    """
    BLOCK: tl.constexpr = x.shape[0]
    # Add the four quarters first: a split has them change layout once, and 48 shuffles a thread become 2.
    x = tl.permute(tl.reshape(x, (4, BLOCK // 4, x.shape[1])), (1, 2, 0))
    a, c = tl.split(tl.reshape(x, (BLOCK // 4, x.shape[1], 2, 2)))
    a, c = tl.split(a + c)
    total = tl.sum(a + c, 0)
    B = tl.num_programs(0) // (tl.cdiv(T, BLOCK) * H)
    row = ((start // BLOCK * B + b) * 3 + part) * H + h
    store_row(sums_ptr + row * D, total, 0, D, total.shape[0])


@triton.jit
def _gather_dq(
    dq,  # (BLOCK_M, D)
    q,  # (BLOCK_M, D)
    do,  # (BLOCK_M, D)
    lse,  # (BLOCK_M,)
    delta,  # (BLOCK_M,)
    kv,  # from here on as in _attend
    row,
    first,
    stream,
    begin,
    end,
    T,
    c,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq + dS k over the keys begin..end."""
    k_ptr, v_ptr, k_stride, v_stride = kv
    query = row + tl.arange(0, q.shape[0])
    for start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, start, k_stride, T, D, BLOCK_N, MASKED)
        v = load_tile(v_ptr, start, v_stride, T, D, BLOCK_N, MASKED)
        p = tl.exp2(dot(q, tl.trans(k), None, PRECISION) * c - lse[:, None])
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            p = tl.where(_visible(query, key, first, T, CAUSAL), p, 0.0)
        dp = dot(do, tl.trans(v), None, PRECISION)
        if DROP:
            keep = kept(stream, row, start, q.shape[0], BLOCK_N, DROP)
            dp = tl.where(keep, dp, 0.0) * (WEIGHTS / (WEIGHTS - DROP))
        ds = p * (dp - delta[:, None])
        dq = dot(cast(ds, k.dtype), k, dq, PRECISION)
    return dq


@hash_callees_first
@triton.jit(do_not_specialize=["H"])
def attention_backward_dq_kernel(
    qkv_ptrs,  # q, k, v: (B, T, H, D) each, any strides
    o_ptr,  # (B, T, H, D) contiguous
    do_ptr,  # (B, T, H, D), any strides
    lse_ptr,  # (B, H, T)
    delta_ptr,  # (B, H, T), written
    dqkv_ptr,  # (B, T, 3, H, D) contiguous
    sums_ptr,  # (tiles, B, 3, H, D) for dq's column sums, or None
    limit_ptr,  # (B, T) of the queries, or None
    seed_ptr,  # one int64; None without dropout
    qkv_strides,  # of q, k, v: each of batch, token and head
    do_strides,
    T,
    H,
    scale,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dq of BLOCK_M queries of one head, and their delta, which the other pass reads."""
    q_ptr, k_ptr, v_ptr = qkv_ptrs
    q_strides, k_strides, v_strides = qkv_strides
    BYTES: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth // 8
    b, h, start = place(T, H, D, BLOCK_M, BYTES, CAUSAL)
    q_ptr = _head(q_ptr, b, h, q_strides)
    kv = _head(k_ptr, b, h, k_strides), _head(v_ptr, b, h, v_strides), k_strides[1], v_strides[1]
    do_ptr = _head(do_ptr, b, h, do_strides)
    o_ptr += (b * T * H + h) * D

    SUM: tl.constexpr = lse_ptr.dtype.element_ty
    q = load_tile(q_ptr, start, q_strides[1], T, D, BLOCK_M, True)
    do = load_tile(do_ptr, start, do_strides[1], T, D, BLOCK_M, True)
    o = load_tile(o_ptr, start, H * D, T, D, BLOCK_M, True)
    delta = tl.sum(do.to(SUM) * o.to(SUM), 1)
    store_row(delta_ptr + (b * H + h) * T, delta, start, T, BLOCK_M)
    lse = load_row(lse_ptr + (b * H + h) * T, start, T, BLOCK_M, True)
    dq = tl.zeros((BLOCK_M, triton.next_power_of_2(D)), SUM)
    c = scale * LOG2_E
    stream = (tl.load(seed_ptr) if DROP else 0, b * H + h)
    first = None
    if limit_ptr is not None:
        limit_ptr += b * T
        first = load_row(limit_ptr, start, T, BLOCK_M, True)

    bounds = _keys(start, limit_ptr, T, CAUSAL, BLOCK_M, BLOCK_N)
    for i in tl.static_range(1 if limit_ptr is None else 0, 3):  # masked, whole, masked
        dq = _gather_dq(
            dq, q, do, lse, delta, kv, start, first, stream, bounds[i], bounds[i + 1], T, c,
            D, CAUSAL, DROP, i != 1, BLOCK_N, PRECISION,
        )  # fmt: skip

    dq *= scale
    store_tile(dqkv_ptr + (b * T * 3 * H + h) * D, dq, start, 3 * H * D, T, D, BLOCK_M)
    if sums_ptr is not None:
        _store_column_sums(sums_ptr, 0, dq, b, h, start, T, H, D)


@triton.jit
def _gather_dkdv(
    dk,  # (BLOCK_N, D)
    dv,  # (BLOCK_N, D)
    k,  # (BLOCK_N, D)
    v,  # (BLOCK_N, D)
    queries,  # pointers to q, do, lse and delta, the strides of q and do from token to token
    row,  # the first key
    last,  # (BLOCK_N,) one past the last position of each key's document, or None
    stream,
    begin,
    end,
    T,
    c,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dk + dS^T q and dv + (M P)^T do over the queries begin..end.

    S is computed transposed, keys down and queries across: P^T and dS^T are then left operands, straight from
    registers. Queries past T have q = do = delta = 0 and add 0.
    """
    q_ptr, do_ptr, lse_ptr, delta_ptr, q_stride, do_stride = queries
    key = row + tl.arange(0, k.shape[0])
    for start in range(begin, end, BLOCK_M):
        q = load_tile(q_ptr, start, q_stride, T, D, BLOCK_M, MASKED)
        lse = load_row(lse_ptr, start, T, BLOCK_M, MASKED)
        p = tl.exp2(dot(k, tl.trans(q), None, PRECISION) * c - lse[None, :])
        if MASKED and CAUSAL:
            query = start + tl.arange(0, BLOCK_M)
            p = tl.where(query[None, :] >= key[:, None], p, 0.0)
            if last is not None:
                p = tl.where(query[None, :] < last[:, None], p, 0.0)
        do = load_tile(do_ptr, start, do_stride, T, D, BLOCK_M, MASKED)
        if DROP:
            keep = tl.trans(kept(stream, start, row, BLOCK_M, k.shape[0], DROP))
            dv = dot(cast(tl.where(keep, p, 0.0), do.dtype), do, dv, PRECISION)
        else:
            dv = dot(cast(p, do.dtype), do, dv, PRECISION)
        delta = load_row(delta_ptr, start, T, BLOCK_M, MASKED)
        dp = dot(v, tl.trans(do), None, PRECISION)
        if DROP:
            dp = tl.where(keep, dp, 0.0) * (WEIGHTS / (WEIGHTS - DROP))
        ds = p * (dp - delta[None, :])
        dk = dot(cast(ds, q.dtype), q, dk, PRECISION)
    return dk, dv


@hash_callees_first
@triton.jit(do_not_specialize=["H"])
def attention_backward_dkdv_kernel(
    qkv_ptrs,  # q, k, v: (B, T, H, D) each, any strides
    do_ptr,  # (B, T, H, D), any strides
    lse_ptr,  # (B, H, T)
    delta_ptr,  # (B, H, T)
    dqkv_ptr,  # (B, T, 3, H, D) contiguous
    sums_ptr,  # (tiles, B, 3, H, D) for dv's column sums, or None
    limit_ptr,  # (B, T) of the keys, or None
    seed_ptr,  # one int64; None without dropout
    qkv_strides,  # of q, k, v: each of batch, token and head
    do_strides,
    T,
    H,
    scale,
    D: tl.constexpr,
    CAUSAL: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: dk and dv of BLOCK_N keys of one head, with all queries that see them."""
    q_ptr, k_ptr, v_ptr = qkv_ptrs
    q_strides, k_strides, v_strides = qkv_strides
    BYTES: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth // 8
    b, h, start = place(T, H, D, BLOCK_N, BYTES, False)
    q_ptr = _head(q_ptr, b, h, q_strides)
    k_ptr = _head(k_ptr, b, h, k_strides)
    v_ptr = _head(v_ptr, b, h, v_strides)
    do_ptr = _head(do_ptr, b, h, do_strides)
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T
    queries = q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides[1], do_strides[1]

    SUM: tl.constexpr = lse_ptr.dtype.element_ty
    k = load_tile(k_ptr, start, k_strides[1], T, D, BLOCK_N, True)
    v = load_tile(v_ptr, start, v_strides[1], T, D, BLOCK_N, True)
    dk = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), SUM)
    dv = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), SUM)
    c = scale * LOG2_E
    stream = (tl.load(seed_ptr) if DROP else 0, b * H + h)
    last = None
    if limit_ptr is not None:
        limit_ptr += b * T
        last = load_row(limit_ptr, start, T, BLOCK_N, True)

    first, edge, tail, past = _queries(start, limit_ptr, T, CAUSAL, BLOCK_M, BLOCK_N)
    for i in tl.static_range(0 if CAUSAL else 1, 3):  # masked, whole, masked
        if i == 0:
            begin, end = first, tl.minimum(edge, past)
        elif i == 1:
            begin, end = edge, tail
        else:
            begin, end = tl.maximum(edge, tail), past
        dk, dv = _gather_dkdv(
            dk, dv, k, v, queries, start, last, stream, begin, end, T, c,
            D, CAUSAL, DROP, i != 1, BLOCK_M, PRECISION,
        )  # fmt: skip

    if DROP:
        dv *= WEIGHTS / (WEIGHTS - DROP)
    dqkv_ptr += (b * T * 3 * H + h) * D
    store_tile(dqkv_ptr + H * D, dk * scale, start, 3 * H * D, T, D, BLOCK_N)
    store_tile(dqkv_ptr + 2 * H * D, dv, start, 3 * H * D, T, D, BLOCK_N)
    if sums_ptr is not None:
        if not CAUSAL:  # the queries also see the keys past T
            dv = tl.where(start + tl.arange(0, BLOCK_N)[:, None] < T, dv, 0.0)
        _store_column_sums(sums_ptr, 2, dv, b, h, start, T, H, D)
