"""Every implementation of every slot follows the float64 reference, and the check that says so rejects faults."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastgpt2 import config, verify
from fastgpt2.accuracy import problems
from fastgpt2.backends.attention import naive_attention, sdpa_attention
from fastgpt2.backends.loss import torch_loss
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.backends.norm import torch_norm
from fastgpt2.fields import field_hints, names
from fastgpt2.ops import Ops
from fastgpt2.settings import TORCH_DTYPE
from fastgpt2.slots import AUTO, SLOTS, implementation
from fastgpt2.verify import STREAMS, Backend, Checks, Gradients, Row, backends, error_row, small_config
from tests import seeds

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
PRECISIONS = ["float32", "tf32", "bfloat16", "float16"] if CUDA else ["float32", "bfloat16"]
BACKENDS = backends()
CUDA_ONLY = {f"{slot} {name}" for slot, table in SLOTS.items() for name, known in table.items() if known.cuda}
HERE = [name for name in BACKENDS if CUDA or name not in CUDA_ONLY]
SINGLE = [name for name in HERE if len(BACKENDS[name].choices) == 1]
TRITON = [
    name for name in HERE if any(implementation(*choice).interpreted for choice in BACKENDS[name].choices.items())
]


@pytest.fixture(scope="module")
def checks() -> Checks:
    return Checks(DEVICE)


@pytest.fixture(scope="module")
def gradients(checks: Checks) -> Gradients:
    return checks.gradients(BACKENDS["plain"])


def skip_unless_supported(name: str, dtype: str) -> None:
    """What PyTorch has no kernel for on a GPU in a precision; ours and the plain forms must run everywhere."""
    try:
        BACKENDS[name].ops(DEVICE, dtype)
    except config.ConfigError as error:
        assert name in CUDA_ONLY
        pytest.skip(str(error))


def check(row: Row) -> None:
    assert row.passed, f"{row.backend} in {row.dtype}: {row.check}: {row.error:.3e} is over {row.budget:.3e}"


def test_sequences_span_three_tiles() -> None:
    """On a CPU the kernel's tiles have 16 rows, on a GPU at most 128."""
    assert int(small_config("cpu").block_size or 0) > 2 * 16
    assert int(small_config("cuda").block_size or 0) > 2 * 128


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", [name for name in HERE if name not in TRITON])
def test_losses_follow_the_reference(checks: Checks, name: str, dtype: str) -> None:
    skip_unless_supported(name, dtype)
    losses = checks.losses(BACKENDS[name])
    assert len(losses.reference) >= 100
    check(losses.check(BACKENDS[name], dtype))


@pytest.mark.parametrize("name", TRITON)
def test_losses_of_the_triton_kernels_follow_the_reference(checks: Checks, name: str) -> None:
    check(checks.losses(BACKENDS[name]).check(BACKENDS[name], "float32"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["tf32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", TRITON)
def test_losses_of_the_triton_kernels_on_the_gpu(checks: Checks, name: str, dtype: str) -> None:
    """float16 fails, too, where the gradient scaler skipped a step."""
    check(checks.losses(BACKENDS[name]).check(BACKENDS[name], dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    # Compiling takes most of the time, and all that float16 adds to it is the scaler.
    [*((name, "bfloat16") for name in BACKENDS), ("plain", "float16"), ("all triton", "float16")],
)
def test_compiled_losses_on_the_gpu(checks: Checks, name: str, dtype: str) -> None:
    skip_unless_supported(name, dtype)
    check(checks.losses(BACKENDS[name]).check(BACKENDS[name], dtype, compile=True))


@pytest.mark.skipif(
    not CUDA and shutil.which(os.environ.get("CXX", "g++")) is None,
    reason="on a CPU torch.compile needs a C++ compiler",
)
@pytest.mark.parametrize("name", ["plain", "attn sdpa", "loss chunked", "all triton"])
def test_compiled_losses_follow_the_reference(name: str) -> None:
    """As one graph. Few steps suffice: what compiling could break is the same in each."""
    check(Checks(DEVICE, steps=3).losses(BACKENDS[name]).check(BACKENDS[name], "float32", compile=True))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", HERE)
def test_gradients_follow_the_reference(checks: Checks, name: str, dtype: str) -> None:
    gradients = checks.gradients(BACKENDS[name])
    assert len(gradients.snapshots) == 10
    skip_unless_supported(name, dtype)
    check(gradients.check(name, BACKENDS[name].ops(DEVICE, dtype), dtype))


@pytest.mark.parametrize("dtype", PRECISIONS)
@pytest.mark.parametrize("name", SINGLE)
def test_errors_are_within_budget(name: str, dtype: str) -> None:
    skip_unless_supported(name, dtype)
    (slot,) = BACKENDS[name].choices
    five = range(seeds.first, seeds.first + 5)
    for form in (form for form, problem in problems(DEVICE).items() if problem.slot == slot):
        check(error_row(name, form, BACKENDS[name].ops(DEVICE, dtype), dtype, DEVICE, five))


# ----------------------------------------------------------------------------------------- planted faults


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


@pytest.mark.parametrize("name", STREAMS)
def test_a_bfloat16_stream_stays_within_its_budget(checks: Checks, name: str) -> None:
    backend = STREAMS[name]
    ops = backend.ops(DEVICE, "bfloat16")
    check(checks.gradients(backend).check(name, ops, "bfloat16", backend.stream))
    check(checks.losses(backend).check(backend, "bfloat16"))


def scaled_gradients(*factors: float) -> Callable[..., Tensor]:
    return lambda qkv, **_: sdpa_attention(_ScaleGradients.apply(qkv, factors))


def scaled_logits(factor: float) -> Callable[..., Tensor]:
    def attention(qkv: Tensor, **_: object) -> Tensor:
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scale = factor / math.sqrt(q.size(-1))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)

    return attention


def sees_the_next_token(qkv: Tensor, **_: object) -> Tensor:
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mask = torch.ones(q.size(-2), q.size(-2), dtype=torch.bool, device=q.device).tril(1)
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)


def detached_bias(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    return torch_mlp(x, w_fc, b_fc - 0.1 * (b_fc - b_fc.detach()), w_proj, b_proj)


def erf_gelu(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, b_proj: Tensor) -> Tensor:
    F = torch.nn.functional
    return F.linear(F.gelu(F.linear(x, w_fc, b_fc)), w_proj, b_proj)


def drops_the_stream(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor, **_: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradient through the normalised value doesn't reach what came before x."""
    y, total = torch_norm(x, residual if residual is None else residual.detach(), weight, bias)
    return y, total if residual is None else x + residual


def loses_some_of_the_stream(x: Tensor, residual: Tensor, *rest: Tensor, last: bool) -> tuple[Tensor, Tensor | None]:
    return torch_norm(x, 0.99 * residual, *rest, last=last)


def predicts_padding(hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int) -> Tensor:
    return torch_loss(hidden, weight, targets, vocab_size=weight.size(0) - 1)


MUTANTS = {
    "zeroed dQ": Ops(attn=scaled_gradients(0, 1, 1)),
    "zeroed dK": Ops(attn=scaled_gradients(1, 0, 1)),
    "doubled dK": Ops(attn=scaled_gradients(1, 2, 1)),
    "halved scale": Ops(attn=scaled_logits(0.5)),
    "mask off by one": Ops(attn=sees_the_next_token),
    "a tenth of a bias gradient lost": Ops(mlp=detached_bias),
    "a residual path lost": Ops(norm=drops_the_stream),
}
FINE = {
    "scale 2% off": Ops(attn=scaled_logits(1.02)),
    "GELU by erf": Ops(mlp=erf_gelu),
}
"""What only float32 can tell from rounding."""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", *(["tf32"] if CUDA else [])])
def test_the_gradient_check_rejects_planted_faults(gradients: Gradients, dtype: str) -> None:
    # float16 runs on a CPU too, here: autocast has it, only the trainer refuses it.
    assert gradients.check("untouched", Ops(attn=scaled_gradients(1, 1, 1)), dtype).passed
    for name, ops in (MUTANTS | (FINE if dtype == "float32" else {})).items():
        row = gradients.check(name, ops, dtype)
        assert row.error > 4 * row.budget, f"{name} in {dtype} would nearly pass: {row.error:.2f} x the yardstick"


def test_a_nan_is_out_of_budget(gradients: Gradients) -> None:
    broken = Ops(attn=lambda qkv, **_: naive_attention(qkv) * float("nan"))
    assert not gradients.check("NaN", broken, "float32").passed
    assert not Row("", "", "", float("nan"), 1.0).passed


def test_the_loss_check_rejects_a_mask_off_by_one(checks: Checks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.backends.attention.sdpa_attention", sees_the_next_token)
    broken = Backend("broken", {"attn": "sdpa"})
    assert not checks.losses(broken).check(broken, "float32").passed


@pytest.mark.parametrize(
    ("form", "op"),
    [
        ("mlp", erf_gelu),
        ("mlp", detached_bias),
        ("norm", drops_the_stream),
        ("last norm", loses_some_of_the_stream),
        ("loss", predicts_padding),
    ],
)
def test_the_error_check_rejects_planted_faults(form: str, op: Callable[..., Tensor]) -> None:
    row = error_row("fault", form, Ops(**{form.split()[-1]: op}), "float32", DEVICE)
    assert row.error > 4 * row.budget, row


def test_every_implementation_of_the_tables_is_checked() -> None:
    hints = field_hints(config.TrainConfig)
    assert [f.name for f in dataclasses.fields(Ops)] == [*SLOTS, "bias_gradients"] and list(SLOTS) == list(AUTO)
    for slot, table in SLOTS.items():
        assert names(hints[slot]) == ("auto", *table)  # the command line's choices
        assert all(f"{slot} {name}" in BACKENDS for name in list(table)[1:])
    assert {d for d in PRECISIONS if d not in TORCH_DTYPE} == set()


@pytest.mark.skipif(CUDA, reason="on a GPU it compiles every backend one after the other: a stage of bench.gpu")
def test_a_check_that_raises_is_a_failed_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def explode(*_: object) -> Row:
        raise RuntimeError("no kernel image")

    def fine() -> Row:
        return Row("fine", "plain", "float32", 0.0, 1.0)

    monkeypatch.setattr(verify, "_each", lambda *_: [("losses", explode), ("fine", fine)])
    rows = verify.verify(DEVICE, steps=1)
    assert {row.passed for row in rows[::2]} == {False} and {row.passed for row in rows[1::2]} == {True}
    assert "losses: raised RuntimeError" in capsys.readouterr().out


def test_verify_refuses_no_steps() -> None:
    with pytest.raises(config.ConfigError, match="--steps must be at least 1, got 0"):
        verify.verify(DEVICE, steps=0)


def test_verify_prints_the_table_and_passes(capsys: pytest.CaptureFixture) -> None:
    """The command, with few steps: the tests above make all of them."""
    assert verify.main(["--device", DEVICE, "--steps", "2"]) == 0
    printed = capsys.readouterr().out
    rows = [line for line in printed.splitlines() if line.endswith(" ok")]
    for name in HERE:
        least = 2 + (len(BACKENDS[name].choices) == 1)
        assert sum(f" {name} " in row for row in rows) >= least * (1 if name in CUDA_ONLY else len(PRECISIONS)), name
    assert "OUT OF BUDGET" not in printed


def test_verify_on_a_cpu_starts_a_process_that_interprets(monkeypatch: pytest.MonkeyPatch) -> None:
    started = mock.Mock(return_value=mock.Mock(returncode=7))
    monkeypatch.setattr(subprocess, "run", started)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert verify.main(["--device", "cpu", "--steps", "2", "--attn", "sdpa"]) == 7
    flags = ["--device", "cpu", "--steps", "2", "--attn", "sdpa"]
    assert started.call_args.args == ([sys.executable, "-m", "fastgpt2.verify", *flags],)
    assert started.call_args.kwargs["env"]["TRITON_INTERPRET"] == "1"
