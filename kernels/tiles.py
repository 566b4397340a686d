"""The verbs that the kernels use: load a tile, store it, multiply two, round one.

They also fix the 16-bit arithmetic of Triton's interpreter: its products of bfloat16 multiply bit patterns, its casts
to bfloat16 lose the carry into the exponent, and its sums of float16 are float16. Here operands are widened first,
which is exact, and bfloat16 is rounded by its bits: an interpreted kernel rounds only where a GPU does. A product is
summed in float64 and rounded once. NumPy's BLAS sums float32 in an order that depends on the processor and
on which operand is transposed, but attention's backward must recompute exactly the scores of its forward.
"""

import triton
import triton.language as tl

# Triton decides at its own import (TRITON_INTERPRET) whether @triton.jit compiles or interprets.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr):
    """accumulator + a b in float32 (float64 for float64); accumulator may be None.

    PRECISION of float32 operands: "ieee" is exact, "tf32" rounds them to 10 bits of mantissa.
    """
    SUM: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    if INTERPRETED:
        product = tl.dot(a.to(tl.float64), b.to(tl.float64), out_dtype=tl.float64).to(SUM)
        total = product if accumulator is None else accumulator + product
    else:
        total = tl.dot(a, b, accumulator, input_precision=PRECISION, out_dtype=SUM)
    return total


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x in dtype, rounded to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # Add half a unit of the last kept place, minus one bit if that place is even, then truncate.
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def load_tile(ptr, start, stride, T, D: tl.constexpr, ROWS: tl.constexpr, BOUNDED: tl.constexpr):
    """Rows start.. of a (T, D) matrix as (ROWS, D to the next power of two).

    Zeros past column D and, if BOUNDED, past row T; without BOUNDED all rows must exist.
    """
    COLUMNS: tl.constexpr = triton.next_power_of_2(D)
    rows, columns = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    # The tile's first row needs 64 bits. Offsets within the tile don't, and the compiler hoists them.
    tile = ptr + tl.cast(start, tl.int64) * stride + (rows[:, None] * stride + columns[None, :])
    if BOUNDED and D < COLUMNS:
        x = tl.load(tile, mask=(start + rows[:, None] < T) & (columns[None, :] < D), other=0.0)
    elif BOUNDED:
        x = tl.load(tile, mask=start + rows[:, None] < T, other=0.0)
    elif D < COLUMNS:
        x = tl.load(tile, mask=columns[None, :] < D, other=0.0)
    else:
        x = tl.load(tile)
    return x


@triton.jit
def store_tile(ptr, x, start, stride, T, D: tl.constexpr, ROWS: tl.constexpr):
    """Write x (ROWS, D to the next power of two) to rows start.. of a (T, D) matrix, nothing past T or D."""
    columns = tl.arange(0, triton.next_power_of_2(D))
    rows = start + tl.arange(0, ROWS)
    tile = ptr + tl.cast(start, tl.int64) * stride + (tl.arange(0, ROWS)[:, None] * stride + columns[None, :])
    tl.store(tile, cast(x, ptr.dtype.element_ty), mask=(rows[:, None] < T) & (columns[None, :] < D))


@triton.jit
def load_row(ptr, start, T, SIZE: tl.constexpr, BOUNDED: tl.constexpr):
    """Elements start.. of a vector of T, with zeros past T if BOUNDED, as in load_tile."""
    index = start + tl.arange(0, SIZE)
    return tl.load(ptr + index, mask=index < T, other=0.0) if BOUNDED else tl.load(ptr + index)


@triton.jit
def store_row(ptr, x, start, T, SIZE: tl.constexpr):
    """Write x to elements start.. of a vector of T, nothing past T."""
    index = start + tl.arange(0, SIZE)
    tl.store(ptr + index, cast(x, ptr.dtype.element_ty), mask=index < T)
