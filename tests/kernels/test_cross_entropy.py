"""The rows' step of the loss: Triton's kernel and PyTorch's plain form, on logits with any padding."""

from __future__ import annotations

import functools
import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.accuracy import maximum
from fastgpt2.kernels import cross_entropy
from fastgpt2.kernels import loss as module
from fastgpt2.kernels.cross_entropy import cross_entropy_reference
from fastgpt2.kernels.specs import cross_entropy as spec
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configurations
from tests.kernels.cases.loss import (
    assert_right,
    every_dtype,
    every_implementation,
    inputs,
    ours,
)
from tests.kernels.oracle import DEVICE
from tests.seeds import generator

pytestmark = pytest.mark.numeric


@pytest.mark.parametrize("V", [1, 7, 16, 17, 33, 64, 65])
def test_the_ends_of_the_kernels_blocks(V, monkeypatch) -> None:
    """Blocks of 16 columns: no whole block, some, and a vocabulary that ends inside, at and just past a block."""
    monkeypatch.setattr(cross_entropy, "lookup", lambda *_: LaunchConfig(block_n=16))
    make = lambda seed: inputs((6, V, V + 3, 8), seed=seed)  # noqa: E731
    assert_right(functools.partial(ours, implementation="triton"), make, vocab_size=V, slow=DEVICE == "cpu")


@pytest.mark.parametrize("arch", architectures())
def test_shipped_blocks(arch, monkeypatch) -> None:
    shipped = configurations(arch)["cross_entropy", "bfloat16", 50304]
    monkeypatch.setattr(cross_entropy, "lookup", lambda *_: shipped)
    size = (3, 50257, 50304, 8)
    assert_right(functools.partial(ours, implementation="triton"), lambda seed: inputs(size, seed=seed),
                 vocab_size=size[1], slow=DEVICE == "cpu")  # fmt: skip


@every_implementation
@every_dtype
def test_rows_whatever_lies_past_the_vocabulary(dtype, implementation) -> None:
    """The rows' step alone, with NaN past the vocabulary: losses, log-sum-exps, gradient, and zeros in the padding."""
    N, V, stride = 5, 100, 128
    logits = torch.full((N, stride), math.nan, dtype=dtype, device=DEVICE)
    logits[:, :V] = torch.randn(N, V, generator=generator()).to(dtype)
    targets = torch.tensor([0, 99, -100, 7, 3], device=DEVICE)
    wanted = cross_entropy_reference(logits[:, :V].double(), targets)
    losses, lse = (torch.full((N,), math.nan, device=DEVICE) for _ in range(2))
    step = cross_entropy.cross_entropy_rows if implementation == "triton" else module.cross_entropy_rows
    before = logits.clone()
    for upstream in (None, torch.full((N,), 0.5, device=DEVICE)):
        rows = before.clone()
        step(rows, targets, losses, lse, upstream, V, -100, True)
        gradient = wanted[2] * (1.0 if upstream is None else 0.5)
        assert maximum(rows[:, :V].double() - gradient) <= 1.01 * torch.finfo(dtype).eps / 2 + 1e-6
        assert not rows[:, V:].any()
    torch.testing.assert_close(losses.double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's own test of the tuner times it")
def test_the_tuners_example_does_not_depend_on_the_configuration(monkeypatch) -> None:
    monkeypatch.setattr(spec, "EXAMPLE_ROWS", 20)
    first, other = (spec.TUNING["cross_entropy"].example("bfloat16", 96, torch.device("cpu"), i) for i in (0, 1))
    results = [f(config) for f in (first, other) for config in (LaunchConfig(block_n=32), LaunchConfig(block_n=64))]
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])
