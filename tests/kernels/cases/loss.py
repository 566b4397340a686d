"""Inputs of the head and its loss and their forms: ours, the oracle, and the peers that set the budget."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import linear_cross_entropy
from fastgpt2.kernels.loss import linear_cross_entropy_reference
from tests.kernels.oracle import DEVICE, DTYPES, Compute, Oracle, Results, differentiate
from tests.seeds import generator

# N, V, padded V, C; and a budget that makes three chunks of it, the last of them short.
SMALL = (11, 100, 112, 16)
THREE_CHUNKS = 4 * 128
FULL = (2048, 50257, 50304, 768)
"""In four chunks of 16 bits or seven of 32; in float64 its logits are 0.8 GB, some five of them in each process."""

every_implementation = pytest.mark.parametrize("implementation", ["chunked", "triton"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
"""hidden (N, C), weight (padded V, C), targets (N,), upstream: a scalar, or (N,) for "none"."""


def inputs(
    size: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    *,
    reduction: str = "mean",
    seed: int = 0,
    gain: float = 1.0,
    ignored: bool = True,
) -> Inputs:
    """Logits of standard deviation `gain`; every fifth target is ignored."""
    N, V, padded, C = size
    rng = generator(seed, DEVICE)
    draw = functools.partial(torch.randn, generator=rng, dtype=torch.float64, device=DEVICE)
    hidden, weight = draw(N, C), draw(padded, C) * gain / math.sqrt(C)
    targets = torch.randint(V, (N,), generator=rng, device=DEVICE)
    if ignored:
        targets[2::5] = -100
    upstream = draw(N) if reduction == "none" else torch.tensor(1.7, device=DEVICE)
    return hidden.to(dtype), weight.to(dtype), targets, upstream.to(torch.promote_types(dtype, torch.float32))


def head(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, **options: Any
) -> Results:
    """(loss, dhidden, dweight)."""
    return differentiate(functools.partial(function, targets=targets, **options), (hidden, weight), (upstream,))


ours = functools.partial(head, linear_cross_entropy)
plain = functools.partial(head, linear_cross_entropy_reference)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, **options: Any) -> Results:
    return plain(hidden.double(), weight.double(), targets, upstream, **options)


def plain_16_bits(*args: Tensor, vocab_size: int | None = None, **options: Any) -> Results:
    """As F.cross_entropy takes the logits, in their own dtype."""

    def function(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(hidden, weight[:vocab_size]), targets, **options)

    return head(function, *args)


def scaled_after(
    hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, *, reduction: str = "mean", **options: Any
) -> Results:
    """The upstream gradient's scale and the mean's count multiply after the products, not before.

    A constant factor changes how a sum of 50257 terms rounds: 2.5 times the error was seen.
    """
    count = (targets != options.get("ignore_index", -100)).sum() if reduction == "mean" else 1
    largest = upstream.abs().max()
    unscaled = "none" if reduction == "none" else "sum"
    loss, *gradients = plain(hidden, weight, targets, upstream / largest, reduction=unscaled, **options)
    return loss / count, *(gradient * (largest / count) for gradient in gradients)


ORACLE = Oracle(("loss", "dhidden", "dweight"), exact, (plain, plain_16_bits, scaled_after))


def excess(compute: Compute, make: Callable[[int], Inputs], *, slow: bool = False, **options: Any) -> dict[str, float]:
    """The oracle's, for a function that takes the reference's options too.

    slow: one seed of ours.
    """
    return ORACLE.excess(functools.partial(compute, **options), make, once=slow, **options)


def assert_right(compute: Compute, make: Callable[[int], Inputs], *, slow: bool = False, **options: Any) -> None:
    ORACLE.assert_right(functools.partial(compute, **options), make, once=slow, **options)


def assert_wrong(compute: Compute, make: Callable[[int], Inputs], **options: Any) -> None:
    ORACLE.assert_wrong(functools.partial(compute, **options), make, once=False, **options)


def interpreted(implementation: str) -> bool:
    """Whether the kernels are slow here."""
    return implementation == "triton" and DEVICE == "cpu"
