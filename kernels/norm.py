"""LayerNorm over the last dimension, alone or with the residual add before it: one pass each way.

Maths, a row of C channels at a time; without a residual s = x:

    s = x + r                          the residual stream
    mean = sum(s) / C,  rstd = 1 / sqrt(sum((s - mean)^2) / C + eps)
    n = (s - mean) rstd                the row normalised
    y = w n + b

    db = sum over rows of dy,  dw = sum over rows of dy n
    g = w dy
    ds' = rstd (g - sum(g) / C - n sum(g n) / C) + ds
    dx = dr = ds'                      ds is the gradient that the stream brings with it
    dbranch = sum over rows of ds'     if asked for: of the bias that the product behind x added last

Memory, bytes an element. mean and rstd are 8 bytes a row; the parameters and their gradients are negligible. In
training under bfloat16 autocast x, y, dy and dx have 2 bytes, the stream and its gradient 4:

    forward    reads x 2, r 4; writes s 4, y 2                    12
               PyTorch: add 10, LayerNorm 8, cast to 2 bytes 6    24
    backward   reads dy 2, s 4, ds 4; writes dx 2, dr 4           16
               PyTorch: cast 6, LayerNorm's dx 12, its dw and db 8, sum with ds 12, cast 6    44
    kept       s, which is an output and r of the next norm       4

Nothing else uses the last norm's s. It is not written, and the backward adds x and r again:

    forward    reads x 2, r 4; writes y 2                          8
    backward   reads dy 2, x 2, r 4; writes dx 2, dr 4            14    22 in all; with s written 12 + 12 = 24
    kept       x; r is the norm's before                           2

and 8 less again under torch.compile, which makes a gradient of zeros for an unused s, writes it and reads it.

With the stream's gradient in bfloat16 (stream_gradient) ds and ds' have 2 bytes, and one tensor is both dx and dr:

    backward   reads dy 2, s 4, ds 2; writes dx 2                 10

In one dtype of e bytes: forward 4 e (PyTorch 5 e), backward 4 e (PyTorch 8 e), as one tensor is both dx and dr; the
last norm 3 e and 4 e. mean and rstd are kept, not recomputed: 8 bytes a row instead of two more sums over it.

FLOPs: 8 an element forward, 14 backward. Memory takes the time.

Always float32 (float64 for float64): the statistics, every sum, dw and db. s has the dtype that x and r promote to, as
PyTorch's sum does: if both have 16 bits, the rounded s is normalised, forward and backward. y and dx are rounded once,
at the end. The variance is computed from s - mean in registers, never as E[s^2] - mean^2, which loses all digits if the
mean is large.

dw, db and dbranch: each of P programs adds the terms of its rows in registers and writes one row of a (P, 2 or 3, C)
scratch; one sum over P reduces it. That writes and reads 8 P C bytes for each of them. dbranch adds ds' before it is
rounded; PyTorch's own sum would read the rounded dx again, 2 bytes an element. P is what fits on the multiprocessors at
16 warps each (528 on 132 with 4 warps). It depends only on the device and the shape: the sums have a fixed order and no
atomics, and two runs agree to the bit.

Versions tried: NOTES.md. Papers: Layer Normalization (Ba et al. 2016, arXiv:1607.06450).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from fastgpt2.kernels import launch
from fastgpt2.kernels.launch import on, statistics
from fastgpt2.kernels.norm_device import layer_norm_backward_kernel, layer_norm_forward_kernel
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

MAX_CHANNELS = 8192
"""A row is one tile. With more channels the backward would spill."""
BRANCH_CHANNELS = 4096
"""With more, the sum of dbranch would spill: dx is read again."""
WARPS = 16
"""Warps of the backward on a multiprocessor, in all its programs. Each keeps a tile's loads in flight."""
INTERPRETED_PROGRAMS = 2
"""Programs of the backward in the interpreter, which has no multiprocessors: enough to have sums to add."""


def layer_norm_reference(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float = 1e-5,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y in `dtype`, or the sum's, and the sum) in plain PyTorch; the statistics are float32 at least."""
    total = x if residual is None else x + residual
    s = total.to(statistics(total.dtype))
    centred = s - s.mean(-1, keepdim=True)
    normalised = centred * (centred.square().mean(-1, keepdim=True) + eps).rsqrt()
    return (weight * normalised + bias).to(dtype or total.dtype), total


def layer_norm_forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype,
    config: LaunchConfig | None = None, *, want_sum: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y in `dtype`, x + residual, mean, rstd): (..., C) twice, float32 at least (rows,) twice; contiguous.

    The sum is empty without a residual or without want_sum. config overrides the table's.
    """
    C = x.size(-1)
    total_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    config = config or lookup("layer_norm_forward", precision_name(dtype), C, x.device)
    make = functools.partial(torch.empty, device=x.device)
    y = make(x.shape, dtype=dtype)
    want_sum = want_sum and residual is not None
    total = make(x.shape if want_sum else (0,), dtype=total_dtype)
    x, residual = _rows(x), None if residual is None else _rows(residual)
    rows = x.size(0)
    mean, rstd = (make((rows,), dtype=statistics(total_dtype)) for _ in range(2))
    with on(x.device):
        layer_norm_forward_kernel[(triton.cdiv(rows, config.block_m),)](
            x, residual, weight, bias, y, total if want_sum else None, mean, rstd,
            x.stride(0), 0 if residual is None else residual.stride(0), rows, eps, C=C, **config.arguments(),
        )  # fmt: skip
    return y, total, mean, rstd


def layer_norm_backward(
    dy: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
    x_dtype: torch.dtype, residual_dtype: torch.dtype | None,
    config: LaunchConfig | None = None, programs: int | None = None, *, residual: Tensor | None = None,
    want_branch: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dresidual, dw and db as one (2, C) tensor of the statistics' dtype, or (3, C) with dbranch).

    dresidual is empty if there is no residual, or if it has x's dtype: dx then serves for both.

    Args:
        dy, dtotal: (..., C) of any strides; dtotal is None if nothing else used the sum.
        total, mean, rstd: what was normalised and its statistics.
        residual: given if the sum was not written; total is then x, and residual is added to it again.
        want_branch: also add the rows of dx.
        config, programs: override the table's configuration and the number of programs that fit on the device.
    """
    C = total.size(-1)
    config = config or lookup("layer_norm_backward", precision_name(dy.dtype), C, dy.device)
    make = functools.partial(torch.empty, device=dy.device)
    dx = make(total.shape, dtype=x_dtype)
    apart = residual_dtype not in (None, x_dtype)
    dresidual = make(total.shape if apart else (0,), dtype=residual_dtype or x_dtype)
    dy, total = _rows(dy), _rows(total)
    dtotal, residual = (None if t is None else _rows(t) for t in (dtotal, residual))
    rows = dy.size(0)
    programs = min(triton.cdiv(rows, config.block_m), programs or _programs(dy.device, config.num_warps))
    branch_inside = want_branch and C <= BRANCH_CHANNELS
    sums = make((programs, 2 + branch_inside, C), dtype=mean.dtype)
    with on(dy.device):
        layer_norm_backward_kernel[(programs,)](
            dy, dtotal, total, residual, mean, rstd, weight, dx, dresidual if apart else None, sums,
            dy.stride(0), 0 if dtotal is None else dtotal.stride(0),
            total.stride(0), 0 if residual is None else residual.stride(0), rows,
            C=C, SUMS=sums.size(1), **config.arguments(),
        )  # fmt: skip
    sums = sums.sum(0)
    if want_branch and not branch_inside:
        sums = torch.cat((sums, _rows(dx).sum(0, dtype=sums.dtype)[None]))
    return dx, dresidual, sums


def _rows(x: Tensor) -> Tensor:
    """x as (rows, C), copied only if necessary: a row must be contiguous, and 128 rows must span less than 2^31."""
    x = x.reshape(-1, x.size(-1))
    return x if x.stride(1) == 1 and x.stride(0) < 2**24 else x.contiguous()


def _programs(device: torch.device, warps: int) -> int:
    """As many as the multiprocessors hold at once. It depends on the device alone: the sums have a fixed order."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return _multiprocessors(device) * max(1, WARPS // warps)


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# Operators that are opaque to torch.compile. Autograd sees the Function below, never these.
torch.library.define(
    "fastgpt2::layer_norm_forward",
    "(Tensor x, Tensor? residual, Tensor weight, Tensor bias, float eps, ScalarType dtype, *, bool want_sum=True)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)
torch.library.define(
    "fastgpt2::layer_norm_backward",
    "(Tensor dy, Tensor? dtotal, Tensor total, Tensor mean, Tensor rstd, Tensor weight, ScalarType x_dtype,"
    " ScalarType? residual_dtype, *, Tensor? residual=None, bool want_branch=False) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("fastgpt2::layer_norm_forward", "default", layer_norm_forward)
torch.library.impl("fastgpt2::layer_norm_backward", "default", layer_norm_backward)


@launch.register_fake("fastgpt2::layer_norm_forward")
def _(x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, *,
      want_sum: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    total_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    total = x.new_empty(x.shape if want_sum and residual is not None else (0,), dtype=total_dtype)
    mean, rstd = (x.new_empty(math.prod(x.shape[:-1]), dtype=statistics(total_dtype)) for _ in range(2))
    return x.new_empty(x.shape, dtype=dtype), total, mean, rstd


@launch.register_fake("fastgpt2::layer_norm_backward")
def _(dy: Tensor, dtotal: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor,
      x_dtype: torch.dtype, residual_dtype: torch.dtype | None, *,
      residual: Tensor | None = None, want_branch: bool = False) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    apart = residual_dtype not in (None, x_dtype)
    dresidual = dy.new_empty(total.shape if apart else (0,), dtype=residual_dtype or x_dtype)
    return dy.new_empty(total.shape, dtype=x_dtype), dresidual, mean.new_empty(2 + want_branch, total.size(-1))


class Stream(NamedTuple):
    """A residual stream whose gradient has a dtype of its own.

    Autograd casts a gradient to the dtype of its tensor. So the sum has none, and its gradient is the carrier's.
    """

    total: Tensor  # (..., C)
    carrier: Tensor  # (..., C) of the gradient's dtype: one element without a value, expanded


class _LayerNorm(torch.autograd.Function):
    """(y, x + residual, carrier): the sum is empty without want_sum, the carrier without stream_gradient.

    Without the sum the backward reads x and residual again. x without residual is the sum, and not returned.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, residual: Tensor | None, carrier: Tensor | None, weight: Tensor, bias: Tensor, eps: float,
        dtype: torch.dtype, want_sum: bool, branch_bias: Tensor | None, stream_gradient: torch.dtype | None,
    ):  # fmt: skip
        y, total, mean, rstd = torch.ops.fastgpt2.layer_norm_forward(
            x, residual, weight, bias, eps, dtype, want_sum=want_sum
        )
        ctx.save_for_backward(*((total, None) if want_sum else (x, residual)), mean, rstd, weight)
        stream = carrier if carrier is not None else residual
        ctx.dtypes = tuple(None if t is None else t.dtype for t in (x, stream, bias, branch_bias))
        ctx.carried = carrier is not None
        # An unused sum then has the gradient None. torch.compile makes zeros of it nevertheless.
        ctx.set_materialize_grads(False)
        if stream_gradient is None:
            return (y, total) if want_sum else y
        ctx.mark_non_differentiable(total)
        return y, total, x.new_empty_strided(x.shape, [0] * x.dim(), dtype=stream_gradient)

    @staticmethod
    def backward(ctx, dy: Tensor | None, dtotal: Tensor | None = None, dcarrier: Tensor | None = None):
        launch.refuse_second_derivative("Triton LayerNorm", "layer_norm_reference")
        total, residual, mean, rstd, weight = ctx.saved_tensors
        x_dtype, residual_dtype, bias_dtype, branch_dtype = ctx.dtypes
        dtotal = dtotal if dcarrier is None else dcarrier
        want_branch = ctx.needs_input_grad[8]
        dx = dresidual = dweight = dbias = dbranch = None
        if dy is not None:
            dx, dresidual, sums = torch.ops.fastgpt2.layer_norm_backward(
                dy, dtotal, total, mean, rstd, weight, x_dtype, residual_dtype,
                residual=residual, want_branch=want_branch,
            )  # fmt: skip
            dweight, dbias = sums[0].to(weight.dtype), sums[1].to(bias_dtype)
            dbranch = sums[2].to(branch_dtype) if want_branch else None
        elif dtotal is not None:
            dx, dresidual = dtotal.to(x_dtype), dtotal.to(residual_dtype or x_dtype)
            dbranch = _rows(dtotal).sum(0, dtype=mean.dtype).to(branch_dtype) if want_branch else None
        # If the dtypes agree, return one tensor for both, as a plain sum's backward does. Autograd adds in place only
        # to a tensor that nothing else refers to.
        if residual_dtype is None:
            dresidual = None
        elif residual_dtype == x_dtype:
            dresidual = dx
        dresidual, carried = (None, dresidual) if ctx.carried else (dresidual, None)
        return dx, dresidual, carried, dweight, dbias, None, None, None, dbranch, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor | None = None) -> Tensor:
    """w (s - mean) / sqrt(variance + eps) + b over the last dimension of s = x, or x + residual.

    Args:
        x: (..., C), bfloat16, float16 or float32, C at most MAX_CHANNELS. Rows may have any strides; those that
            are not contiguous are copied. Differentiable once; the gradient has x's dtype.
        weight, bias: (C,), each of a floating dtype, usually float32. Differentiable once; their gradients are summed
            in float32 and have their dtypes.
        eps: added to the variance; not negative.
        residual: (..., C) of x's shape and any dtype, for a sum that nothing else uses: the sum is not written.
            Differentiable once.

    Returns:
        (..., C), contiguous, in the sum's dtype or, under autocast, in autocast's.

    Raises:
        ValueError: a wrong shape, dtype, device or eps; the message says what is accepted.
    """
    return _normalise(x, residual, weight, bias, eps, want_sum=False)


def add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """layer_norm(x + residual) and the sum itself, in one pass.

    Args:
        x: (..., C), a branch's output; as for layer_norm.
        residual: (..., C) of x's shape and any dtype, the stream so far. Differentiable once.
        weight, bias, eps: as for layer_norm.

    Returns:
        (y, x + residual), contiguous. The sum has the dtype that x's and residual's promote to. y has the same dtype
        or, under autocast, autocast's: a matmul follows, and would round it anyway. y is the norm of the returned sum.

    Raises:
        ValueError: a wrong shape, dtype, device or eps; the message says what is accepted.
    """
    if residual is None:
        raise ValueError("residual must be a tensor, got None; use layer_norm if there is nothing to add")
    return _normalise(x, residual, weight, bias, eps, want_sum=True)


def stream_norm(
    x: Tensor, residual: Tensor | Stream | None, weight: Tensor, bias: Tensor, *,
    last: bool = False, branch_bias: Tensor | None = None, stream_gradient: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | Stream | None]:  # fmt: skip
    """Add x to a residual stream and normalise it, as a model's blocks do: (y, the new stream).

    Args:
        x, weight, bias: as for layer_norm.
        residual: the stream so far; None where x itself begins it.
        last: the stream ends here: its sum is not written, and None is returned for it.
        branch_bias: (C,), the bias that the product behind x added last, there without a gradient. It is not added
            again; its gradient is returned here, as the sum over the rows of x's gradient before that is rounded.
        stream_gradient: the dtype of the stream's gradient from norm to norm; None: the stream's own. With it the
            stream is handed on as a Stream.
    """
    residual, carrier = residual if isinstance(residual, Stream) else (residual, None)
    want_sum = residual is not None and not last
    asked = None if last else stream_gradient
    made = _normalise(
        x, residual, weight, bias, 1e-5,
        want_sum=want_sum, branch_bias=branch_bias, carrier=carrier, stream_gradient=asked,
    )  # fmt: skip
    if asked is not None:
        y, total, carrier = made
        return y, Stream(total if want_sum else x.detach(), carrier)
    return made if want_sum else (made, None if last else x)


def _normalise(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, *,
    want_sum: bool, branch_bias: Tensor | None = None,
    carrier: Tensor | None = None, stream_gradient: torch.dtype | None = None,
) -> Any:  # fmt: skip
    dtype = _validate(x, residual, weight, bias, eps, branch_bias)
    if residual is x:  # torch.compile doesn't accept one tensor for two arguments
        residual = x.view_as(x)
    launch.refuse_transforms("Triton LayerNorm", "layer_norm_reference")
    return _LayerNorm.apply(x, residual, carrier, weight, bias, eps, dtype, want_sum, branch_bias, stream_gradient)


def _validate(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, eps: float, branch_bias: Tensor | None
) -> torch.dtype:
    """Check the inputs and return y's dtype."""
    if x.dim() < 1:
        raise ValueError("x must be (..., C), got a scalar")
    C = x.size(-1)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape, {tuple(x.shape)}, got {tuple(residual.shape)}")
    parameters = {"weight": weight, "bias": bias, **({} if branch_bias is None else {"branch_bias": branch_bias})}
    for name, parameter in parameters.items():
        if parameter.shape != (C,):
            raise ValueError(f"{name} must have shape ({C},), x's last dimension, got {tuple(parameter.shape)}")
        if not parameter.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got stride {parameter.stride(0)}")
    for name, tensor in (("residual", residual), *parameters.items()):
        if tensor is None:
            continue
        if tensor.device != x.device:
            raise ValueError(f"{name} must have x's device, {x.device}, got {tensor.device}")
        if reason := launch.why_unsupported(f"Triton LayerNorm ({name})", x.device, tensor.dtype):
            raise ValueError(reason)
    if reason := why_unsupported(x.device, x.dtype, C):
        raise ValueError(reason)
    if not eps >= 0.0:
        raise ValueError(f"eps must not be negative, got {eps}")
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return launch.autocast_dtype(x, dtype)


def why_unsupported(device: torch.device, dtype: torch.dtype, channels: int) -> str | None:
    """Why these kernels can't run with such inputs, in a line; None if they can."""
    if reason := launch.why_unsupported("Triton LayerNorm", device, dtype):
        return reason
    if not 1 <= channels <= MAX_CHANNELS:
        return f"Triton LayerNorm has 1 to {MAX_CHANNELS} channels, got {channels}"
    return None
