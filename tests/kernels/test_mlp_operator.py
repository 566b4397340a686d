"""The GELU-MLP as an operator: memory layouts, what is read and written, autograd, compiling, tables, errors."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")


from fastgpt2.accuracy import maximum
from fastgpt2.kernels import gelu_mlp, mlp
from fastgpt2.kernels.specs.mlp import KERNELS
from fastgpt2.kernels.tuning import architectures, configurations
from tests.kernels.cases.mlp import NAMES, inputs, ours
from tests.kernels.conftest import Made
from tests.kernels.oracle import DEVICE, Results, assert_equal

# Where exp overflows, GELU's share of z is exactly 0, which is right; numpy warns.
pytestmark = [
    pytest.mark.usefixtures("mlp_tiles"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


@pytest.mark.parametrize("kind", ["(T, B, C)", "padded", "weights transposed", "misaligned"])
def test_strides_change_nothing(kind, way) -> None:
    shape = (6, 24, 64, 32)
    x, w_fc, b_fc, w_proj, b_proj, dy = inputs(shape)
    x, dy = x.view(2, 3, 24), dy.view(2, 3, 32)
    expected = ours(x, w_fc, b_fc, w_proj, b_proj, dy)
    match kind:
        case "(T, B, C)":
            x = x.transpose(0, 1).contiguous().transpose(0, 1)
        case "padded":
            x, w_fc, b_fc = F.pad(x, (0, 3))[..., :-3], F.pad(w_fc, (1, 3))[:, 1:-3], F.pad(b_fc, (2, 2))[2:-2]
        case "weights transposed":
            w_fc, w_proj = w_fc.t().contiguous().t(), w_proj.t().contiguous().t()
        case "misaligned":  # contiguous, but 4 bytes past where a descriptor may begin
            x = F.pad(x.flatten(), (1, 0))[1:].view(x.shape)
            assert x.is_contiguous() and not mlp._descriptors(x.flatten(0, 1))
    for mine, theirs in zip(ours(x, w_fc, b_fc, w_proj, b_proj, dy), expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * maximum(theirs))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "last dimension strided", "broadcast over rows"])
def test_gradients_of_any_layout(kind, way) -> None:
    *tensors, dy = inputs((34, 24, 64, 32))
    match kind:
        case "expanded":
            dy = torch.ones((), device=DEVICE).expand(dy.shape)
        case "transposed":
            dy = dy.t().contiguous().t()
        case "last dimension strided":
            dy = F.pad(dy[..., None], (0, 1))[..., 0]
        case "broadcast over rows":
            dy = dy[:1].expand(dy.shape)
    for mine, theirs in zip(ours(*tensors, dy), ours(*tensors, dy.contiguous()), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * maximum(theirs))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(33, 40, 72, 24), (1, 8, 16, 8), (64, 32, 64, 32)], ids=str)
def test_every_element_is_written_and_nothing_beside_it(shape, keep, way, made: Made) -> None:
    x, w_fc, b_fc, w_proj, b_proj, dy = inputs(shape)
    _, pre = mlp.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, keep, False)
    assert pre.shape == (shape[0] if keep else 0, shape[2])
    if keep:
        mlp.gelu_mlp_backward(dy, x, w_fc, w_proj, pre, False)
    assert len(made) == (5 if keep else 2)  # pre, act; dpre, act, the partial sums
    made.assert_written()


def test_inputs_are_not_read_past_their_ends(way) -> None:
    """NaN surrounds every input: reading one row or column too many would spread it."""
    tensors = inputs((33, 24, 72, 40))
    framed = []
    for x in tensors:
        frame = torch.full((x.numel() + 2 * 8192,), math.nan, device=DEVICE)
        middle = frame[8192 : 8192 + x.numel()].view(x.shape)
        framed.append(middle.copy_(x))
    assert_equal(ours(*framed), ours(*tensors))


def test_repeats_are_bitwise_equal(way) -> None:
    tensors = inputs((45, 32, 72, 32))
    assert_equal(ours(*tensors), ours(*tensors))


def test_without_gradients_the_pre_activation_is_not_kept(way, made: Made) -> None:
    *tensors, _ = inputs((33, 24, 64, 32))
    with torch.no_grad():
        y = gelu_mlp(*(x.requires_grad_() for x in tensors))
    assert [middle.shape for _, middle in made] == [(0, 64), (33, 64)]
    assert torch.equal(y, gelu_mlp(*tensors).detach())
    assert [middle.shape for _, middle in made[2:]] == [(33, 64), (33, 64)]


def test_a_bias_without_gradient_is_not_summed(way, monkeypatch) -> None:
    *tensors, b_proj, dy = inputs((33, 24, 64, 32))
    leaves = [x.requires_grad_() for x in tensors]
    made = []
    backward = mlp.gelu_mlp_backward
    monkeypatch.setattr(
        torch.ops.fastgpt2,
        "gelu_mlp_backward",
        lambda *given, **how: (made.append(backward(*given, **how)), made[-1])[1],
    )
    want = torch.autograd.grad(gelu_mlp(*leaves, b_proj.requires_grad_()), leaves, dy)
    assert_equal(torch.autograd.grad(gelu_mlp(*leaves, b_proj.detach()), leaves, dy), want)
    assert [db_proj.shape for *_, db_proj in made] == [(32,), (0,)]


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
@pytest.mark.parametrize("fast", [True, False])
def test_gradcheck(fast, way) -> None:
    shape = (35, 20, 36, 12) if fast else (2, 2, 2, 2)
    tensors = [x.requires_grad_() for x in inputs(shape, torch.float64)[:-1]]
    assert torch.autograd.gradcheck(gelu_mlp, tensors, fast_mode=fast)


def test_operators_pass_opcheck(way) -> None:
    x, w_fc, b_fc, w_proj, b_proj, dy = inputs((6, 8, 16, 12))
    x, dy = x.view(2, 3, 8), dy.view(2, 3, 12)
    for keep in (True, False):
        forward = (x, w_fc, b_fc, w_proj, b_proj, keep, False)
        torch.library.opcheck(torch.ops.fastgpt2.gelu_mlp_forward.default, forward)
    _, pre = torch.ops.fastgpt2.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, True, False)
    for options in ({}, {"want_db_proj": False}):
        torch.library.opcheck(torch.ops.fastgpt2.gelu_mlp_backward.default, (dy, x, w_fc, w_proj, pre, False), options)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_whole(backend, dynamic) -> None:
    torch._dynamo.reset()
    x, *weights, _ = inputs((34, 16, 64, 16))

    def layer(x: Tensor) -> Tensor:
        return gelu_mlp((2.0 * x).view(2, 17, 16), *weights).sin()

    leaves = [tensor.requires_grad_() for tensor in (x, *weights)]
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    # Inductor has its own elementwise functions, which may round differently.
    rtol, atol = (1e-5, 1e-6) if backend == "aot_eager" else (1e-4, 1e-5)
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=rtol, atol=atol)


def test_autocast_decides_the_dtype(way) -> None:
    *tensors, dy = inputs((34, 24, 64, 32))
    leaves = [x.requires_grad_() for x in tensors]
    with torch.autocast(DEVICE, torch.bfloat16):
        y = gelu_mlp(*leaves)
    assert y.dtype == torch.bfloat16
    gradients = torch.autograd.grad(y, leaves, dy.bfloat16())
    assert [g.dtype for g in gradients] == [torch.float32] * 5
    for mine, theirs in zip((y, *gradients), ours(*(x.bfloat16() for x in (*tensors, dy))), strict=True):
        assert torch.equal(mine.float(), theirs.float())


@pytest.mark.parametrize("asked", range(5), ids=NAMES[1:])
def test_only_what_is_asked_for_has_a_gradient(asked) -> None:
    *tensors, dy = inputs((33, 24, 64, 32))
    tensors[asked].requires_grad_()
    gelu_mlp(*tensors).backward(dy)
    assert [i for i, x in enumerate(tensors) if x.grad is not None] == [asked]
    torch.testing.assert_close(tensors[asked].grad, ours(*tensors, dy)[1 + asked])


def test_a_batch_of_nothing(way) -> None:
    y, dx, dw_fc, db_fc, dw_proj, db_proj = ours(*inputs((0, 16, 32, 24)))
    assert y.shape == (0, 24) and dx.shape == (0, 16)
    assert [maximum(g) for g in (dw_fc, db_fc, dw_proj, db_proj)] == [0.0] * 4


def test_second_derivatives_are_an_error() -> None:
    *tensors, _ = inputs((3, 8, 16, 8))
    x = tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(gelu_mlp(*tensors).sum(), x, create_graph=True)


def test_errors_name_the_argument() -> None:
    x, w_fc, b_fc, w_proj, b_proj, _ = inputs((3, 8, 16, 12))
    for arguments, message in (
        ((x[0, 0], w_fc, b_fc, w_proj, b_proj), r"x must be \(\.\.\., C\), got a scalar"),
        ((x, w_fc.t(), b_fc, w_proj, b_proj), r"w_fc must be \(HIDDEN, 8\), by x's last dimension, got \(8, 16\)"),
        ((x, w_fc[0], b_fc, w_proj, b_proj), r"w_fc must be \(HIDDEN, 8\)"),
        ((x, w_fc, b_fc, w_proj.t(), b_proj), r"w_proj must be \(N, 16\), by w_fc's first dimension, got \(16, 12\)"),
        ((x, w_fc, b_fc[:-1], w_proj, b_proj), r"b_fc must have shape \(16,\), got \(15,\)"),
        ((x, w_fc, b_fc, w_proj, b_fc), r"b_proj must have shape \(12,\), got \(16,\)"),
        ((x, w_fc, b_fc, w_proj[:0], b_proj[:0]), "w_fc and w_proj must not be empty"),
        ((x.int(), w_fc, b_fc, w_proj, b_proj), "got torch.int32"),
        ((x, w_fc.bfloat16(), b_fc, w_proj, b_proj), "w_fc must have x's dtype, torch.float32, got torch.bfloat16"),
        ((x, w_fc, b_fc, w_proj, b_proj.to("meta")), "b_proj must have x's device"),
    ):
        with pytest.raises(ValueError, match=message):
            gelu_mlp(*arguments)


def test_the_callers_allocator_stays() -> None:
    allocation = importlib.import_module("triton.runtime._allocation")
    before = allocation._allocator.get()
    ours(*inputs((3, 8, 16, 8)))
    assert allocation._allocator.get() is before


def test_tables_cover_every_kernel_and_precision() -> None:
    for arch in architectures():
        entries = {(op, p, size) for op, p, size in configurations(arch) if op.startswith("gelu_mlp")}
        ops = [op for op in KERNELS if arch != "sm_80" or not op.endswith("_tma")]
        precisions = ("bfloat16", "float16", "tf32", "float32")
        sizes = {op: (1600,) if op.endswith("_odd") else (768, 1024, 1280, 1600) for op in ops}
        assert entries == {(op, p, C) for op in ops for p in precisions for C in sizes[op]}
    assert {op for op, *_ in configurations("interpreter") if op.startswith("gelu_mlp")} == set(KERNELS)


@pytest.mark.gpu
def test_250_repeats_are_bitwise_equal(way) -> None:
    tensors = inputs((4096, 768, 3072, 768), torch.bfloat16)
    first = ours(*tensors)
    for _ in range(250):
        assert_equal(ours(*tensors), first)


@pytest.mark.gpu
@pytest.mark.xdist_group("fills the card")
def test_offsets_past_32_bits(way) -> None:
    """The hidden activations have more than 2^31 elements: the last rows must equal the first."""
    *tensors, dy = inputs((1024, 768, 3072, 768), torch.bfloat16)
    x = tensors[0].repeat(700, 1).requires_grad_()
    assert x.size(0) * 3072 > 2**31
    y = gelu_mlp(x, *tensors[1:])
    (dx,) = torch.autograd.grad(y, x, dy.repeat(700, 1))
    for rows in (y, dx):
        torch.testing.assert_close(rows[-1024:], rows[:1024], rtol=0, atol=2**-7 * maximum(rows[:1024]))


@pytest.mark.gpu
def test_a_cuda_graph_captures_it(way) -> None:
    *tensors, dy = inputs((512, 768, 3072, 768), torch.bfloat16)
    leaves = [x.requires_grad_() for x in tensors]

    def step() -> Results:
        y = gelu_mlp(*leaves)
        return (y, *torch.autograd.grad(y, leaves, dy))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = [x.detach().clone() for x in step()]
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for x in captured:
        x.detach().zero_()
    graph.replay()
    assert_equal(captured, expected)
