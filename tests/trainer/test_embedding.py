"""The token embedding: PyTorch's own numbers, and a gradient that the compiler leaves in one piece."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch._inductor.decomposition import select_decomp_table
from torch.func import functional_call

from fastgpt2.config import ModelConfig, TrainConfig
from fastgpt2.embedding import embedding
from fastgpt2.model import GPT
from fastgpt2.ops import make_ops
from fastgpt2.run import numerics
from fastgpt2.settings import resolve
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
    gradient = torch.randn(2, 5, C, device=DEVICE)
    torch.library.opcheck(torch.ops.fastgpt2.embedding_backward.default, (gradient, text(2, 5), ROWS))


def test_the_compiled_step_has_no_indexed_sum() -> None:
    """With inductor's decompositions the gradient of a lookup is one: of tokens here, and of positions if they were."""
    calls: Counter[str] = Counter()

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        calls.update(node.target.name() for node in graph.graph.nodes if hasattr(node.target, "_schema"))
        return make_boxed_func(graph.forward)

    config = TrainConfig(n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=64, batch_size=2, device="cpu")
    with numerics(config):
        model = GPT(resolve(config, cuda=False, bf16=False, memory_bytes=0).model_config())
        model.compile(backend=aot_autograd(fw_compiler=count, decompositions=select_decomp_table()), fullgraph=True)
        tokens = torch.zeros(2, 8, dtype=torch.int64)
        model(tokens, tokens).backward()
    assert calls["fastgpt2::embedding_backward"] == 1
    assert calls["aten::embedding"] == 1
    assert not [name for name in calls if "index_put" in name], calls


# torch.func


SHAPE = ModelConfig(n_layer=1, n_head=2, n_embd=32, block_size=8, vocab_size=30)


def small_model(seed: int = 0, **choices: str) -> GPT:
    torch.manual_seed(seed)
    ops, _ = make_ops({"attn": "naive", "mlp": "torch", "norm": "torch", "loss": "torch", **choices})
    return GPT(SHAPE, ops).eval()


def weights_of(model: GPT) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def batch() -> tuple[Tensor, Tensor]:
    return torch.randint(30, (3, 8), generator=generator()), torch.randint(30, (3, 8), generator=generator(1))


def gradients(model: GPT, tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """By autograd, as in training."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(model(tokens, targets), parameters), strict=True))


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], msg=name)


@pytest.mark.parametrize("attention", ["naive", "sdpa"])
@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev])
def test_a_gradient_by_torch_func(attention: str, transform: Callable) -> None:
    model, data = small_model(attn=attention), batch()
    ours = transform(lambda weights: functional_call(model, weights, data))(weights_of(model))
    assert_same(ours, gradients(model, *data))


def test_gradients_of_each_sequence_by_vmap() -> None:
    model, (tokens, targets) = small_model(), batch()

    def loss(weights: dict[str, Tensor], inputs: Tensor, outputs: Tensor) -> Tensor:
        return functional_call(model, weights, (inputs[None], outputs[None]))

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weights_of(model), tokens, targets)
    for i in range(3):
        assert_same({name: g[i] for name, g in each.items()}, gradients(model, tokens[i : i + 1], targets[i : i + 1]))


def test_several_models_at_once_by_vmap() -> None:
    models, data = [small_model(seed) for seed in range(3)], batch()
    weights, _ = torch.func.stack_module_state(models)
    weights = {name: weight.detach() for name, weight in weights.items()}
    each = torch.vmap(torch.func.grad(lambda weights: functional_call(models[0], weights, data)))(weights)
    for i, model in enumerate(models):
        assert_same({name: g[i] for name, g in each.items()}, gradients(model, *data))


def test_a_second_derivative_by_torch_func() -> None:
    tokens, weight = text(2, 5), torch.randn(ROWS, 3, dtype=torch.float64, device=DEVICE)
    hessian = torch.func.jacrev(torch.func.jacrev(lambda w: embedding(tokens, w).pow(3).sum()))(weight)
    expected = torch.func.jacrev(torch.func.jacrev(lambda w: F.embedding(tokens, w).pow(3).sum()))(weight)
    torch.testing.assert_close(hessian, expected)


def test_forward_mode_of_the_function_and_of_its_gradient() -> None:
    tokens, rng = text(2, 5), generator(1)
    weight, tangent = (torch.randn(ROWS, 3, dtype=torch.float64, generator=rng).to(DEVICE) for _ in range(2))
    for transform in (
        lambda f: torch.func.jvp(f, (weight,), (tangent,)),
        lambda f: torch.func.jvp(torch.func.grad(lambda w: f(w).pow(3).sum()), (weight,), (tangent,)),
        lambda f: torch.func.linearize(f, weight)[1](tangent),
        lambda f: torch.func.jacfwd(f)(weight),
        lambda f: torch.func.hessian(lambda w: f(w).pow(3).sum())(weight),
        # Linear in the upstream gradient, which is all that depends on `u`.
        lambda f: torch.func.jvp(lambda u: torch.func.vjp(f, weight)[1](u)[0], (f(tangent),), (f(weight),)),
    ):
        torch.testing.assert_close(*(transform(lambda w, op=op: op(tokens, w)) for op in (embedding, F.embedding)))


def test_a_derivative_of_the_whole_model_along_a_direction() -> None:
    model, data = small_model(), batch()
    weights = weights_of(model)
    direction = {name: torch.randn(w.shape, generator=generator()) for name, w in weights.items()}
    _, along = torch.func.jvp(lambda w: functional_call(model, w, data), (weights,), (direction,))
    expected = sum((g * direction[name]).sum() for name, g in gradients(model, *data).items())
    torch.testing.assert_close(along, expected)


@pytest.mark.parametrize("table", [0, 1, None])
def test_the_operator_by_vmap(table: int | None) -> None:
    """One gradient by two batches of tokens, two by one, and two by two of their own."""
    gradient, tokens = torch.randn(2, 2, 5, C, device=DEVICE), text(2, 2, 5)
    dims = {0: (0, None), 1: (None, 1), None: (0, 0)}[table]
    picked = [x if dim is not None else x[0] for x, dim in zip((gradient, tokens), dims, strict=True)]
    got = torch.vmap(lambda g, t: torch.ops.fastgpt2.embedding_backward(g, t, ROWS), dims)(*picked)
    for i in range(2):
        one = [x if dim is None else x.select(dim, i) for x, dim in zip(picked, dims, strict=True)]
        torch.testing.assert_close(got[i], torch.ops.fastgpt2.embedding_backward(*one, ROWS))


@pytest.mark.parametrize(
    ("choice", "instead"),
    [
        ({"loss": "chunked"}, "torch.nn.functional.cross_entropy"),
        ({"attn": "triton"}, "attention_reference"),
        ({"mlp": "triton"}, "gelu_mlp_reference"),
        ({"norm": "triton"}, "layer_norm_reference"),
    ],
    ids=str,
)
def test_what_torch_func_cant_do_says_what_can(choice: dict[str, str], instead: str) -> None:
    if "triton" in choice.values():
        pytest.importorskip("triton", reason="Triton is published for Linux")
    model, data = small_model(**choice), batch()
    with pytest.raises(RuntimeError, match=f"under torch.func .*: use {instead}"):
        torch.func.grad(lambda weights: functional_call(model, weights, data))(weights_of(model))


@pytest.mark.gpu
def test_on_a_gpu_the_bits_repeat_where_one_token_fills_a_third_of_the_rows() -> None:
    tokens, gradient = text(16384), torch.randn(16384, 768, device="cuda")
    first = torch.ops.fastgpt2.embedding_backward(gradient, tokens, ROWS)
    exact = torch.zeros(ROWS, 768, dtype=torch.float64, device="cuda").index_add_(0, tokens, gradient.double())
    assert (first - exact).abs().max() < 1e-3
    assert all(torch.equal(torch.ops.fastgpt2.embedding_backward(gradient, tokens, ROWS), first) for _ in range(20))
