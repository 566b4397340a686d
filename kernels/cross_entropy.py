"""Cross-entropy of rows of logits: each row's loss, its log-sum-exp, and its gradient written over the row.

    lse = log sum_j exp(x_j)                         over the vocabulary, the first columns of a padded row
    loss = lse - x_target
    dx_j = upstream (exp(x_j - lse) - [j = target])  upstream: the row's own factor, 1 where none is given

Memory, e bytes an element, V columns: V e read and V e written a row. The row is read from memory once: the second
pass over it, which writes the gradient, finds it in the caches (100 KB at V = 50304 in bfloat16; two blocks of 32
warps fill a multiprocessor, so that 132 of them hold 26 MB in flight), and goes backwards, as what was read last is
nearest. Forward alone reads V e. FLOPs don't count: two exponentials an element, one in each pass.

float32 whatever the logits are: maximum, sum, log-sum-exp, loss; the gradient is rounded once, when it is stored.
Each lane keeps a running maximum and sum of its own, so that the loop has no reduction across lanes; their order is
fixed, and there are no atomics. Whatever m the running maximum is rounded to, loss and gradient use the same m, and so
keep their digits where the logits are in the tens of thousands.

Versions tried. No GPU has timed any of them yet: these are counts of what the compiler made, for sm_90, bfloat16,
V = 50304, Triton 3.6 / 3.9; "loops" are the machine instructions that a warp spends on eight columns a lane, in the
first pass + in the second.

    design                         block  warps  registers   spilled  blocks  loops
    shipped                         8192   32     26 / 26          0     2    59 + 68 / 58 + 74
    twice the work a thread         8192   16     57 / 32          0   2 / 4  54 + 68 / 55 + 72
    lanes hold single columns, one
      exponential, masks everywhere 8192   32     42 / 43          0     1   121 + 114 / 113 + 114
    the row held in registers      65536   32     64 / 64  208 / 336     1
      in pieces, unpadded         7x8192   32     64 / 64   96 / 192     1
      and kept in 16 bits         7x8192   32     64 / 64  176 / 120     1

A row of 50304 in registers leaves no room for its gradient: 50 columns a thread of the 64 registers that 32 warps
have. It would leave one block a multiprocessor, too, whose loads wait for its reduction; the loop has two.

Paper: online normaliser calculation for softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt2.kernels.launch import hash_callees_first, on, statistics
from fastgpt2.kernels.specs.records import Kernel, Loop, Tuning, Work
from fastgpt2.kernels.tiles import cast
from fastgpt2.kernels.tuning import LaunchConfig, lookup, precision_name

LOG2_E = tl.constexpr(math.log2(math.e))
# Below every logit, and far enough above the lowest float32 for a difference with one times log2(e) to be finite.
LOWEST = tl.constexpr(-1.0e38)
EXAMPLE_ROWS = 9472
"""A chunk of 65536 tokens of GPT-2 in bfloat16, for which the tuner times."""


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
    """The columns start.. as (BLOCK_N / 8, 8): a lane loads its eight at once and reduces them by itself."""
    return start + tl.arange(0, BLOCK_N // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _load(row_ptr, column, stride, vocab_size, SUM: tl.constexpr, MASKED: tl.constexpr):
    """Logits of a row; where MASKED, -inf past the vocabulary."""
    if MASKED:
        # Two masks: the row's length divides by 16 and leaves the load vectorised, the vocabulary needn't.
        x = tl.load(row_ptr + column, mask=column < stride, other=float("-inf"))
        x = tl.where(column < vocab_size, x.to(SUM), float("-inf"))
    else:
        x = tl.load(row_ptr + column).to(SUM)
    return x


@triton.jit
def _accumulate(m, total, row_ptr, begin, end, stride, vocab_size, MASKED: tl.constexpr, BLOCK_N: tl.constexpr):
    """Update m = max_j c x_j and total = sum_j 2^(c x_j - m), c = log2(e), with columns; in each lane by itself."""
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
    # A target outside the vocabulary is never an address.
    inside = (target >= 0) & (target < vocab_size)
    known = inside & (target != ignore_index)

    if FORWARD:
        # Read before the reduction, in which the warps wait for each other: afterwards they overwrite the row.
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
        # A row without a target has no gradient: 2^(c x - inf) is 0, and 0 is taken from it.
        m = tl.where(known, m, float("inf"))
        total, upstream = tl.where(known, total, 1.0), tl.where(known, upstream, 0.0)
        edge = vocab_size // BLOCK_N * BLOCK_N
        _write_gradient(row_ptr, edge, stride, target, upstream, m, total, stride, vocab_size, True, BLOCK_N)
        _write_gradient(row_ptr, 0, edge, target, upstream, m, total, stride, vocab_size, False, BLOCK_N)


def cross_entropy_rows(
    logits: Tensor, targets: Tensor, losses: Tensor, lse: Tensor, upstream: Tensor | None, vocab_size: int,
    ignore_index: int, gradient: bool, config: LaunchConfig | None = None,
) -> None:  # fmt: skip
    """A chunk of rows, in place; see linear_cross_entropy.cross_entropy_rows, the same in plain PyTorch.

    logits: (N, padded V) contiguous. config overrides the table's.
    """
    rows, stride = logits.shape
    config = config or lookup("cross_entropy", precision_name(logits.dtype), stride, logits.device)
    with on(logits.device):
        cross_entropy_kernel[(rows,)](
            logits, targets, losses, lse, upstream, stride, vocab_size, ignore_index,
            FORWARD=upstream is None, GRADIENT=gradient, **config.arguments(),
        )  # fmt: skip


def _constants(precision: str, size: int) -> dict[str, object]:
    return {"FORWARD": True, "GRADIENT": True, "upstream_ptr": None}


_TYPES = {"targets_ptr": "*i64", "loss_ptr": "*fp32", "lse_ptr": "*fp32", "upstream_ptr": "*fp32"}


def _work(precision: str, size: int, config: LaunchConfig) -> Work:
    """GPT-2's vocabulary, stored padded, for 64 sequences of 1024 tokens."""
    rows, vocab_size, stride = 65536, 50257, 50304
    block, element = config.block_n or 1, 4 if precision == "float32" else 2
    whole = vocab_size // block
    # Maximum and sum of whole blocks and of the last one, the gradient of the last and of whole ones.
    loops = tuple(Loop(runs, special=block) for runs in (whole * rows, rows, rows, whole * rows))
    return Work(stride, 0.0, 0.0, bytes=2 * element * rows * stride, programs=rows, loops=loops)


_VARIANTS: dict[str, dict[str, object]] = {
    "evaluation": {"GRADIENT": False},
    "upstream": {"FORWARD": False, "upstream_ptr": ...},
}
KERNELS = {
    "cross_entropy": Kernel(cross_entropy_kernel, _constants, _TYPES, ("stride",), variants=_VARIANTS, work=_work)
}


def _candidates(precision: str, size: int) -> list[LaunchConfig]:
    """8 to 32 columns a thread."""
    pairs = [(block, warps) for block in (1024, 2048, 4096, 8192, 16384) for warps in (4, 8, 16, 32)]
    return [LaunchConfig(block_n=b, num_warps=w) for b, w in pairs if 8 <= b // (32 * w) <= 32 and b <= 2 * size]


def _example(
    precision: str, size: int, device: torch.device, seed: int
) -> Callable[[LaunchConfig], tuple[Tensor, ...]]:
    """A chunk, which each launch overwrites with the gradient of what the last one left; and of the same
    kind 16 rows that are new each time, whose results can be compared."""
    generator, dtype = torch.Generator(device).manual_seed(seed), getattr(torch, precision)
    logits = torch.randn(EXAMPLE_ROWS, size, device=device, dtype=dtype, generator=generator)
    targets = torch.randint(size, (EXAMPLE_ROWS,), device=device, generator=generator)
    losses, lse = torch.empty(2, EXAMPLE_ROWS, device=device, dtype=statistics(dtype))
    few = logits[:16].clone()

    def launch(config: LaunchConfig) -> tuple[Tensor, ...]:
        cross_entropy_rows(logits, targets, losses, lse, None, size, -100, True, config)
        rows, results = few.clone(), torch.empty(2, len(few), device=device, dtype=lse.dtype)
        cross_entropy_rows(rows, targets, results[0], results[1], None, size, -100, True, config)
        return rows, results

    return launch


TUNING = {"cross_entropy": Tuning(_candidates, _example)}
