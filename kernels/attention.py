"""Flash attention, forward and backward: o = softmax(scale q k^T + mask) v for each batch and head.

Maths, with c = scale log2(e), which makes exp one multiply-add and one exp2:

    S = q k^T                          (T, T), a tile at a time, never stored
    lse = log2 sum_j 2^(c S)           (T,), the base-2 log-sum-exp of each row, stored for the backward
    P = 2^(c S - lse)                  the weights; rows sum to 1
    o = P v

    delta = rowsum(do * o)             equals rowsum(dP * P)
    dP = do v^T,  dS = P * (dP - delta)
    dv = P^T do,  dk = scale dS^T q,  dq = scale dS k

A bias that was added to q, k and v (optional): its gradient is the sum of dq, dk and dv over B and T, taken from the
float32 tiles before they are rounded. The sum of dk is 0, as softmax ignores what all scores of a row share: each row
of dS sums to 0. It is returned as exactly 0, not as rounding errors.

With dropout, M = 1 where a weight is kept and 0 elsewhere, r = 1 / (1 - p). Each kernel computes M anew (dropout.py):

    o = r (M * P) v,  dP = r M * (do v^T),  dv = r (M * P)^T do;  delta, dS, dk and dq as above

Documents (optional, need the causal mask): a position sees only its own document. A query needs only the first
position of its document, a key only the end. Neither decreases along a row, so a tile's first and last row bound the
tiles that it meets: tiles outside are skipped, and tiles that all its rows see in full are not masked.

Memory, e bytes an element, B T H D elements a tensor: the forward reads q, k, v and writes o (4 e) and lse. The
backward reads q, k, v, o, do and writes dq, dk, dv (8 e); its two passes each read q, k, v, do. A bias adds one float32
row of D for each tile of each pass. No (T, T) matrix is stored. The packed form reads (B, T, 3, H, D) as the projection
wrote it and writes its gradient in the same layout: no transpose, no concatenation.

FLOPs (causal: half): forward 4 B H T^2 D, two matmuls. Backward 10 B H T^2 D credited, 14 executed: each of the two
passes computes S and dP for itself. Sums have a fixed order, without atomics: two runs agree bit for bit.

S, the running maximum and sum, lse, delta and every accumulator are float32 for any inputs (float64 for float64).
P and dS are rounded to the inputs' dtype, as operands of the next matmul. float32 inputs are multiplied exactly, or in
TF32 with allow_tf32. lse is rounded at the size of the logits, and P inherits its error: in float32 with logits of
standard deviation 30, T = 100 and D = 64, the norm of dv's error is 21 units in the last place. Storing a maximum and a
sum separately would give 8. SDPA, which also stores one lse, has 32.

Only tiles that touch the diagonal, the edge of a document or the end of the sequence are masked. Programs with the
longest rows start first. Few enough heads run at a time for k and v to stay in L2.

The kernels are in attention_device.py. attention_hopper.py and attention_hopper_backward.py have others for Hopper.
NOTES.md has the versions tried and what they measured.

Papers: FlashAttention (Dao et al. 2022, arXiv:2205.14135), FlashAttention-2 (Dao 2023, arXiv:2307.08691).
"""

from __future__ import annotations

import math
from importlib.util import find_spec

import torch
import triton
from torch import Tensor

from fastgpt2.kernels import launch
from fastgpt2.kernels.attention_device import (
    attention_backward_dkdv_kernel,
    attention_backward_dq_kernel,
    attention_forward_kernel,
)
from fastgpt2.kernels.dropout import draw_seed, weights_to_drop
from fastgpt2.kernels.launch import on, statistics
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

HEAD_DIMS = (16, 32, 64, 80, 96, 128)
HOPPER_HEAD_DIMS = (64, 80, 96, 128)
HOPPER_DTYPES = (torch.bfloat16, torch.float16)


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, scale: float | None = None,
    documents: Tensor | None = None, keep: Tensor | None = None, dropout_p: float = 0.0,
) -> Tensor:  # fmt: skip
    """The same function in plain PyTorch, (B, T, H, D) each. The softmax is at least float32.

    keep: (B, H, T, T) bool, the weights that dropout keeps. They are scaled by 1 / (1 - dropout_p).
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


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    scale: float,
    allow_tf32: bool,
    documents: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    hopper: bool = False,
    config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns o (B, T, H, D), contiguous, and the base-2 lse (B, H, T), at least float32.

    Args:
        q, k, v: (B, T, H, D), any strides, the last 1.
        documents: (2, B, T) int32, contiguous.
        seed: one int64; None if dropout_p is 0.
        hopper: run attention_hopper.py's kernel if it takes such strides; causal, without documents and seed.
        config: used instead of the table's.
    """
    B, T, H, D = q.shape
    if hopper:
        from fastgpt2.kernels import attention_hopper

        if attention_hopper.copied_by_tiles(q, k, v):
            return attention_hopper.attention_forward(q, k, v, scale, config)
    q, k, v = _tiled(q), _tiled(k), _tiled(v)
    precision = precision_name(q.dtype, allow_tf32)
    config = config or lookup("attention_forward", precision, D, q.device)
    o = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=statistics(q.dtype), device=q.device)
    first, _ = _limits(documents)
    with on(q.device):
        attention_forward_kernel[(B * H * triton.cdiv(T, config.block_m),)](
            (q, k, v),
            o,
            lse,
            first,
            seed,
            _strides(q, k, v),
            T,
            H,
            scale,
            **kernel_constants(precision, D, causal, dropout_p),
            **config.arguments(),
        )
    return o, lse


def attention_backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
    allow_tf32: bool,
    documents: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
    want_bias: bool = False,
    hopper: bool = False,
    dq_config: LaunchConfig | None = None,
    dkdv_config: LaunchConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns dqkv (B, T, 3, H, D), contiguous, and its sum over B and T: (3 H D,), at least float32.

    Args:
        do: (B, T, H, D), any strides.
        o, lse: from attention_forward, as are the other arguments.
        want_bias: the sum is empty without it.
        hopper: likewise, attention_hopper_backward.py's kernels.
        dq_config, dkdv_config: used instead of the table's.
    """
    if hopper:
        from fastgpt2.kernels import attention_hopper_backward

        if attention_hopper_backward.takes(do, q, k, v, o):
            options = scale, want_bias, dq_config, dkdv_config
            return attention_hopper_backward.attention_backward(do, q, k, v, o, lse, *options)
    B, T, H, D = q.shape
    do, q, k, v = _tiled(do), _tiled(q), _tiled(k), _tiled(v)
    precision = precision_name(q.dtype, allow_tf32)
    dq_config = dq_config or lookup("attention_backward_dq", precision, D, q.device)
    dkdv_config = dkdv_config or lookup("attention_backward_dkdv", precision, D, q.device)
    dqkv = torch.empty((B, T, 3, H, D), dtype=q.dtype, device=q.device)
    delta = torch.empty((B, H, T), dtype=lse.dtype, device=q.device)
    # Not torch.empty: k's sums stay 0, and one pass may have fewer tiles than the other.
    tiles = max(triton.cdiv(T, dq_config.block_m), triton.cdiv(T, dkdv_config.block_n))
    sums = torch.zeros((tiles, B, 3, H, D), dtype=lse.dtype, device=q.device) if want_bias else None
    first, last = _limits(documents)
    rest = _strides(q, k, v), do.stride()[:3], T, H, scale
    constants = kernel_constants(precision, D, causal, dropout_p)
    with on(q.device):
        attention_backward_dq_kernel[(B * H * triton.cdiv(T, dq_config.block_m),)](
            (q, k, v),
            o,
            do,
            lse,
            delta,
            dqkv,
            sums,
            first,
            seed,
            *rest,
            **constants,
            **dq_config.arguments(),
        )
        attention_backward_dkdv_kernel[(B * H * triton.cdiv(T, dkdv_config.block_n),)](
            (q, k, v),
            do,
            lse,
            delta,
            dqkv,
            sums,
            last,
            seed,
            *rest,
            **constants,
            **dkdv_config.arguments(),
        )
    return dqkv, lse.new_empty(0) if sums is None else sums.sum((0, 1)).view(-1)


def kernel_constants(precision: str, head_dim: int, causal: bool = True, dropout_p: float = 0.0) -> dict[str, object]:
    """A kernel's compile-time constants, without its configuration."""
    return {
        "D": head_dim,
        "CAUSAL": causal,
        "DROP": weights_to_drop(dropout_p),
        "PRECISION": "tf32" if precision == "tf32" else "ieee",
    }


def _tiled(x: Tensor) -> Tensor:
    """x, or a copy if the kernels can't address it: rows must be contiguous, 128 of them within 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(1) < 2**24 else x.contiguous()


def _limits(documents: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The kernels' limit_ptr, (B, T) each: for queries and for keys."""
    return (None, None) if documents is None else (documents[0], documents[1])


def _strides(*tensors: Tensor) -> tuple[tuple[int, ...], ...]:
    """The strides of batch, token and head of each tensor."""
    return tuple(x.stride()[:3] for x in tensors)


# Operators that are opaque to torch.compile. Autograd sees only the Function below.
_INPUTS = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "bool causal, float scale, bool allow_tf32, Tensor? documents=None, Tensor? seed=None, float dropout_p=0.0"
torch.library.define("fastgpt2::attention_forward", f"({_INPUTS}, {_OPTIONS}, bool hopper=False) -> (Tensor, Tensor)")
_BACKWARD = f"(Tensor do, {_INPUTS}, Tensor o, Tensor lse, {_OPTIONS}, bool want_bias=False, bool hopper=False)"
torch.library.define("fastgpt2::attention_backward", f"{_BACKWARD} -> (Tensor, Tensor)")
torch.library.impl("fastgpt2::attention_forward", "default", attention_forward)
torch.library.impl("fastgpt2::attention_backward", "default", attention_backward)


@launch.register_fake("fastgpt2::attention_forward")
def _(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float, allow_tf32: bool,
      documents: Tensor | None = None, seed: Tensor | None = None, dropout_p: float = 0.0, hopper: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=statistics(q.dtype))


@launch.register_fake("fastgpt2::attention_backward")
def _(do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor,
      causal: bool, scale: float, allow_tf32: bool, documents: Tensor | None = None, seed: Tensor | None = None,
      dropout_p: float = 0.0, want_bias: bool = False, hopper: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    B, T, H, D = q.shape
    return q.new_empty(B, T, 3, H, D), lse.new_empty(3 * H * D if want_bias else 0)


class _FlashAttention(torch.autograd.Function):
    """qkv is one packed (B, T, 3, H, D) tensor, or q, k and v apart. The gradient has the same form.

    bias (3 H D,) is already in qkv: it has a gradient but no use in the forward.
    """

    @staticmethod
    def forward(
        ctx, causal: bool, scale: float, allow_tf32: bool, documents: Tensor | None, seed: Tensor | None,
        dropout_p: float, hopper: bool, bias: Tensor | None, *qkv: Tensor,
    ) -> Tensor:  # fmt: skip
        q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(2)
        options = causal, scale, allow_tf32, documents, seed, dropout_p
        o, lse = torch.ops.fastgpt2.attention_forward(q, k, v, *options, hopper)
        ctx.save_for_backward(o, lse, documents, seed, *qkv)
        ctx.options = causal, scale, allow_tf32
        ctx.dropout_p, ctx.hopper = dropout_p, hopper
        ctx.bias_dtype = None if bias is None else bias.dtype
        return o

    @staticmethod
    def backward(ctx, do: Tensor):
        launch.refuse_second_derivative("flash attention", "attention_reference")
        o, lse, documents, seed, *qkv = ctx.saved_tensors
        q, k, v = qkv if len(qkv) == 3 else qkv[0].unbind(2)
        want_bias = ctx.needs_input_grad[7]
        options = *ctx.options, documents, seed, ctx.dropout_p, want_bias, ctx.hopper
        dqkv, sums = torch.ops.fastgpt2.attention_backward(do, q, k, v, o, lse, *options)
        dbias = sums.to(ctx.bias_dtype) if want_bias else None
        return *(None,) * 7, dbias, *(dqkv.unbind(2) if len(qkv) == 3 else (dqkv,))


def flash_attention_qkv(
    qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None, *,
    bias: Tensor | None = None, causal: bool = True, scale: float | None = None, allow_tf32: bool = False,
    seed: Tensor | None = None, hopper: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + mask) v of the packed projection, as the matmul wrote it.

    Args:
        qkv: (B, T, 3, H, D), bfloat16, float16 or float32. T >= 1, D one of HEAD_DIMS. Any strides, but the last must
            be 1. Differentiable once; the gradient is one contiguous (B, T, 3, H, D) tensor.
        dropout_p: the probability of dropping a weight, in [0, 1), rounded to a multiple of 2^-16 (dropout.py).
        documents: (2, B, T) int32: the first position of each token's document, and one past its last. A token sees
            only its own document. Needs causal. Neither may decrease along a row; checking it would wait for the GPU.
        bias: (3 H D,), any floating dtype: what the projection has already added to qkv, detached: it is not added
            here. It gets the gradient that the projection would have computed, from sums of the backward's own tiles.
        causal: a token sees only itself and earlier tokens.
        scale: positive; 1 / sqrt(D) by default.
        allow_tf32: multiply float32 in TF32, with 10 bits of mantissa, instead of exactly.
        seed: one int64 on qkv's device that determines which weights are dropped. By default it is drawn from torch's
            generator.
        hopper: on an H100 or H200, compute the forward by attention_hopper.py's kernel, and with D = 64 the backward
            by attention_hopper_backward.py's. With documents, dropout or strides that are not multiples of 16 bytes,
            and without the causal mask, they are computed as usual.

    Returns:
        (B, T, H, D), contiguous, in qkv's dtype, or in autocast's if autocast is on.

    Raises:
        ValueError: shape, dtype, device, strides or an option; the message says what would work.
    """
    if qkv.dim() != 5 or qkv.size(2) != 3:
        raise ValueError(f"qkv must be (B, T, 3, H, D), got shape {tuple(qkv.shape)}")
    (qkv,) = launch.autocast(qkv)
    scale, documents, seed = _validate({"qkv": qkv}, scale, dropout_p, causal, documents, seed)
    size = 3 * qkv.size(3) * qkv.size(4)
    if bias is not None and not (bias.shape == (size,) and bias.is_floating_point()):
        raise ValueError(f"bias must be ({size},) of a floating dtype, got {tuple(bias.shape)} {bias.dtype}")
    if hopper and (reason := hopper_why_unsupported(qkv.device, qkv.dtype, qkv.size(-1), 0.0)):
        raise ValueError(reason)
    hopper = hopper and causal and documents is None and seed is None and qkv.numel() > 0
    launch.refuse_transforms("flash attention", "attention_reference")
    return _FlashAttention.apply(causal, scale, allow_tf32, documents, seed, dropout_p, hopper, bias, qkv)


def flash_attention(
    q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None, *,
    causal: bool = True, scale: float | None = None, allow_tf32: bool = False, seed: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """softmax(scale q k^T + mask) v.

    Args:
        q, k, v: (B, T, H, D) each, of the same shape, dtype and device. Any strides, but the last must be 1.
            Differentiable once; the gradients are views of one (B, T, 3, H, D) tensor.
        dropout_p, documents, causal, scale, allow_tf32, seed: as for flash_attention_qkv.

    Returns:
        (B, T, H, D), contiguous, in q's dtype, or in autocast's if autocast is on.

    Raises:
        ValueError: shape, dtype, device, strides or an option; the message says what would work.
    """
    if q.dim() != 4:
        raise ValueError(f"q must be (B, T, H, D), got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        for what, of_x, of_q in (("shape", tuple(x.shape), tuple(q.shape)), ("device", x.device, q.device)):
            if of_x != of_q:
                raise ValueError(f"{name} must have q's {what}, {of_q}, got {of_x}")
    q, k, v = launch.autocast(q, k, v)
    k = k.view_as(k) if k is q else k  # torch.compile refuses one tensor as two arguments
    v = v.view_as(v) if v is q or v is k else v
    scale, documents, seed = _validate({"q": q, "k": k, "v": v}, scale, dropout_p, causal, documents, seed)
    launch.refuse_transforms("flash attention", "attention_reference")
    return _FlashAttention.apply(causal, scale, allow_tf32, documents, seed, dropout_p, False, None, q, k, v)


def _validate(
    inputs: dict[str, Tensor], scale: float | None, dropout_p: float, causal: bool,
    documents: Tensor | None, seed: Tensor | None,
) -> tuple[float, Tensor | None, Tensor | None]:  # fmt: skip
    """Check all arguments, and return scale, documents and seed with their defaults filled in."""
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
    """Why these kernels can't run with such inputs, in a line; None if they can."""
    if reason := launch.why_unsupported("Triton attention", device, dtype):
        return reason
    if head_dim not in HEAD_DIMS:
        return f"Triton attention's head size must be one of {HEAD_DIMS}, got {head_dim}"
    if not 0.0 <= dropout_p < 1.0:
        return f"Triton attention's dropout must be at least 0 and less than 1, got {dropout_p}"
    return None


def hopper_why_unsupported(device: torch.device, dtype: torch.dtype, head_dim: int, dropout_p: float) -> str | None:
    """Why Hopper's kernels can't train with such inputs, in a line; None if they can."""
    if device.type != "cuda" or launch.capability(device) != (9, 0):
        found = device.type if device.type != "cuda" else "compute capability {}.{}".format(*launch.capability(device))
        return f"Hopper's attention needs an H100 or H200 (sm_90), got {found}"
    if not _has_gluon():
        return f"Hopper's attention needs Gluon, which Triton {triton.__version__} lacks: install Triton 3.6"
    if dtype not in HOPPER_DTYPES:
        return f"Hopper's attention computes in bfloat16 or float16, got {dtype}"
    if head_dim not in HOPPER_HEAD_DIMS:
        return f"the head size of Hopper's attention must be one of {HOPPER_HEAD_DIMS}, got {head_dim}"
    return why_unsupported(device, dtype, head_dim, dropout_p)


@launch.constant_in_graphs
def _has_gluon() -> bool:
    return find_spec("triton.experimental") is not None and find_spec("triton.experimental.gluon") is not None
