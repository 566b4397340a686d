"""The whole training step, as the trainer runs it: draw the next batch, forward, backward, optimizer.

The backends run under the trainer's numerics, which ask PyTorch for deterministic algorithms. The peers are the same
step with PyTorch's attention held to one kernel and without that request, which is PyTorch at its fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.bench_attention import check_attention
from bench.shapes import DEVICE, OURS, PEERS, SECONDS, STEP_SHAPES, AttentionShape, StepShape
from bench.timing import peak_memory, rates, time_call
from fastgpt2.config import TrainConfig
from fastgpt2.model import FLOPS_PER_TOKEN
from fastgpt2.run import TORCH_DTYPE, build, numerics, settle
from fastgpt2.train import MFU_FORMULA

CANDIDATES = {**OURS, **{name: PEERS[name] for name in ("sdpa-cudnn", "sdpa-flash")}}


@pytest.mark.parametrize("name", CANDIDATES)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=lambda shape: f"B{shape.batch_size}")
def test_train_step(
    benchmark: Any, record: Callable[[dict[str, Any]], None], shape: StepShape, compiled: bool, name: str
) -> None:
    candidate = CANDIDATES[name]
    config, _ = settle(
        TrainConfig(
            model=shape.model,
            n_layer=shape.n_layer,
            batch_size=shape.batch_size,
            dtype=shape.dtype,  # type: ignore[arg-type]
            attn=candidate.attention,  # type: ignore[arg-type]
            compile=compiled,
            device=str(DEVICE),
        )
    )
    size, dtype = config.model_config(), TORCH_DTYPE[shape.dtype]
    op = candidate.op(DEVICE, dtype, size.head_dim)
    with candidate.selected():
        check_attention(name, op, AttentionShape(2, size.block_size, size.n_head, size.head_dim, dtype))
        with numerics(config):
            if candidate.peer:
                torch.use_deterministic_algorithms(False)
            run = build(config)
            tokens = [run.next_tokens(0)]
            losses: list[torch.Tensor] = []

            def step(i: int) -> None:
                loss, _ = run.step(i, tokens[0])
                tokens[0] = run.next_tokens(i + 1)
                losses[:] = [loss]

            benchmark.group = f"training step, {shape.model}"
            timing = time_call(benchmark, step, DEVICE, seconds=2 * SECONDS)
            memory = peak_memory(lambda: step(0), DEVICE)
            deterministic = torch.are_deterministic_algorithms_enabled()
    assert torch.isfinite(losses[0]), f"the loss of a timed step is {losses[0].item()}"
    tokens_a_step = shape.batch_size * size.block_size
    record(
        {
            "op": "training step",
            "backend": name,
            "compiled": compiled,
            "dtype": shape.dtype,
            "shape": {"model": shape.model, "n_layer": size.n_layer, "B": shape.batch_size, "T": size.block_size},
            "deterministic": deterministic,
            **timing,
            **rates(
                timing,
                tokens=tokens_a_step,
                flops=tokens_a_step * FLOPS_PER_TOKEN[MFU_FORMULA](size),
                formula=f"{MFU_FORMULA}, forward and backward",
                dtype=shape.dtype,
                device=DEVICE,
            ),
            **memory,
        }
    )
