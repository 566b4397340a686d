"""The output head and its loss, cross_entropy(hidden @ weight^T, targets), without storing all logits.

Maths, for n rows of hidden h (C,), W (V, C) and targets t:

    x = h W^T                          (n, V), a chunk of rows at a time, in one buffer that every chunk reuses
    lse = log sum_j exp(x_j)           over the vocabulary, without W's padding rows
    loss = lse - x_t
    G = exp(x - lse) - onehot(t)       written over x, in the inputs' dtype
    dh = G W,  dW += G^T h             at once, while the chunk is in the buffer

The forward pass makes the gradient of the losses' sum. The backward multiplies it, in float32, by the upstream gradient
over the number of targets: a factor 1 / N in a 16-bit G would underflow. Both stay on the device, and nothing waits.
With reduction "none" every row has its own upstream gradient: the backward recomputes each chunk from hidden, weight
and lse, and scales G's rows by their upstream gradients over the largest of them.

Memory, e bytes an element: besides inputs and gradients one chunk of logits, V e a row. A budget sets the number of
chunks, 1 to 8. dW is summed over the chunks in float32. Bytes moved: the matmuls write or read n V e three times, the
rows' step twice; W and the float32 dW once or twice a chunk. FLOPs: 6 n C V forward and backward, three matmuls, as in
the plain form; 2 n C V forward alone; 8 n C V for a differentiated "none".

Always float32: maximum, sum, log-sum-exp, losses, their sum, dW. The logits are rounded to the inputs' dtype, as in the
plain form. Every sum has a fixed order, without atomics. A CPU stores a product of bfloat16 in bfloat16: there
dW = G^T h adds a second product, of what the first rounded off, and errs by about 2^-18.

The rows' step has two implementations: Triton (cross_entropy.py) and plain PyTorch, for any device, in blocks of rows
that stay in the cache. The rest is shared.

Versions tried: NOTES.md. Papers: Cut Your Losses (Wijmans et al. 2024, arXiv:2411.09009), which recomputes the logits.
This keeps a chunk instead: at C = 768 reading it costs less than a fourth matmul.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import launch
from fastgpt2.kernels.launch import statistics

IMPLEMENTATIONS = ("auto", "triton", "chunked")
REDUCTIONS = ("mean", "sum", "none")
PLAIN = "torch.nn.functional.cross_entropy of the logits"
MOST_CHUNKS = 8
"""More chunks would save little memory, and each reads the weight and rewrites its gradient."""
MEMORY_BUDGET = {"cuda": 2**30, "cpu": 2**28}
"""Bytes of a chunk of logits; on a GPU the least, as its matmuls need thousands of rows. On a CPU, whose matmuls are as
fast with fewer rows, GPT-2 has 7 chunks of 8k tokens in float32."""
MEMORY_SHARE = 48
"""A GPU with more than 48 GiB spends a 48th of its memory instead. With an H100's 79 GiB GPT-2 has 4 chunks of 64k
tokens in bfloat16, with 40 GiB 7."""
ROW_TILE = 128
"""Large chunks have a multiple of this many rows, so that they fill whole matmul tiles."""
COLUMN_TILE = 64
"""A row of the buffer is padded to a multiple of this: aligned for the matmuls and for 16-byte loads."""
PRODUCT_ROWS = 1024
"""Rows of dW at a time on a CPU, where 16 bits take more than one pass over them."""
CACHE_BLOCK = {"cuda": 2**28, "cpu": 2**20}
"""Bytes of float32 that the plain rows' step works on at a time. On a CPU for each thread: half a core's L2 cache."""


def linear_cross_entropy_reference(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    vocab_size: int | None = None, ignore_index: int = -100, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The same function in plain PyTorch: the logits in the inputs' dtype, the loss in float32 at least."""
    logits = F.linear(hidden, weight[:vocab_size]).flatten(0, -2)
    losses = F.cross_entropy(
        logits.to(statistics(logits.dtype)), targets.flatten(), ignore_index=ignore_index, reduction=reduction
    )
    return losses.view(targets.shape) if reduction == "none" else losses


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, upstream: Tensor | None, vocab_size: int,
    ignore_index: int, gradient: bool,
) -> None:  # fmt: skip
    """The rows' step in plain PyTorch, in place.

    Args:
        logits: (N, padded V), any contents past vocab_size; overwritten, with their gradient where `gradient`.
        targets: (N,) int64.
        losses, lse: (N,), float32 at least; written where upstream is None, else lse is read.
        upstream: (N,) factors of the rows' gradients; None for 1.
    """
    known = (targets != ignore_index) & (targets >= 0) & (targets < vocab_size)
    safe = torch.where(known, targets, 0)[:, None]
    factor = known.to(lse.dtype) if upstream is None else torch.where(known, upstream, 0.0)
    rows = max(1, CACHE_BLOCK.get(logits.device.type, 2**28) // (lse.itemsize * vocab_size))
    if logits.device.type == "cpu":
        # As many for each thread. One thread computes a row's maximum and sum; if the elementwise steps divided the
        # row differently, its cache lines would move from core to core.
        rows *= torch.get_num_threads()
    scratch = None
    if logits.dtype != lse.dtype:
        scratch = torch.empty((min(rows, len(logits)), vocab_size), dtype=lse.dtype, device=logits.device)
    for start in range(0, len(logits), rows):
        here = slice(start, start + rows)
        stored = logits[here, :vocab_size]
        x = stored if scratch is None else scratch[: len(stored)].copy_(stored)
        if upstream is None:
            x_target = x.gather(1, safe[here])
            highest = x.amax(1, keepdim=True)
            total = x.sub_(highest).exp_().sum(1, keepdim=True)
            log_total = total.log()
            torch.sub(log_total, x_target - highest, out=losses[here, None])
            torch.add(log_total, highest, out=lse[here, None])
            scale = factor[here, None] / total
        else:
            x.sub_(lse[here, None]).exp_()
            scale = factor[here, None]
        if gradient:
            x.mul_(scale)
            # scatter_ would do, but that its deterministic form on CUDA copies the strides there and waits for it.
            x.index_put_((torch.arange(len(x), device=x.device), safe[here, 0]), -factor[here], accumulate=True)
            if scratch is not None:
                stored.copy_(x)
    if upstream is None:
        losses.masked_fill_(~known, float("nan")).masked_fill_(targets == ignore_index, 0.0)
    if gradient:
        logits[:, vocab_size:].zero_()


def chunk_rows(rows: int, row_bytes: int, memory_budget: int) -> int:
    """Rows of a chunk: of 1 to 8 chunks the fewest that fit in the budget; 8 where none does."""
    each = rows
    for chunks in range(1, MOST_CHUNKS + 1):
        each = -(-rows // chunks)
        if chunks > 1 and each >= 8 * ROW_TILE:
            each = -(-each // ROW_TILE) * ROW_TILE
        if each * row_bytes <= memory_budget:
            break
    return max(each, 1)


@launch.constant_in_graphs
def default_budget(device: torch.device) -> int:
    """Bytes of a chunk of logits. A device always has the same: the chunks set the order of dW's sum."""
    least = MEMORY_BUDGET.get(device.type, 2**28)
    if device.type != "cuda":
        return least
    return max(least, torch.cuda.get_device_properties(device).total_memory // MEMORY_SHARE)


def _sweep(
    hidden: Tensor, weight: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, upstream: Tensor | None,
    vocab_size: int, ignore_index: int, triton: bool, memory_budget: int, grad_hidden: bool, grad_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Go through the chunks: fill losses and lse (upstream None), and return dhidden and float32 dweight.

    hidden (N, C) and weight (padded V, C) have one dtype; a gradient that isn't wanted is empty.
    """
    rows_step = import_module("fastgpt2.kernels.cross_entropy").cross_entropy_rows if triton else cross_entropy_rows
    N, V = len(hidden), len(weight)
    stride = -(-V // COLUMN_TILE) * COLUMN_TILE
    each = chunk_rows(N, stride * hidden.itemsize, memory_budget)
    buffer = torch.empty((min(each, N), stride), dtype=hidden.dtype, device=hidden.device)
    dhidden = torch.empty(hidden.shape if grad_hidden else (0,), dtype=hidden.dtype, device=hidden.device)
    dweight = torch.empty(weight.shape if grad_weight else (0,), dtype=lse.dtype, device=hidden.device)
    if N == 0:
        return dhidden, dweight.zero_()
    for start in range(0, N, each):
        here = slice(start, start + each)
        chunk = buffer[: min(each, N - start)]
        logits = chunk[:, :V]
        torch.mm(hidden[here], weight.T, out=logits)
        row_upstream = None if upstream is None else upstream[here]
        gradient = grad_hidden or grad_weight
        rows_step(chunk, targets[here], losses[here], lse[here], row_upstream, vocab_size, ignore_index, gradient)
        if grad_hidden:
            torch.mm(logits, weight, out=dhidden[here])
        if grad_weight:
            _accumulate(dweight, logits.T, hidden[here], first=start == 0)
    return dhidden, dweight


def _accumulate(total: Tensor, a: Tensor, b: Tensor, *, first: bool) -> None:
    """total = a b at first, then total += a b; total is float32 where a and b have 16 bits."""
    if total.dtype == a.dtype:
        torch.mm(a, b, out=total) if first else total.addmm_(a, b)
    elif a.device.type == "cuda":
        # cuBLAS sums in float32 and stores it: no 16-bit product in between, nor a pass of its own for the sum.
        if first:
            torch.mm(a, b, out_dtype=total.dtype, out=total)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    elif a.dtype == torch.bfloat16:
        # A CPU stores the product in bfloat16; what that rounded off is a second product. Each is added while it is in
        # the cache.
        for rows, sums in zip(a.split(PRODUCT_ROWS), total.split(PRODUCT_ROWS), strict=True):
            product = rows @ b
            sums.copy_(product) if first else sums.add_(product)
            sums.add_(product.addmm_(rows, b, beta=-1.0))
    else:
        # In float16 the rounding error would underflow. float32 is also faster.
        b = b.to(total.dtype)
        for rows, sums in zip(a.split(PRODUCT_ROWS), total.split(PRODUCT_ROWS), strict=True):
            sums.addmm_(rows.to(total.dtype), b, beta=0.0 if first else 1.0)


def linear_cross_entropy_forward(
    hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, vocab_size: int, ignore_index: int,
    triton: bool, memory_budget: int, grad_hidden: bool, grad_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """losses (N,), lse (N,), and the gradients of the losses' sum: dhidden in dtype, dweight in float32 at least.

    Args:
        hidden, weight: (N, C), (padded V, C), of any dtype; multiplied in `dtype`.
        grad_hidden, grad_weight: whether to make each gradient; empty if not.
    """
    losses, lse = (torch.empty(targets.shape, dtype=statistics(dtype), device=hidden.device) for _ in range(2))
    with torch.autocast(hidden.device.type, enabled=False):
        dhidden, dweight = _sweep(
            hidden.to(dtype), weight.to(dtype), targets.contiguous(), losses, lse, None,
            vocab_size, ignore_index, triton, memory_budget, grad_hidden, grad_weight,
        )  # fmt: skip
    return losses, lse, dhidden, dweight


def linear_cross_entropy_backward(
    upstream: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, vocab_size: int,
    ignore_index: int, triton: bool, memory_budget: int, grad_hidden: bool, grad_weight: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of sum_i upstream_i losses_i, as linear_cross_entropy_forward gives them for upstream 1.

    upstream: (N,), any strides.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        return _sweep(
            hidden.to(dtype), weight.to(dtype), targets.contiguous(), lse, lse,
            upstream.to(lse.dtype).contiguous(),
            vocab_size, ignore_index, triton, memory_budget, grad_hidden, grad_weight,
        )  # fmt: skip


# Operators that are opaque to torch.compile. Autograd sees the Function below, never these.
_INPUTS = "Tensor hidden, Tensor weight, Tensor targets"
_OPTIONS = (
    "ScalarType dtype, int vocab_size, int ignore_index, bool triton, int memory_budget, "
    "bool grad_hidden, bool grad_weight"
)
torch.library.define(
    "fastgpt2::linear_cross_entropy_forward", f"({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)"
)
torch.library.define(
    "fastgpt2::linear_cross_entropy_backward",
    f"(Tensor upstream, Tensor lse, {_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor)",
)
torch.library.impl("fastgpt2::linear_cross_entropy_forward", "default", linear_cross_entropy_forward)
torch.library.impl("fastgpt2::linear_cross_entropy_backward", "default", linear_cross_entropy_backward)


@launch.register_fake("fastgpt2::linear_cross_entropy_forward")
def _(hidden, weight, targets, dtype, vocab_size, ignore_index, triton, memory_budget, grad_hidden, grad_weight):
    losses = hidden.new_empty(targets.shape, dtype=statistics(dtype))
    return losses, torch.empty_like(losses), *_fake_gradients(hidden, weight, dtype, grad_hidden, grad_weight)


@launch.register_fake("fastgpt2::linear_cross_entropy_backward")
def _(upstream, lse, hidden, weight, targets, dtype, vocab_size, ignore_index, triton, memory_budget,
      grad_hidden, grad_weight):  # fmt: skip
    return _fake_gradients(hidden, weight, dtype, grad_hidden, grad_weight)


def _fake_gradients(
    hidden: Tensor, weight: Tensor, dtype: torch.dtype, grad_hidden: bool, grad_weight: bool
) -> tuple[Tensor, Tensor]:
    return (
        hidden.new_empty(hidden.shape if grad_hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if grad_weight else (0,), dtype=statistics(dtype)),
    )


class _SummedLoss(torch.autograd.Function):
    """The sum or mean of the losses. The forward pass makes the gradients, the backward scales them."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, mean: bool, options: tuple) -> Tensor:
        losses, _, dhidden, dweight = torch.ops.fastgpt2.linear_cross_entropy_forward(hidden, weight, targets, *options)
        _, _, ignore_index, *_ = options
        count = (targets != ignore_index).sum() if mean else losses.new_ones(())
        ctx.save_for_backward(dhidden, dweight, count)
        ctx.dtypes = hidden.dtype, weight.dtype
        return losses.sum() / count

    @staticmethod
    def backward(ctx, upstream: Tensor):
        launch.refuse_second_derivative("linear_cross_entropy", PLAIN)
        dhidden, dweight, count = ctx.saved_tensors
        # If no target counts, the gradients are zeros already: 0 / 0 must not make them NaN.
        scale = upstream / count.clamp(min=1)
        return *_scaled(ctx, dhidden, dweight, scale, in_place=launch.frees_graph()), None, None, None


class _Losses(torch.autograd.Function):
    """The losses, one a target. The backward recomputes the logits."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, options: tuple) -> Tensor:
        *how, grad_hidden, grad_weight = options
        losses, lse, _, _ = torch.ops.fastgpt2.linear_cross_entropy_forward(hidden, weight, targets, *how, False, False)
        if grad_hidden or grad_weight:
            ctx.save_for_backward(hidden, weight, targets, lse)
        ctx.dtypes, ctx.options = (hidden.dtype, weight.dtype), options
        return losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        launch.refuse_second_derivative("linear_cross_entropy", PLAIN)
        hidden, weight, targets, lse = ctx.saved_tensors
        _, _, ignore_index, *_ = ctx.options
        # Scale the rows of a 16-bit G by at most 1, which does not underflow, and the float32 results by the rest.
        upstream = upstream.to(lse.dtype).masked_fill(targets == ignore_index, 0.0)
        largest = upstream.abs().sum() if upstream.numel() == 0 else upstream.abs().amax()
        upstream = torch.where(largest > 0, upstream / largest, upstream)
        dhidden, dweight = torch.ops.fastgpt2.linear_cross_entropy_backward(
            upstream, lse, hidden, weight, targets, *ctx.options
        )
        return *_scaled(ctx, dhidden, dweight, largest, in_place=not torch.compiler.is_compiling()), None, None


def _scaled(
    ctx, dhidden: Tensor, dweight: Tensor, scale: Tensor, *, in_place: bool
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients times a scalar on the device, in the dtypes of hidden and weight.

    in_place: nothing reads these gradients again. A copy of dweight is as large as the embedding.
    """
    factor = scale.view(1, 1)  # two-dimensional: a scalar tensor would leave the product at 16 bits
    gradients: list[Tensor | None] = []
    for gradient, dtype, needed in zip((dhidden, dweight), ctx.dtypes, ctx.needs_input_grad, strict=False):
        if needed and in_place and gradient.dtype == dtype:
            gradients.append(gradient.mul_(factor))
        else:
            gradients.append((gradient * factor).to(dtype) if needed else None)
    return gradients[0], gradients[1]


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, *,
    vocab_size: int | None = None, ignore_index: int = -100, reduction: str = "mean",
    memory_budget: int | None = None, implementation: str = "auto",
) -> Tensor:  # fmt: skip
    """cross_entropy(hidden @ weight^T, targets), in nats, from a chunk of logits at a time.

    Args:
        hidden: (..., C), bfloat16, float16, float32 or float64. Differentiable once.
        weight: (padded V, C), in hidden's dtype, or in any under autocast. Rows from vocab_size on are not in the
            softmax. Differentiable once; the gradient is summed in float32, has weight's dtype, and is 0 in those rows.
        targets: (...), int64. A target that is neither in the vocabulary nor ignore_index makes its loss NaN and its
            row of the gradient 0. This neither waits for the device nor reads out of bounds.
        vocab_size: 1 to padded V; default: padded V.
        ignore_index: a target with loss 0 and no gradient, which the mean does not count.
        reduction: "mean" over the targets that are not ignored (NaN if all are), "sum", or "none".
        memory_budget: bytes of logits that may exist at a time; at most 8 chunks are made, however small it is.
            Default: on a GPU 1 GiB or, if that is more, 1/48 of its memory; 256 MiB elsewhere.
        implementation: of the rows' step: "triton" (CUDA), "chunked" (plain PyTorch, any device), or "auto", which
            is triton where that runs.

    Returns:
        A scalar, or with "none" the losses in targets' shape; float32, or float64 for float64. Gradients that nothing
        needs (torch.no_grad, inputs that do not require them) are not computed.

    Raises:
        ValueError: a wrong shape, dtype, device or option; the message says what is accepted.

    Source: the chunks are Liger-Kernel's idea (arXiv:2410.10989). Here they are few and large, which keeps the matmuls
    at full speed; the weight's gradient is float32, and nothing waits for the device.
    """
    _validate(hidden, weight, targets, vocab_size, reduction, memory_budget)
    dtype = launch.autocast_dtype(hidden)
    triton = _takes_triton(implementation, hidden.device, dtype)
    recording = torch.is_grad_enabled()
    options = (
        dtype,
        vocab_size or weight.size(0),
        ignore_index,
        triton,
        memory_budget or default_budget(hidden.device),
        recording and hidden.requires_grad,
        recording and weight.requires_grad,
    )
    rows, flat = hidden.reshape(-1, hidden.size(-1)), targets.reshape(-1)
    launch.refuse_transforms("linear_cross_entropy", PLAIN)
    if reduction == "none":
        return _Losses.apply(rows, weight, flat, options).view(targets.shape)
    return _SummedLoss.apply(rows, weight, flat, reduction == "mean", options)


def _validate(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int | None, reduction: str, memory_budget: int | None
) -> None:
    if hidden.dim() < 1 or hidden.size(-1) < 1:
        raise ValueError(f"hidden must be (..., C), got shape {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.size(1) != hidden.size(-1) or weight.size(0) < 1:
        raise ValueError(f"weight must be (V, C) with C = {hidden.size(-1)}, got shape {tuple(weight.shape)}")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets must have hidden's shape without C, {tuple(hidden.shape[:-1])}, "
                         f"got {tuple(targets.shape)}")  # fmt: skip
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be torch.int64, got {targets.dtype}")
    for name, x in (("weight", weight), ("targets", targets)):
        if x.device != hidden.device:
            raise ValueError(f"{name} must be on hidden's device, {hidden.device}, got {x.device}")
    if hidden.dtype not in (*launch.DTYPES, torch.float64):
        raise ValueError(f"hidden must be bfloat16, float16, float32 or float64, got {hidden.dtype}")
    if launch.autocast_dtype(weight) != launch.autocast_dtype(hidden):
        raise ValueError(f"weight must have hidden's dtype, {hidden.dtype}, got {weight.dtype}")
    if vocab_size is not None and not 1 <= vocab_size <= weight.size(0):
        raise ValueError(f"vocab_size must be from 1 to weight's {weight.size(0)} rows, got {vocab_size}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be positive, in bytes, got {memory_budget}")


def _takes_triton(implementation: str, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the rows' step is Triton's: as asked for, or where it runs."""
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if implementation == "chunked" or (implementation == "auto" and device.type != "cuda"):
        return False
    reason = why_unsupported(device, dtype)
    if reason and implementation == "triton":
        raise ValueError(f'{reason}; use implementation="chunked"')
    return reason is None


def why_unsupported(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton rows' step can't run with such inputs, in a line; None if it can."""
    if not _has_triton():
        return "Triton cross-entropy needs the triton package, which is published for Linux"
    return launch.why_unsupported("Triton cross-entropy", device, dtype)


@launch.constant_in_graphs
def _has_triton() -> bool:
    return find_spec("triton") is not None
