"""Cross-entropy of rows of logits: each row's loss, its log-sum-exp, and its gradient written over the row.

    lse = log sum_j exp(x_j)                         over the vocabulary: the first columns of a padded row
    loss = lse - x_target
    dx_j = upstream (exp(x_j - lse) - [j = target])  upstream: the row's factor, 1 if none is given

Memory, e bytes an element, V columns: V e read and V e written a row. Forward alone reads V e. A row comes from memory
once: the second pass, which writes the gradient, finds it in the caches, and goes backwards to begin with what was read
last. (A row is 100 KB at V = 50304 in bfloat16. Two blocks of 32 warps fill a multiprocessor; 132 of them hold 26 MB in
flight.) FLOPs are negligible: two exponentials an element, one in each pass.

Always float32: maximum, sum, log-sum-exp, loss. The gradient is rounded once, when it is stored. Each lane keeps its
own running maximum and sum: the loop needs no reduction across lanes. Their order is fixed, without atomics. Loss and
gradient use the same rounded maximum m, and so keep their digits even if logits are in the tens of thousands.

Versions tried: NOTES.md. Paper: Online normalizer calculation for softmax (Milakov and Gimelshein 2018,
arXiv:1805.02867).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels.launch import hash_callees_first, on
from fastgpt2.kernels.tiles import cast
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

LOG2_E = tl.constexpr(math.log2(math.e))
# Below every logit, but high enough that log2(e) times its difference to a logit is finite in float32.
LOWEST = tl.constexpr(-1.0e38)


def cross_entropy_reference(logits: Tensor, targets: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, log-sum-exps, gradient of the losses' sum) in plain PyTorch; logits (N, V) without padding."""
    lse = logits.logsumexp(1)
    kept = targets != ignore_index
    safe = torch.where(kept, targets, 0)[:, None]
    losses = (lse - logits.gather(1, safe)[:, 0]) * kept
    onehot = torch.zeros_like(logits).scatter(1, safe, 1.0)
    return losses, lse, (logits.softmax(1) - onehot) * kept[:, None]


@triton.jit
def _columns(start, BLOCK_N: tl.constexpr):
    """The columns start.. as (BLOCK_N / 8, 8). A lane loads eight at once and reduces them by itself."""
    return start + tl.arange(0, BLOCK_N // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _load(row_ptr, column, stride, vocab_size, SUM: tl.constexpr, MASKED: tl.constexpr):
    """Logits of a row; if MASKED, -inf past the vocabulary."""
    if MASKED:
        # Two masks: 16 divides the row's stride, which keeps the load vectorized; it need not divide the vocabulary.
        x = tl.load(row_ptr + column, mask=column < stride, other=float("-inf"))
        x = tl.where(column < vocab_size, x.to(SUM), float("-inf"))
    else:
        x = tl.load(row_ptr + column).to(SUM)
    return x


@triton.jit
def _accumulate(m, total, row_ptr, begin, end, stride, vocab_size, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Update m = max_j c x_j and total = sum_j 2^(c x_j - m), c = log2(e), over columns, in each lane by itself."""
    for start in range(begin, end, BLOCK_N):
        x = _load(row_ptr, _columns(start, BLOCK_N), stride, vocab_size, m.dtype, MASKED)
        m_new = tl.maximum(m, tl.max(x, 1) * LOG2_E)
        total = total * tl.exp2(m - m_new) + tl.sum(tl.exp2(x * LOG2_E - m_new[:, None]), 1)
        m = m_new
    return m, total


@triton.jit
def _normaliser(row_ptr, stride, vocab_size, SUM: tl.constexpr, BLOCK_N: tl.constexpr):
    """m = max_j c x_j and sum_j 2^(c x_j - m) of a row."""
    m = tl.full((BLOCK_N // 8,), LOWEST, SUM)
    total = tl.zeros((BLOCK_N // 8,), SUM)
    edge = vocab_size // BLOCK_N * BLOCK_N
    m, total = _accumulate(m, total, row_ptr, 0, edge, stride, vocab_size, False, BLOCK_N)
    m, total = _accumulate(m, total, row_ptr, edge, vocab_size, stride, vocab_size, True, BLOCK_N)
    highest = tl.max(m, 0)
    return highest, tl.sum(total * tl.exp2(m - highest), 0)


@triton.jit
def _write_gradient(row_ptr, begin, end, target, upstream, m, total, stride, vocab_size,
                    MASKED: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """upstream (2^(c x - m) / total - [column = target]) over x, zeros past the vocabulary; the last columns first."""
    scale, hit = upstream / total, tl.cast(target, tl.int32)
    for done in range(begin, end, BLOCK_N):
        column = _columns(begin + (end - begin - 1) // BLOCK_N * BLOCK_N - (done - begin), BLOCK_N)
        x = _load(row_ptr, column, stride, vocab_size, m.dtype, MASKED)
        gradient = tl.exp2(x * LOG2_E - m) * scale
        gradient = cast(tl.where(column == hit, gradient - upstream, gradient), row_ptr.dtype.element_ty)
        tl.store(row_ptr + column, gradient, mask=column < stride) if MASKED else tl.store(row_ptr + column, gradient)


@hash_callees_first
@triton.jit(do_not_specialize=["vocab_size", "ignore_index"])
def cross_entropy_kernel(
    logits_ptr, targets_ptr, loss_ptr, lse_ptr, upstream_ptr,  # (N, stride); (N,) four times
    stride, vocab_size, ignore_index,
    FORWARD: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One program a row. FORWARD: write loss and lse, upstream is 1; else read lse and upstream.
    GRADIENT: overwrite the row with its gradient."""
    SUM: tl.constexpr = lse_ptr.dtype.element_ty
    row = tl.cast(tl.program_id(0), tl.int64)
    row_ptr = logits_ptr + row * stride
    target = tl.load(targets_ptr + row)
    # Never use a target outside the vocabulary as an address.
    inside = (target >= 0) & (target < vocab_size)
    known = inside & (target != ignore_index)

    if FORWARD:
        # Read it before the reduction, which synchronizes the warps: after it they overwrite the row.
        x_target = tl.load(row_ptr + tl.where(inside, target, 0)).to(SUM)
        m, total = _normaliser(row_ptr, stride, vocab_size, SUM, BLOCK_N)
        log2_total = tl.log2(total)
        loss = tl.where(inside, (log2_total - (x_target * LOG2_E - m)) / LOG2_E, float("nan"))
        tl.store(loss_ptr + row, tl.where(target == ignore_index, 0.0, loss))
        tl.store(lse_ptr + row, (m + log2_total) / LOG2_E)
        upstream = tl.full((), 1.0, SUM)
    else:
        m, total = tl.load(lse_ptr + row) * LOG2_E, tl.full((), 1.0, SUM)
        upstream = tl.load(upstream_ptr + row)

    if GRADIENT:
        # A row without a target has gradient 0: 2^(c x - inf) = 0, minus an upstream of 0.
        m = tl.where(known, m, float("inf"))
        total, upstream = tl.where(known, total, 1.0), tl.where(known, upstream, 0.0)
        edge = vocab_size // BLOCK_N * BLOCK_N
        _write_gradient(row_ptr, edge, stride, target, upstream, m, total, stride, vocab_size, True, BLOCK_N)
        _write_gradient(row_ptr, 0, edge, target, upstream, m, total, stride, vocab_size, False, BLOCK_N)


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, upstream: Tensor | None, vocab_size: int,
    ignore_index: int, gradient: bool, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """A chunk of rows, in place; loss.cross_entropy_rows does the same in plain PyTorch.

    logits: (N, padded V) contiguous. config overrides the table's.
    """
    rows, stride = logits.shape
    config = config or lookup("cross_entropy", precision_name(logits.dtype), stride, logits.device)
    with on(logits.device):
        cross_entropy_kernel[(rows,)](
            logits, targets, losses, lse, upstream, stride, vocab_size, ignore_index,
            FORWARD=upstream is None, GRADIENT=gradient, **config.arguments(),
        )  # fmt: skip
