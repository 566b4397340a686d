"""The token embedding: PyTorch's own numbers, and a gradient that the compiler leaves in one piece."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table

from fastgpt2.config import TrainConfig
from fastgpt2.embedding import embedding
from fastgpt2.model import GPT
from fastgpt2.run import numerics
from tests.seeds import generator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, C = 50, 24
pytestmark = pytest.mark.numeric


def text(*shape: int) -> Tensor:
    """Tokens of which one is everywhere and some are nowhere, as in text; token 0 is among them."""
    tokens = torch.randint(ROWS - 10, shape, generator=generator())
    return torch.where(tokens % 3 == 1, 7, tokens).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_same_bits_as_pytorchs(dtype: torch.dtype) -> None:
    tokens, rng = text(4, 33), generator(1)
    weight, upstream = (torch.randn(n, generator=rng).to(DEVICE, dtype) for n in ((ROWS, C), (4, 33, C)))
    results = []
    for op in (F.embedding, embedding):
        leaf = weight.clone().requires_grad_()
        y = op(tokens, leaf)
        y.backward(upstream)
        results.append((y, leaf.grad))
    for theirs, ours in zip(*results, strict=True):
        assert torch.equal(ours, theirs)
    assert results[1][1][[0, 7]].abs().sum(-1).all() and results[1][1][-1].abs().sum() == 0


def test_derivatives_of_both_orders() -> None:
    tokens = text(2, 5)
    weight = torch.randn(ROWS, 3, dtype=torch.float64, device=DEVICE, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: embedding(tokens, w), weight, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda w: embedding(tokens, w).square(), weight, fast_mode=True)


def test_the_operator_is_what_it_says_to_the_compiler() -> None:
    gradient = torch.randn(2, 5, C, device=DEVICE, requires_grad=True)
    torch.library.opcheck(torch.ops.fastgpt2.embedding_backward.default, (gradient, text(2, 5), ROWS))


def test_the_compiled_step_has_no_indexed_sum() -> None:
    """With inductor's decompositions the gradient of a lookup is one: of tokens here, and of positions if they were."""
    calls: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.update(node.target.name() for node in graph.graph.nodes if hasattr(node.target, "_schema"))
        return make_boxed_func(graph.forward)

    config = TrainConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=64, batch_size=2, device="cpu")
    with numerics(config):
        model = GPT(config.resolve(cuda=False, bf16=False, memory_bytes=0).model_config())
        model.compile(backend=aot_autograd(fw_compiler=count, decompositions=select_decomp_table()), fullgraph=True)
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        model(tokens, tokens).backward()
    assert calls["fastgpt2::embedding_backward"] == 1
    assert calls["aten::embedding"] == 1
    assert not [name for name in calls if "index_put" in name], calls


@pytest.mark.gpu
def test_on_a_gpu_the_bits_repeat_where_one_token_fills_a_third_of_the_rows() -> None:
    tokens, gradient = text(16384), torch.randn(16384, 768, device="cuda")
    first = torch.ops.fastgpt2.embedding_backward(gradient, tokens, ROWS)
    exact = torch.zeros(ROWS, 768, dtype=torch.float64, device="cuda").index_add_(0, tokens, gradient.double())
    assert (first - exact).abs().max() < 1e-3
    assert all(torch.equal(torch.ops.fastgpt2.embedding_backward(gradient, tokens, ROWS), first) for _ in range(20))
