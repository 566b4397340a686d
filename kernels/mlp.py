"""GELU-MLP, forward and backward: y = gelu(x w_fc^T + b_fc) w_proj^T + b_proj with the tanh GELU of GPT-2.

Maths, M rows, C channels in, F hidden (HIDDEN in the code; GPT-2: 4 C), N channels out (GPT-2: C):

    pre = x w_fc^T + b_fc              (M, F), rounded to the inputs' dtype; with x the only thing kept
    act = gelu(pre)                    (M, F), not kept
    y = act w_proj^T + b_proj

    dact = dy w_proj                   never stored
    dpre = dact gelu'(pre)             gelu' in the code
    dw_proj = dy^T act,  db_proj = sum over rows of dy
    dw_fc = dpre^T x,  db_fc = sum over rows of dpre,  dx = dpre w_fc

Six matmuls. Two have something to do with a tile of (M, F) while it is in registers, and are Triton's: the first,
which writes pre and act, and dact, whose epilogue reads pre and writes dpre, act again and the column sums of dpre.
The other four are plain products and cuBLAS's. Fusing the two matmuls of a direction instead would recompute one.

Memory, e bytes an element, M C elements at F = 4 C, N = C; weights are nothing beside it:

    forward    reads x 1, writes pre 4, act 4; reads act 4, writes y 1                    14 e
               PyTorch: the same, but gelu reads pre 4                                    18 e
    backward   dact: reads dy 1, pre 4, writes dpre 4, act 4; dw_proj 5, dw_fc 5, dx 5, db_proj 1    29 e
               PyTorch: dact 5, gelu' 12, db_fc 4; the others alike                       37 e
    kept       pre 4; PyTorch keeps act as well, 8 e

FLOPs: forward 2 M C F + 2 M F N, backward twice that; nothing is done twice but gelu itself.

float32 whatever the inputs are (float64 for float64): every sum of a product, gelu, its gradient and db_fc, which
adds dpre as it is before rounding. Both sums over rows have a fixed order, without atomics: db_fc's partial sums, one
a row tile and column, are added by a second kernel, and two runs agree to the bit. act is gelu of the rounded pre,
so that the backward makes the activation that the forward multiplied.

gelu(z) = z s(z) with s in [0, 1]: 1 + tanh has no cancellation to lose digits in. In bfloat16 the tanh is the
hardware's, tanh.approx, one special function an element, off by 2^-11 at most: by an emulation that errs as much
it raises gelu's root mean square error, which is bfloat16's rounding, by 0.5%, and float16's by 33%. So float16 and
float32 have exp2 and a reciprocal, two special functions, right to float32's last places.

By descriptors (the _tma kernels; compute capability 9 and 10, rows of 16 bytes' multiples): as many programs as run
at a time take tiles in turn, and the loops over tiles and over K are one pipeline, so that a tile's first loads are
under way in its predecessor's epilogue. By pointers (compute capability 8 and 12, odd sizes): a program a tile.
Groups of 8 row tiles take all columns, so that their rows and the weights stay in L2. An epilogue takes its tile in
halves or quarters: fewer registers, a smaller buffer for its stores.

Versions tried. No GPU has timed any of them yet: these are counts of what the compiler made, for sm_90, bfloat16, by
descriptors, with Triton 3.6 / 3.9; spilled bytes.

    kernel    tile        warps, stages  registers  blocks  spilled
    forward   128x256x64    8, 4         213 / 178    1       0      shipped, in halves
    forward   128x256x64    8, 3         204 / 255    1     0 / 8    in one piece: 4 stages don't fit
    forward   128x128x64    8, 3         124 / 103    2       0      hides epilogues, reads L2 more often
    backward  128x128x64    8, 3         128 / 128    2       0      shipped, in quarters; hides the wait for pre
    backward  128x256x64    8, 4         234 / 242    1       0      in quarters; waits for pre alone
    backward  128x256x64    8, 3         255 / 255    1   176 / 0    in halves
    backward  128x256x64    8, 3         255 / 255    1  1224 / -    in one piece, 3.6 alone
    backward  128x128x64    8, 3         178 / 184    1       0      in halves
    backward  128x256x64    8, 3         255 / 255    1  2464 / 1616  in halves, pre loaded before the products

Rounding pre by the compiler's own conversion, of a number that is used again, took 128 slots of the special-function
unit a tile of 128x256 and thread; two at a time by hand it takes none. Loading pre before the products, not pipelined,
fits with 3.6 (255 registers) and spills 48 bytes with 3.9. Without being told that K is not 0, the compiler makes every
flattened loop twice. By pointers the backward spills 16 bytes where BLOCK_K doesn't divide N, as it does GPT-2's.

Papers: Gaussian Error Linear Units (Hendrycks and Gimpel 2016, arXiv:1606.08415).
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels import launch
from fastgpt2.kernels.launch import hash_callees_first, on, statistics
from fastgpt2.kernels.specs.records import Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tiles import INTERPRETED, cast, dot
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

# gelu(z) = z s(z),  s(z) = (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)),  u = A z + B z^3. In the kernels a tensor stands
# left of a constant: the interpreter takes a constexpr times a tensor for a constexpr.
A = tl.constexpr(math.sqrt(2 / math.pi))
B = tl.constexpr(0.044715 * math.sqrt(2 / math.pi))
LOG2_E = tl.constexpr(math.log2(math.e))
# Row tiles that share a pass over the weights' columns: 8 x 128 rows and some 4 MB of weights stay in L2 together.
GROUP = tl.constexpr(8)
DESCRIPTORS = (9, 10)
"""The major compute capabilities where the _tma kernels run."""
ALIGNED = 64
"""Widths that don't divide by this, as every BLOCK_K of the aligned tables does, have tiles of their own: with masks
in the loop and loads of single elements large ones spill kilobytes, 64x64x32 with 8 warps nothing (128 registers)."""


def gelu_mlp_reference(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """The same function in plain PyTorch."""
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


@triton.jit
def _share(z, APPROXIMATE: tl.constexpr):
    """s(z), the share of z that gelu lets through, to float32's precision, or to 11 bits."""
    if INTERPRETED:
        s = 1.0 / (1.0 + tl.exp2(z * (z * z * B + A) * (-2.0 * LOG2_E)))
    elif APPROXIMATE:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * (z * z * B + A)], tl.float32, True, 1)
        s = 0.5 * t + 0.5
    else:
        # Two special functions and an add. Where exp overflows, s = 1 / inf = 0, which is right.
        s = tl.inline_asm_elementwise(
            "{ .reg .f32 e; ex2.approx.ftz.f32 e, $1; add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e; }",
            "=f,f", [z * (z * z * (-2.0 * LOG2_E * B) + (-2.0 * LOG2_E * A))], tl.float32, True, 1,
        )  # fmt: skip
    return s


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """cast(x, dtype) two at a time: the compiler's own, of what is used again, takes a special-function slot each."""
    if INTERPRETED or (dtype != tl.bfloat16 and dtype != tl.float16):
        x = cast(x, dtype)
    elif dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.bfloat16, True, 2)
    else:
        x = tl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,f,f", [x], tl.float16, True, 2)
    return x


@triton.jit
def _matrix(ptr, R, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr):
    """A contiguous (R, S) matrix to load or store by tiles of (ROWS, COLUMNS): by descriptor, or by pointers."""
    return tl.make_tensor_descriptor(ptr, [R, S], [tl.cast(S, tl.int64), 1], [ROWS, COLUMNS]) if TMA else ptr


@triton.jit
def _tile(row, column, R, S, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
          WHOLE_ROWS: tl.constexpr, WHOLE_COLUMNS: tl.constexpr):  # fmt: skip
    """(start, offsets, mask) of a tile of an (R, S) matrix; a whole tile's rows or columns all exist."""
    r, c = tl.arange(0, ROWS)[:, None], tl.arange(0, COLUMNS)[None, :]
    # The tile's first element needs 64 bits, the way within the tile doesn't and stays out of the loop.
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
    """A tile's first row and column: GROUP row tiles take all columns before the next GROUP starts."""
    columns = tl.cdiv(HIDDEN, BLOCK_N)
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - first, GROUP)
    within = tile - first * columns
    return (first + within % height) * BLOCK_M, within // height * BLOCK_N


@triton.jit
def _halves(x):
    """The left and the right columns of a tile: an epilogue that takes them in turn has fewer temporaries."""
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1] // 2
    return x.reshape(ROWS, 2, WIDTH).permute(0, 2, 1).split()


@triton.jit
def _activate(z, bias_ptr, pre, act, row, column, M, HIDDEN, DTYPE: tl.constexpr, KEEP: tl.constexpr,
              TMA: tl.constexpr, APPROXIMATE: tl.constexpr):  # fmt: skip
    """Write pre = z + bias and act = gelu(pre), of pre as it was rounded: the backward's act is this one again."""
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
    """One program: every num_programs-th tile of pre = x w^T + bias and act = gelu(pre); pre is written where KEEP."""
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    SUM: tl.constexpr = tl.float64 if x_ptr.dtype.element_ty == tl.float64 else tl.float32
    HALF: tl.constexpr = BLOCK_N // 2
    x = _matrix(x_ptr, M, C, BLOCK_M, BLOCK_K, TMA)
    w = _matrix(w_ptr, HIDDEN, C, BLOCK_N, BLOCK_K, TMA)
    pre = _matrix(pre_ptr, M, HIDDEN, BLOCK_M, HALF, TMA and KEEP)
    act = _matrix(act_ptr, M, HIDDEN, BLOCK_M, HALF, TMA)

    first, step = tl.program_id(0), tl.num_programs(0)
    tiles, steps = tl.cdiv(M, BLOCK_M) * tl.cdiv(HIDDEN, BLOCK_N), tl.cdiv(C, BLOCK_K)
    tl.assume(steps > 0)  # or the compiler makes a second loop over tiles, for none
    # Flattened, the two loops are one pipeline: a tile's first loads are under way in its predecessor's epilogue.
    # The epilogue counts tiles for itself, or the loads would have to wait for it.
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
    """Write act = gelu(pre) again, dpre = dact gelu'(pre), and dpre's column sums, in float32 and of what is exact.

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


def gelu_mlp_forward(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: bool, allow_tf32: bool,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (..., N) and the pre-activation (rows, HIDDEN), which is (0, HIDDEN) unless it is to be kept.

    x: (..., C); any strides, as for all of them: what isn't contiguous is copied. config overrides the table's.
    """
    pre, act = _activation(_rows(x), w_fc.contiguous(), b_fc.contiguous(), keep, allow_tf32, config)
    return torch.addmm(b_proj, act, w_proj.t()).view(*x.shape[:-1], w_proj.size(0)), pre


def _activation(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, keep: bool, allow_tf32: bool, config: LaunchConfig | None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """pre, which is (0, HIDDEN) unless it is to be kept, and act (M, HIDDEN), from contiguous x (M, C), w_fc and b_fc.

    tma: whether by descriptors; None: where they can be had.
    """
    (M, C), HIDDEN = x.shape, w_fc.size(0)
    pre = torch.empty((M if keep else 0, HIDDEN), dtype=x.dtype, device=x.device)
    act = torch.empty((M, HIDDEN), dtype=x.dtype, device=x.device)
    by_descriptors = _descriptors(x, w_fc, act) if tma is None else tma
    config, constants = _configured("gelu_mlp_forward", by_descriptors, x, HIDDEN, allow_tf32, config)
    _run(x.device, lambda: gelu_mlp_forward_kernel[(_programs(M, HIDDEN, by_descriptors, config, x.device),)](
        x, w_fc, b_fc, pre, act, M, HIDDEN, C, KEEP=keep, **constants, **config.arguments()
    ))  # fmt: skip
    return pre, act


def gelu_mlp_backward(
    dy: Tensor, x: Tensor, w_fc: Tensor, w_proj: Tensor, pre: Tensor, allow_tf32: bool,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw_fc, db_fc, dw_proj and db_proj, from dy (..., N) of any strides, what the forward was given and pre."""
    dy_rows, rows = _rows(dy), _rows(x)
    dpre, act, db_fc = _dgrad(dy_rows, w_proj.contiguous(), pre, allow_tf32, config)
    dw_proj = torch.mm(dy_rows.t(), act)
    del act  # as large as dpre, and not needed any more
    dx = torch.mm(dpre, w_fc).view(x.shape)
    db_proj = dy_rows.sum(0, dtype=statistics(dy.dtype)).to(dy.dtype)
    return dx, torch.mm(dpre.t(), rows), db_fc, dw_proj, db_proj


def _dgrad(
    dy: Tensor, w_proj: Tensor, pre: Tensor, allow_tf32: bool, config: LaunchConfig | None, tma: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre and act, (M, HIDDEN) each, and db_fc (HIDDEN,); tma as in _activation."""
    (M, HIDDEN), N = pre.shape, w_proj.size(0)
    by_descriptors = _descriptors(dy, w_proj, pre) if tma is None else tma
    config, constants = _configured("gelu_mlp_backward", by_descriptors, dy, HIDDEN, allow_tf32, config)
    dpre, act = (torch.empty((M, HIDDEN), dtype=dy.dtype, device=dy.device) for _ in range(2))
    row_tiles = triton.cdiv(M, config.block_m)
    partial = torch.empty((row_tiles, HIDDEN), dtype=statistics(dy.dtype), device=dy.device)
    _run(dy.device, lambda: gelu_mlp_backward_kernel[(_programs(M, HIDDEN, by_descriptors, config, dy.device),)](
        dy, w_proj, pre, dpre, act, partial, M, HIDDEN, N, **constants, **config.arguments()
    ))  # fmt: skip
    return dpre, act, partial.sum(0).to(dy.dtype)


def _rows(x: Tensor) -> Tensor:
    """x (..., C) as a contiguous (rows, C), copied only where it must be."""
    return x.reshape(-1, x.size(-1)).contiguous()


def _descriptors(*matrices: Tensor) -> bool:
    """Whether the hardware can fetch these contiguous matrices by tiles: rows and first elements at 16-byte steps."""
    device = matrices[0].device
    if any(x.size(1) * x.itemsize % 16 or x.data_ptr() % 16 for x in matrices):
        return False
    return device.type == "cpu" or launch.capability(device)[0] in DESCRIPTORS


def _configured(
    op: str, tma: bool, rows: Tensor, hidden: int, allow_tf32: bool, config: LaunchConfig | None
) -> tuple[LaunchConfig, dict[str, object]]:
    """The table's configuration unless one is given, and the constants that both kernels have."""
    precision, K = precision_name(rows.dtype, allow_tf32), rows.size(1)
    form = "_tma" if tma else "" if K % ALIGNED == 0 and hidden % ALIGNED == 0 else "_odd"
    config = config or lookup(op + form, precision, K, rows.device)
    assert config.block_k is not None
    return config, _shared_constants(precision, tma, K % config.block_k == 0)


def _shared_constants(precision: str, tma: bool, whole_k: bool) -> dict[str, object]:
    """tanh.approx errs by 2^-11 of its value, less than bfloat16's rounding and more than float16's."""
    products = "tf32" if precision == "tf32" else "ieee"
    return {"TMA": tma, "WHOLE_K": whole_k, "APPROXIMATE": precision == "bfloat16", "PRECISION": products}


def _programs(M: int, HIDDEN: int, tma: bool, config: LaunchConfig, device: torch.device) -> int:
    """A program a tile; by descriptors, which a program makes once, as many as run at a time."""
    assert config.block_m is not None and config.block_n is not None
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(HIDDEN, config.block_n)
    if not tma:
        return tiles
    if device.type == "cpu":  # interpreted: several tiles each
        return min(tiles, 2)
    # A block's float32 sums take at most half of a multiprocessor's 65,536 registers.
    blocks = max(1, 2**15 // (config.block_m * config.block_n))
    return min(tiles, blocks * torch.cuda.get_device_properties(device).multi_processor_count)


def _run(device: torch.device, kernel: Callable[[], object]) -> None:
    """Launch. Descriptors are made in scratch memory, from an allocator that Triton keeps in the context: a copy
    of it, so that the caller's own allocator stays, and this one is there in autograd's threads, too."""

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty((size,), dtype=torch.int8, device=device)

    def inside() -> None:
        triton.set_allocator(scratch)
        kernel()

    with on(device):
        contextvars.copy_context().run(inside)


def _constants(form: str, **more: object) -> Callable[[str, int], dict[str, object]]:
    """A kernel's for inspect."""
    return lambda precision, size: more | _shared_constants(precision, form == "_tma", form != "_odd")


_TOKENS, _CHANNELS = 65536, 768
"""GPT-2 124M's, in a micro-step of 64 sequences."""


def _work(tma: bool, tensors: int) -> Callable[[str, int, LaunchConfig], Work]:
    """One product of 2 M C F, and `tensors` of (M, F) read or written beside the (M, C) one."""

    def work(precision: str, size: int, config: LaunchConfig) -> Work:
        M, C, F = _TOKENS, _CHANNELS, 4 * _CHANNELS
        assert config.block_m and config.block_n and config.block_k
        tiles, element = (M // config.block_m) * (F // config.block_n), 4 if precision in ("float32", "tf32") else 2
        # Flattened, the loop over K has the epilogue in it, behind an `if`.
        runs = tiles * (C // config.block_k)
        loops = (Loop(runs, conditional=tiles),) if tma else (Loop(tiles), Loop(runs))
        blocks = max(1, 2**15 // (config.block_m * config.block_n))
        return Work(
            size=C,
            flops=2.0 * M * C * F,
            executed_flops=2.0 * M * C * F,
            bytes=element * (M * C + tensors * M * F + F * C),
            programs=blocks * 132 if tma else tiles,  # an H100's; what they do outside the loop is nothing beside it
            loops=loops,
        )

    return work


_SUMS = {"partial_ptr": "*fp32"}
_FORWARD, _BACKWARD = (gelu_mlp_forward_kernel, ("HIDDEN", "C")), (gelu_mlp_backward_kernel, ("HIDDEN", "N"))
KERNELS = {
    f"gelu_mlp_{direction}{form}": Kernel(
        kernel,
        _constants(form, **more),
        types,
        () if form == "_odd" else multiples,
        products=1,
        variants={"evaluation": {"KEEP": False}} if direction == "forward" else {},
        work=None if form == "_odd" else _work(form == "_tma", tensors),
    )
    for direction, (kernel, multiples), more, types, tensors in (
        ("forward", _FORWARD, {"KEEP": True}, {}, 2),
        ("backward", _BACKWARD, {}, _SUMS, 3),
    )
    for form in ("", "_tma", "_odd")
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    if precision == "float32":
        tiles = [(m, n, 16) for m in (32, 64) for n in (64, 128)]
    else:
        depths = (32, 64) if precision == "tf32" else (64, 128)
        tiles = [(m, n, k) for m, n in ((128, 256), (128, 128), (64, 256), (256, 128)) for k in depths]
    stages = (1,) if precision == "float32" else (2, 3, 4, 5)
    return [LaunchConfig(*tile, num_warps=w, num_stages=s) for tile in tiles for w in (4, 8) for s in stages]


def _example(
    forward: bool, tma: bool, precision: str, size: int, device: torch.device, seed: int
) -> Callable[[LaunchConfig], tuple[Tensor, ...]]:
    """The product with the epilogue alone, of which `size` is K; half of the 64 sequences, to leave room."""
    tf32, generator = precision == "tf32", torch.Generator(device).manual_seed(seed)
    dtype = torch.float32 if tf32 else getattr(torch, precision)
    M, HIDDEN = _TOKENS // 2, 4 * size

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=generator)

    if forward:
        x, w_fc, b_fc = draw(M, size), draw(HIDDEN, size) * size**-0.5, draw(HIDDEN)
        return lambda config: _activation(x, w_fc, b_fc, True, tf32, config, tma)
    dy, w_proj, pre = draw(M, size), draw(size, HIDDEN) * size**-0.5, draw(M, HIDDEN)
    return lambda config: _dgrad(dy, w_proj, pre, tf32, config, tma)


TUNING = {
    f"gelu_mlp_{direction}{'_tma' if tma else ''}": Tuning(
        _candidates,
        partial(_example, direction == "forward", tma),
        launched=lambda major, tma=tma: tma == (major in DESCRIPTORS),  # type: ignore[misc]
    )
    for direction in ("forward", "backward")
    for tma in (False, True)
}


# Operators that torch.compile takes whole. Autograd sees the Function below, never these.
_WEIGHTS = "Tensor w_fc, Tensor b_fc, Tensor w_proj, Tensor b_proj"
torch.library.define(
    "fastgpt2::gelu_mlp_forward", f"(Tensor x, {_WEIGHTS}, bool keep, bool allow_tf32) -> (Tensor, Tensor)"
)
torch.library.define(
    "fastgpt2::gelu_mlp_backward",
    "(Tensor dy, Tensor x, Tensor w_fc, Tensor w_proj, Tensor pre, bool allow_tf32)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
torch.library.impl("fastgpt2::gelu_mlp_forward", "default", gelu_mlp_forward)
torch.library.impl("fastgpt2::gelu_mlp_backward", "default", gelu_mlp_backward)


@launch.register_fake("fastgpt2::gelu_mlp_forward")
def _(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor,
      keep: bool, allow_tf32: bool) -> tuple[Tensor, Tensor]:  # fmt: skip
    kept = math.prod(x.shape[:-1]) if keep else 0
    return x.new_empty(*x.shape[:-1], w_proj.size(0)), x.new_empty(kept, w_fc.size(0))


@launch.register_fake("fastgpt2::gelu_mlp_backward")
def _(dy: Tensor, x: Tensor, w_fc: Tensor, w_proj: Tensor, pre: Tensor,
      allow_tf32: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (x.shape, w_fc.shape, w_fc.shape[:1], w_proj.shape, w_proj.shape[:1])
    return tuple(x.new_empty(shape) for shape in shapes)  # type: ignore[return-value]


class _GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, keep: bool, allow_tf32: bool, x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor,
                b_proj: Tensor) -> Tensor:  # fmt: skip
        y, pre = torch.ops.fastgpt2.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, keep, allow_tf32)
        ctx.save_for_backward(x, w_fc, w_proj, pre)
        ctx.allow_tf32 = allow_tf32
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        launch.refuse_second_derivative("the GELU-MLP", "--mlp torch")
        return None, None, *torch.ops.fastgpt2.gelu_mlp_backward(dy, *ctx.saved_tensors, ctx.allow_tf32)


def gelu_mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, *, allow_tf32: bool = False
) -> Tensor:
    """gelu(x w_fc^T + b_fc) w_proj^T + b_proj with GPT-2's tanh GELU; the weights as torch.nn.Linear has them.

    Args:
        x: (..., C), bfloat16, float16 or float32, of any strides.
        w_fc, b_fc: (HIDDEN, C) and (HIDDEN,); GPT-2's HIDDEN is 4 C.
        w_proj, b_proj: (N, HIDDEN) and (N,); GPT-2's N is C. All alike in dtype and device; all five are
            differentiable once. Kept for the backward: they and the pre-activation, (rows, HIDDEN).
        allow_tf32: multiply float32 in TF32, 10 bits of mantissa, rather than exactly, in the two products of
            Triton's. The four of cuBLAS follow torch.set_float32_matmul_precision.

    Returns:
        (..., N), contiguous, in x's dtype, or autocast's where that is on.

    Raises:
        ValueError: the shape, dtype or device; it says what would work.
    """
    if x.dim() == 0:
        raise ValueError("x must be (..., C), got a scalar")
    if w_fc.dim() != 2 or w_fc.size(1) != x.size(-1):
        raise ValueError(f"w_fc must be (HIDDEN, {x.size(-1)}), by x's last dimension, got {tuple(w_fc.shape)}")
    HIDDEN = w_fc.size(0)
    if w_proj.dim() != 2 or w_proj.size(1) != HIDDEN:
        raise ValueError(f"w_proj must be (N, {HIDDEN}), by w_fc's first dimension, got {tuple(w_proj.shape)}")
    if 0 in (*w_fc.shape, *w_proj.shape):
        raise ValueError(f"w_fc and w_proj must not be empty, got {tuple(w_fc.shape)} and {tuple(w_proj.shape)}")
    for name, bias, weight in (("b_fc", b_fc, w_fc), ("b_proj", b_proj, w_proj)):
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} must have shape ({weight.size(0)},), got {tuple(bias.shape)}")
    given = {"w_fc": w_fc, "b_fc": b_fc, "w_proj": w_proj, "b_proj": b_proj}
    for name, weight in given.items():
        if weight.device != x.device:
            raise ValueError(f"{name} must have x's device, {x.device}, got {weight.device}")
    x, *weights = launch.autocast(x, *given.values())
    if reason := launch.why_unsupported("Triton's GELU-MLP", x.device, x.dtype, "--mlp torch"):
        raise ValueError(reason)
    for name, weight in zip(given, weights, strict=True):
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype, {x.dtype}, got {weight.dtype}")
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    launch.refuse_transforms("the GELU-MLP", "--mlp torch")
    return _GeluMlp.apply(keep, allow_tf32, x, *weights)
