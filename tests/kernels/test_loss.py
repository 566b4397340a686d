"""The head and its loss against a float64 reference, within twice what PyTorch's plain forms lose in that precision.

Both implementations of the rows' step go through the same tests; without a GPU Triton's runs in the interpreter.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.accuracy import maximum, rms
from fastgpt2.kernels import linear_cross_entropy
from fastgpt2.kernels import loss as module
from tests.kernels.cases.loss import (
    FULL,
    SMALL,
    THREE_CHUNKS,
    assert_right,
    assert_wrong,
    every_dtype,
    every_implementation,
    every_reduction,
    exact,
    excess,
    head,
    inputs,
    interpreted,
    ours,
    plain,
)
from tests.kernels.oracle import DEVICE, DTYPES, Compute, assert_equal

pytestmark = pytest.mark.numeric


@every_implementation
@every_reduction
@every_dtype
def test_within_the_budget(dtype, reduction, implementation) -> None:
    assert_right(
        functools.partial(ours, implementation=implementation, memory_budget=THREE_CHUNKS * dtype.itemsize),
        lambda seed: inputs(SMALL, dtype, reduction=reduction, seed=seed),
        vocab_size=SMALL[1],
        reduction=reduction,
        slow=interpreted(implementation),
    )


ODD = [(1, 128256, 128256), (21, 50257, 50304), (33, 50257, 50257)]


@pytest.mark.parametrize(("N", "V", "padded"), ODD)
@every_implementation
def test_odd_shapes(N, V, padded, implementation) -> None:
    make = lambda seed: inputs((N, V, padded, 4), seed=seed, ignored=N > 2)  # noqa: E731
    compute = functools.partial(ours, implementation=implementation)
    assert_right(compute, make, vocab_size=V, slow=interpreted(implementation))


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_large_vocabulary_in_16_bits(dtype, implementation) -> None:
    """Several blocks of vocabulary rows, each added to the float32 gradient separately."""
    size = (11, 2500, 2560, 16)
    assert size[2] > 2 * module.PRODUCT_ROWS
    make = lambda seed: inputs(size, dtype, seed=seed)  # noqa: E731
    compute = functools.partial(ours, implementation=implementation)
    assert_right(compute, make, vocab_size=size[1], slow=interpreted(implementation))


@every_implementation
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype, reduction, implementation) -> None:
    """Logits of tens of thousands: one class takes all the probability, and losses keep their digits."""
    assert_right(
        functools.partial(ours, implementation=implementation),
        lambda seed: inputs(SMALL, dtype, reduction=reduction, seed=seed, gain=1e4),
        vocab_size=SMALL[1],
        reduction=reduction,
        slow=interpreted(implementation),
    )


@every_implementation
@pytest.mark.parametrize("logit", [30_000.0, -30_000.0])
def test_small_losses_keep_their_digits(logit, implementation) -> None:
    """The target wins by little at large logits: computed as log-sum-exp minus logit, the loss would round to zero."""
    hidden = torch.ones(4, 1, device=DEVICE)
    weight = torch.full((8, 1), logit, device=DEVICE)
    weight[3] += 6.0
    losses = linear_cross_entropy(hidden, weight, torch.full((4,), 3, device=DEVICE), reduction="none",
                                  implementation=implementation)  # fmt: skip
    expected = math.log1p(7 * math.exp(-6.0))
    # At this size float32 numbers are 2e-3 apart. Without a GPU's fused multiply-add a part of that remains.
    assert (losses - expected).abs().max().item() < 3e-5


@every_implementation
def test_first_and_last_target(implementation) -> None:
    hidden, weight, targets, upstream = inputs((2, 100, 112, 16), ignored=False)
    targets[:] = torch.tensor([0, 99])
    results = ours(hidden, weight, targets, upstream, vocab_size=100, implementation=implementation)
    for mine, truth in zip(results, exact(hidden, weight, targets, upstream, vocab_size=100), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-6)


@every_implementation
@every_reduction
def test_all_ignored(reduction, implementation) -> None:
    hidden, weight, targets, upstream = inputs(reduction=reduction)
    targets[:] = -100
    options = {"vocab_size": SMALL[1], "reduction": reduction}
    loss, dhidden, dweight = ours(hidden, weight, targets, upstream, implementation=implementation, **options)
    torch.testing.assert_close(loss, plain(hidden, weight, targets, upstream, **options)[0], equal_nan=True)
    assert loss.isnan().all() == (reduction == "mean")
    assert not dhidden.any() and not dweight.any()


@every_implementation
def test_an_ignored_class_may_be_one_of_the_vocabulary(implementation) -> None:
    args = inputs(ignored=False)
    args[2][::2] = 5
    options = {"vocab_size": SMALL[1], "ignore_index": 5}
    results = ours(*args, implementation=implementation, **options)
    for mine, theirs in zip(results, exact(*args, **options), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


@every_implementation
@every_reduction
@pytest.mark.parametrize("wrong", [-1, 100, 111, 2**40, -(2**40)])
def test_a_target_outside_the_vocabulary_is_found(wrong, reduction, implementation) -> None:
    hidden, weight, targets, upstream = inputs(reduction=reduction, ignored=False)
    targets[4] = wrong
    options = {"vocab_size": SMALL[1], "implementation": implementation}
    loss, dhidden, dweight = ours(hidden, weight, targets, upstream, reduction=reduction, **options)
    assert loss.isnan().sum() == 1 and (reduction != "none" or loss[4].isnan())
    assert not dhidden[4].any() and dhidden[[0, 1, 2, 3, 5]].all()
    # The other rows' gradients are those of a batch where that row is ignored, up to the divisor of the mean.
    ignored = targets.masked_fill(targets == wrong, -100)
    _, dhidden2, dweight2 = ours(hidden, weight, ignored, upstream, reduction=reduction, **options)
    ratio = 10 / 11 if reduction == "mean" else 1.0
    torch.testing.assert_close((dhidden, dweight), (dhidden2 * ratio, dweight2 * ratio))


@every_implementation
def test_the_padding_of_the_vocabulary_is_outside(implementation) -> None:
    """Rows of the weight past vocab_size have a gradient of exactly zero and change nothing else."""
    hidden, weight, targets, upstream = inputs()
    loud = weight.clone()
    loud[SMALL[1] :] = 1e4
    options = {"vocab_size": SMALL[1], "implementation": implementation}
    results = ours(hidden, weight, targets, upstream, **options)
    for quiet, found in zip(results, ours(hidden, loud, targets, upstream, **options), strict=True):
        torch.testing.assert_close(found, quiet)
    assert not results[2][SMALL[1] :].any() and results[2][: SMALL[1]].any(1).all()


def faults() -> dict[str, Compute]:
    """Faults planted in a correct computation."""

    def with_step(change: Callable[[dict[str, Any]], None], **options: Any) -> Compute:
        """Change something before or after the rows' step."""

        def compute(*args: Tensor, **given: Any):
            step = module.cross_entropy_rows

            def faulty(*values: Any) -> None:
                names = ("logits", "targets", "losses", "lse", "upstream", "vocab_size", "ignore_index", "gradient")
                here = dict(zip(names, values, strict=True))
                change(here)
                step(*(here[name] for name in names))
                if after := here.get("after"):
                    after()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "cross_entropy_rows", faulty)
                return ours(*args, implementation="chunked", memory_budget=THREE_CHUNKS * 4, **options | given)

        return compute

    def one_hot_forgotten(here: dict[str, Any]) -> None:
        rows, targets = here["logits"], here["targets"].clamp(min=0)[:, None]
        kept = (here["targets"] >= 0).to(rows.dtype)[:, None]
        here["after"] = lambda: rows.scatter_add_(1, targets, kept)

    def last_row_of_a_chunk_lost(here: dict[str, Any]) -> None:
        here["after"] = lambda: here["logits"][-1].zero_()

    def gradient_in_bfloat16(here: dict[str, Any]) -> None:
        here["after"] = lambda: here["logits"].copy_(here["logits"].bfloat16())

    def losses_in_bfloat16(here: dict[str, Any]) -> None:
        here["after"] = lambda: here["losses"].copy_(here["losses"].bfloat16())

    def padding_in_the_softmax(*args: Tensor, vocab_size: int, **options: Any):
        return ours(*args, implementation="chunked", **options)

    def ignored_counted(hidden, weight, targets, upstream, **options: Any):
        share = (targets >= 0).float().mean()
        return tuple(x * share for x in ours(hidden, weight, targets, upstream, implementation="chunked", **options))

    def zero_dweight(*args: Tensor, **options: Any):
        loss, dhidden, dweight = ours(*args, implementation="chunked", **options)
        return loss, dhidden, torch.zeros_like(dweight)

    return {
        "one-hot forgotten": with_step(one_hot_forgotten),
        "last row of a chunk lost": with_step(last_row_of_a_chunk_lost),
        "gradient in bfloat16": with_step(gradient_in_bfloat16),
        "losses in bfloat16": with_step(losses_in_bfloat16),
        "padding in the softmax": padding_in_the_softmax,
        "ignored counted": ignored_counted,
        "zero dweight": zero_dweight,
    }


@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_found(fault) -> None:
    assert_wrong(faults()[fault], lambda seed: inputs(seed=seed), vocab_size=SMALL[1], reduction="mean")


def test_a_first_chunk_forgotten_by_the_sum_is_found(monkeypatch) -> None:
    accumulate = module._accumulate
    monkeypatch.setattr(module, "_accumulate", lambda *args, first: accumulate(*args, first=True))
    compute = functools.partial(ours, implementation="chunked", memory_budget=THREE_CHUNKS * 4)
    assert excess(compute, lambda seed: inputs(seed=seed), vocab_size=SMALL[1])["dweight by norm"] > 2.0


@pytest.mark.parametrize("fault", ["one-hot forgotten", "last row of a chunk lost", "padding in the softmax"])
def test_a_planted_fault_is_found_in_bfloat16(fault) -> None:
    make = lambda seed: inputs(dtype=torch.bfloat16, seed=seed)  # noqa: E731
    assert_wrong(faults()[fault], make, vocab_size=SMALL[1], reduction="mean")


@every_implementation
def test_ignored_rows_may_have_any_upstream_gradient(implementation) -> None:
    hidden, weight, targets, upstream = inputs(reduction="none")
    options = {"vocab_size": SMALL[1], "reduction": "none", "implementation": implementation}
    usual = ours(hidden, weight, targets, upstream, **options)
    loud = upstream.masked_fill(targets == -100, math.nan)
    assert_equal(usual, ours(hidden, weight, targets, loud, **options))


@every_implementation
@every_reduction
@pytest.mark.parametrize("scale", [1e-12, 0.0, 1e12, -1e12])
def test_small_and_large_upstream_gradients_survive_16_bits(scale, reduction, implementation) -> None:
    """Under autocast to float16 the weight's gradient is float32: the upstream gradient must not pass float16."""
    hidden, weight, targets, upstream = inputs(reduction=reduction)
    upstream = upstream.abs()
    options = {"vocab_size": SMALL[1], "reduction": reduction}
    with torch.autocast(DEVICE, torch.float16):
        _, dhidden, dweight = ours(hidden, weight, targets, upstream * scale, implementation=implementation, **options)
    _, dhidden_exact, dweight_exact = exact(hidden, weight, targets, upstream * scale, **options)
    for mine, truth in ((dhidden, dhidden_exact), (dweight, dweight_exact)):
        assert mine.dtype == torch.float32
        assert maximum(mine.double() - truth) <= 4e-3 * maximum(truth)


@every_reduction
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_no_chunks_share_of_the_weights_gradient_is_rounded_to_16_bits(dtype, reduction) -> None:
    """64 equal logits have a gradient that 16 bits hold exactly: all error is that of the products with the hidden
    states, and of their sum over eight chunks."""
    N, V, C = 64, 64, 16
    hidden, _, targets, _ = inputs((N, V, V, C), dtype)
    weight, upstream = torch.zeros(V, C, device=DEVICE), torch.ones((N,) if reduction == "none" else (), device=DEVICE)
    args, options = (hidden, weight, targets, upstream), {"reduction": reduction}
    with torch.autocast(DEVICE, dtype):
        *_, dweight = ours(*args, implementation="chunked", memory_budget=1, **options)
    *_, truth = exact(*args, **options)
    assert rms(dweight.double() - truth) <= 2**-17 * rms(truth)


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has linear_cross_entropy from 2.13 on")
@every_implementation
@every_reduction
def test_agrees_with_torchs_own(reduction, implementation) -> None:
    args = inputs((11, 100, 100, 16), reduction=reduction)
    theirs = head(lambda h, w, targets: F.linear_cross_entropy(h, w, targets, reduction=reduction), *args)
    mine = ours(*args, reduction=reduction, implementation=implementation)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.gpu
@every_implementation
@every_reduction
@every_dtype
def test_full_size(dtype, reduction, implementation) -> None:
    assert_right(
        functools.partial(ours, implementation=implementation, memory_budget=2**26),
        lambda seed: inputs(FULL, dtype, reduction=reduction, seed=seed),
        vocab_size=FULL[1],
        reduction=reduction,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 77, 289])
@pytest.mark.parametrize(("V", "padded"), [(50257, 50257), (50257, 50304), (128256, 128256)])
@every_dtype
def test_full_odd_shapes(dtype, V, padded, N) -> None:
    make = lambda seed: inputs((N, V, padded, 768), dtype, seed=seed, ignored=N > 2)  # noqa: E731
    assert_right(functools.partial(ours, implementation="triton"), make, vocab_size=V)


@pytest.mark.gpu
def test_the_weights_gradient_is_summed_in_float32() -> None:
    """Under autocast 8 chunks lose no more than one: cuBLAS adds each product to the float32 sum unrounded."""
    hidden, weight, targets, upstream = inputs((4096, 50257, 50304, 128), ignored=False)
    errors = []
    for budget in (1, 2**40):
        with torch.autocast("cuda", torch.bfloat16):
            *_, dweight = ours(hidden, weight, targets, upstream, vocab_size=50257, memory_budget=budget)
        rounded = (hidden.bfloat16(), weight.bfloat16(), targets, upstream)
        *_, truth = exact(*rounded, vocab_size=50257)
        errors.append(rms(dweight.double() - truth))
    assert errors[0] <= 1.05 * errors[1]
