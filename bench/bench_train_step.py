"""The whole training step, as the trainer runs it: draw the next batch, forward, backward, optimizer.

The ablation: one slot's implementation changed at a time, the others in PyTorch's form; all of ours together; and what
is about the step as a whole (activations recomputed, the step as one CUDA graph). They run under the trainer's
numerics, which ask PyTorch for deterministic algorithms. The peers are the same step with PyTorch's attention held to
one kernel and without that request, which is PyTorch at its fastest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from bench.bench_attention import check_attention
from bench.shapes import CUDA, DEVICE, PEERS, SECONDS, STEP_SHAPES, AttentionShape, Candidate, StepShape
from bench.timing import peak_memory, rates, time_call
from fastgpt2.compare import error_and_budget, problems
from fastgpt2.config import TrainConfig
from fastgpt2.model import FLOPS_PER_TOKEN
from fastgpt2.ops import FLAGS, SLOTS, make_ops
from fastgpt2.run import TORCH_DTYPE, build, numerics, settle
from fastgpt2.train import MFU_FORMULA

PLAIN = {"attention": "sdpa", "mlp": "torch", "norm": "torch", "loss": "torch"}
"""What the ablation changes: PyTorch's forms."""


@dataclass(frozen=True)
class Variant:
    """A step: some slots' implementations, PyTorch's for the others, and settings of the trainer."""

    choices: dict[str, str] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    peer: Candidate | None = None

    def ops(self) -> dict[str, str]:
        return PLAIN | self.choices

    def config(self, shape: StepShape, compiled: bool) -> TrainConfig:
        flags: dict[str, Any] = {FLAGS[slot].removeprefix("--"): name for slot, name in self.ops().items()}
        return TrainConfig(
            model=shape.model,
            n_layer=shape.n_layer,
            batch_size=shape.batch_size,
            dtype=shape.dtype,  # type: ignore[arg-type]
            compile=compiled,
            device=str(DEVICE),
            deterministic=self.choices != {"attention": "cudnn"},
            **flags,
            **self.settings,
        )


_OURS = dict.fromkeys(SLOTS, "triton")
VARIANTS: dict[str, Variant] = {
    "plain": Variant(),
    "all-triton": Variant(_OURS),
    **{
        f"{slot}-{name}": Variant({slot: name})
        for slot, table in SLOTS.items()
        for name in table
        if name != PLAIN[slot]
    },
    "plain-recompute": Variant(settings={"recompute": True}),
    "all-triton-recompute": Variant(_OURS, {"recompute": True}),
    "plain-graph": Variant(settings={"cuda_graph": True}),
    "all-triton-graph": Variant(_OURS, {"cuda_graph": True}),
    **{name: Variant(peer=PEERS[name]) for name in ("sdpa-cudnn", "sdpa-flash")},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "eager"])
@pytest.mark.parametrize("shape", STEP_SHAPES, ids=lambda shape: f"B{shape.batch_size}")
def test_train_step(
    benchmark: Any, record: Callable[[dict[str, Any]], None], shape: StepShape, compiled: bool, name: str
) -> None:
    variant = VARIANTS[name]
    if not CUDA and "triton" in variant.choices.values():
        pytest.skip("Triton on a CPU is interpreted: its time would say nothing about the kernels")
    if not CUDA and variant.settings.get("cuda_graph"):
        pytest.skip("a CUDA graph needs a CUDA GPU")
    candidate = variant.peer or Candidate(variant.ops()["attention"])
    config, _ = settle(variant.config(shape, compiled))
    size, dtype = config.model_config(), TORCH_DTYPE[shape.dtype]
    op = candidate.op(DEVICE, dtype, size.head_dim)
    with candidate.selected():
        check_attention(name, op, AttentionShape(2, size.block_size, size.n_head, size.head_dim, dtype))
        check_slots(variant, dtype)
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
            "slots": variant.ops(),
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


def check_slots(variant: Variant, dtype: torch.dtype) -> None:
    """Fail where an implementation other than the attention's errs more than its budget allows."""
    ops, _ = make_ops(variant.ops(), device=DEVICE, dtype=dtype)
    for slot, problem in problems(DEVICE).items():
        if slot != "attention" and variant.ops()[slot] != PLAIN[slot]:
            table = error_and_budget(getattr(ops, slot), problem, dtype, DEVICE, [0])
            for tensor, (error, budget) in table.items():
                assert error <= budget, f"not timed: {slot} {tensor} is off by {error:.2e}, {budget:.2e} is allowed"
