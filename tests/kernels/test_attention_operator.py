"""Flash attention as an operator: memory layouts, what is read and written, autograd, compiling, errors."""

from __future__ import annotations

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")


from fastgpt2.kernels import flash_attention, flash_attention_qkv, launch
from fastgpt2.kernels.attention import attention_backward, attention_forward, why_unsupported
from tests.kernels.cases.attention import bounds, flash, inputs, packed
from tests.kernels.conftest import Made
from tests.kernels.oracle import DEVICE, Results, assert_equal, assert_same
from tests.seeds import generator

# Masked scores may overflow before the mask removes them; numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


TOLERANCE = {"aot_eager": {"rtol": 1e-5, "atol": 1e-6}, "inductor": {"rtol": 1e-4, "atol": 1e-5}}
"""What compiling may change: Inductor has its own elementwise functions, which may round differently."""


SHAPE = (2, 20, 2, 16)


@functools.cache
def usual() -> Results:
    """The results of SHAPE's inputs in the usual layout, in tiles of 16 rows."""
    return flash(*inputs(SHAPE))


def strided(kind: str) -> Results:
    """SHAPE's inputs, with q, k and v in that kind's memory layout."""
    q, k, v, do = inputs(SHAPE)
    match kind:
        case "packed by head":  # (B, T, H, 3, D), as some checkpoints have it
            q, k, v = torch.stack((q, k, v), 3).unbind(3)
        case "(B, H, T, D)":
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        case "(T, B, H, D)":
            q, k, v = (x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
        case "each its own":
            q, k = F.pad(q, (0, 3))[..., :-3], k.transpose(1, 2).contiguous().transpose(1, 2)
    return q, k, v, do


@pytest.mark.parametrize("kind", ["packed by head", "(B, H, T, D)", "(T, B, H, D)", "each its own"])
def test_strides_change_nothing(kind, tiles) -> None:
    tiles(16, 16)
    assert_same(flash(*strided(kind)), usual())


@pytest.mark.parametrize("kind", ["expanded", "transposed", "last dimension strided", "broadcast over heads"])
def test_gradients_of_any_layout(kind, tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs(SHAPE)
    match kind:
        case "expanded":
            do = torch.ones((), device=DEVICE).expand(do.shape)
        case "broadcast over heads":
            do = do[:, :, :1].expand(do.shape)
        case "transposed":
            do = do.transpose(1, 2).contiguous().transpose(1, 2)
        case "last dimension strided":
            do = do.mT.contiguous().mT
    same_values = kind in ("transposed", "last dimension strided")
    assert_same(packed(q, k, v, do), usual() if same_values else packed(q, k, v, do.contiguous()))


def test_packed_and_apart_agree_and_the_packed_gradient_is_one_tensor(tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs(SHAPE)
    qkv = torch.stack((q, k, v), 2).requires_grad_()
    o = flash_attention_qkv(qkv)
    o.backward(do)
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape and qkv.grad.is_contiguous()
    assert_same((o.detach(), *qkv.grad.unbind(2)), usual())


@pytest.mark.parametrize("kind", ["causal", "full", "documents and dropout"])
@pytest.mark.parametrize(("T", "D", "tile"), [(17, 80, (16, 16)), (33, 16, (32, 16)), (20, 32, (16, 64))])
def test_every_element_is_written_and_nothing_beside_it(T, D, tile, kind, tiles, made: Made) -> None:
    tiles(*tile)
    q, k, v, do = inputs((2, T, 3, D))
    options = (kind != "full", 0.25, False)
    if kind == "documents and dropout":
        options = (*options, bounds(T, (1, 5, 16), (7,)), torch.tensor([3], device=DEVICE), 0.5)
    o, lse = attention_forward(q, k, v, *options)
    attention_backward(do, q, k, v, o, lse, *options)
    assert len(made) == 4  # o, lse, dqkv, delta
    made.assert_written()


def test_inputs_are_not_read_past_their_ends(tiles) -> None:
    """NaN surrounds q, k, v and do: reading one row or column too many would spread it."""
    tiles(16, 16)
    q, k, v, do = inputs((1, 20, 1, 80))
    framed = []
    for x in (q, k, v, do):
        frame = torch.full((1, 20 + 64, 1, 80 + 64), math.nan, device=DEVICE)
        frame[:, 32:52, :, 32:112] = x
        framed.append(frame[:, 32:52, :, 32:112])
    assert_same(flash(*framed), flash(q, k, v, do))


def test_repeats_are_bitwise_equal(tiles) -> None:
    tiles(16, 16)
    args = inputs((1, 33, 2, 16))
    assert_equal(flash(*args), flash(*args))


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
@pytest.mark.parametrize("kind", ["causal", "full", "documents and dropout"])
def test_gradcheck(kind) -> None:
    qkv = torch.stack(inputs((1, 19, 2, 16), torch.float64)[:3], 2).requires_grad_()
    options = {"causal": kind != "full"}
    if kind == "documents and dropout":
        options = {"documents": bounds(19, (7, 17)), "dropout_p": 0.3, "seed": torch.tensor([5])}
    assert torch.autograd.gradcheck(lambda x: flash_attention_qkv(x, **options), qkv, fast_mode=True)


@pytest.mark.parametrize("kind", ["plain", "documents and dropout"])
def test_operators_pass_opcheck(kind, tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs((1, 5, 2, 16))
    options = (True, 0.25, False)
    if kind == "documents and dropout":
        options = (*options, bounds(5, (2,)), torch.tensor([5], device=DEVICE), 0.5)
    o, lse = torch.ops.fastgpt2.attention_forward(q, k, v, *options)
    torch.library.opcheck(torch.ops.fastgpt2.attention_forward.default, (q, k, v, *options))
    torch.library.opcheck(torch.ops.fastgpt2.attention_backward.default, (do, q, k, v, o, lse, *options))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_whole(backend, dynamic, tiles) -> None:
    tiles(16, 16)
    torch._dynamo.reset()

    def layer(x: Tensor) -> Tensor:
        return flash_attention_qkv((2.0 * x).unflatten(-1, (3, 2, 16))).flatten(-2).sin()

    x = torch.randn(2, 17, 96, generator=generator()).to(DEVICE).requires_grad_()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend, dynamic=dynamic)):
        y = function(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **TOLERANCE[backend])


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_documents_and_a_seed_compile_whole(backend, tiles) -> None:
    tiles(16, 16)
    torch._dynamo.reset()
    documents, seed = bounds(17, (5,), (9,)), torch.tensor([5], device=DEVICE)

    def layer(x: Tensor, documents: Tensor, seed: Tensor) -> Tensor:
        return flash_attention_qkv((2.0 * x).unflatten(-1, (3, 2, 16)), 0.5, documents, seed=seed).flatten(-2).sin()

    x = torch.randn(2, 17, 96, generator=generator()).to(DEVICE).requires_grad_()
    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend=backend)):
        y = function(x, documents, seed)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, **TOLERANCE[backend])


def test_one_tensor_for_all_three_compiles(tiles) -> None:
    tiles(16, 16)
    torch._dynamo.reset()
    x = inputs((1, 17, 2, 16))[0].requires_grad_()
    compiled = torch.compile(lambda x: flash_attention(x, x, x).square().sum(), fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(x), x)[0] for f in (lambda x: flash_attention(x, x, x).square().sum(), compiled)]
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)


def test_autocast_leaves_integers_alone_and_they_are_refused(tiles) -> None:
    x = torch.zeros(1, 4, 3, 2, 16, dtype=torch.int64, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(ValueError, match=r"got torch\.int64"):
        flash_attention_qkv(x)


def test_autocast_decides_the_dtype(tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs((1, 17, 2, 16))
    qkv = torch.stack((q, k, v), 2).requires_grad_()
    with torch.autocast(DEVICE, torch.bfloat16):
        o = flash_attention_qkv(qkv)
    assert o.dtype == torch.bfloat16
    o.backward(do.bfloat16())
    assert qkv.grad is not None and qkv.grad.dtype == torch.float32
    assert torch.equal(o, flash_attention_qkv(qkv.bfloat16()))


def test_a_batch_of_nothing(tiles) -> None:
    tiles(16, 16)
    assert [x.shape for x in flash(*inputs((0, 4, 2, 16)))] == [(0, 4, 2, 16)] * 4


def test_second_derivatives_are_an_error(tiles) -> None:
    tiles(16, 16)
    qkv = torch.stack(inputs((1, 3, 1, 16))[:3], 2).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(flash_attention_qkv(qkv).sum(), qkv, create_graph=True)


def test_errors_name_the_argument() -> None:
    q, k, v, _ = inputs((1, 4, 2, 16))
    qkv = torch.stack((q, k, v), 2)
    for call, message in (
        (lambda: flash_attention_qkv(q), r"qkv must be \(B, T, 3, H, D\), got shape \(1, 4, 2, 16\)"),
        (lambda: flash_attention_qkv(qkv[:, :0]), "qkv must have at least one token"),
        (lambda: flash_attention_qkv(qkv.transpose(-1, -2)), "head size must be one of"),
        (lambda: flash_attention_qkv(qkv.mT.contiguous().mT), "qkv must be contiguous in its last dimension"),
        (lambda: flash_attention_qkv(qkv.int()), "got torch.int32"),
        (lambda: flash_attention_qkv(qkv, dropout_p=1.0), "at least 0 and less than 1, got 1.0"),
        (lambda: flash_attention_qkv(qkv, 0.1, seed=torch.tensor(3)), r"seed must be \(1,\) torch.int64 on"),
        (lambda: flash_attention_qkv(qkv, documents=bounds(3, ())), r"documents must be \(2, 1, 4\) torch.int32 on"),
        (lambda: flash_attention_qkv(qkv, documents=bounds(4, ()).long()), "documents must be .*, got .*int64"),
        (lambda: flash_attention_qkv(qkv, documents=bounds(4, ()), causal=False), "documents needs causal=True"),
        (lambda: flash_attention_qkv(qkv, scale=0.0), "scale must be positive"),
        (lambda: flash_attention(q[0], k, v), r"q must be \(B, T, H, D\)"),
        (lambda: flash_attention(q, k[:, :2], v), r"k must have q's shape, \(1, 4, 2, 16\), got \(1, 2, 2, 16\)"),
        (lambda: flash_attention(q, k, v.double()), "v must have q's dtype, torch.float32, got torch.float64"),
        (lambda: flash_attention(q, k, v.to("meta")), "v must have q's device"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_why_unsupported(monkeypatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    assert why_unsupported(cpu, torch.float64, 64, 0.0) is None
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    assert "TRITON_INTERPRET=1" in str(why_unsupported(cpu, torch.float32, 64, 0.0))
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    assert why_unsupported(cuda, torch.bfloat16, 64, 0.0) is None
    assert "float64" in str(why_unsupported(cuda, torch.float64, 64, 0.0))
    assert "got 48" in str(why_unsupported(cuda, torch.float32, 48, 0.0))
    assert why_unsupported(cuda, torch.float32, 64, 0.1) is None
    assert "less than 1, got 1.0" in str(why_unsupported(cuda, torch.float32, 64, 1.0))
    monkeypatch.setattr(launch, "capability", lambda _: (7, 5))
    assert "compute capability 8.0" in str(why_unsupported(cuda, torch.float16, 64, 0.0))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["plain", "documents and dropout"])
def test_250_repeats_are_bitwise_equal(kind) -> None:
    args = inputs((4, 1024, 12, 64), torch.bfloat16)
    options = {}
    if kind == "documents and dropout":
        documents = bounds(1024, (), (100, 900), range(0, 1024, 64), (1,))
        options = {"documents": documents, "dropout_p": 0.1, "seed": torch.tensor([7], device=DEVICE)}
    first = packed(*args, **options)
    for _ in range(250):
        assert_equal(packed(*args, **options), first)


@pytest.mark.gpu
@pytest.mark.xdist_group("fills the card")
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
def test_offsets_past_32_bits(documents) -> None:
    """qkv has more than 2^31 elements: the last batch must equal the first."""
    B, T, H, D = 1000, 1024, 12, 64
    qkv = torch.empty((B, T, 3, H, D), dtype=torch.bfloat16, device="cuda")
    assert qkv.numel() > 2**31
    qkv[:] = torch.randn(1, T, 3, H, D, device="cuda").bfloat16()
    spans = bounds(T, (100, 700)).expand(2, B, T) if documents else None
    o = flash_attention_qkv(qkv.requires_grad_(), documents=spans)
    o.backward(o.detach()[:1].expand(o.shape))
    assert qkv.grad is not None
    assert torch.equal(o[0], o[-1]) and torch.equal(qkv.grad[0], qkv.grad[-1])
