"""The gradient of qkv's bias, summed by attention's backward from its own tiles, against a float64 reference."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels import attention, flash_attention_qkv
from fastgpt2.kernels.attention import attention_backward, attention_forward
from fastgpt2.kernels.dropout import dropout_mask
from fastgpt2.kernels.tuning import configurations
from tests.kernels.cases.attention import bounds, exact, inputs, naive, sdpa
from tests.kernels.conftest import Made
from tests.kernels.oracle import DEVICE, DTYPES, Oracle, Results, assert_equal, differentiate
from tests.seeds import generator

# Masked scores may overflow before the mask removes them; numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


def biased(q: Tensor, k: Tensor, v: Tensor, do: Tensor, dtype: torch.dtype = torch.float32, **options) -> Results:
    """(o, dqkv, dbias) of ours."""
    qkv = torch.stack((q, k, v), 2)
    bias = torch.zeros(qkv[0, 0].numel(), dtype=dtype, device=DEVICE)
    return differentiate(lambda qkv, bias: flash_attention_qkv(qkv, bias=bias, **options), (qkv, bias), (do,))


def ours(*tensors: Tensor, **options) -> Results:
    """The sums of dq and dv; the sum of dk is 0 to the bit."""
    dq, dk, dv = biased(*tensors, **options)[2].chunk(3)
    assert not dk.any()
    return dq, dv


def summed(form, *tensors: Tensor, **options) -> Results:
    """What autograd makes of a form: the rounded gradients are read and added in float32."""
    _, dq, _, dv = form(*tensors, **options)
    return tuple(x.to(torch.promote_types(x.dtype, torch.float32)).sum((0, 1)).flatten() for x in (dq, dv))


def terms(tensors: Results) -> dict[str, Results]:
    """As for dq: at T = 1 it is zero but for rounding."""
    _, k, v, do = tensors
    return {"dbias of q": (do, v, k)}


NAMES = ("dbias of q", "dbias of v")
TRUTH = functools.partial(summed, exact)
ORACLE = Oracle(NAMES, TRUTH, (functools.partial(summed, naive), functools.partial(summed, sdpa)), terms)
REPLAYED = Oracle(NAMES, TRUTH, (functools.partial(summed, naive),), terms)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(
    ("shape", "tile"),
    [
        ((2, 1, 3, 16), (16, 16)),
        ((2, 17, 2, 16), (16, 16)),
        ((2, 40, 1, 16), (16, 64)),
        ((1, 65, 1, 16), (64, 16)),
        ((1, 129, 1, 16), (64, 32)),
    ],
    ids=lambda x: "x".join(map(str, x)),
)
def test_every_length(shape, tile, causal, tiles) -> None:
    """Either pass may have more tiles than the other, and a last tile that is not full."""
    tiles(*tile)
    ORACLE.assert_right(functools.partial(ours, causal=causal), lambda seed: inputs(shape, seed=seed), causal=causal)


@pytest.mark.numeric
@pytest.mark.parametrize(("D", "dtype"), zip(attention.HEAD_DIMS, 2 * DTYPES, strict=True), ids=str)
def test_every_head_size(D, dtype, tiles) -> None:
    tiles(16, 16)
    ORACLE.assert_right(ours, lambda seed: inputs((1, 20, 2, D), dtype, seed=seed))


def test_documents(tiles) -> None:
    tiles(16, 32)
    options = {"documents": bounds(40, (1, 17, 36), (20,))}
    ORACLE.assert_right(functools.partial(ours, **options), lambda seed: inputs((2, 40, 1, 16), seed=seed), **options)


def test_dropout(tiles) -> None:
    tiles(16, 16)
    number = torch.tensor([3], device=DEVICE)
    keep, rounded = dropout_mask(number, 0.25, 2, 1, 20), {"dropout_p": 0.25}
    REPLAYED.assert_right(
        functools.partial(ours, seed=number, **rounded),
        lambda seed: inputs((2, 20, 1, 16), seed=seed),
        keep=keep,
        **rounded,
    )


def test_shipped_tiles(monkeypatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "lookup", lambda op, *_: configurations("sm_90")[op, "bfloat16", 64])
    ORACLE.assert_right(ours, lambda seed: inputs((1, 200, 1, 64), seed=seed))


def test_the_keys_third_is_zero() -> None:
    """Not a shortcut: adding the same to all scores of a row changes no weight."""
    _, dq, dk, _ = exact(*inputs((2, 40, 2, 16)))
    assert dk.sum((0, 1)).abs().max() < 1e-13 * dq.sum((0, 1)).abs().max()


@pytest.mark.parametrize("fault", ["a tile is lost", "a sequence is lost", "heads swapped", "not scaled"])
def test_a_planted_fault_is_found(fault, tiles) -> None:
    tiles(16, 16)

    def faulty(q: Tensor, k: Tensor, v: Tensor, do: Tensor) -> Results:
        match fault:
            case "a tile is lost":
                do = torch.cat((do[:, :-16], torch.zeros_like(do[:, -16:])), 1)
            case "a sequence is lost":
                q, k, v, do = (x[:1] for x in (q, k, v, do))
        dq, dv = ours(q, k, v, do)
        match fault:
            case "heads swapped":
                dq = dq.view(2, -1).flip(0).flatten()
            case "not scaled":
                dq = dq * q.size(-1) ** 0.5
        return dq, dv

    ORACLE.assert_wrong(faulty, lambda seed: inputs((2, 18, 2, 16), seed=seed))


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
@pytest.mark.parametrize("kind", ["causal", "full", "documents and dropout"])
def test_gradcheck(kind) -> None:
    """As the model calls it: the bias is added to qkv, detached."""
    qkv = torch.stack(inputs((2, 19, 1, 16), torch.float64)[:3], 2)
    bias = torch.randn(48, dtype=torch.float64, generator=generator()).requires_grad_()
    options = {"causal": kind != "full"}
    if kind == "documents and dropout":
        options = {"documents": bounds(19, (7, 17), ()), "dropout_p": 0.3, "seed": torch.tensor([5])}

    def function(bias: Tensor) -> Tensor:
        return flash_attention_qkv(qkv + bias.detach().view(3, 1, 16), bias=bias, **options)

    assert torch.autograd.gradcheck(function, bias, fast_mode=True)


def test_nothing_else_changes(tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs((2, 17, 1, 16))
    plain = differentiate(flash_attention_qkv, (torch.stack((q, k, v), 2),), (do,))
    first, second = (biased(q, k, v, do) for _ in range(2))
    assert_equal(first[:2], plain)
    assert_equal(first, second)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_nothing_is_written_beside_the_sums(causal, tiles, made: Made) -> None:
    """A tile of D = 80 has 128 columns."""
    tiles(16, 16)
    q, k, v, do = inputs((2, 33, 1, 80))
    options = (causal, 0.25, False)
    o, lse = attention_forward(q, k, v, *options)
    attention_backward(do, q, k, v, o, lse, *options, want_bias=True)
    assert len(made) == 5  # o, lse, dqkv, delta, sums
    made.assert_written()


def test_the_operator_passes_opcheck(tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs((1, 5, 2, 16))
    options = (True, 0.25, False)
    o, lse = torch.ops.fastgpt2.attention_forward(q, k, v, *options)
    arguments = (do, q, k, v, o, lse, *options, None, None, 0.0, True)
    torch.library.opcheck(torch.ops.fastgpt2.attention_backward.default, arguments)


def test_compiles_whole(tiles) -> None:
    tiles(16, 16)
    torch._dynamo.reset()
    x = torch.randn(2, 5, 96, generator=generator()).to(DEVICE).requires_grad_()
    bias = torch.randn(96, generator=generator()).to(DEVICE).requires_grad_()

    def layer(x: Tensor, bias: Tensor) -> Tensor:
        return flash_attention_qkv((x + bias.detach()).unflatten(-1, (3, 2, 16)), bias=bias).sin()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = function(x, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, bias))))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_under_autocast_the_gradient_is_summed_in_float32(dtype, tiles) -> None:
    tiles(16, 16)
    tensors = inputs((2, 5, 1, 16))
    with torch.autocast(DEVICE, torch.bfloat16):
        _, _, dbias = biased(*tensors, dtype=dtype)
    _, _, same = biased(*(x.bfloat16() for x in tensors))
    assert dbias.dtype == dtype and torch.equal(dbias, same.to(dtype))


def test_a_bias_that_is_not_trained_costs_nothing(tiles, monkeypatch) -> None:
    tiles(16, 16)
    q, k, v, do = inputs((1, 17, 2, 16))
    monkeypatch.setattr(torch, "zeros", None)
    qkv = torch.stack((q, k, v), 2).requires_grad_()
    flash_attention_qkv(qkv, bias=torch.ones(96, device=DEVICE)).backward(do)
    assert qkv.grad is not None


def test_errors_name_the_bias() -> None:
    qkv = torch.ones(1, 4, 3, 2, 16, device=DEVICE)
    for bias in (torch.ones(95), torch.ones(3, 32), torch.ones(96, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"bias must be \(96,\) of a floating dtype, got"):
            flash_attention_qkv(qkv, bias=bias)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 127, 128, 1000, 1024])
def test_full_lengths(T, dtype) -> None:
    for causal in (True, False):
        make = lambda seed: inputs((4, T, 3, 64), dtype, seed=seed)  # noqa: E731
        ORACLE.assert_right(functools.partial(ours, causal=causal), make, causal=causal)


@pytest.mark.gpu
def test_250_repeats_are_bitwise_equal() -> None:
    tensors = inputs((4, 1024, 12, 64), torch.bfloat16)
    first = biased(*tensors)
    for _ in range(250):
        assert_equal(biased(*tensors), first)
