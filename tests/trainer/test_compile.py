"""--compile: what it requires, what it stores for the backward pass, and how many runs a process can compile."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.config import ConfigError
from fastgpt2.model import saved_bytes
from fastgpt2.run import build, inductor_recomputing_elementwise
from fastgpt2.training import train
from tests.trainer.runs import tiny, tiny_on_gpu

CUDA = torch.cuda.is_available()


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"--compile on a CPU needs a C\+\+ compiler, but /no/such/compiler is not"):
        build(tiny(compile=True))


def test_recomputing_elementwise_without_compile_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="--recompute elementwise is done by the compiler: add --compile"):
        tiny(recompute="elementwise")


@pytest.mark.skipif(CUDA, reason="counts what the CPU's kernels store")
def test_recomputing_elementwise_stores_two_thirds_of_a_blocks_activations() -> None:
    """Bytes for each channel of a token in bfloat16.

    24 are stored: x-hat of both norms in float32 (8), q, k, v and o (8), the MLP's four hidden channels (8). Recomputed
    are both norms' outputs and the four channels after GELU (12).
    """
    B, T, C = 2, 64, 128

    def kept(n_layer: int, backend: Any) -> int:
        config = tiny(dtype="bfloat16", compile=True, block_size=T, n_embd=C, n_layer=n_layer)
        run = build(config)
        run.model.compile(dynamic=False, fullgraph=True, backend=backend)
        tokens = torch.zeros(B, T, dtype=torch.int64)
        with run.autocast():
            return saved_bytes(run.model, tokens, tokens)

    weights = 2 * 12 * C * C
    for backend, bytes_a_channel, copies in ((inductor_recomputing_elementwise, 24, 0), ("inductor", 36, weights)):
        each = kept(2, backend) - kept(1, backend)
        # The rest is the attention's log-sum-exps and the norms' statistics.
        assert 0 <= each - (bytes_a_channel * B * T * C + copies) <= 4 * B * T * (2 + 2), (backend, each)


@pytest.mark.numeric
def test_gelu_by_a_sigmoid_is_as_exact_as_by_tanh() -> None:
    """torch_mlp writes it so when it is compiled for a CPU; with unit weights it is GELU alone."""
    C = 64
    one, zero = torch.eye(C), torch.zeros(C)

    def gelu(mlp: Any, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.linspace(-12.0, 12.0, 32 * C + 1)[:-1].view(32, C).to(dtype).requires_grad_()
        assert (x == 0.0).any()
        y = mlp(x, *(parameter.to(dtype) for parameter in (one, zero, one, zero)))
        (grad,) = torch.autograd.grad(y.sum(), x)
        return y.detach().double(), grad.double()

    exact = gelu(torch_mlp, torch.float64)
    for found, plain, right in zip(
        gelu(torch.compile(torch_mlp), torch.float32), gelu(torch_mlp, torch.float32), exact, strict=True
    ):
        assert (found - right).norm() <= 4.0 * (plain - right).norm()


def test_a_process_compiles_any_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """verify compiles one for each backend. dynamo limits how many variants of a function a process compiles."""
    graphs = []

    def eager(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("fastgpt2.run.inductor_recomputing_elementwise", eager)
    # monkeypatch can't restore values of a torch config module.
    with torch._dynamo.config.patch(recompile_limit=1):
        for changes in ({"loss": "torch"}, {"loss": "chunked"}, {"dropout": 0.1}):
            run = build(tiny(compile=True, recompute="elementwise", **changes))
            run.step(0, run.next_tokens(0))
    assert len(graphs) == 3


TRACED = """
import torch
import torch._inductor.lowering as lowering
from torch._subclasses.fake_tensor import FakeTensorMode
from fastgpt2.config import ModelConfig
from fastgpt2.model import GPT
from fastgpt2.ops import Site, make_ops
from fastgpt2.slots import SLOTS

operators = [f"fastgpt2::{name}" for name in (
    "attention_forward", "attention_backward", "gelu_mlp_forward", "gelu_mlp_backward", "layer_norm_forward",
    "layer_norm_backward", "linear_cross_entropy_forward", "embedding_backward",
)]
def known():
    return [name for name in operators if getattr(torch.ops.fastgpt2, name[10:]).default in lowering.lowerings]
ops, _ = make_ops(dict.fromkeys(SLOTS, "triton"))
assert known() == []
with FakeTensorMode():
    model = GPT(ModelConfig(n_layer=1, n_head=1, n_embd=32, block_size=8, vocab_size=64), ops)
    tokens = torch.zeros(1, 8, dtype=torch.int64)
    model(tokens, tokens).backward()
assert known() == operators, known()
"""


def test_inductor_need_not_find_out_that_it_does_not_know_our_operators() -> None:
    """PyTorch 2.11 takes time exponential in the preceding layers to find out: GPT-2 124M never finished compiling."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_a_deep_model_compiles() -> None:
    """As deep as GPT-2 124M, with our operator in every slot. PyTorch 2.11 would not finish compiling it otherwise."""
    slots = dict.fromkeys(("attn", "mlp", "norm", "loss"), "triton")
    train(tiny_on_gpu(n_layer=12, dtype="bfloat16", compile=True, steps=1, **slots))
