"""The GELU-MLP against a float64 reference, within twice what PyTorch itself loses in the same precision.

Without a GPU the kernels run in Triton's interpreter; with one, the same tests run there with the shipped tiles, and
those marked gpu add the full sizes. Both ways to reach memory are tested: by descriptors, and by pointers.
"""

from __future__ import annotations

import functools
import importlib
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

import triton
import triton.language as tl

from fastgpt2.accuracy import maximum, named, pooled, rms
from fastgpt2.kernels import gelu_mlp
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configuration, configurations, precision_name
from tests.kernels import guards
from tests.seeds import generator

module = importlib.import_module("fastgpt2.kernels.mlp")
reference, place = module.gelu_mlp_reference, module._place

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "dx", "dw_fc", "db_fc", "dw_proj", "db_proj")
# Where exp overflows its share of z is exactly 0: the interpreter warns, and means nothing by it.
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

# (x, w_fc, b_fc, w_proj, b_proj, dy) -> (y, dx, dw_fc, db_fc, dw_proj, db_proj)
Results = tuple[Tensor, ...]
Compute = Callable[..., Results]
Shape = tuple[int, int, int, int]
"""Rows, C, HIDDEN, N."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tiles to a small problem; on a GPU the shipped ones stay."""
    force_tiles(monkeypatch, LaunchConfig(32, 64, 32))


def force_tiles(monkeypatch: pytest.MonkeyPatch, config: LaunchConfig) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(module, "lookup", lambda *_: config)


@pytest.fixture(params=["descriptors", "pointers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to memory; that of descriptors must really be taken where the device has it."""
    possible, taken = module._descriptors, []

    def descriptors(*matrices: Tensor) -> bool:
        taken.append(possible(*matrices))
        return taken[-1] and request.param == "descriptors"

    monkeypatch.setattr(module, "_descriptors", descriptors)
    return request.param


def inputs(shape: Shape, dtype: torch.dtype = torch.float32, *, seed: int = 0, gain: float = 1.0) -> Results:
    """x, w_fc, b_fc, w_proj, b_proj and dy; gain is the pre-activation's standard deviation, about."""
    M, C, HIDDEN, N = shape
    rng = generator(seed, DEVICE)

    def draw(*size: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(size, generator=rng, dtype=torch.float64, device=DEVICE)).to(dtype)

    return (
        draw(M, C),
        draw(HIDDEN, C, scale=gain * C**-0.5),
        draw(HIDDEN),
        draw(N, HIDDEN, scale=HIDDEN**-0.5),
        draw(N),
        draw(M, N),
    )


def differentiate(function: Callable[..., Tensor], *tensors: Tensor) -> Results:
    *tensors, dy = tensors
    leaves = [x.detach().requires_grad_() for x in tensors]
    y = function(*leaves)
    return (y.detach(), *torch.autograd.grad(y, leaves, dy))


def ours(*tensors: Tensor, **options) -> Results:
    return differentiate(functools.partial(gelu_mlp, **options), *tensors)


def plain(*tensors: Tensor) -> Results:
    return differentiate(reference, *tensors)


def apart(*tensors: Tensor) -> Results:
    """The other plain form: products and biases apart, as one would write it down."""

    def function(x, w_fc, b_fc, w_proj, b_proj):
        return F.gelu(x @ w_fc.t() + b_fc, approximate="tanh") @ w_proj.t() + b_proj

    return differentiate(function, *tensors)


def exact(*tensors: Tensor) -> Results:
    return plain(*(x.double() for x in tensors))


def excess(
    compute: Compute, make: Callable[[int], Results], peers: tuple[Compute, ...] = (plain, apart)
) -> dict[str, float]:
    """Error over budget for each result, by maximum and by norm: right is at most 1."""

    mine, *others, truth = (named(NAMES, f) for f in (compute, *peers, exact))
    return pooled(make, mine, others, truth, once=DEVICE == "cpu").excess()


def assert_right(compute: Compute, make: Callable[[int], Results]) -> None:
    over = {key: factor for key, factor in excess(compute, make).items() if factor > 1.0}
    assert not over, over


# Edges of tiles of 32 x 64 x 32.
SHAPES: list[Shape] = [
    (1, 8, 16, 8),
    (31, 24, 40, 16),
    (32, 32, 64, 32),
    (33, 64, 72, 40),
    (77, 40, 160, 40),
]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_every_shape(shape, way) -> None:
    assert_right(ours, lambda seed: inputs(shape, seed=seed))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 20, 50, 21), (33, 13, 68, 20), (40, 35, 33, 1)], ids=str)
def test_shapes_that_descriptors_cannot_reach(shape) -> None:
    x, w_fc, _, w_proj, _, dy = inputs(shape)
    assert not module._descriptors(x, w_fc, w_proj, dy)
    assert_right(ours, lambda seed: inputs(shape, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(45, 40, 80, 40)], ids=str)
@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_every_dtype(dtype, shape, gain, way) -> None:
    """A gain of 8 takes most of the pre-activation to where gelu is 0 or the identity."""
    assert_right(ours, lambda seed: inputs(shape, dtype, seed=seed, gain=gain))


@pytest.mark.parametrize("shape", [(1, 768, 128, 768), (77, 1600, 200, 64), (289, 768, 200, 96)], ids=str)
def test_gpt2s_channels_and_odd_rows(shape, way, monkeypatch) -> None:
    force_tiles(monkeypatch, LaunchConfig(128, 128, 64))
    assert_right(ours, lambda seed: inputs(shape, seed=seed))


@triton.jit
def _note_place(places_ptr, M, HIDDEN):
    row, column = place(tl.program_id(0), M, HIDDEN, 32, 64)
    tl.store(places_ptr + 2 * tl.program_id(0), row)
    tl.store(places_ptr + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("row_tiles", [1, 8, 9, 19])
def test_groups_of_eight_row_tiles_take_all_columns(row_tiles) -> None:
    """Every tile once, the last group cut."""
    M, HIDDEN = 32 * row_tiles - 5, 150
    places = torch.zeros((3 * row_tiles, 2), dtype=torch.int32, device=DEVICE)
    _note_place[(len(places),)](places, M, HIDDEN)
    assert places.tolist() == [
        [row, column]
        for first in range(0, M, 8 * 32)
        for column in range(0, HIDDEN, 64)
        for row in range(first, min(first + 8 * 32, M), 32)
    ]


@pytest.mark.parametrize("shape", [(150, 128, 576, 192), (150, 96, 528, 80)], ids=["aligned", "odd"])
@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_shipped_tiles(arch, precision, shape, monkeypatch) -> None:
    """A GPU's own tiles, interpreted, in float32, where they can't hide an error."""
    if DEVICE == "cuda":
        pytest.skip("a GPU has its own, in the other tests")
    tma = "" if arch == "sm_80" else "_tma"
    monkeypatch.setattr(module, "_descriptors", lambda *_: bool(tma))
    monkeypatch.setattr(module, "lookup", lambda op, *_: configuration(arch, op, precision, 768))
    assert_right(ours, lambda seed: inputs(shape, seed=seed))


def test_tf32_is_within_its_own_rounding(way) -> None:
    """10 bits of mantissa: the error of float16 inputs, and on a GPU more than float32's."""
    tensors = inputs((45, 40, 72, 40))
    for mine, truth in zip(ours(*tensors, allow_tf32=True), exact(*tensors), strict=True):
        assert maximum(mine.double() - truth) <= 8 * 2**-11 * maximum(truth)


@pytest.mark.parametrize(("dtype", "costs"), [(torch.bfloat16, 1.006), (torch.float16, 1.33)], ids=str)
def test_what_tanh_of_11_bits_costs(dtype, costs) -> None:
    """The hardware's tanh errs by up to 2^-11: nothing beside bfloat16's rounding of gelu, a third beside float16's."""
    rng = generator()
    z = torch.randn(2**18, dtype=torch.float64, generator=rng).to(dtype).double()
    t = (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh()
    error = 2.0**-11 * (2 * torch.rand(z.shape, dtype=torch.float64, generator=rng) - 1)
    truth = F.gelu(z, approximate="tanh")
    rounded, approximate = (
        rms(gelu.to(dtype).double() - truth) for gelu in (truth, z * (0.5 + 0.5 * (t * (1 + error)).clamp(-1, 1)))
    )
    assert approximate / rounded == pytest.approx(costs, abs=0.01)
    assert module._shared_constants(precision_name(dtype), True, True)["APPROXIMATE"] == (costs < 1.01)


def faults() -> dict[str, Compute]:
    """Planted in a computation that is right."""

    def instead(index: int, change: Callable[[Tensor], Tensor]) -> Compute:
        return lambda *tensors: tuple(change(r) if i == index else r for i, r in enumerate(ours(*tensors)))

    def erf(*tensors: Tensor) -> Results:
        return differentiate(lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b)), v, c), *tensors)

    def row_too_many(x, w_fc, b_fc, w_proj, b_proj, dy) -> Results:
        """The biases' gradients take in a row past the last."""
        more = ours(torch.cat((x, x[-1:])), w_fc, b_fc, w_proj, b_proj, torch.cat((dy, dy[-1:])))
        y, dx, dw_fc, _, dw_proj, _ = ours(x, w_fc, b_fc, w_proj, b_proj, dy)
        return y, dx, dw_fc, more[3], dw_proj, more[5]

    return {
        "gelu by erf": erf,
        "zero dx": instead(1, torch.zeros_like),
        "dw_fc 2% off": instead(2, lambda x: 1.02 * x),
        "db_fc 3% off": instead(3, lambda x: 0.97 * x),
        "dw_proj's columns swapped": instead(4, lambda x: x.flip(1)),
        "a row too many in the biases' gradients": row_too_many,
        "second bias forgotten": instead(0, lambda y: y - y.mean(0)),
        "bfloat16 inside": lambda *tensors: tuple(x.float() for x in plain(*(t.bfloat16() for t in tensors))),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_found(fault) -> None:
    assert max(excess(faults()[fault], lambda seed: inputs((45, 32, 64, 32), seed=seed)).values()) > 2.0


@pytest.mark.parametrize("fault", ["zero dx", "dw_proj's columns swapped", "second bias forgotten"])
def test_a_planted_fault_is_found_in_bfloat16(fault) -> None:
    make = lambda seed: inputs((45, 32, 64, 32), torch.bfloat16, seed=seed)  # noqa: E731
    assert max(excess(faults()[fault], make).values()) > 2.0


@triton.jit
def _wrong_share(z, APPROXIMATE: tl.constexpr):
    """The cube's coefficient 0.044 rather than 0.044715."""
    return 1.0 / (1.0 + tl.exp2(z * (z * z * 0.044 + 1.0) * (-2.0 * 0.7978845608 * 1.4426950409)))


@triton.jit
def _misplaced(tile, M, HIDDEN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The last tile is taken for the one before it."""
    columns = tl.cdiv(HIDDEN, BLOCK_N)
    tile = tl.minimum(tile, tl.cdiv(M, BLOCK_M) * columns - 2)
    return tile // columns * BLOCK_M, tile % columns * BLOCK_N


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter looks helpers up when it runs, the compiler doesn't")
@pytest.mark.parametrize(("helper", "wrong"), [("_share", _wrong_share), ("_place", _misplaced)])
def test_a_fault_in_a_kernel_is_found(helper, wrong, way, monkeypatch) -> None:
    monkeypatch.setattr(module, helper, wrong)
    assert max(excess(ours, lambda seed: inputs((45, 32, 64, 32), seed=seed)).values()) > 2.0


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
            assert x.is_contiguous() and not module._descriptors(x.flatten(0, 1))
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


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    with guards.guarded(monkeypatch) as made:
        yield made


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("shape", [(33, 40, 72, 24), (1, 8, 16, 8), (64, 32, 64, 32)], ids=str)
def test_every_element_is_written_and_nothing_beside_it(shape, keep, way, guarded) -> None:
    x, w_fc, b_fc, w_proj, b_proj, dy = inputs(shape)
    _, pre = module.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, keep, False)
    assert pre.shape == (shape[0] if keep else 0, shape[2])
    if keep:
        module.gelu_mlp_backward(dy, x, w_fc, w_proj, pre, False)
    assert len(guarded) == (5 if keep else 2)  # pre, act; dpre, act, the partial sums
    for whole, middle in guarded:
        assert not middle.isnan().any()
        assert whole.isnan().sum() == whole.numel() - middle.numel()


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter looks helpers up when it runs, the compiler doesn't")
def test_the_guards_find_a_tile_not_written(way, guarded, monkeypatch) -> None:
    monkeypatch.setattr(module, "_place", _misplaced)
    x, w_fc, b_fc, w_proj, b_proj, _ = inputs((64, 32, 64, 32))
    module.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, True, False)
    assert all(middle.isnan().any() for _, middle in guarded)


def test_inputs_are_not_read_past_their_ends(way) -> None:
    """Every input sits in NaN: a row or column too many would spread."""
    tensors = inputs((33, 24, 72, 40))
    framed = []
    for x in tensors:
        frame = torch.full((x.numel() + 2 * 8192,), math.nan, device=DEVICE)
        middle = frame[8192 : 8192 + x.numel()].view(x.shape)
        framed.append(middle.copy_(x))
    for mine, theirs in zip(ours(*framed), ours(*tensors), strict=True):
        assert torch.equal(mine, theirs)


def test_both_ways_agree(monkeypatch) -> None:
    """The same sums in the same order, in tiles that both ways share."""
    tensors = inputs((45, 32, 72, 48))
    by_descriptors = ours(*tensors)
    monkeypatch.setattr(module, "_descriptors", lambda *_: False)
    for mine, theirs in zip(ours(*tensors), by_descriptors, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0 if DEVICE == "cpu" else 1e-5 * maximum(theirs))


def test_the_backwards_activation_is_the_forwards(way, guarded) -> None:
    """To the bit: what the weight's gradient is made of is what the forward multiplied."""
    for dtype in (torch.float32, torch.bfloat16):
        guarded.clear()
        x, w_fc, b_fc, w_proj, b_proj, dy = inputs((45, 32, 64, 32), dtype)
        _, pre = module.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, True, False)
        module.gelu_mlp_backward(dy, x, w_fc, w_proj, pre, False)
        (_, forward), (_, backward) = guarded[1], guarded[3]
        if DEVICE == "cpu":
            assert torch.equal(forward, backward)
        else:  # the compiler may fuse a multiply and an add in one of the two kernels alone
            assert maximum(forward.double() - backward.double()) <= torch.finfo(dtype).eps * maximum(forward)


def test_the_first_biass_gradient_is_summed_before_rounding(way, guarded) -> None:
    """The partial sums are of dpre in float32; dpre rounded to float16 would be 10 times further off."""
    x, w_fc, _, w_proj, _, dy = inputs((45, 24, 64, 32), torch.float16)
    pre = x @ w_fc.t()
    z = pre.double().requires_grad_()
    (dpre,) = torch.autograd.grad(F.gelu(z, approximate="tanh"), z, dy.double() @ w_proj.double())
    module.gelu_mlp_backward(dy, x, w_fc, w_proj, pre, False)
    *_, (_, partial) = guarded
    assert maximum(partial.double().sum(0) - dpre.sum(0)) <= 2e-6 * maximum(dpre.abs().sum(0))


def test_the_second_biass_gradient_is_summed_in_float32(way) -> None:
    """A running sum in bfloat16 gets no further than 256."""
    *tensors, dy = inputs((300, 8, 16, 8), torch.bfloat16)
    assert torch.equal(ours(*tensors, torch.ones_like(dy))[-1], torch.full_like(dy[0], 300.0))


def test_repeats_are_bitwise_equal(way) -> None:
    tensors = inputs((45, 32, 72, 32))
    for first, second in zip(ours(*tensors), ours(*tensors), strict=True):
        assert torch.equal(first, second)


def test_without_gradients_the_pre_activation_is_not_kept(way, guarded) -> None:
    *tensors, _ = inputs((33, 24, 64, 32))
    with torch.no_grad():
        y = gelu_mlp(*(x.requires_grad_() for x in tensors))
    assert [middle.shape for _, middle in guarded] == [(0, 64), (33, 64)]
    assert torch.equal(y, gelu_mlp(*tensors).detach())
    assert [middle.shape for _, middle in guarded[2:]] == [(33, 64), (33, 64)]


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
    torch.library.opcheck(torch.ops.fastgpt2.gelu_mlp_backward.default, (dy, x, w_fc, w_proj, pre, False))


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
    # Of elementwise functions inductor has its own, which may round otherwise.
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
        ops = [op for op in module.KERNELS if arch != "sm_80" or not op.endswith("_tma")]
        precisions = ("bfloat16", "float16", "tf32", "float32")
        sizes = {op: (1600,) if op.endswith("_odd") else (768, 1024, 1280, 1600) for op in ops}
        assert entries == {(op, p, C) for op in ops for p in precisions for C in sizes[op]}
    assert {op for op, *_ in configurations("interpreter") if op.startswith("gelu_mlp")} == set(module.KERNELS)


@pytest.mark.parametrize("arch", architectures())
def test_compiles_well(arch) -> None:
    """No spill and every product on the matrix units, in the precisions that have them."""
    command = [
        sys.executable,
        "-m",
        "fastgpt2.kernels.tools.inspect",
        "--json",
        "--op",
        "gelu_mlp",
        "--arch",
        arch,
        "--size",
        "768",
    ]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command += ["--precision", "bfloat16", "float16", "tf32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(done.stdout)
    assert len(reports) == 3 * (2 if arch == "sm_80" else 4)
    unit = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[arch]
    for report in reports:
        assert unit in report["instructions"] and report["blocks"] >= 1
        assert (report["spilled"], report["missed"], report["faults"]) == (0, 0, [])


FULL: list[Shape] = [(rows, C, 4 * C, C) for C in (768, 1024, 1280, 1600) for rows in (1, 77, 289, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_sizes(shape, dtype, way) -> None:
    assert_right(ours, lambda seed: inputs(shape, dtype, seed=seed))


@pytest.mark.gpu
def test_full_sizes_in_tf32(way) -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        tensors = inputs((4096, 768, 3072, 768))
        results, peers = ours(*tensors, allow_tf32=True), plain(*tensors)
    finally:
        torch.set_float32_matmul_precision(before)
    for mine, theirs, truth in zip(results, peers, exact(*tensors), strict=True):
        # The hardware cuts a float32 where PyTorch's library may round it: a bit more.
        assert rms(mine.double() - truth) <= 4 * rms(theirs.double() - truth)


@pytest.mark.gpu
def test_250_repeats_are_bitwise_equal(way) -> None:
    tensors = inputs((4096, 768, 3072, 768), torch.bfloat16)
    first = ours(*tensors)
    for _ in range(250):
        assert all(torch.equal(x, y) for x, y in zip(ours(*tensors), first, strict=True))


@pytest.mark.gpu
@pytest.mark.xdist_group("fills the card")
def test_offsets_past_32_bits(way) -> None:
    """rows x HIDDEN passes 2^31: the last rows must be computed like the first."""
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
    assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))
