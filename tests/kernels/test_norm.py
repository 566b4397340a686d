"""LayerNorm against a float64 reference, within twice what PyTorch itself loses in the same precision.

Without a GPU the kernels run in Triton's interpreter, two programs with small tiles, so that a few rows make sums
of several. With one, the same tests run there with the shipped tiles, and those marked gpu add the full sizes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.accuracy import maximum, named, pooled
from fastgpt2.kernels import norm as module
from fastgpt2.kernels.norm import MAX_CHANNELS, layer_norm_backward, layer_norm_forward
from fastgpt2.kernels.specs.norm import KERNELS
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configuration, configurations
from tests.kernels.cases.norm import (
    NAMES,
    ORACLE,
    Case,
    Compute,
    Norm,
    case,
    differentiate,
    every_precision,
    exact,
    fused,
    ours,
    ours_alone,
    plain,
)
from tests.kernels.oracle import DEVICE, Results

# With eps = 0, rows past the last divide by zero; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in:RuntimeWarning")


@pytest.mark.parametrize("compute", [ours, ours_alone], ids=["add", "alone"])
@pytest.mark.parametrize("C", [768, 1600])
@pytest.mark.parametrize("R", [1, 77, 289])
def test_every_number_of_rows(R, C, compute, rows) -> None:
    rows(32)
    ORACLE.assert_right(compute, lambda seed: (case((R, C), seed=seed),))


@pytest.mark.parametrize("shape", [(5, 1), (3, 2), (2, 3, 20), (1,), (20,), (2, 1, 3, 33), (3, MAX_CHANNELS)], ids=str)
def test_every_shape(shape, rows) -> None:
    rows(4)
    ORACLE.assert_right(ours, lambda seed: (case(shape, seed=seed),))


@pytest.mark.numeric
@pytest.mark.parametrize("compute", [ours, ours_alone], ids=["add", "alone"])
@every_precision
def test_every_precision(precision, compute, rows) -> None:
    rows(16)
    ORACLE.assert_right(compute, lambda seed: (case((70, 100), precision, seed=seed),))


@pytest.mark.numeric
@every_precision
def test_rows_far_from_zero(precision, rows) -> None:
    """The variance is a thousandth of the squared mean, or a millionth in float32."""
    rows(16)
    mean = 1000.0 if precision == "float32" else 30.0
    ORACLE.assert_right(ours, lambda seed: (case((33, 64), precision, seed=seed, mean=mean),))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_sum_of_16_bits_is_rounded_before_it_is_normalised(precision, rows) -> None:
    """As in PyTorch's plain form, forward and backward: each result is that of the rounded sum, rounded once."""
    rows(16)
    c = case((33, 100), precision)
    total = c.x + c.residual
    truth = exact(c._replace(x=total, residual=torch.zeros_like(total)))
    results = ours(c)
    assert torch.equal(results[1], total)
    for name, result, want in zip(NAMES, results, truth, strict=True):
        half_a_place = torch.finfo(result.dtype).eps / 2
        allowed = 1.01 * half_a_place * want.abs() + 1e-6 * maximum(want)
        assert ((result.double() - want).abs() <= allowed).all(), name


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_eps(eps, rows) -> None:
    rows(16)
    ORACLE.assert_right(ours, lambda seed: (case((9, 20), seed=seed, eps=eps),))


def test_a_constant_row_is_the_bias(rows) -> None:
    rows(4)
    c = case((3, 32))
    y, _, dx, *_ = ours(c._replace(x=torch.full_like(c.x, 2.5), residual=torch.full_like(c.x, -1.0)))
    assert torch.equal(y, c.bias.expand(y.shape))
    assert dx.isfinite().all()


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("C", [100, 768, 1280])
def test_shipped_tiles(arch, C, monkeypatch) -> None:
    """A GPU's own tiles, interpreted."""
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "lookup", lambda op, *_: configuration(arch, op, "bfloat16", C))
    ORACLE.assert_right(ours, lambda seed: (case((11, C), seed=seed),))


@pytest.mark.parametrize("arch", architectures())
def test_tables_cover_every_kernel_and_precision(arch) -> None:
    entries = [key for key in configurations(arch) if key[0].startswith("layer_norm")]
    sizes = (256, 768, 1024, 1280, 1600, 2048, 4096, MAX_CHANNELS)
    precisions = ("bfloat16", "float16", "float32")
    assert sorted(entries) == sorted((op, p, C) for op in KERNELS for p in precisions for C in sizes)


def faults() -> dict[str, tuple[str, float, Compute]]:
    """Faults planted in a correct computation: (precision, mean of the rows, computation)."""

    def backward(change: Callable[..., tuple]) -> Compute:
        def compute(c: Case) -> Results:
            y, total, mean, rstd = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype)
            dy, dtotal, mean, rstd = change(c.dy, c.dtotal, mean, rstd)
            dx, _, sums = layer_norm_backward(dy, dtotal, total, mean, rstd, c.weight, c.x.dtype, c.residual.dtype)
            return y, total, dx, dx, sums[0], sums[1]

        return compute

    def forward(variance: Callable[[Tensor], Tensor]) -> Compute:
        def norm(x, residual, weight, bias, eps, dtype) -> tuple[Tensor, Tensor]:
            total = x + residual
            n = (total - total.mean(-1, keepdim=True)) * (variance(total) + eps).rsqrt()
            return (weight * n + bias).to(dtype), total

        return functools.partial(differentiate, norm)

    def change(**results: Callable[[Tensor], Tensor]) -> Compute:
        return lambda c: tuple(results.get(n, lambda t: t)(t) for n, t in zip(NAMES, ours(c), strict=True))

    def rows_missing_from_dw(c: Case) -> Results:
        first = Case(c.x[:16], c.residual[:16], c.weight, c.bias, c.dy[:16], c.dtotal[:16], c.eps)
        return (*ours(c)[:4], *ours(first)[4:])

    def last_row_lost(t: Tensor) -> Tensor:
        return torch.cat((t[:-1], t[-2:-1]))

    return {
        "nothing": ("float32", 0.0, backward(lambda *args: args)),
        "the stream's gradient forgotten": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, None, m, r))),
        "the stream's gradient twice": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, 2 * ds, m, r))),
        "mean forgotten": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, ds, 0 * m, r))),
        "rstd 0.01% off": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, ds, m, 1.0001 * r))),
        "E[s^2] - mean^2": (
            "float32",
            1000.0,
            forward(lambda s: s.square().mean(-1, True) - s.mean(-1, True).square()),
        ),
        "variance over C - 1": ("float32", 0.0, forward(lambda s: s.var(-1, keepdim=True))),
        "padding counted": ("float32", 0.0, forward(lambda s: s.var(-1, keepdim=True, correction=0) * 100 / 128)),
        "eps ten times": ("float32", 0.0, lambda c: ours(c._replace(eps=10 * c.eps))),
        "eps forgotten": ("float32", 0.0, lambda c: ours(c._replace(eps=0.0))),
        "rows missing from dw": ("float32", 0.0, rows_missing_from_dw),
        "last row lost": ("float32", 0.0, change(y=last_row_lost)),
        "last row's gradient lost": ("bfloat16", 0.0, change(dx=last_row_lost)),
        "the stream in bfloat16": ("bfloat16 autocast", 0.0, change(sum=lambda t: t.bfloat16().float())),
        "its gradient in bfloat16": ("bfloat16 autocast", 0.0, change(dresidual=lambda t: t.bfloat16().float())),
        "dw through bfloat16": ("bfloat16 autocast", 0.0, change(dw=lambda t: t.bfloat16().float())),
        "db through float16": ("float16 autocast", 0.0, change(db=lambda t: t.half().float())),
        "dw and db swapped": ("bfloat16", 0.0, lambda c: (*(r := ours(c))[:4], r[5], r[4])),
        "y of the norm before": ("bfloat16", 0.0, lambda c: ours(c._replace(residual=0 * c.residual))),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_found(fault, rows) -> None:
    rows(16)
    precision, mean, compute = faults()[fault]
    check = ORACLE.assert_right if fault == "nothing" else ORACLE.assert_wrong
    check(compute, lambda seed: (case((40, 100), precision, seed=seed, mean=mean),))


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_any_number_of_programs(programs) -> None:
    """There are fewer tiles than 7."""
    config = LaunchConfig(8)

    def compute(c: Case) -> Results:
        y, total, mean, rstd = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype, config)
        dx, _, sums = layer_norm_backward(
            c.dy, c.dtotal, total, mean, rstd, c.weight, c.x.dtype, c.residual.dtype, config, programs
        )
        return y, total, dx, dx, *sums

    ORACLE.assert_right(compute, lambda seed: (case((41, 20), seed=seed),))


def test_a_chain_of_norms_on_one_stream(rows) -> None:
    """Three blocks in float32: the gradient of the stream comes from every later norm."""
    rows(16)

    def stream(norm: Norm, dtype: torch.dtype) -> Callable[[int], Results]:
        def gradients(seed: int) -> Results:
            c, *branches = (case((2, 5, 32), seed=4 * seed + i).to(dtype) for i in range(4))
            leaves = [t.requires_grad_() for t in (c.residual, c.weight, c.bias, *(branch.x for branch in branches))]
            total, weight, bias, *xs = leaves
            y: Tensor | float = 0.0
            for x in xs:
                y, total = norm(x + y, total, weight, bias, c.eps, dtype)
            return torch.autograd.grad((y * c.dy).sum(), leaves)

        return gradients

    names = ("dstream", "dw", "db", "dx0", "dx1", "dx2")
    forms = ((fused, torch.float32), (plain, torch.float32), (plain, torch.float64))
    mine, peer, truth = (named(names, stream(*form)) for form in forms)
    assert max(pooled(lambda seed: (seed,), mine, [peer], truth).excess().values()) <= 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600, MAX_CHANNELS, 20, 33])
@every_precision
def test_full_sizes(precision, C) -> None:
    # Fewer rows at 8192 channels: the float64 reference would take gigabytes in each parallel test.
    for R in (1, 77, 289, 1025 if C == MAX_CHANNELS else 8 * 1024 + 1):
        ORACLE.assert_right(ours, lambda seed, R=R: (case((R, C), precision, seed=seed),))
