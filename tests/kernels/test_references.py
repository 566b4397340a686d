"""A kernel's reference and the model's plain form are the same function, so that either may be the oracle.

The reference stands in the kernel's file, which imports nothing of the trainer, and knows every option of the kernel.
The plain form stands in fastgpt2/backends, and is what verify, the trainer's tests and the benchmarks compare with.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.backends.attention import naive_attention
from fastgpt2.backends.loss import torch_loss
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.backends.norm import torch_norm
from fastgpt2.documents import document_bounds
from fastgpt2.kernels.attention import attention_reference
from fastgpt2.kernels.loss import linear_cross_entropy_reference
from fastgpt2.kernels.mlp import gelu_mlp_reference
from fastgpt2.kernels.norm import layer_norm_reference
from tests.kernels.oracle import differentiate
from tests.seeds import generator

pytestmark = pytest.mark.numeric


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    rng = generator()
    return [torch.randn(shape, generator=rng, dtype=torch.float64) for shape in shapes]


def assert_one_function(one: Callable, other: Callable, *inputs: Tensor) -> None:
    """Outputs and gradients, to a few places of float64."""
    outputs = one(*inputs)
    upstream = draw(*(y.shape for y in (outputs if isinstance(outputs, tuple) else (outputs,))))
    results = [differentiate(function, inputs, upstream) for function in (one, other)]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("opening", [None, 5])
def test_attention(opening) -> None:
    documents = None if opening is None else document_bounds(torch.arange(34).view(2, 17) % 9, opening)
    assert_one_function(
        lambda qkv: naive_attention(qkv, documents=documents),
        lambda qkv: attention_reference(*qkv.unbind(2), documents=documents),
        *draw((2, 17, 3, 2, 16)),
    )


def test_mlp() -> None:
    assert_one_function(torch_mlp, gelu_mlp_reference, *draw((2, 5, 8), (32, 8), (32,), (8, 32), (8,)))


@pytest.mark.parametrize("streams", [1, 2], ids=["first", "later"])
def test_norm(streams) -> None:
    def form(norm: Callable) -> Callable:
        return lambda weight, bias, x, residual=None: norm(x, residual, weight, bias)

    inputs = draw((20,), (20,), *streams * [(2, 5, 20)])
    assert_one_function(form(torch_norm), form(layer_norm_reference), *inputs)


@pytest.mark.parametrize("vocab_size", [96, 101, 128])
def test_loss(vocab_size) -> None:
    targets = torch.arange(14).view(2, 7) * 6
    assert_one_function(
        lambda hidden, weight: torch_loss(hidden, weight, targets, vocab_size=vocab_size),
        lambda hidden, weight: linear_cross_entropy_reference(hidden, weight, targets, vocab_size=vocab_size),
        *draw((2, 7, 16), (128, 16)),
    )
