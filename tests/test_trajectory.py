"""Every backend follows the float64 reference, and the check that says so rejects planted faults."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from fastgpt2.attention import naive_attention, sdpa_attention
from fastgpt2.verify import TORCH_DTYPE, Gradients, Losses, Row, attention_row, backends, small_config

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PRECISIONS = ["float32", "tf32", "bfloat16", "float16"] if CUDA else ["float32", "bfloat16"]
BACKENDS = ["naive", "sdpa", "triton"]


@pytest.fixture(scope="module")
def losses() -> Losses:
    return Losses(small_config(DEVICE))


@pytest.fixture(scope="module")
def gradients() -> Gradients:
    return Gradients(small_config(DEVICE))


def check(row: Row) -> None:
    assert row.passed, f"{row.backend} in {row.dtype}: {row.check}: {row.error:.3e} is over {row.budget:.3e}"


def test_sequences_span_three_tiles() -> None:
    """On a CPU the kernel's tiles have 16 rows, on a GPU at most 128."""
    assert int(small_config("cpu").block_size or 0) > 2 * 16
    assert int(small_config("cuda").block_size or 0) > 2 * 128


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("attn", ["naive", "sdpa"])
def test_losses_follow_the_reference(losses: Losses, attn: str, dtype: str) -> None:
    assert len(losses.reference) >= 100
    check(losses.check(attn, dtype))


def test_losses_of_the_triton_kernel_follow_the_reference(losses: Losses) -> None:
    check(losses.check("triton", "float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("attn", BACKENDS)
def test_losses_on_the_gpu(losses: Losses, attn: str, dtype: str) -> None:
    """float16 fails, too, where the gradient scaler skipped a step."""
    check(losses.check(attn, dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("attn", BACKENDS)
def test_compiled_losses_on_the_gpu(losses: Losses, attn: str, dtype: str) -> None:
    check(losses.check(attn, dtype, compile=True))


@pytest.mark.skipif(
    not CUDA and shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="on a CPU torch.compile needs a C++ compiler",
)
@pytest.mark.parametrize("attn", BACKENDS)
def test_compiled_losses_follow_the_reference(attn: str) -> None:
    """Few steps suffice: what compiling could break is the same in each."""
    check(Losses(small_config(DEVICE, steps=10)).check(attn, "float32", compile=True))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("attn", BACKENDS)
def test_gradients_follow_the_reference(gradients: Gradients, attn: str, dtype: str) -> None:
    assert len(gradients.snapshots) == 10
    check(gradients.check(attn, backends(DEVICE, dtype)[attn], dtype))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("attn", BACKENDS)
def test_attention_errors_are_within_budget(attn: str, dtype: str) -> None:
    check(attention_row(attn, backends(DEVICE, dtype)[attn], dtype, DEVICE))


class _ScaleGradients(torch.autograd.Function):
    """The identity, whose gradient for q, k and v is multiplied by a factor each: a planted fault."""

    @staticmethod
    def forward(ctx, qkv: Tensor, factors: tuple[float, float, float]) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.factors = factors
        return qkv.view_as(qkv)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        factors = torch.tensor(ctx.factors, dtype=gradient.dtype, device=gradient.device)
        return gradient * factors[:, None, None], None


def scaled_gradients(*factors: float) -> Callable[..., Tensor]:
    return lambda qkv, dropout_p=0.0: sdpa_attention(_ScaleGradients.apply(qkv, factors))


def scaled_logits(factor: float) -> Callable[..., Tensor]:
    def attention(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = factor / math.sqrt(q.size(-1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    return attention


def sees_the_next_token(qkv: Tensor, dropout_p: float = 0.0) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool, device=q.device).tril(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


MUTANTS = {
    "zeroed dQ": scaled_gradients(0, 1, 1),
    "zeroed dK": scaled_gradients(1, 0, 1),
    "doubled dK": scaled_gradients(1, 2, 1),
    "halved scale": scaled_logits(0.5),
    "mask off by one": sees_the_next_token,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *(["tf32"] if CUDA else [])])
def test_the_gradient_check_rejects_planted_faults(gradients: Gradients, dtype: str) -> None:
    # float16 runs on a CPU too, here: autocast has it, only the trainer refuses it.
    assert gradients.check("untouched", scaled_gradients(1, 1, 1), dtype).passed
    for name, attention in MUTANTS.items():
        row = gradients.check(name, attention, dtype)
        assert row.error > 4 * row.budget, f"{name} in {dtype} would nearly pass: {row.error:.2f} x the yardstick"


def test_the_gradient_check_rejects_a_scale_two_percent_off_in_float32(gradients: Gradients) -> None:
    row = gradients.check("scale 2% off", scaled_logits(1.02), "float32")
    assert row.error > 4 * row.budget, row


def test_a_nan_is_out_of_budget(gradients: Gradients) -> None:
    assert not gradients.check("NaN", lambda qkv, dropout_p=0.0: naive_attention(qkv) * float("nan"), "float32").passed
    assert not Row("", "", "", float("nan"), 1.0).passed


def test_the_loss_check_rejects_a_mask_off_by_one(losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.attention.sdpa_attention", sees_the_next_token)
    assert not losses.check("sdpa", "float32").passed


def test_every_backend_of_the_table_is_checked() -> None:
    from fastgpt2.config import Attention
    from fastgpt2.ops import ATTENTION

    assert list(ATTENTION) == BACKENDS
    assert get_args(Attention) == ("auto", *ATTENTION)  # the command line's choices
    assert {d for d in PRECISIONS if d not in TORCH_DTYPE} == set()


def test_verify_prints_the_table_and_passes() -> None:
    """The command, with few steps; it starts an interpreter process of its own where CUDA is missing."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "fastgpt2.verify", "--steps", "10"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in done.stdout.splitlines() if line.endswith(" ok")]
    for backend in BACKENDS:
        assert sum(f" {backend} " in row for row in rows) >= 3 * len(PRECISIONS), done.stdout
    assert "OUT OF BUDGET" not in done.stdout
