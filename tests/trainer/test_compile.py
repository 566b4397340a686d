"""--compile: what it needs, what it keeps for the backward pass, how often it compiles."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from fastgpt2.config import ConfigError
from fastgpt2.model import saved_bytes
from fastgpt2.run import build, inductor_recomputing_elementwise
from fastgpt2.training import train
from tests.trainer.runs import tiny, tiny_on_gpu

CUDA = torch.cuda.is_available()


def test_compiling_on_a_cpu_without_a_compiler_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.raises(ConfigError, match=r"--compile on a CPU needs a C\+\+ compiler and /no/such/compiler is not"):
        build(tiny(compile=True))


def test_recomputing_elementwise_without_compile_says_what_to_do() -> None:
    with pytest.raises(ConfigError, match="--recompute elementwise is done by the compiler: add --compile"):
        tiny(recompute="elementwise")


@pytest.mark.skipif(CUDA, reason="counts what the CPU's kernels store")
def test_recomputing_elementwise_stores_two_thirds_of_a_blocks_activations() -> None:
    """In bfloat16, for each channel of a token: x-hat of both norms in float32, q, k, v and o, and the MLP's four
    hidden channels are 24 bytes; both norms' outputs and the four after GELU would be 12 more."""
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
        # The log-sum-exps of the attention and the norms' statistics are the rest.
        assert 0 <= each - (bytes_a_channel * B * T * C + copies) <= 4 * B * T * (2 + 2), (backend, each)


def test_a_process_compiles_any_number_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As verify does, of every backend; each run has code of its own, which dynamo counts."""
    graphs = []

    def eager(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr("fastgpt2.run.inductor_recomputing_elementwise", eager)
    # Not monkeypatch's: what it sets in a module of settings it can't set back.
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
    """With PyTorch 2.11 that took a time exponential in the layers before: a whole GPT-2 was never compiled."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", TRACED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.gpu
def test_a_deep_model_compiles() -> None:
    """Every slot by our operators, as deep as GPT-2 124M, which PyTorch 2.11 would not do in any time unless told."""
    slots = dict.fromkeys(("attn", "mlp", "norm", "loss"), "triton")
    train(tiny_on_gpu(n_layer=12, dtype="bfloat16", compile=True, steps=1, **slots))
