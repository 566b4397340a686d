"""The GELU-MLP's Triton kernels; mlp.py has the maths and the launchers.

Each kernel is one matmul with an epilogue, by descriptors or by pointers (TMA), over tiles of an (M, HIDDEN) result.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from fastgpt2.kernels.launch import hash_callees_first
from fastgpt2.kernels.tiles import INTERPRETED, cast, dot

# gelu(z) = z s(z),  s(z) = (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)),  u = A z + B z^3. Write the tensor left of the
# constant: in the interpreter, a constexpr times a tensor is a constexpr.
A = tl.constexpr(math.sqrt(2 / math.pi))
B = tl.constexpr(0.044715 * math.sqrt(2 / math.pi))
LOG2_E = tl.constexpr(math.log2(math.e))
# Row tiles that share a pass over the weights' columns: 8 x 128 rows and about 4 MB of weights fit in L2 together.
GROUP = tl.constexpr(8)


@triton.jit
def _share(z, APPROXIMATE: tl.constexpr):
    """s(z), the share of z that gelu lets through: to float32's precision, or to 11 bits if APPROXIMATE."""
    if INTERPRETED:
        s = 1.0 / (1.0 + tl.exp2(z * (z * z * B + A) * (-2.0 * LOG2_E)))
    elif APPROXIMATE:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * (z * z * B + A)], tl.float32, True, 1)
        s = 0.5 * t + 0.5
    else:
        # Two special functions and an add. If exp overflows, s = 1 / inf = 0, which is right.
        s = tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f", [z * (z * z * (-2.0 * LOG2_E * B) + (-2.0 * LOG2_E * A))], tl.float32, True, 1,
        )  # fmt: skip
    return s


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """cast(x, dtype), two elements at a time. The compiler's conversion takes a special-function slot each."""
    if INTERPRETED or (dtype != tl.bfloat16 and dtype != tl.float16):
        x = cast(x, dtype)
    elif dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, True, 2)
    else:
        x = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, True, 2)
    return x


@triton.jit
def _matrix(ptr, R, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A handle to load and store (ROWS, COLUMNS) tiles of a contiguous (R, S) matrix: a descriptor, or its pointer."""
    return tl.make_tensor_descriptor(ptr, [R, S], [tl.cast(S, tl.int64), 1], [ROWS, COLUMNS]) if TMA else ptr


@triton.jit
def _tile(row, column, R, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):  # fmt: skip
    """(start, offsets, mask) of a tile of an (R, S) matrix. WHOLE_ROWS (COLUMNS): none is past its end."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    # The tile's first element needs 64 bits. Offsets within the tile don't, and the compiler hoists them.
    start = tl.cast(row, tl.int64) * S + column
    if WHOLE_ROWS:
        mask = column + c < S
    elif WHOLE_COLUMNS:
        mask = row + r < R
    else:
        mask = (row + r < R) & (column + c < S)
    return start, r * S + c, mask


@triton.jit
def _load(matrix, row, column, R, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr,
          WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):  # fmt: skip
    """The tile at (row, column), zeros outside the matrix."""
    if TMA:
        x = matrix.load([row, column])
    else:
        start, offsets, mask = _tile(row, column, R, S, ROWS, COLUMNS, WHOLE_ROWS, WHOLE_COLUMNS)
        x = tl.load(matrix + start + offsets, mask=mask, other=0.0)
    return x


@triton.jit
def _store(matrix, x, row, column, R, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """Write the tile at (row, column), nothing outside the matrix."""
    if TMA:
        matrix.store([row, column], x)
    else:
        start, offsets, mask = _tile(row, column, R, S, ROWS, COLUMNS, False, False)
        tl.store(matrix + start + offsets, x, mask=mask)


@triton.jit
def _place(tile, M, HIDDEN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile's first row and column. GROUP row tiles take all columns before the next GROUP starts."""
    columns = tl.cdiv(HIDDEN, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = tile - first * columns
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _halves(x):
    """The left and the right half of a tile's columns. An epilogue that takes them in turn needs fewer registers."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1] // 2
    return x.reshape(ROWS, 2, WIDTH).permute(0, 2, 1).split()


@triton.jit
def _activate(z, bias_ptr, pre, act, row, column, M, HIDDEN, DTYPE: tl.constexpr, KEEP: tl.constexpr,
              TMA: tl.constexpr, APPROXIMATE: tl.constexpr):  # fmt: skip
    """Write pre = z + bias and act = gelu(pre) of the rounded pre: the backward recomputes the same act."""
    ROWS: tl.constexpr = z.shape[0]
    COLUMNS: tl.constexpr = z.shape[1]
    c = column + tl.arange(0, COLUMNS)
    bias = tl.load(bias_ptr + c, mask=c < HIDDEN, other=0.0)
    rounded = _rounded(z + bias.to(z.dtype)[None, :], DTYPE)
    if KEEP:
        _store(pre, rounded, row, column, M, HIDDEN, ROWS, COLUMNS, TMA)
    z = rounded.to(z.dtype)
    _store(act, cast(z * _share(z, APPROXIMATE), DTYPE), row, column, M, HIDDEN, ROWS, COLUMNS, TMA)


@hash_callees_first
@triton.jit(do_not_specialize=["M"])
def gelu_mlp_forward_kernel(
    x_ptr, w_ptr, bias_ptr, pre_ptr, act_ptr,  # (M, C), (HIDDEN, C), (HIDDEN,), (M, HIDDEN) twice: contiguous
    M, HIDDEN, C,
    KEEP: tl.constexpr, TMA: tl.constexpr, WHOLE_K: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of pre = x w^T + bias and act = gelu(pre). pre is written if KEEP."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    HALF: tl.constexpr = BLOCK_N // 2
    x = _matrix(x_ptr, M, C, BLOCK_M, BLOCK_K, TMA)
    w = _matrix(w_ptr, HIDDEN, C, BLOCK_N, BLOCK_K, TMA)
    pre = _matrix(pre_ptr, M, HIDDEN, BLOCK_M, HALF, TMA and KEEP)
    act = _matrix(act_ptr, M, HIDDEN, BLOCK_M, HALF, TMA)

    first, step = tl.program_id(0), tl.num_programs(0)
    tiles, steps = tl.cdiv(M, BLOCK_M) * tl.cdiv(HIDDEN, BLOCK_N), tl.cdiv(C, BLOCK_K)
    tl.assume(steps > 0)  # otherwise the compiler makes a second loop over tiles, for steps = 0
    # Flattened, the two loops are one pipeline: a tile's first loads run during the epilogue of the tile before.
    # The epilogue has a tile counter of its own: with a shared one the loads would wait for it.
    finished = first - step
    for tile in tl.range(first, tiles, step, flatten=TMA):
        row, column = _place(tile, M, HIDDEN, BLOCK_M, BLOCK_N)
        z = tl.zeros((BLOCK_M, BLOCK_N), SUM)
        for i in range(steps):
            k = i * BLOCK_K
            left = _load(x, row, k, M, C, BLOCK_M, BLOCK_K, TMA, False, WHOLE_K)
            right = _load(w, column, k, HIDDEN, C, BLOCK_N, BLOCK_K, TMA, False, WHOLE_K)
            z = dot(left, tl.trans(right), z, PRECISION)

        finished += step
        row, column = _place(finished, M, HIDDEN, BLOCK_M, BLOCK_N)
        z0, z1 = _halves(z)
        _activate(z0, bias_ptr, pre, act, row, column, M, HIDDEN, DTYPE, KEEP, TMA, APPROXIMATE)
        _activate(z1, bias_ptr, pre, act, row, column + HALF, M, HIDDEN, DTYPE, KEEP, TMA, APPROXIMATE)


@triton.jit
def _differentiate(dact, pre, dpre, act, partial_ptr, row, column, M, HIDDEN, DTYPE: tl.constexpr,
                   TMA: tl.constexpr, APPROXIMATE: tl.constexpr):  # fmt: skip
    """Write act = gelu(pre) again, dpre = dact gelu'(pre), and the column sums of the unrounded dpre, in float32.

    gelu' = s + z s' = s (1 + 2 z (1 - s) u'),  u' = A + 3 B z^2
    """
    ROWS: tl.constexpr = dact.shape[0]
    COLUMNS: tl.constexpr = dact.shape[1]
    z = _load(pre, row, column, M, HIDDEN, ROWS, COLUMNS, TMA, False, False).to(dact.dtype)
    s = _share(z, APPROXIMATE)
    _store(act, cast(z * s, DTYPE), row, column, M, HIDDEN, ROWS, COLUMNS, TMA)
    # Rows past M have dact = 0 and add nothing.
    d = dact * (s * (z * (1.0 - s) * (z * z * (6.0 * B) + 2.0 * A) + 1.0))
    _store(dpre, cast(d, DTYPE), row, column, M, HIDDEN, ROWS, COLUMNS, TMA)
    c = column + tl.arange(0, COLUMNS)
    tl.store(partial_ptr + tl.cast(row // ROWS, tl.int64) * HIDDEN + c, tl.sum(d, 0), mask=c < HIDDEN)


@hash_callees_first
@triton.jit(do_not_specialize=["M"])
def gelu_mlp_backward_kernel(
    dy_ptr, w_ptr, pre_ptr, dpre_ptr, act_ptr,  # (M, N), (N, HIDDEN), (M, HIDDEN) three times: contiguous
    partial_ptr,  # (row tiles, HIDDEN): a tile's column sums of dpre
    M, HIDDEN, N,
    TMA: tl.constexpr, WHOLE_K: tl.constexpr, APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of dpre = (dy w) gelu'(pre), act = gelu(pre) and partial."""
    DTYPE: tl.constexpr = dy_ptr.dtype.element_ty
    QUARTER: tl.constexpr = BLOCK_N // 4
    dy = _matrix(dy_ptr, M, N, BLOCK_M, BLOCK_K, TMA)
    w = _matrix(w_ptr, N, HIDDEN, BLOCK_K, BLOCK_N, TMA)
    pre = _matrix(pre_ptr, M, HIDDEN, BLOCK_M, QUARTER, TMA)
    dpre = _matrix(dpre_ptr, M, HIDDEN, BLOCK_M, QUARTER, TMA)
    act = _matrix(act_ptr, M, HIDDEN, BLOCK_M, QUARTER, TMA)

    first, step = tl.program_id(0), tl.num_programs(0)
    tiles, steps = tl.cdiv(M, BLOCK_M) * tl.cdiv(HIDDEN, BLOCK_N), tl.cdiv(N, BLOCK_K)
    tl.assume(steps > 0)
    finished = first - step
    for tile in tl.range(first, tiles, step, flatten=TMA):
        row, column = _place(tile, M, HIDDEN, BLOCK_M, BLOCK_N)
        dact = tl.zeros((BLOCK_M, BLOCK_N), partial_ptr.dtype.element_ty)
        for i in range(steps):
            k = i * BLOCK_K
            left = _load(dy, row, k, M, N, BLOCK_M, BLOCK_K, TMA, False, WHOLE_K)
            right = _load(w, k, column, N, HIDDEN, BLOCK_K, BLOCK_N, TMA, WHOLE_K, False)
            dact = dot(left, right, dact, PRECISION)

        finished += step
        row, column = _place(finished, M, HIDDEN, BLOCK_M, BLOCK_N)
        left, right = _halves(dact)
        d0, d1 = _halves(left)
        d2, d3 = _halves(right)
        quarters = (d0, d1, d2, d3)
        for i in tl.static_range(4):
            _differentiate(quarters[i], pre, dpre, act, partial_ptr, row, column + i * QUARTER, M, HIDDEN, DTYPE, TMA,
                           APPROXIMATE)  # fmt: skip
