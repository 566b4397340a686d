"""Flash attention, forward and backward: o = softmax(scale q k^T + mask) v for each batch and head.

Maths, with c = scale log2(e), so that exp is one multiply-add and one exp2:

    S = q k^T                          (T, T), a tile at a time, never stored
    lse = log2 sum_j 2^(c S)           (T,), the base-2 log-sum-exp of each row: all the backward needs
    P = 2^(c S - lse)                  the weights; rows sum to 1
    o = P v

    delta = rowsum(do * o)             equals rowsum(dP * P)
    dP = do v^T,  dS = P * (dP - delta)
    dv = P^T do,  dk = scale dS^T q,  dq = scale dS k

With dropout, M = 1 where a weight is kept and 0 elsewhere, r = 1 / (1 - p), from fastgpt2.kernels.dropout in each kernel anew:

    o = r (M * P) v,  dP = r M * (do v^T),  dv = r (M * P)^T do;  delta, dS, dk and dq as above

Documents (optional, with the causal mask): a position sees only its own document, whose first position is all that a
query's side need know, and whose end all that a key's side. Both never fall along a row, so a tile's first and last
row bound the tiles it meets: those outside are not read, those that every row of the tile sees whole aren't masked.

Memory, e bytes an element, B T H D elements a tensor: the forward reads q, k, v and writes o (4 e) and
lse; the backward reads q, k, v, o, do and writes dq, dk, dv (8 e), and reads q, k, v, do once more,
being two passes. Nothing of size T^2 exists. The packed forms read (B, T, 3, H, D) as the projection
left it and write its gradient in the same layout: no transpose, no concatenation.

FLOPs (causal: half): forward 4 B H T^2 D, two matmuls; backward 10 B H T^2 D credited, 14 done, as
each of the two passes forms S and dP for itself. Its sums have a fixed order, without atomics: two
runs agree to the bit.

float32 whatever the inputs are: S, the running maximum and sum, lse, delta, and every accumulator.
P and dS are rounded to the inputs' dtype, as operands of the next matmul. float32 inputs are
multiplied exactly, or in TF32 where allow_tf32 says so. lse is rounded at the size of the logits, and P errs
with it: in float32 with logits of standard deviation 30, T = 100 and D = 64 dv is off by 21 units in the last
place by norm, where a maximum and a sum kept apart would leave 8. SDPA, which keeps one lse too, is off by 32.

Tiles below the diagonal are not masked: only those that touch it, or the end of the sequence, are.
Programs start with the longest rows, and few enough heads are in flight that k and v stay in L2.

Versions tried. No GPU has timed any of them yet: these are counts of what the compiler made, for sm_90,
bfloat16, D = 64, Triton 3.6; "loop" is the machine instructions a warp spends on one unmasked tile.

    kernel  tile    warps  registers  blocks  loop
    forward 128x64    8       117       2     286   shipped
    forward 128x128   8       201       1     447   fewer an element, but nothing to hide the exp2 under
    forward 128x64    4       255       2     503
    dq      128x64    8       164       1     243   shipped; delta is formed here, not by a kernel of its own
    dq      64x64     4       137       3     250   reads k and v twice as often
    dk, dv  64x128    8       218       1     340   shipped
    dk, dv  64x128    8       217       1     374   row bounds checked in every tile
    dk, dv  64x128    8       254       1     530   T not known to divide by 16: lse and delta come 4 bytes at a time
    dk, dv  64x64     4       254       2     311   reads q and do twice as often
    all     64x128    8       255       1     520   one pass a head, dq summed in float32 scratch; spills 24 bytes

Documents and dropout off compile to that. On, with the tiles shipped (an entry: registers, loop; none spills up to
D = 64, beyond it dk, dv with dropout does, 16 bytes; in TF32, Triton 3.9, D = 64 dq with dropout spills 8 bytes on
sm_80 and 56 on sm_100, where dk, dv without a mask spills 8, too; dk, dv with dropout 8 on sm_90 with 3.7.1):

                                             forward      dq         dk, dv
    documents                                127, 299     196, 264   220, 340
    dropout, eight weights a call            202, 554     210, 502   244, 837   shipped; dk, dv need eight calls for 32
    dropout, four weights a call, 32 bits    204, 645     234, 598   247, 828
    dropout, one weight a call               174, 1134    172, 1079  253, 1369
    dropout, eight a call, ten rounds        204, 618     223, 574   239, 979

Without the causal mask, or with documents, the assembler serialises the products of the forward and of dq (ptxas's
remark C7515: a loop may run no time, and the accumulators are then set to zero where a product of the loop would be in
flight): right, but each product is waited for. Seen on sm_90 with Triton 3.6 and 3.9 for every tile tried; with 1 stage
they are not serialised, and nothing is loaded ahead. GPT-2's causal form is not serialised.

One pass does 5 matmuls where two passes do 7: issue and matrix clocks added up, 2320 a tile against 2960.
It needs B H of twice the multiprocessors to fill the GPU, and waits for dq from L2 in every tile: a GPU must
decide. Its dq multiplies the transpose of a tile that is in registers, which Triton 3.4 and later were seen to get
wrong on Hopper (flash-linear-attention issues 640 and 984): no kernel here has such a product.

Papers: FlashAttention (Dao et al. 2022, arXiv:2205.14135), FlashAttention-2 (Dao 2023,
arXiv:2307.08691).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import launch
from fastgpt2.kernels.dropout import BITS, draw_seed, kept, weights_to_drop
from fastgpt2.kernels.launch import hash_callees_first, on, statistics
from fastgpt2.kernels.specs.records import Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tiles import cast, dot, load_row, load_tile, store_row, store_tile
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

HEAD_DIMS = (16, 32, 64, 80, 96, 128)

LOG2_E = tl.constexpr(math.log2(math.e))
# Where the running maximum begins when a query's first tiles may hide all their keys: -inf less itself is NaN.
LOWEST = tl.constexpr(-3e38)
# DROP of so many weights are dropped, the rest scaled by WEIGHTS / (WEIGHTS - DROP).
WEIGHTS = tl.constexpr(2**BITS)
# Half the L2 of an A100 or H100, less room for what streams through: the k and v of the heads in flight.
L2_BYTES = tl.constexpr(16 * 2**20)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
    documents: Tensor | None = None, keep: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same function in plain PyTorch, (B, T, H, D) each; the softmax is float32 at least.

    keep: the weights that dropout keeps, (B, H, T, T) bool; they are scaled by 1 / (1 - dropout_p).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = (q @ k.mT) * (scale or q.size(-1) ** -0.5)
    position = torch.arange(q.size(-2), device=q.device)
    if causal:
        scores = scores.masked_fill(position > position[:, None], float("-inf"))
    if documents is not None:
        scores = scores.masked_fill(position < documents[0][:, None, :, None], float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(v.dtype)
    if keep is not None:
        weights = weights * keep / (1.0 - dropout_p)
    return (weights @ v).transpose(1, 2)


@triton.jit
def _place(T, H, D: tl.constexpr, BLOCK: tl.constexpr, BYTES: tl.constexpr, LAST_FIRST: tl.constexpr):
    """This program's batch, head and first row.

    Heads are taken in groups whose k and v fit in L2; within a group every head's first tile comes
    before any head's second. LAST_FIRST: the last rows of a sequence see the most keys, and start first.
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
    """Where a batch's head begins; strides of batch, token and head."""
    return ptr + (b * strides[0] + h * strides[2])


@triton.jit
def _visible(query, key, first, T, CAUSAL: tl.constexpr):
    """Whether each query sees each key. Queries before T see no key past T either way; those past T aren't kept.

    first: of each query's document, or None.
    """
    query, key = query[:, None], key[None, :]
    visible = (query >= key) if CAUSAL else (key < T)
    if first is not None:
        visible &= key >= first[:, None]
    return visible


@triton.jit
def _keys(start, limit_ptr, T, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, whole, edge, end): the queries start.. all see the keys from whole to edge, which exist; from begin to
    whole and from edge to end, ask. limit_ptr: the first position of each query's document, which never falls; or None.
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
    """(begin, edge, tail, end): queries from edge to tail exist and see all keys start..; from begin to edge and from
    tail to end, ask; from end on, none sees them. edge may lie past tail and end. limit_ptr: one past the last position
    of each key's document, which never falls; or None.
    """
    edge, tail, end = 0, T // BLOCK_M * BLOCK_M, T
    if limit_ptr is not None:
        tail = tl.load(limit_ptr + start) // BLOCK_M * BLOCK_M
        end = tl.load(limit_ptr + tl.minimum(start + BLOCK_N, T) - 1)
    if CAUSAL:
        edge = tl.cdiv(start + BLOCK_N, BLOCK_M) * BLOCK_M
    return start // BLOCK_M * BLOCK_M, edge, tail, end


@triton.jit
def _attend(
    o, m, total, q, kv, row, first, stream, begin, end, T, c,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Update o = sum_j M_j 2^(c S - m) v, m = max_j c S, total = sum_j 2^(c S - m) with the keys begin..end.

    kv: k and v's pointers, then their strides from token to token. row: the first query. first: position of each
    query's document, or None. stream: the dropout's seed and the head's number in the batch.
    """
    k_ptr, v_ptr, k_stride, v_stride = kv
    query = row + tl.arange(0, q.shape[0])
    for start in range(begin, end, BLOCK_N):
        k = load_tile(k_ptr, start, k_stride, T, D, BLOCK_N, MASKED)
        s = dot(q, tl.trans(k), None, PRECISION)
        if MASKED:
            key = start + tl.arange(0, BLOCK_N)
            s = tl.where(_visible(query, key, first, T, CAUSAL), s, float("-inf"))
        # m is finite from the first tile on: every query sees key 0, or m began so where documents hide it.
        m_new = tl.maximum(m, tl.max(s, 1) * c)
        p = tl.exp2(s * c - m_new[:, None])
        shrink = tl.exp2(m - m_new)
        total = total * shrink + tl.sum(p, 1)
        if DROP:
            p = tl.where(kept(stream, row, start, q.shape[0], BLOCK_N, DROP), p, 0.0)
        v = load_tile(v_ptr, start, v_stride, T, D, BLOCK_N, MASKED)
        o = dot(cast(p, v.dtype), v, o * shrink[:, None], PRECISION)
        m = m_new
    return o, m, total


@hash_callees_first
@triton.jit(do_not_specialize=["H"])
def attention_forward_kernel(
    qkv_ptrs, o_ptr, lse_ptr,  # three of (B, T, H, D) by strides, one contiguous; (B, H, T)
    limit_ptr, seed_ptr,  # (B, T), the first position of each query's document, or None; int64, None without dropout
    qkv_strides,  # q's, k's and v's, each of batch, token and head
    T, H, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all keys they see."""
    q_ptr, k_ptr, v_ptr = qkv_ptrs
    q_strides, k_strides, v_strides = qkv_strides
    BYTES: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth // 8
    b, h, start = _place(T, H, D, BLOCK_M, BYTES, CAUSAL)
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
def _gather_dq(
    dq, q, do, lse, delta, kv, row, first, stream, begin, end, T, c,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq + dS k over the keys begin..end; arguments as of _attend."""
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
    qkv_ptrs, o_ptr, do_ptr, lse_ptr, delta_ptr, dqkv_ptr,  # dqkv (B, T, 3, H, D) contiguous
    limit_ptr, seed_ptr,
    qkv_strides, do_strides,
    T, H, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dq, and delta for the other pass, of BLOCK_M queries of one head."""
    q_ptr, k_ptr, v_ptr = qkv_ptrs
    q_strides, k_strides, v_strides = qkv_strides
    BYTES: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth // 8
    b, h, start = _place(T, H, D, BLOCK_M, BYTES, CAUSAL)
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

    store_tile(dqkv_ptr + (b * T * 3 * H + h) * D, dq * scale, start, 3 * H * D, T, D, BLOCK_M)


@triton.jit
def _gather_dkdv(
    dk, dv, k, v, queries, row, last, stream, begin, end, T, c,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dk + dS^T q and dv + (M P)^T do over the queries begin..end.

    queries: q, do, lse and delta's pointers, then q and do's strides from token to token. row: the first key.
    last: one past each key's document, or None.

    S is formed transposed, keys down and queries across, so that P^T and dS^T are left operands straight
    from registers. Queries past T have q = do = delta = 0 and so add 0.
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
    qkv_ptrs, do_ptr, lse_ptr, delta_ptr, dqkv_ptr,
    limit_ptr, seed_ptr,  # (B, T), one past the last position of each key's document, or None
    qkv_strides, do_strides,
    T, H, scale,
    D: tl.constexpr, CAUSAL: tl.constexpr, DROP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: dk and dv of BLOCK_N keys of one head, from all queries that see them."""
    q_ptr, k_ptr, v_ptr = qkv_ptrs
    q_strides, k_strides, v_strides = qkv_strides
    BYTES: tl.constexpr = q_ptr.dtype.element_ty.primitive_bitwidth // 8
    b, h, start = _place(T, H, D, BLOCK_N, BYTES, False)
    q_ptr = _head(q_ptr, b, h, q_strides)
    k_ptr = _head(k_ptr, b, h, k_strides)
    v_ptr = _head(v_ptr, b, h, v_strides)
    do_ptr = _head(do_ptr, b, h, do_strides)
    lse_ptr += (b * H + h) * T
    delta_ptr += (b * H + h) * T

    SUM: tl.constexpr = lse_ptr.dtype.element_ty
    k = load_tile(k_ptr, start, k_strides[1], T, D, BLOCK_N, True)
    v = load_tile(v_ptr, start, v_strides[1], T, D, BLOCK_N, True)
    dk = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), SUM)
    dv = tl.zeros((BLOCK_N, triton.next_power_of_2(D)), SUM)
    c = scale * LOG2_E

    stream = (tl.load(seed_ptr) if DROP else 0, b * H + h)

    queries = q_ptr, do_ptr, lse_ptr, delta_ptr, q_strides[1], do_strides[1]
    last = None
    if limit_ptr is not None:
        limit_ptr += b * T
        last = load_row(limit_ptr, start, T, BLOCK_N, True)

    first, edge, tail, end = _queries(start, limit_ptr, T, CAUSAL, BLOCK_M, BLOCK_N)
    for i in tl.static_range(0 if CAUSAL else 1, 3):  # masked, whole, masked
        if i == 0:
            begin, stop = first, tl.minimum(edge, end)
        elif i == 1:
            begin, stop = edge, tail
        else:
            begin, stop = tl.maximum(edge, tail), end
        dk, dv = _gather_dkdv(
            dk, dv, k, v, queries, start, last, stream, begin, stop, T, c,
            D, CAUSAL, DROP, i != 1, BLOCK_M, PRECISION,
        )  # fmt: skip

    if DROP:
        dv *= WEIGHTS / (WEIGHTS - DROP)
    dqkv_ptr += (b * T * 3 * H + h) * D
    store_tile(dqkv_ptr + H * D, dk * scale, start, 3 * H * D, T, D, BLOCK_N)
    store_tile(dqkv_ptr + 2 * H * D, dv, start, 3 * H * D, T, D, BLOCK_N)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, allow_tf32: bool,
    documents: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """o (B, T, H, D) contiguous and the base-2 lse (B, H, T), float32 at least.

    q, k, v: (B, T, H, D), any strides but the last, which is 1. documents: (2, B, T) int32, contiguous. seed: one
    int64, where dropout_p isn't 0. config overrides the table's.
    """
    B, T, H, D = q.shape
    q, k, v = _tiled(q), _tiled(k), _tiled(v)
    precision = precision_name(q.dtype, allow_tf32)
    config = config or lookup("attention_forward", precision, D, q.device)
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=statistics(q.dtype), device=q.device)
    with on(q.device):
        attention_forward_kernel[(B * H * triton.cdiv(T, config.block_m),)](
            (q, k, v), o, lse, None if documents is None else documents[0], seed,
            tuple(x.stride()[:3] for x in (q, k, v)), T, H, scale,
            D=D, CAUSAL=causal, DROP=weights_to_drop(dropout_p), PRECISION=_products(precision), **config.arguments(),
        )  # fmt: skip
    return o, lse


def attention_backward(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, causal: bool, scale: float, allow_tf32: bool,
    documents: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
    dq_config: LaunchConfig | None = None, dkdv_config: LaunchConfig | None = None,
) -> Tensor:  # fmt: skip
    """dqkv (B, T, 3, H, D) contiguous, from do (B, T, H, D) of any strides and what the forward was given and gave."""
    B, T, H, D = q.shape
    do, q, k, v = _tiled(do), _tiled(q), _tiled(k), _tiled(v)
    precision = precision_name(q.dtype, allow_tf32)
    dq_config = dq_config or lookup("attention_backward_dq", precision, D, q.device)
    dkdv_config = dkdv_config or lookup("attention_backward_dkdv", precision, D, q.device)
    dqkv = torch.empty((B, T, 3, H, D), dtype=q.dtype, device=q.device)
    delta = torch.empty((B, H, T), dtype=lse.dtype, device=q.device)
    strides = tuple(x.stride()[:3] for x in (q, k, v)), do.stride()[:3]
    first, last = (None, None) if documents is None else documents.unbind(0)
    constants = {"D": D, "CAUSAL": causal, "DROP": weights_to_drop(dropout_p), "PRECISION": _products(precision)}
    with on(q.device):
        attention_backward_dq_kernel[(B * H * triton.cdiv(T, dq_config.block_m),)](
            (q, k, v), o, do, lse, delta, dqkv, first, seed, *strides, T, H, scale, **constants, **dq_config.arguments()
        )
        attention_backward_dkdv_kernel[(B * H * triton.cdiv(T, dkdv_config.block_n),)](
            (q, k, v), do, lse, delta, dqkv, last, seed, *strides, T, H, scale, **constants, **dkdv_config.arguments()
        )
    return dqkv


def _tiled(x: Tensor) -> Tensor:
    """x, copied only where its strides don't do: a row must be contiguous, 128 rows within 32 bits of the first."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _products(precision: str) -> str:
    return "tf32" if precision == "tf32" else "ieee"


def _constants(precision: str, size: int) -> dict[str, object]:
    off = {"DROP": 0, "limit_ptr": None, "seed_ptr": None}
    return {"D": size, "CAUSAL": True, "PRECISION": _products(precision), **off}


_TYPES = {
    "qkv_ptrs": ("*{}",) * 3, "qkv_strides": (("i32",) * 3,) * 3,
    "lse_ptr": "*fp32", "delta_ptr": "*fp32", "scale": "fp32",
    "limit_ptr": "*i32", "seed_ptr": "*i64",
}  # fmt: skip
EXAMPLE = (64, 1024, 768)
"""(B, T, C) of a micro-step of GPT-2 124M on an 80 GB card, for which the tuner times."""
EXAMPLE_HEAD_DIM = 64


def _work(
    products: int, credited: float, tensors: int, runs: list[int], precision: str, config: LaunchConfig, programs: int
) -> Work:
    """Of a head's programs: `products` matmuls a tile, of which the formulas above credit `credited`; `tensors` of
    (B, T, H, D) read or written; `runs` of each loop."""
    (B, T, C), D = EXAMPLE, EXAMPLE_HEAD_DIM
    heads, tile = B * C // D, (config.block_m or 1) * (config.block_n or 1)
    element = 4 if precision in ("float32", "tf32") else 2
    return Work(
        size=D,
        flops=heads * credited * T * T * D,  # half of 2 T^2 D: causal
        executed_flops=heads * sum(runs) * products * 2 * tile * D,
        bytes=B * T * (tensors * C * element + 8 * C // D),
        programs=heads * programs,
        loops=tuple(Loop(heads * n, special=tile) for n in runs),
    )


def _work_by_queries(products: int, credited: float, tensors: int) -> Callable[[str, int, LaunchConfig], Work]:
    """The forward and dq: key tiles before the diagonal, then those on it."""

    def work(precision: str, size: int, config: LaunchConfig) -> Work:
        T, m, n = EXAMPLE[1], config.block_m or 1, config.block_n or 1
        starts = range(0, T, m)
        whole = sum(start // n for start in starts)
        edge = sum(triton.cdiv(min(start + m, T) - start // n * n, n) for start in starts)
        return _work(products, credited, tensors, [whole, edge], precision, config, len(starts))

    return work


def _work_by_keys(precision: str, size: int, config: LaunchConfig) -> Work:
    """dk and dv: query tiles on the diagonal, those after it, and past T none."""
    T, m, n = EXAMPLE[1], config.block_m or 1, config.block_n or 1
    starts = range(0, T, n)
    edges = [triton.cdiv(start + n, m) * m for start in starts]
    on_diagonal = sum((min(edge, T) - start // m * m) // m for start, edge in zip(starts, edges, strict=True))
    runs = [on_diagonal, sum((T - edge) // m for edge in edges), 0]
    return _work(4, 5 * 4 / 7, 6, runs, precision, config, len(starts))


_DROPOUT, _DOCUMENTS = {"DROP": WEIGHTS.value // 10, "seed_ptr": ...}, {"limit_ptr": ...}
_VARIANTS = {"full": {"CAUSAL": False}, "dropout": _DROPOUT, "documents": _DOCUMENTS, "both": _DROPOUT | _DOCUMENTS}
KERNELS = {
    op: Kernel(kernel, _constants, _TYPES, ("T",), products=products, variants=_VARIANTS, work=work)
    for op, kernel, products, work in (
        ("attention_forward", attention_forward_kernel, 4, _work_by_queries(2, 2, 4)),
        ("attention_backward_dq", attention_backward_dq_kernel, 6, _work_by_queries(3, 5 * 3 / 7, 6)),
        ("attention_backward_dkdv", attention_backward_dkdv_kernel, 12, _work_by_keys),
    )
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    exact = precision == "float32"
    tiles = (16, 32, 64) if exact else (32, 64, 128)
    return [
        LaunchConfig(m, n, num_warps=warps, num_stages=stages)
        for m in tiles for n in tiles for warps in (4, 8) for stages in ((1,) if exact else (1, 2, 3))
    ]  # fmt: skip


def _example(
    of: str | None, precision: str, size: int, device: torch.device, seed: int
) -> Callable[[LaunchConfig], object]:
    """The forward, or the backward with the configuration of one of its kernels, on packed inputs."""
    (B, T, C), tf32 = EXAMPLE, precision == "tf32"
    dtype = torch.float32 if tf32 else getattr(torch, precision)
    generator = torch.Generator(device).manual_seed(seed)
    qkv = torch.randn(B, T, 3, C // size, size, dtype=dtype, device=device, generator=generator)
    q, k, v = qkv.unbind(2)
    options = True, size**-0.5, tf32
    if of is None:
        return lambda config: attention_forward(q, k, v, *options, config=config)
    o, lse = attention_forward(q, k, v, *options)
    do = torch.randn(o.shape, dtype=dtype, device=device, generator=generator)
    backward: Callable[..., object] = partial(attention_backward, do, q, k, v, o, lse, *options)
    return lambda config: backward(**{of: config})


TUNING = {
    "attention_forward": Tuning(_candidates, partial(_example, None)),
    "attention_backward_dq": Tuning(_candidates, partial(_example, "dq_config")),
    "attention_backward_dkdv": Tuning(_candidates, partial(_example, "dkdv_config")),
}


# Operators that torch.compile takes whole. Autograd sees the Function below, never these.
_INPUTS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "bool causal, float scale, bool allow_tf32, Tensor? documents=None, Tensor? seed=None, float dropout_p=0.0"
torch.library.define("fastgpt2::attention_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)")
torch.library.define(
    "fastgpt2::attention_backward", f"(Tensor do, {_INPUTS}, Tensor o, Tensor lse, {_OPTIONS}) -> Tensor"
)
torch.library.impl("fastgpt2::attention_forward", "default", attention_forward)
torch.library.impl("fastgpt2::attention_backward", "default", attention_backward)


@launch.register_fake("fastgpt2::attention_forward")
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, allow_tf32: bool,
      documents: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=statistics(q.dtype))


@launch.register_fake("fastgpt2::attention_backward")
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
      causal: bool, scale: float, allow_tf32: bool, documents: Tensor | None = None, seed: Tensor | None = None,
      dropout_p: float = 0.0) -> Tensor:  # fmt: skip
    B, T, H, D = q.shape
    return q.new_empty(B, T, 3, H, D)


class _FlashAttention(torch.autograd.Function):
    """qkv is one packed (B, T, 3, H, D) tensor, or q, k and v apart; the gradient comes in the same form."""

    @staticmethod
    def forward(
        ctx, causal: bool, scale: float, allow_tf32: bool, documents: Tensor | None, seed: Tensor | None,
        dropout_p: float, *qkv: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(2)
        options = causal, scale, allow_tf32, documents, seed, dropout_p
        o, lse = torch.ops.fastgpt2.attention_forward(q, k, v, *options)
        ctx.save_for_backward(o, lse, documents, seed, *qkv)
        ctx.options = causal, scale, allow_tf32
        ctx.dropout_p = dropout_p
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        launch.refuse_second_derivative("flash attention", "--attn naive")
        o, lse, documents, seed, *qkv = ctx.saved_tensors
        q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(2)
        options = *ctx.options, documents, seed, ctx.dropout_p
        dqkv = torch.ops.fastgpt2.attention_backward(do, q, k, v, o, lse, *options)
        return (None,) * 6 + (dqkv.unbind(2) if len(qkv) == 3 else (dqkv,))


def flash_attention_qkv(
    qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None, *,
    causal: bool = True, scale: float | None = None, allow_tf32: bool = False, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + mask) v on the packed projection, as it leaves the matmul.

    Args:
        qkv: (B, T, 3, H, D), bfloat16, float16 or float32; T >= 1, D one of HEAD_DIMS; any strides, the
            last 1. Differentiable once; its gradient is one contiguous (B, T, 3, H, D) tensor.
        dropout_p: the probability of dropping a weight, in [0, 1), rounded to 2^-16 (fastgpt2.kernels.dropout.weights_to_drop).
        documents: (2, B, T) int32, where each token's document begins and one past where it ends, both never falling
            within a row: a token sees only its own. It isn't checked, as that would wait for the GPU. Needs causal.
        causal: whether a token sees only itself and those before it.
        scale: positive; 1 / sqrt(D) by default.
        allow_tf32: multiply float32 in TF32, 10 bits of mantissa, rather than exactly.
        seed: one int64 on qkv's device, which decides what is dropped; drawn from torch's generator by default.

    Returns:
        (B, T, H, D), contiguous, in qkv's dtype, or autocast's where that is on.

    Raises:
        ValueError: the shape, dtype, device, strides or an option; it says what would work.
    """
    if qkv.dim() != 5 or qkv.size(2) != 3:
        raise ValueError(f"qkv must be (B, T, 3, H, D), got shape {tuple(qkv.shape)}")
    (qkv,) = launch.autocast(qkv)
    scale, documents, seed = _validate({"qkv": qkv}, scale, dropout_p, causal, documents, seed)
    launch.refuse_transforms("flash attention", "--attn naive")
    return _FlashAttention.apply(causal, scale, allow_tf32, documents, seed, dropout_p, qkv)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None, *,
    causal: bool = True, scale: float | None = None, allow_tf32: bool = False, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + mask) v.

    Args:
        q, k, v: (B, T, H, D) each, alike in shape, dtype and device, each with strides of its own, the
            last 1. Differentiable once; the gradients are views of one (B, T, 3, H, D) tensor.
        dropout_p, documents, causal, scale, allow_tf32, seed: as for flash_attention_qkv.

    Returns:
        (B, T, H, D), contiguous, in q's dtype, or autocast's where that is on.

    Raises:
        ValueError: the shape, dtype, device, strides or an option; it says what would work.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, T, H, D), got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        for what, of_x, of_q in (("shape", tuple(x.shape), tuple(q.shape)), ("device", x.device, q.device)):
            if of_x != of_q:
                raise ValueError(f"{name} must have q's {what}, {of_q}, got {of_x}")
    q, k, v = launch.autocast(q, k, v)
    k = k.view_as(k) if k is q else k  # torch.compile takes no tensor for two arguments
    v = v.view_as(v) if v is q or v is k else v
    scale, documents, seed = _validate({"q": q, "k": k, "v": v}, scale, dropout_p, causal, documents, seed)
    launch.refuse_transforms("flash attention", "--attn naive")
    return _FlashAttention.apply(causal, scale, allow_tf32, documents, seed, dropout_p, q, k, v)


def _validate(
    inputs: dict[str, Tensor], scale: float | None, dropout_p: float, causal: bool,
    documents: Tensor | None, seed: Tensor | None,
) -> tuple[float, Tensor | None, Tensor | None]:  # fmt: skip
    """The scale, documents and seed, once all is found to be what the kernels can take."""
    first = next(iter(inputs.values()))
    B, T, D = first.size(0), first.size(1), first.size(-1)
    for name, x in inputs.items():
        if x.dtype != first.dtype:
            raise ValueError(f"{name} must have q's dtype, {first.dtype}, got {x.dtype}")
        if T < 1:
            raise ValueError(f"{name} must have at least one token, got shape {tuple(x.shape)}")
        reason = why_unsupported(x.device, x.dtype, D, dropout_p)
        if reason:
            raise ValueError(reason)
        if x.stride(-1) != 1:
            raise ValueError(f"{name} must be contiguous in its last dimension, got stride {x.stride(-1)}")
    if scale is None:
        scale = D**-0.5
    if not 0.0 < scale < math.inf:
        raise ValueError(f"scale must be positive and finite, got {scale}")
    if documents is not None:
        if not causal:
            raise ValueError("documents needs causal=True: without it, leave documents out")
        _require("documents", documents, (2, B, T), torch.int32, first.device)
        documents = documents.contiguous()
    if not weights_to_drop(dropout_p):
        return scale, documents, None
    if seed is None:
        return scale, documents, draw_seed(first.device)
    _require("seed", seed, (1,), torch.int64, first.device)
    return scale, documents, seed


def _require(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    expected = f"{shape} {dtype} on {device}"
    if (tuple(x.shape), x.dtype, x.device) != (shape, dtype, device):
        raise ValueError(f"{name} must be {expected}, got {tuple(x.shape)} {x.dtype} on {x.device}")


def why_unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, dropout_p: float) -> str | None:
    """Why these kernels can't run with such inputs, in a line that says what would work; None if they can."""
    if reason := launch.why_unsupported("Triton attention", device, dtype, "--attn sdpa"):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"Triton attention has head sizes {HEAD_DIMS}, got {head_dim}; choose one, or use --attn sdpa"
    if not 0.0 <= dropout_p < 1.0:
        return f"Triton attention drops with a probability of at least 0 and less than 1, got {dropout_p}"
    return None
