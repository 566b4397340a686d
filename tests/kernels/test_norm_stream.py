"""The norms of a stream: the gradient of a branch's bias, summed from dx's tiles, and a gradient in bfloat16."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels.norm import BRANCH_CHANNELS, layer_norm_backward, layer_norm_forward, stream_norm
from tests.kernels.cases.norm import Case, assert_same, autocast, case, every_precision
from tests.kernels.oracle import DEVICE, Results


@pytest.mark.parametrize("where", ["inside", "begins", "last", "y unused"])
@every_precision
def test_the_bias_of_a_branch_gets_the_sum_of_its_gradient(precision, where, rows) -> None:
    """As exact as the sum of float64's dx, although dx is rounded. Nothing else changes by a bit.

    A stream of 16 bits is rounded before it is normalised.
    """
    rows(4)
    c = case((2, 5, 20), precision)
    used = {"inside": (0, 1), "y unused": (1,)}.get(where, (0,))

    def results(c: Case, *branch_bias: Tensor) -> Results:
        residual = None if where == "begins" else c.residual
        leaves = [t.detach().requires_grad_() for t in (c.x, c.weight, c.bias, *branch_bias)]
        given = {"branch_bias": leaves[3]} if branch_bias else {}
        with autocast(c.dy.dtype, c.x, c.x if residual is None else residual):
            made = stream_norm(leaves[0], residual, *leaves[1:3], last=where == "last", **given)
        upstream = [(c.dy, c.dtotal)[i].to(made[i].dtype) for i in used]
        zeros = [torch.zeros_like(leaf) for leaf in leaves]
        found = torch.autograd.grad([made[i] for i in used], leaves, upstream, allow_unused=True)
        return tuple(zero if g is None else g for g, zero in zip(found, zeros, strict=True))

    *found, dbranch = results(c, torch.randn(20, device=DEVICE))
    assert_same(tuple(found), results(c))
    stream = c.x if where == "begins" else c.x + c.residual
    exact = c._replace(x=stream, residual=torch.zeros_like(stream)).to(torch.float64)
    want = results(exact)[0].flatten(0, -2).sum(0)
    torch.testing.assert_close(dbranch.double(), want, rtol=1e-5, atol=1e-5)


def test_wide_rows_give_the_bias_of_a_branch_its_gradient(rows) -> None:
    rows(4)
    c = case((5, BRANCH_CHANNELS + 1))
    x, branch_bias = c.x.requires_grad_(), c.bias.clone().requires_grad_()
    y, total = stream_norm(x, c.residual, c.weight, c.bias, branch_bias=branch_bias)
    dx, dbranch = torch.autograd.grad((y, total), (x, branch_bias), (c.dy, c.dtotal))
    torch.testing.assert_close(dbranch, dx.sum(0))


def test_a_frozen_bias_of_a_branch_is_not_summed(rows, monkeypatch) -> None:
    rows(4)
    c = case((5, 20))
    asked = []
    backward = layer_norm_backward
    monkeypatch.setattr(
        torch.ops.fastgpt2,
        "layer_norm_backward",
        lambda *given, want_branch, **how: (asked.append(want_branch), backward(*given, **how))[1],
    )
    y, total = stream_norm(c.x.requires_grad_(), c.residual, c.weight, c.bias, branch_bias=c.bias)
    torch.autograd.backward((y, total), (c.dy, c.dtotal))
    assert asked == [False]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_stream_whose_gradient_is_bfloat16(compiled, rows) -> None:
    """Three norms on a float32 stream, to the bit: what each launcher returns is rounded once and handed on."""
    rows(4)
    torch._dynamo.reset()
    cases = [case((2, 5, 20), "bfloat16 autocast", seed=seed) for seed in range(3)]
    weight, bias, eps, half = cases[0].weight, cases[0].bias, 1e-5, torch.bfloat16
    x0, x1, x2 = cases[0].residual, cases[1].x, cases[2].x

    def norms(x0: Tensor, x1: Tensor, x2: Tensor, stream_gradient: torch.dtype | None = half) -> Results:
        with torch.autocast(DEVICE, half):
            y0, stream = stream_norm(x0, None, weight, bias, stream_gradient=stream_gradient)
            y1, stream = stream_norm(x1, stream, weight, bias, stream_gradient=stream_gradient)
            y2, _ = stream_norm(x2, stream, weight, bias, last=True, stream_gradient=stream_gradient)
        return y0, y1, y2

    function = torch.compile(norms, fullgraph=True, backend="aot_eager") if compiled else norms
    leaves = [x.detach().requires_grad_() for x in (x0, x1, x2)]
    ys = function(*leaves)
    assert_same(tuple(ys), norms(x0, x1, x2, None))
    found = torch.autograd.grad(ys, leaves, [c.dy for c in cases])

    def statistics_of(x: Tensor, residual: Tensor | None) -> tuple[Tensor, ...]:
        return layer_norm_forward(x, residual, weight, bias, eps, half)[1:]

    total, *rest = statistics_of(x1, x0)
    dx2, *_ = layer_norm_backward(
        cases[2].dy, None, x2, *statistics_of(x2, total)[1:], weight, half, half, residual=total
    )
    dx1, *_ = layer_norm_backward(cases[1].dy, dx2, total, *rest, weight, half, half)
    dx0, *_ = layer_norm_backward(cases[0].dy, dx1, x0, *statistics_of(x0, None)[1:], weight, x0.dtype, None)
    assert_same(found, (dx0, dx1, dx2))
