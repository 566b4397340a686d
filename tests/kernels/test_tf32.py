"""What `--dtype tf32` reaches: every product of every kernel, in the forward and in the backward."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2 import TrainConfig, run, train
from fastgpt2.parallel import Ranks
from fastgpt2.verify import Backend

PRODUCTS = {
    "fastgpt2.kernels.attention_device": {"_attend", "_gather_dq", "_gather_dkdv"},
    "fastgpt2.kernels.mlp_device": {"gelu_mlp_forward_kernel", "gelu_mlp_backward_kernel"},
}
"""The functions that multiply, by module."""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the compiler doesn't look helpers up when a kernel runs")
@pytest.mark.parametrize(("dtype", "products"), [("tf32", ("tf32", "high")), ("float32", ("ieee", "highest"))])
def test_every_product_is_in_the_runs_precision(dtype, products, monkeypatch) -> None:
    """Triton's as they are told, PyTorch's by its global setting; a CPU is taken for a GPU that has tf32."""
    seen = set()
    for name in PRODUCTS:
        module = importlib.import_module(name)

        def dot(a: Any, b: Any, accumulator: Any, precision: Any, multiply: Any = module.dot) -> Any:
            caller = sys._getframe(1).f_code.co_name
            seen.add((caller, getattr(precision, "value", precision), torch.get_float32_matmul_precision()))
            return multiply(a, b, accumulator, precision)

        monkeypatch.setattr(module, "dot", dot)
    settle = run.settle

    def settle_without_a_gpu(config: TrainConfig, ranks: Ranks) -> tuple[TrainConfig, torch.device]:
        settled, device = settle(dataclasses.replace(config, dtype="float32"), ranks)
        return dataclasses.replace(settled, dtype=config.dtype), device

    monkeypatch.setattr(run, "settle", settle_without_a_gpu)
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 16, "block_size": 16, "vocab_size": 16, "batch_size": 1, "steps": 1}
    train(TrainConfig(**shape, device="cpu", dtype=dtype, attn="triton", mlp="triton"))
    assert seen == {(function, *products) for functions in PRODUCTS.values() for function in functions}


@pytest.mark.parametrize("dtype", ["tf32", "float32"])
def test_verify_tells_the_kernels(dtype) -> None:
    ops = Backend("ours", {"attn": "triton", "mlp": "triton"}).ops("cpu", dtype)
    assert ops.attn.keywords == ops.mlp.keywords == {"allow_tf32": dtype == "tf32"}
