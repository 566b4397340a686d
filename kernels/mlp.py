"""GELU-MLP, forward and backward: y = gelu(x w_fc^T + b_fc) w_proj^T + b_proj with the tanh GELU of GPT-2.

Maths, M rows, C channels in, F hidden (HIDDEN in the code; GPT-2: 4 C), N channels out (GPT-2: C):

    pre = x w_fc^T + b_fc              (M, F), rounded to the inputs' dtype; kept for the backward, as x is
    act = gelu(pre)                    (M, F), recomputed in the backward
    y = act w_proj^T + b_proj

    dact = dy w_proj                   never stored
    dpre = dact gelu'(pre)             gelu' in the code
    dw_proj = dy^T act,  db_proj = sum over rows of dy, if b_proj needs a gradient
    dw_fc = dpre^T x,  db_fc = sum over rows of dpre,  dx = dpre w_fc

Six matmuls. Triton does the two whose epilogue works on a tile of (M, F) in registers: the first writes pre and act;
the epilogue of dact reads pre and writes dpre, act again and the column sums of dpre. cuBLAS does the other four, which
are plain products. Fusing the two matmuls of a direction would recompute one of them.

Memory, e bytes an element, in units of M C elements at F = 4 C, N = C; the weights are negligible:

    forward    reads x 1, writes pre 4, act 4; reads act 4, writes y 1                    14 e
               PyTorch: the same, but gelu reads pre 4                                    18 e
    backward   dact: reads dy 1, pre 4, writes dpre 4, act 4; dw_proj 5, dw_fc 5, dx 5, db_proj 1    29 e
               PyTorch: dact 5, gelu' 12, db_fc 4; the others alike                       37 e
    kept       pre 4; PyTorch keeps act as well, 8 e

FLOPs: forward 2 M C F + 2 M F N, backward twice that; only gelu is computed twice.

Always float32 (float64 for float64): the sums of products, gelu, its gradient, and db_fc, which adds dpre before it is
rounded. Sums over rows have a fixed order and no atomics: each row tile writes partial sums of db_fc, and a second
kernel adds them. Two runs agree to the bit. act is gelu of the rounded pre: the backward recomputes exactly the
activation that the forward multiplied.

gelu(z) = z s(z) with s in [0, 1]: 1 + tanh loses no digits to cancellation. bfloat16 uses the hardware's tanh.approx,
one special function an element, with an error of at most 2^-11. float16 and float32 need more: exp2 and a reciprocal,
two special functions, accurate to float32's last places.

By descriptors (the _tma kernels; compute capability 9 and 10, rows of multiples of 16 bytes): as many programs as run
at a time take tiles in turn. The loops over tiles and over K are one pipeline, which loads the next tile during the
epilogue of the one before. By pointers (compute capability 8 and 12, odd sizes): a program a tile. Groups of 8 row
tiles take all columns, to keep their rows and the weights in L2. An epilogue takes its tile in halves or quarters: that
needs fewer registers and a smaller buffer for its stores.

Versions tried: NOTES.md. Papers: Gaussian Error Linear Units (Hendrycks and Gimpel 2016, arXiv:1606.08415).
"""

from __future__ import annotations

import contextvars
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from fastgpt2.kernels import launch
from fastgpt2.kernels.launch import on, statistics
from fastgpt2.kernels.mlp_device import gelu_mlp_backward_kernel, gelu_mlp_forward_kernel
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

DESCRIPTORS = (9, 10)
"""The major compute capabilities where the _tma kernels run."""
ALIGNED = 64
"""Every BLOCK_K of the aligned tables divides this. Widths that it doesn't divide have tiles of their own (_odd)."""


def gelu_mlp_reference(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    """The same function in plain PyTorch."""
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc), approximate="tanh"), w_proj, b_proj)


def gelu_mlp_forward(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, keep: bool, allow_tf32: bool,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (..., N) and the pre-activation, (rows, HIDDEN) if `keep` and (0, HIDDEN) otherwise.

    x: (..., C). Inputs may have any strides; those that are not contiguous are copied. config overrides the table's.
    """
    pre, act = gelu_matmul_forward(_rows(x), w_fc.contiguous(), b_fc.contiguous(), keep, allow_tf32, config)
    return torch.addmm(b_proj, act, w_proj.t()).view(*x.shape[:-1], w_proj.size(0)), pre


def gelu_matmul_forward(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, keep: bool, allow_tf32: bool, config: LaunchConfig | None,
    tma: bool | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """pre, (M, HIDDEN) if `keep` and (0, HIDDEN) otherwise, and act (M, HIDDEN). x (M, C), w_fc, b_fc: contiguous.

    tma: whether to use descriptors; None uses them where the hardware has them.
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
    config: LaunchConfig | None = None, *, want_db_proj: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dw_fc, db_fc, dw_proj and db_proj, from dy (..., N) of any strides, what the forward was given and pre.

    db_proj is empty without want_db_proj.
    """
    dy_rows, rows = _rows(dy), _rows(x)
    dpre, act, db_fc = gelu_matmul_backward(dy_rows, w_proj.contiguous(), pre, allow_tf32, config)
    dw_proj = torch.mm(dy_rows.t(), act)
    del act  # as large as dpre
    dx = torch.mm(dpre, w_fc).view(x.shape)
    db_proj = dy_rows.sum(0, dtype=statistics(dy.dtype)).to(dy.dtype) if want_db_proj else dy.new_empty(0)
    return dx, torch.mm(dpre.t(), rows), db_fc, dw_proj, db_proj


def gelu_matmul_backward(
    dy: Tensor, w_proj: Tensor, pre: Tensor, allow_tf32: bool, config: LaunchConfig | None, tma: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """dpre and act, (M, HIDDEN) each, and db_fc (HIDDEN,); tma as in gelu_matmul_forward."""
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
    """x (..., C) as a contiguous (rows, C), copied only if necessary."""
    return x.reshape(-1, x.size(-1)).contiguous()


def _descriptors(*matrices: Tensor) -> bool:
    """Whether the hardware can fetch tiles of these contiguous matrices: all rows must be aligned to 16 bytes."""
    device = matrices[0].device
    if any(x.size(1) * x.itemsize % 16 or x.data_ptr() % 16 for x in matrices):
        return False
    return device.type == "cpu" or launch.capability(device)[0] in DESCRIPTORS


def _configured(
    op: str, tma: bool, rows: Tensor, hidden: int, allow_tf32: bool, config: LaunchConfig | None
) -> tuple[LaunchConfig, dict[str, object]]:
    """The given configuration or the table's, and the constants that both kernels take."""
    precision, K = precision_name(rows.dtype, allow_tf32), rows.size(1)
    form = "_tma" if tma else "" if K % ALIGNED == 0 and hidden % ALIGNED == 0 else "_odd"
    config = config or lookup(op + form, precision, K, rows.device)
    assert config.block_k is not None
    return config, kernel_constants(precision, tma, K % config.block_k == 0)


def kernel_constants(precision: str, tma: bool, whole_k: bool) -> dict[str, object]:
    """tanh.approx errs by 2^-11 of its value, less than bfloat16's rounding and more than float16's."""
    products = "tf32" if precision == "tf32" else "ieee"
    return {"TMA": tma, "WHOLE_K": whole_k, "APPROXIMATE": precision == "bfloat16", "PRECISION": products}


def _programs(M: int, HIDDEN: int, tma: bool, config: LaunchConfig, device: torch.device) -> int:
    """The grid: a program a tile; by descriptors, which each program makes once, as many programs as run at a time."""
    assert config.block_m is not None and config.block_n is not None
    tiles = triton.cdiv(M, config.block_m) * triton.cdiv(HIDDEN, config.block_n)
    if not tma:
        return tiles
    if device.type == "cpu":  # interpreted: several tiles each
        return min(tiles, 2)
    return min(
        tiles, programs_a_multiprocessor(config) * torch.cuda.get_device_properties(device).multi_processor_count
    )


def programs_a_multiprocessor(config: LaunchConfig) -> int:
    """How many fit: their float32 sums take at most half of a multiprocessor's 65,536 registers."""
    assert config.block_m is not None and config.block_n is not None
    return max(1, 2**15 // (config.block_m * config.block_n))


def _run(device: torch.device, kernel: Callable[[], object]) -> None:
    """Launch a kernel that makes descriptors, which need scratch memory from an allocator in Triton's context.

    The launch runs in a copy of the context: the caller's allocator stays, and autograd's threads have this one too.
    """

    def scratch(size: int, alignment: int, stream: int | None) -> Tensor:
        return torch.empty((size,), dtype=torch.int8, device=device)

    def inside() -> None:
        triton.set_allocator(scratch)
        kernel()

    with on(device):
        contextvars.copy_context().run(inside)


# Operators that are opaque to torch.compile. Autograd sees the Function below, never these.
_WEIGHTS = "Tensor w_fc, Tensor b_fc, Tensor w_proj, Tensor b_proj"
torch.library.define(
    "fastgpt2::gelu_mlp_forward", f"(Tensor x, {_WEIGHTS}, bool keep, bool allow_tf32) -> (Tensor, Tensor)"
)
torch.library.define(
    "fastgpt2::gelu_mlp_backward",
    "(Tensor dy, Tensor x, Tensor w_fc, Tensor w_proj, Tensor pre, bool allow_tf32, *, bool want_db_proj=True)"
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
      allow_tf32: bool, *, want_db_proj: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    shapes = (x.shape, w_fc.shape, w_fc.shape[:1], w_proj.shape, w_proj.shape[:1] if want_db_proj else (0,))
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
        launch.refuse_second_derivative("the GELU-MLP", "gelu_mlp_reference")
        want_db_proj = ctx.needs_input_grad[6]
        *gradients, db_proj = torch.ops.fastgpt2.gelu_mlp_backward(
            dy, *ctx.saved_tensors, ctx.allow_tf32, want_db_proj=want_db_proj
        )
        return None, None, *gradients, db_proj if want_db_proj else None


def gelu_mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor, *, allow_tf32: bool = False
) -> Tensor:
    """gelu(x w_fc^T + b_fc) w_proj^T + b_proj with GPT-2's tanh GELU; the weights as torch.nn.Linear has them.

    Args:
        x: (..., C), bfloat16, float16 or float32, of any strides.
        w_fc, b_fc: (HIDDEN, C) and (HIDDEN,); GPT-2's HIDDEN is 4 C.
        w_proj, b_proj: (N, HIDDEN) and (N,); GPT-2's N is C. All alike in dtype and device; all five are
            differentiable once. The backward keeps them and the pre-activation, (rows, HIDDEN).
        allow_tf32: multiply float32 in TF32, with 10 bits of mantissa, in Triton's two products. cuBLAS's four
            follow torch.set_float32_matmul_precision.

    Returns:
        (..., N), contiguous, in x's dtype or, under autocast, in autocast's.

    Raises:
        ValueError: a wrong shape, dtype or device; the message says what is accepted.
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
    if reason := why_unsupported(x.device, x.dtype):
        raise ValueError(reason)
    for name, weight in zip(given, weights, strict=True):
        if weight.dtype != x.dtype:
            raise ValueError(f"{name} must have x's dtype, {x.dtype}, got {weight.dtype}")
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    launch.refuse_transforms("the GELU-MLP", "gelu_mlp_reference")
    return _GeluMlp.apply(keep, allow_tf32, x, *weights)


def why_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why these kernels can't run with such inputs, in a line; None if they can."""
    return launch.why_unsupported("Triton's GELU-MLP", device, dtype)
