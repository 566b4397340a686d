"""LayerNorm as an operator: memory layouts, what is read and written, autograd, autocast, compiling, errors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels import add_layer_norm, launch, layer_norm
from fastgpt2.kernels.norm import (
    MAX_CHANNELS,
    layer_norm_backward,
    layer_norm_forward,
    layer_norm_reference,
    stream_norm,
    why_unsupported,
)
from tests.kernels.cases.norm import (
    assert_same,
    case,
    every_precision,
    fused,
    last,
    ours,
)
from tests.kernels.conftest import Made
from tests.kernels.oracle import DEVICE, Results, assert_equal

# With eps = 0, rows past the last divide by zero; they are not stored.
pytestmark = pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in:RuntimeWarning")


def strided(kind: str, t: Tensor) -> Tensor:
    """The values of a (B, T, C) tensor in another memory layout."""
    match kind:
        case "rows apart":
            return F.pad(t, (0, 3))[..., :-3]
        case "transposed":
            return t.transpose(0, 1).contiguous().transpose(0, 1)
        case "last dimension strided":
            return t.mT.contiguous().mT
        case "batch expanded":
            return t[:1].expand(t.shape)
        case "rows expanded":
            return t[:, :1].expand(t.shape)
        case "a scalar expanded":
            return t.flatten()[0].expand(t.shape)
    raise ValueError(kind)


LAYOUTS = [
    "rows apart", "transposed", "last dimension strided", "batch expanded", "rows expanded", "a scalar expanded"
]  # fmt: skip


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize("names", ["x residual", "dy dtotal", "x", "residual", "dy", "dtotal"])
def test_layouts_change_nothing(names, kind, rows) -> None:
    rows(4)
    c = case((2, 5, 20))
    given = {name: strided(kind, getattr(c, name)) for name in names.split()}
    results = ours(c._replace(**given))
    assert all(r.is_contiguous() for r in results[:2])
    assert_same(results, ours(c._replace(**{name: t.contiguous() for name, t in given.items()})))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("name", "summed"), [("x", False), ("x", True), ("residual", True)])
def test_layouts_of_what_the_norm_keeps_change_nothing(name, summed, kind, rows) -> None:
    """Without a written sum the backward reads x and the residual again."""
    rows(4)
    c = case((2, 5, 20))

    def results(given: Tensor) -> Results:
        here = c._replace(**{name: given})
        leaves = [t.detach().requires_grad_() for t in (here.x, c.weight, c.bias, here.residual)[: 3 + summed]]
        y = layer_norm(*leaves[:3], residual=leaves[3] if summed else None)
        return (y.detach(), *torch.autograd.grad(y, leaves, c.dy))

    given = strided(kind, getattr(c, name))
    assert_same(results(given), results(given.contiguous()))


@every_precision
def test_the_norm_of_a_sum_that_is_not_written_is_the_same(precision, rows) -> None:
    """y and all gradients equal, to the bit, those of add_layer_norm when the gradient of its sum is zero."""
    rows(16)
    c = case((33, 100), precision)
    leaves = c.leaves()
    y = last(*leaves, c.eps, c.dy.dtype)
    want, _, *gradients = ours(c._replace(dtotal=torch.zeros_like(c.dtotal)))
    assert_same((y.detach(), *torch.autograd.grad(y, leaves, c.dy)), (want, *gradients))
    _, empty, _, _ = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype, want_sum=False)
    assert empty.numel() == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
@pytest.mark.parametrize(("shape", "block_m"), [((17, 20), 16), ((33, 32), 8), ((3, 7, 100), 4)], ids=str)
def test_every_element_is_written_and_nothing_beside_it(shape, block_m, precision, rows, made: Made) -> None:
    rows(block_m)
    c = case(shape, precision)
    _, total, mean, rstd = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype)
    dtypes = c.x.dtype, c.residual.dtype
    layer_norm_backward(c.dy, c.dtotal, total, mean, rstd, c.weight, *dtypes, want_branch=True)
    assert len(made) == 7  # y, sum, mean, rstd; dx, dresidual, partial sums
    made.assert_written()


def test_inputs_are_not_read_past_their_ends(rows) -> None:
    """NaN surrounds every input: reading one row or column too many would spread it."""
    rows(16)
    c = case((20, 50))
    framed = {}
    for name in ("x", "residual", "weight", "bias", "dy", "dtotal"):
        t = getattr(c, name)
        frame = torch.full([n + 64 for n in t.shape], math.nan, device=DEVICE)
        inside = frame[tuple(slice(32, 32 + n) for n in t.shape)]
        inside[:] = t
        framed[name] = inside
    assert_same(ours(c._replace(**framed)), ours(c))


def test_repeats_are_bitwise_equal(rows) -> None:
    rows(8)
    c = case((45, 20))
    assert_equal(ours(c), ours(c))


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
def test_gradcheck() -> None:
    c = case((2, 9, 20)).to(torch.float64)
    leaves = [t.requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
    assert torch.autograd.gradcheck(add_layer_norm, leaves, fast_mode=True)
    x, _, weight, bias = leaves
    assert torch.autograd.gradcheck(layer_norm, (x, weight, bias), fast_mode=True)
    assert torch.autograd.gradcheck(lambda *given: last(*given, c.eps, torch.float64), leaves, fast_mode=True)
    c = case((3, 4)).to(torch.float64)
    leaves = [t.requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
    assert torch.autograd.gradcheck(add_layer_norm, leaves)


@pytest.mark.parametrize("used", ["y", "sum"])
def test_a_result_that_is_not_used_has_no_gradient_to_read(used, rows, monkeypatch) -> None:
    """The stream ends at the last norm, and it may be used without the norm."""
    rows(16)
    c = case((9, 20), "bfloat16 autocast")
    read = []
    backward = layer_norm_backward
    monkeypatch.setattr(
        torch.ops.fastgpt2,
        "layer_norm_backward",
        lambda dy, ds, *rest, **how: (read.append(ds), backward(dy, ds, *rest, **how))[1],
    )
    leaves = c.leaves()
    y, total = fused(*leaves, c.eps, c.dy.dtype)
    if used == "y":
        grads = torch.autograd.grad(y, leaves, c.dy)
        zero = c._replace(dtotal=torch.zeros_like(c.dtotal))
        assert_same(grads, ours(zero)[2:])
        assert read[0] is None
    else:
        dx, dresidual, dw, db = torch.autograd.grad(total, leaves, c.dtotal, allow_unused=True)
        assert torch.equal(dx, c.dtotal.to(c.x.dtype)) and torch.equal(dresidual, c.dtotal)
        assert dw is db is None and read == []


def test_gradients_of_x_and_residual_do_not_share_memory_once_accumulated(rows) -> None:
    """Autograd gets one tensor for both; the gradients that it accumulates must not share memory."""
    rows(16)
    c = case((9, 20))
    once = ours(c)
    leaves = [t.detach().clone().requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
    for _ in range(2):
        torch.autograd.backward(fused(*leaves, c.eps, c.dy.dtype), (c.dy, c.dtotal))
    for leaf, grad in zip(leaves, once[2:], strict=True):
        assert leaf.grad is not None and torch.equal(leaf.grad, 2 * grad)
    storages = [leaf.grad.untyped_storage().data_ptr() for leaf in leaves[:2]]
    assert storages[0] != storages[1]


def test_one_tensor_as_both_inputs(rows) -> None:
    rows(16)
    c = case((9, 20))
    c = c._replace(residual=c.x)
    x = c.x.clone().requires_grad_()
    dx = torch.autograd.grad(fused(x, x, c.weight, c.bias, c.eps, c.dy.dtype), x, (c.dy, c.dtotal))[0]
    assert torch.equal(dx, 2 * ours(c)[2])


@pytest.mark.parametrize("kind", ["add", "add, float32 stream", "alone", "last"])
def test_operators_pass_opcheck(kind, rows) -> None:
    rows(4)
    c = case((2, 5, 20), "bfloat16 autocast" if "stream" in kind else "float32")
    residual = None if kind == "alone" else c.residual
    arguments = (c.x, residual, c.weight, c.bias, 1e-5, c.dy.dtype)
    written = kind.startswith("add")
    _, total, mean, rstd = torch.ops.fastgpt2.layer_norm_forward(*arguments, want_sum=written)
    torch.library.opcheck(torch.ops.fastgpt2.layer_norm_forward.default, arguments, {"want_sum": written})
    dtotal, total, again = (c.dtotal, total, None) if written else (None, c.x, residual)
    arguments = (c.dy, dtotal, total, mean, rstd, c.weight, c.x.dtype, None if residual is None else residual.dtype)
    options = {"residual": again, "want_branch": written}
    torch.library.opcheck(torch.ops.fastgpt2.layer_norm_backward.default, arguments, options)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_whole(backend, dynamic, rows) -> None:
    rows(16)
    torch._dynamo.reset()
    c = case((2, 5, 20))

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            y, total = add_layer_norm((2.0 * x).bfloat16(), residual.sin(), weight, bias)
            branch = F.linear(y.sin(), torch.eye(20, device=DEVICE), bias.detach())
            y, total = stream_norm(branch, total, weight, 2.0 * bias, branch_bias=bias)
            return layer_norm(y.float(), weight, bias, residual=total)

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)):
        leaves = c.leaves()
        y = function(*leaves)
        assert y.dtype == torch.bfloat16
        results.append((y, *torch.autograd.grad(y.float().square().sum(), leaves)))
    for eager, compiled in zip(*results, strict=True):
        rtol, atol = (1e-5, 1e-6) if backend == "aot_eager" else (2e-2, 2e-2)
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)


def test_a_stream_added_to_itself_compiles(rows) -> None:
    rows(4)
    torch._dynamo.reset()
    c = case((5, 20))
    results = []
    for function in (add_layer_norm, torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")):
        x = c.x.detach().requires_grad_()
        y, total = function(x, x, c.weight, c.bias)
        results.append((y, total, *torch.autograd.grad((y, total), x, (c.dy, c.dtotal))))
    assert_equal(results[0], results[1])
    want = layer_norm_reference(2 * c.x, None, c.weight, c.bias)[0]
    torch.testing.assert_close(results[0][0], want, rtol=1e-5, atol=1e-5)


def test_autocast_decides_ys_dtype_and_leaves_the_streams_and_the_gradients(rows) -> None:
    rows(16)
    c = case((9, 20), "bfloat16 autocast")
    leaves = c.leaves()
    with torch.autocast(DEVICE, torch.bfloat16):
        y, total = add_layer_norm(*leaves)
        assert layer_norm(c.residual, c.weight, c.bias).dtype == torch.bfloat16
    assert (y.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    torch.autograd.backward((y, total), (c.dy, c.dtotal))
    assert [t.grad.dtype for t in leaves] == [torch.bfloat16, torch.float32, torch.float32, torch.float32]
    y, total = add_layer_norm(*leaves)
    assert (y.dtype, total.dtype) == (torch.float32, torch.float32)


def test_parameters_of_another_dtype(rows) -> None:
    rows(16)
    c = case((9, 20))
    leaves = [c.x, c.residual, c.weight.bfloat16().requires_grad_(), c.bias.half().requires_grad_()]
    y, _ = add_layer_norm(*leaves)
    dw, db = torch.autograd.grad(y, leaves[2:], c.dy)
    assert (dw.dtype, db.dtype) == (torch.bfloat16, torch.float16)
    rounded = c._replace(weight=c.weight.bfloat16().float(), bias=c.bias.half().float())
    single = ours(rounded)
    assert_same((y, dw, db), (single[0], single[4].bfloat16(), single[5].half()))


def test_a_batch_of_nothing(rows) -> None:
    rows(16)
    c = case((0, 4, 20))
    *results, dw, db = ours(c)
    assert [r.shape for r in results] == [(0, 4, 20)] * 4
    assert torch.equal(dw, torch.zeros_like(dw)) and torch.equal(db, torch.zeros_like(db))


def test_second_derivatives_are_an_error(rows) -> None:
    rows(16)
    c = case((3, 20))
    x = c.x.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(layer_norm(x, c.weight, c.bias).sum(), x, create_graph=True)


def test_errors_name_the_argument() -> None:
    c = case((3, 20))
    x, r, w, b = c.x, c.residual, c.weight, c.bias
    wide = torch.zeros(1, MAX_CHANNELS + 1, device=DEVICE)
    for call, message in (
        (lambda: layer_norm(x[0, 0], w, b), r"x must be \(..., C\), got a scalar"),
        (lambda: layer_norm(x.int(), w, b), "got torch.int32"),
        (lambda: layer_norm(x[:, :0], w[:0], b[:0]), "1 to 8192 channels, got 0"),
        (lambda: layer_norm(wide, wide[0], wide[0]), "1 to 8192 channels, got 8193"),
        (lambda: layer_norm(x, w[:19], b), r"weight must have shape \(20,\), x's last dimension, got \(19,\)"),
        (lambda: layer_norm(x, w, b[None]), r"bias must have shape \(20,\), x's last dimension, got \(1, 20\)"),
        (lambda: layer_norm(x, w, b[:1].expand(20)), "bias must be contiguous, got stride 0"),
        (lambda: stream_norm(x, r, w, b, branch_bias=b[:19]), r"branch_bias must have shape \(20,\), .* got \(19,\)"),
        (lambda: layer_norm(x, w, b.int()), r"\(bias\) computes in .* got torch.int32"),
        (lambda: layer_norm(x, w.to("meta"), b), "weight must have x's device"),
        (lambda: layer_norm(x, w, b, eps=-1.0), "eps must not be negative, got -1.0"),
        (lambda: layer_norm(x, w, b, eps=math.nan), "eps must not be negative, got nan"),
        (lambda: add_layer_norm(x, None, w, b), "residual must be a tensor, got None; use layer_norm"),
        (lambda: add_layer_norm(x, r[:2], w, b), r"residual must have x's shape, \(3, 20\), got \(2, 20\)"),
        (lambda: layer_norm(x, w, b, residual=r[:2]), r"residual must have x's shape, \(3, 20\), got \(2, 20\)"),
        (lambda: add_layer_norm(x, r.long(), w, b), r"\(residual\) computes in .* got torch.int64"),
        (lambda: add_layer_norm(x, r.to("meta"), w, b), "residual must have x's device"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_why_unsupported(monkeypatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    assert "TRITON_INTERPRET=1" in str(why_unsupported(cpu, torch.float32, 768))
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    assert why_unsupported(cuda, torch.bfloat16, 768) is None
    assert "float64" in str(why_unsupported(cuda, torch.float64, 768))
    assert "1 to 8192 channels, got 10000" in str(why_unsupported(cuda, torch.float32, 10000))


@pytest.mark.gpu
@every_precision
def test_250_repeats_are_bitwise_equal(precision) -> None:
    c = case((8, 1024, 768), precision)
    first = ours(c)
    for _ in range(250):
        assert_equal(ours(c), first)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    c = case((4, 256, 768), "bfloat16 autocast")
    ours(c)
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours(c)
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = ours(c)
    c.x.mul_(-0.5)
    graph.replay()
    assert_equal(captured, ours(c))


@pytest.mark.gpu
@pytest.mark.xdist_group("fills the card")
def test_offsets_past_32_bits() -> None:
    """The tensors have more than 2^31 elements: the last rows must equal the first."""
    rows, C = 2**31 // 1024 + 64, 1024
    c = case((64, C), "bfloat16")
    x = torch.empty((rows, C), dtype=torch.bfloat16, device="cuda")
    assert x.numel() > 2**31
    x[:64] = x[-64:] = c.x
    x[64:-64] = 1.0
    y, total, mean, rstd = layer_norm_forward(x, x, c.weight, c.bias, c.eps, x.dtype)
    assert torch.equal(y[:64], y[-64:]) and torch.equal(total[:64], total[-64:])
    dx, _, _ = layer_norm_backward(y, total, total, mean, rstd, c.weight, x.dtype, x.dtype)
    assert torch.equal(dx[:64], dx[-64:])
