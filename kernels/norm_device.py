"""LayerNorm's Triton kernels; norm.py has the maths and the launchers."""

from __future__ import annotations

import triton
import triton.language as tl

from fastgpt2.kernels.launch import hash_callees_first
from fastgpt2.kernels.tiles import cast, load_row, load_tile, store_row, store_tile


@triton.jit
def load_sum(
    x_ptr, residual_ptr, start, x_stride, residual_stride, rows, C: tl.constexpr, BLOCK_M: tl.constexpr,
    SUM: tl.constexpr,
):  # fmt: skip
    """A tile of x + residual, or of x alone. Rounded to their dtype if they share it, as PyTorch's sum is."""
    s = load_tile(x_ptr, start, x_stride, rows, C, BLOCK_M, True).to(SUM)
    if residual_ptr is not None:
        s += load_tile(residual_ptr, start, residual_stride, rows, C, BLOCK_M, True).to(SUM)
        if x_ptr.dtype == residual_ptr.dtype:
            s = cast(s, x_ptr.dtype.element_ty).to(SUM)
    return s


@hash_callees_first
@triton.jit(do_not_specialize=["rows"])
def layer_norm_forward_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr,  # (rows, C) by its stride, the same or None, (C,), (C,)
    y_ptr, total_ptr, mean_ptr, rstd_ptr,  # (rows, C), the same or None, (rows,), (rows,); contiguous
    x_stride, residual_stride, rows, eps,
    C: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M rows."""
    SUM: tl.constexpr = mean_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = triton.next_power_of_2(C)
    start = tl.program_id(0) * BLOCK_M
    s = load_sum(x_ptr, residual_ptr, start, x_stride, residual_stride, rows, C, BLOCK_M, SUM)
    if total_ptr is not None:
        store_tile(total_ptr, s, start, C, rows, C, BLOCK_M)

    mean = tl.sum(s, 1) / C
    centred = tl.where(tl.arange(0, COLUMNS)[None, :] < C, s - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    w = load_row(weight_ptr, 0, C, COLUMNS, True).to(SUM)
    b = load_row(bias_ptr, 0, C, COLUMNS, True).to(SUM)
    store_tile(y_ptr, w[None, :] * (centred * rstd[:, None]) + b[None, :], start, C, rows, C, BLOCK_M)
    store_row(mean_ptr, mean, start, rows, BLOCK_M)
    store_row(rstd_ptr, rstd, start, rows, BLOCK_M)


@hash_callees_first
@triton.jit(do_not_specialize=["rows"])
def layer_norm_backward_kernel(
    dy_ptr, dtotal_ptr,  # (rows, C) by its stride, the same or None
    total_ptr, residual_ptr,  # the sum and None, or x and what is added to it; as above
    mean_ptr, rstd_ptr, weight_ptr,
    dx_ptr, dresidual_ptr, sums_ptr,  # (rows, C), the same or None, (programs, SUMS, C); contiguous
    dy_stride, dtotal_stride, total_stride, residual_stride, rows,
    C: tl.constexpr, SUMS: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One program: every num_programs-th tile of BLOCK_M rows, and its share of the sums: dw, db and, of 3, dbranch.

    Loads are 0 past C and past the last row, hence so are g and the terms of dw and db. rstd is 0 past the last row,
    hence so are those of dbranch.
    """
    SUM: tl.constexpr = mean_ptr.dtype.element_ty
    COLUMNS: tl.constexpr = triton.next_power_of_2(C)
    w = load_row(weight_ptr, 0, C, COLUMNS, True).to(SUM)
    dw = tl.zeros((COLUMNS,), SUM)
    db = tl.zeros((COLUMNS,), SUM)
    dbranch = tl.zeros((COLUMNS,), SUM)
    for start in range(tl.program_id(0) * BLOCK_M, rows, tl.num_programs(0) * BLOCK_M):
        # Issue every load before the first reduction, which waits for the other warps.
        s = load_sum(total_ptr, residual_ptr, start, total_stride, residual_stride, rows, C, BLOCK_M, SUM)
        dy = load_tile(dy_ptr, start, dy_stride, rows, C, BLOCK_M, True).to(SUM)
        if dtotal_ptr is not None:
            ds = load_tile(dtotal_ptr, start, dtotal_stride, rows, C, BLOCK_M, True).to(SUM)
        mean = load_row(mean_ptr, start, rows, BLOCK_M, True)
        rstd = load_row(rstd_ptr, start, rows, BLOCK_M, True)

        n = (s - mean[:, None]) * rstd[:, None]
        db += tl.sum(dy, 0)
        dw += tl.sum(dy * n, 0)
        g = w[None, :] * dy
        along_one = tl.sum(g, 1) / C
        along_n = tl.sum(g * n, 1) / C
        dx = rstd[:, None] * (g - along_one[:, None] - n * along_n[:, None])
        if dtotal_ptr is not None:
            dx += ds
        if SUMS == 3:
            dbranch += tl.sum(dx, 0)
        store_tile(dx_ptr, dx, start, C, rows, C, BLOCK_M)
        if dresidual_ptr is not None:
            store_tile(dresidual_ptr, dx, start, C, rows, C, BLOCK_M)
    sums_ptr += tl.program_id(0) * SUMS * C
    store_row(sums_ptr, dw, 0, C, COLUMNS)
    store_row(sums_ptr + C, db, 0, C, COLUMNS)
    if SUMS == 3:
        store_row(sums_ptr + 2 * C, dbranch, 0, C, COLUMNS)
