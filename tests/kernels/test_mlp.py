"""The GELU-MLP against a float64 reference, within twice what PyTorch itself loses in the same precision.

Without a GPU the kernels run in Triton's interpreter. With one, the same tests run there with the shipped tiles, and
those marked gpu add the full sizes. Both ways to reach memory are tested: descriptors and pointers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

import triton
import triton.language as tl

from fastgpt2.accuracy import maximum, rms
from fastgpt2.kernels import mlp, mlp_device
from fastgpt2.kernels.tuning import architectures, configuration, precision_name
from tests.kernels.cases.mlp import ORACLE, Shape, exact, inputs, ours, plain
from tests.kernels.conftest import Made, force_tiles
from tests.kernels.oracle import DEVICE, DTYPES, Compute, Results, assert_same, differentiate
from tests.seeds import generator

# Where exp overflows, GELU's share of z is exactly 0, which is right; numpy warns.
pytestmark = [
    pytest.mark.usefixtures("mlp_tiles"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]


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
    ORACLE.assert_right(ours, lambda seed: inputs(shape, seed=seed))


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (5, 20, 50, 21), (33, 13, 68, 20), (40, 35, 33, 1)], ids=str)
def test_shapes_that_descriptors_cannot_reach(shape) -> None:
    x, w_fc, _, w_proj, _, dy = inputs(shape)
    assert not mlp._descriptors(x, w_fc, w_proj, dy)
    ORACLE.assert_right(ours, lambda seed: inputs(shape, seed=seed))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(45, 40, 80, 40)], ids=str)
@pytest.mark.parametrize("gain", [1.0, 8.0])
def test_every_dtype(dtype, shape, gain, way) -> None:
    """A gain of 8 puts most of the pre-activation where GELU is 0 or the identity."""
    ORACLE.assert_right(ours, lambda seed: inputs(shape, dtype, seed=seed, gain=gain))


@pytest.mark.parametrize("shape", [(1, 768, 128, 768), (77, 1600, 200, 64), (289, 768, 200, 96)], ids=str)
def test_gpt2s_channels_and_odd_rows(shape, way, monkeypatch) -> None:
    force_tiles(monkeypatch, "mlp", 128, 128, 64)
    ORACLE.assert_right(ours, lambda seed: inputs(shape, seed=seed))


@triton.jit
def _note_place(places_ptr, M, HIDDEN):
    row, column = mlp_device._place(tl.program_id(0), M, HIDDEN, 32, 64)
    tl.store(places_ptr + 2 * tl.program_id(0), row)
    tl.store(places_ptr + 2 * tl.program_id(0) + 1, column)


@pytest.mark.parametrize("row_tiles", [1, 8, 9, 19])
def test_groups_of_eight_row_tiles_take_all_columns(row_tiles) -> None:
    """Every tile comes once; the last group is cut short."""
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
    """A GPU's own tiles, interpreted in float32, which hides no error."""
    if DEVICE == "cuda":
        pytest.skip("a GPU has its own, in the other tests")
    tma = "" if arch == "sm_80" else "_tma"
    monkeypatch.setattr(mlp, "_descriptors", lambda *_: bool(tma))
    monkeypatch.setattr(mlp, "lookup", lambda op, *_: configuration(arch, op, precision, 768))
    ORACLE.assert_right(ours, lambda seed: inputs(shape, seed=seed))


def test_tf32_is_within_its_own_rounding(way) -> None:
    """TF32 has 10 bits of mantissa, so the error is that of float16 inputs."""
    tensors = inputs((45, 40, 72, 40))
    for mine, truth in zip(ours(*tensors, allow_tf32=True), exact(*tensors), strict=True):
        assert maximum(mine.double() - truth) <= 8 * 2**-11 * maximum(truth)


@pytest.mark.numeric
@pytest.mark.parametrize(("dtype", "costs"), [(torch.bfloat16, 1.006), (torch.float16, 1.33)], ids=str)
def test_what_tanh_of_11_bits_costs(dtype, costs) -> None:
    """The hardware's tanh errs by up to 2^-11: negligible in bfloat16, a third more error in float16."""
    rng = generator()
    z = torch.randn(2**18, dtype=torch.float64, generator=rng).to(dtype).double()
    t = (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh()
    error = 2.0**-11 * (2 * torch.rand(z.shape, dtype=torch.float64, generator=rng) - 1)
    truth = F.gelu(z, approximate="tanh")
    rounded, approximate = (
        rms(gelu.to(dtype).double() - truth) for gelu in (truth, z * (0.5 + 0.5 * (t * (1 + error)).clamp(-1, 1)))
    )
    assert approximate / rounded == pytest.approx(costs, abs=0.01)
    assert mlp.kernel_constants(precision_name(dtype), True, True)["APPROXIMATE"] == (costs < 1.01)


def faults() -> dict[str, Compute]:
    """Faults planted in a correct computation."""

    def instead(index: int, change: Callable[[Tensor], Tensor]) -> Compute:
        return lambda *tensors: tuple(change(r) if i == index else r for i, r in enumerate(ours(*tensors)))

    def erf(*tensors: Tensor) -> Results:
        *tensors, dy = tensors
        return differentiate(lambda x, w, b, v, c: F.linear(F.gelu(F.linear(x, w, b)), v, c), tensors, (dy,))

    def row_too_many(x, w_fc, b_fc, w_proj, b_proj, dy) -> Results:
        """The gradients of the biases include a row past the last."""
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
    ORACLE.assert_wrong(faults()[fault], lambda seed: inputs((45, 32, 64, 32), seed=seed))


@pytest.mark.parametrize("fault", ["zero dx", "dw_proj's columns swapped", "second bias forgotten"])
def test_a_planted_fault_is_found_in_bfloat16(fault) -> None:
    make = lambda seed: inputs((45, 32, 64, 32), torch.bfloat16, seed=seed)  # noqa: E731
    ORACLE.assert_wrong(faults()[fault], make)


@triton.jit
def _wrong_share(z, APPROXIMATE: tl.constexpr):
    """The coefficient of the cube is 0.044, not 0.044715."""
    return 1.0 / (1.0 + tl.exp2(z * (z * z * 0.044 + 1.0) * (-2.0 * 0.7978845608 * 1.4426950409)))


@triton.jit
def _misplaced(tile, M, HIDDEN, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The last tile computes the one before it instead."""
    columns = tl.cdiv(HIDDEN, BLOCK_N)
    tile = tl.minimum(tile, tl.cdiv(M, BLOCK_M) * columns - 2)
    return tile // columns * BLOCK_M, tile % columns * BLOCK_N


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter looks helpers up when it runs, the compiler doesn't")
@pytest.mark.parametrize(("helper", "wrong"), [("_share", _wrong_share), ("_place", _misplaced)])
def test_a_fault_in_a_kernel_is_found(helper, wrong, way, monkeypatch) -> None:
    monkeypatch.setattr(mlp_device, helper, wrong)
    ORACLE.assert_wrong(ours, lambda seed: inputs((45, 32, 64, 32), seed=seed))


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter looks helpers up when it runs, the compiler doesn't")
def test_the_guards_find_a_tile_not_written(way, made: Made, monkeypatch) -> None:
    monkeypatch.setattr(mlp_device, "_place", _misplaced)
    x, w_fc, b_fc, w_proj, b_proj, _ = inputs((64, 32, 64, 32))
    mlp.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, True, False)
    assert all(middle.isnan().any() for _, middle in made)


def test_both_ways_agree(monkeypatch) -> None:
    """With the same tiles both ways add the same numbers in the same order."""
    tensors = inputs((45, 32, 72, 48))
    by_descriptors = ours(*tensors)
    monkeypatch.setattr(mlp, "_descriptors", lambda *_: False)
    assert_same(ours(*tensors), by_descriptors)


def test_the_backwards_activation_is_the_forwards(way, made: Made) -> None:
    """The gradient of w_proj uses the activation that the forward multiplied, to the bit."""
    for dtype in (torch.float32, torch.bfloat16):
        made.clear()
        x, w_fc, b_fc, w_proj, b_proj, dy = inputs((45, 32, 64, 32), dtype)
        _, pre = mlp.gelu_mlp_forward(x, w_fc, b_fc, w_proj, b_proj, True, False)
        mlp.gelu_mlp_backward(dy, x, w_fc, w_proj, pre, False)
        (_, forward), (_, backward) = made[1], made[3]
        if DEVICE == "cpu":
            assert torch.equal(forward, backward)
        else:  # the compiler may fuse a multiply and an add in one of the two kernels alone
            assert maximum(forward.double() - backward.double()) <= torch.finfo(dtype).eps * maximum(forward)


def test_the_first_biass_gradient_is_summed_before_rounding(way, made: Made) -> None:
    """Partial sums add dpre in float32. After rounding to float16 the error would be 10 times larger."""
    x, w_fc, _, w_proj, _, dy = inputs((45, 24, 64, 32), torch.float16)
    pre = x @ w_fc.t()
    z = pre.double().requires_grad_()
    (dpre,) = torch.autograd.grad(F.gelu(z, approximate="tanh"), z, dy.double() @ w_proj.double())
    mlp.gelu_mlp_backward(dy, x, w_fc, w_proj, pre, False)
    *_, (_, partial) = made
    assert maximum(partial.double().sum(0) - dpre.sum(0)) <= 2e-6 * maximum(dpre.abs().sum(0))


def test_the_second_biass_gradient_is_summed_in_float32(way) -> None:
    """A running sum of ones in bfloat16 would stop at 256."""
    *tensors, dy = inputs((300, 8, 16, 8), torch.bfloat16)
    assert torch.equal(ours(*tensors, torch.ones_like(dy))[-1], torch.full_like(dy[0], 300.0))


FULL: list[Shape] = [(rows, C, 4 * C, C) for C in (768, 1024, 1280, 1600) for rows in (1, 77, 289, 4096)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", FULL, ids=str)
def test_full_sizes(shape, dtype, way) -> None:
    ORACLE.assert_right(ours, lambda seed: inputs(shape, dtype, seed=seed))


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
        # The hardware truncates float32 to TF32 where PyTorch's library may round, so it loses a bit more.
        assert rms(mine.double() - truth) <= 4 * rms(theirs.double() - truth)
