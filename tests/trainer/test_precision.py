"""The precision of a step: autocast, torch's global settings, and float16 with its gradient scaler."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from fastgpt2.run import Run, build, numerics
from fastgpt2.training import train
from tests.trainer.runs import Watch, tiny


def test_bfloat16_is_autocast_over_float32_weights() -> None:
    run = build(tiny(dtype="bfloat16"))
    seen: list[torch.dtype] = []
    run.model.h[0].attn.c_attn.register_forward_hook(lambda m, i, output: seen.append(output.dtype))
    streams: list[torch.dtype] = []
    for block in run.model.h:
        block.register_forward_hook(lambda m, i, output: streams.append(output[1].dtype))
    loss, _ = run.step(0, run.next_tokens(0))
    assert seen == [torch.bfloat16]
    assert streams == [torch.float32] * 2
    assert loss.dtype == torch.float32
    assert {p.dtype for p in run.parameters} == {torch.float32}
    assert {s["exp_avg"].dtype for s in run.state.optimizer.state.values()} == {torch.float32}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_stream_with_a_bfloat16_gradient_has_the_same_forward(compiled: bool) -> None:
    """And other gradients, as near as bfloat16's rounding of each sum."""
    pytest.importorskip("triton", reason="Triton is published for Linux")
    runs = [build(tiny(dtype="bfloat16", norm="triton", stream=stream)) for stream in ("full", "bfloat16-gradient")]
    torch.compiler.reset()
    losses, gradients = [], []
    for run in runs:
        if compiled:
            run.model.compile(backend="aot_eager", fullgraph=True, dynamic=False)
        tokens = run.next_tokens(0)[0]
        with run.autocast():
            losses.append(run.model(tokens[:, :-1], tokens[:, 1:]))
        losses[-1].backward()
        gradients.append([p.grad for p in run.parameters])
    assert torch.equal(*losses)
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(*reversed(gradients), strict=True)]
    assert 1e-4 < max(errors) < 0.02, errors


@pytest.mark.parametrize("norm", ["torch", "triton"])
def test_a_bfloat16_stream(norm: str) -> None:
    if norm == "triton":
        pytest.importorskip("triton", reason="Triton is published for Linux")
    run = build(tiny(dtype="bfloat16", norm=norm, stream="bfloat16"))
    streams: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: object, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        output[1].register_hook(streams.append)
        streams.append(output[1].detach())

    for block in run.model.h:
        block.register_forward_hook(keep)
    loss, _ = run.step(0, run.next_tokens(0))
    assert loss.isfinite() and {stream.dtype for stream in streams} == {torch.bfloat16} and len(streams) == 4


def test_validation_computes_in_the_runs_precision() -> None:
    seen: list[tuple[bool, torch.dtype]] = []

    class Hook(Watch):
        def started(self, run: Run) -> None:
            product = run.model.h[0].attn.c_attn
            product.register_forward_hook(lambda module, i, output: seen.append((module.training, output.dtype)))

    train(tiny(dtype="bfloat16", steps=1, eval_every=1, eval_sequences=3), reporters=[Hook()])
    assert seen == [(True, torch.bfloat16), (False, torch.bfloat16)]


def set_numerics(precision: str, deterministic: bool, warn_only: bool, fill: bool) -> None:
    torch.set_float32_matmul_precision(precision)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def get_numerics() -> tuple[str, bool, bool, bool]:
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(("dtype", "precision"), [("float32", "highest"), ("bfloat16", "highest"), ("tf32", "high")])
def test_numerics_are_those_asked_for_and_put_back(dtype: str, precision: str, deterministic: bool) -> None:
    original = get_numerics()
    try:
        for before in (("medium", not deterministic, False, True), ("high", True, True, False)):
            set_numerics(*before)
            with pytest.raises(KeyboardInterrupt), numerics(tiny(dtype=dtype, deterministic=deterministic)):
                assert get_numerics() == (precision, deterministic, False, False)
                raise KeyboardInterrupt
            assert get_numerics() == before
    finally:
        set_numerics(*original)


@pytest.mark.parametrize("users", [None, ":16:8"])
def test_cublas_is_told_to_be_deterministic_before_anything_is_computed(users: str | None) -> None:
    """PyTorch reads the variable at the first matmul; if unset, it refuses deterministic matmuls from then on."""
    environment = {name: value for name, value in os.environ.items() if name != "CUBLAS_WORKSPACE_CONFIG"}
    environment |= {} if users is None else {"CUBLAS_WORKSPACE_CONFIG": users}
    code = "import fastgpt2, os; print(os.environ['CUBLAS_WORKSPACE_CONFIG'])"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (users or ":4096:8")


# -------------------------------------------------------------------------------------------------------------- float16


class Overflow(Watch):
    """Makes a gradient infinite in step `at`, counted from 1 in this process; keeps each step's scale and weights."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.scales, self.weights = at, [], []  # type: ignore[var-annotated]

    def started(self, run: Run) -> None:
        super().started(run)
        self.bias = run.parameters[-1]
        self.bias.register_hook(lambda gradient: gradient * (math.inf if len(self.scales) + 1 == self.at else 1.0))

    def stepped(self, done: int) -> None:
        self.scales.append(self.run.state.scaler.get_scale())
        self.weights.append(self.bias.detach().clone())


@pytest.mark.usefixtures("everything_on_a_cpu")
@pytest.mark.parametrize(
    ("dtype", "products", "scale"),
    [
        ("float64", torch.float64, 1.0),
        ("float32", torch.float32, 1.0),
        ("bfloat16", torch.bfloat16, 1.0),
        ("float16", torch.float16, 2.0**16),
    ],
)
def test_products_have_the_precision_asked_for_and_float16_alone_is_scaled(
    dtype: str, products: torch.dtype, scale: float
) -> None:
    run = build(tiny(dtype=dtype))
    with run.autocast():
        assert run.model.h[0].attn.c_attn(run.model.wte.weight).dtype == products
    assert run.state.scaler.get_scale() == scale


@pytest.mark.usefixtures("everything_on_a_cpu")
@pytest.mark.parametrize("grad_clip", [0.0, 0.05])
def test_the_norm_and_the_gradients_of_float16_are_those_without_a_scale(grad_clip: float) -> None:
    norms = []
    for dtype in ("float32", "float16"):
        run = build(tiny(dtype=dtype, grad_clip=grad_clip))
        _, norm = run.step(0, run.next_tokens(0), want_norm=True)
        assert norm is not None
        norms.append((norm.item(), run._norm().item()))
    assert norms[1] == pytest.approx(norms[0], rel=1e-2)


@pytest.mark.usefixtures("everything_on_a_cpu")
@pytest.mark.parametrize("grad_clip", [0.0, 1.0])
def test_a_float16_step_that_overflows_is_skipped_and_counted_and_halves_the_scale(grad_clip: float) -> None:
    watch = Overflow(at=2)
    result = train(tiny(dtype="float16", grad_clip=grad_clip), reporters=[watch])
    assert watch.scales == [2.0**16] + 5 * [2.0**15]
    assert [torch.equal(a, b) for a, b in pairwise(watch.weights)] == [True] + 4 * [False]
    assert result.skipped_steps == 1


@pytest.mark.usefixtures("everything_on_a_cpu")
def test_a_resumed_float16_run_goes_on_with_its_scaler(tmp_path: Path) -> None:
    pytest.importorskip("safetensors", reason="checkpoints need safetensors")
    config, whole, rest = tiny(dtype="float16", save_every=100), Overflow(at=2), Overflow(at=0)
    uncut = train(dataclasses.replace(config, out=tmp_path / "whole"), reporters=[whole])
    train(dataclasses.replace(config, out=tmp_path / "cut", steps=3), reporters=[Overflow(at=2)])
    result = train(dataclasses.replace(config, out=tmp_path / "cut", resume=True), reporters=[rest])
    assert rest.run.state.scaler.state_dict() == whole.run.state.scaler.state_dict()
    assert result.losses == uncut.losses[3:]
    assert result.skipped_steps == uncut.skipped_steps == 1
