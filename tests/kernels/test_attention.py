"""Flash attention against a float64 reference, within twice what PyTorch itself loses in the same precision.

Without a GPU the kernels run in Triton's interpreter with small tiles, so that a few tokens make several. With one,
the same tests run there with the shipped tiles, and those marked gpu add the full sizes.
"""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

import triton
import triton.language as tl

from fastgpt2.accuracy import maximum
from fastgpt2.kernels import attention, attention_device
from fastgpt2.kernels.attention import attention_backward, attention_forward
from fastgpt2.kernels.tiles import dot, load_tile, store_tile
from fastgpt2.kernels.tuning import architectures, configurations
from tests.kernels.cases.attention import ORACLE, exact, flash, inputs, naive, packed
from tests.kernels.oracle import DEVICE, DTYPES, Compute, Results, differentiate

# Masked scores may overflow before the mask removes them; numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


# The edges of tiles of 16, 32 and 64 rows. (B, T, H, D), tile.
LENGTHS = [
    ((2, 1, 3, 16), (16, 16)),
    ((3, 2, 1, 16), (16, 16)),
    ((1, 15, 2, 16), (16, 16)),
    ((2, 16, 1, 16), (16, 16)),
    ((1, 17, 2, 16), (16, 16)),
    ((1, 40, 2, 16), (32, 16)),
    ((2, 40, 1, 16), (16, 32)),
    ((1, 63, 2, 16), (16, 16)),
    ((1, 64, 1, 16), (32, 16)),
    ((1, 65, 2, 16), (16, 64)),
    ((1, 127, 1, 16), (64, 32)),
    ((1, 128, 1, 16), (32, 64)),
    ((1, 129, 2, 16), (64, 64)),
]


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("shape", "tile"), LENGTHS, ids=lambda x: "x".join(map(str, x)))
def test_every_length(shape, tile, causal, tiles) -> None:
    tiles(*tile)
    ORACLE.assert_right(functools.partial(flash, causal=causal), lambda seed: inputs(shape, seed=seed), causal=causal)


@triton.jit
def _note_place(places_ptr, T, H, LAST_FIRST: tl.constexpr):
    """The batch, head and first row of a program, for tiles of 4096 rows of 128 float32."""
    batch, head, row = attention_device.place(T, H, 128, 4096, 4, LAST_FIRST)
    place = places_ptr + 3 * tl.program_id(0)
    tl.store(place, batch)
    tl.store(place + 1, head)
    tl.store(place + 2, row)


@pytest.mark.parametrize("last_first", [True, False])
@pytest.mark.parametrize(("T", "group"), [(5000, 3), (8192, 2), (20_000, 1), (1000, 8)])
def test_heads_in_groups_that_fit_in_l2(T, group, last_first) -> None:
    """L2 holds 16,384 rows of k and v. Every tile of every head comes once, a group's first tiles before its second."""
    B, H, rows = 2, 4, range(0, T, 4096)
    places = torch.zeros((B * H * len(rows), 3), dtype=torch.int64, device=DEVICE)
    _note_place[(len(places),)](places, T, H, last_first)
    heads = [(b, h) for b in range(B) for h in range(H)]
    order = [*reversed(rows)] if last_first else rows
    assert places.tolist() == [
        [b, h, row] for first in range(0, B * H, group) for row in order for b, h in heads[first : first + group]
    ]


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize(("precision", "D"), [("bfloat16", 64), ("bfloat16", 128), ("tf32", 128)])
def test_shipped_tiles(arch, precision, D, monkeypatch) -> None:
    """A GPU's own tiles, interpreted in float32, which hides no error."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "lookup", lambda op, *_: configurations(arch)[op, precision, D])
    ORACLE.assert_right(packed, lambda seed: inputs((1, 200, 1, D), seed=seed))


@pytest.mark.parametrize("T", [1000, 1025])
def test_gpt2s_length_in_shipped_tiles(T, monkeypatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "lookup", lambda op, *_: configurations("sm_90")[op, "bfloat16", 64])
    ORACLE.assert_right(packed, lambda seed: inputs((1, T, 1, 64), seed=seed))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
def test_every_head_size_and_dtype(D, dtype, tiles) -> None:
    tiles(16, 16)
    ORACLE.assert_right(packed, lambda seed: inputs((1, 35, 2, D), dtype, seed=seed))


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peaked_logits(dtype, tiles) -> None:
    tiles(16, 16)
    ORACLE.assert_right(flash, lambda seed: inputs((1, 49, 2, 32), dtype, seed=seed, gain=50.0))


def test_peaked_logits_of_gpt2s_head_size(tiles) -> None:
    tiles(16, 16)
    ORACLE.assert_right(packed, lambda seed: inputs((1, 100, 2, 64), seed=seed, gain=30.0))


@triton.jit
def _both_ways(a_ptr, b_ptr, ab_ptr, ba_ptr, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """ab = a b^T and ba = b a^T of (SIZE, DEPTH) matrices."""
    a = load_tile(a_ptr, 0, DEPTH, SIZE, DEPTH, SIZE, False)
    b = load_tile(b_ptr, 0, DEPTH, SIZE, DEPTH, SIZE, False)
    store_tile(ab_ptr, dot(a, tl.trans(b), None, "ieee"), 0, SIZE, SIZE, SIZE, SIZE)
    store_tile(ba_ptr, dot(b, tl.trans(a), None, "ieee"), 0, SIZE, SIZE, SIZE, SIZE)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's products; a GPU sums in an order of its own")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_interpreted_products_are_rounded_once(dtype) -> None:
    """So k q^T in the backward equals the transpose of q k^T in the forward to the bit."""
    q, k, _, _ = (x[0, :, 0].contiguous() for x in inputs((1, 64, 1, 64), dtype))
    scores, transposed = torch.empty(2, 64, 64)
    _both_ways[(1,)](q, k, scores, transposed, SIZE=64, DEPTH=64)
    assert torch.equal(scores, (q.double() @ k.double().T).float())
    assert torch.equal(scores, transposed.T)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_rows_where_one_key_takes_all(causal, tiles) -> None:
    """Key 5 wins by hundreds of powers of two; the other weights underflow to zero."""
    tiles(16, 16)

    def make(seed: int) -> Results:
        q, k, v, do = inputs((1, 40, 2, 16), seed=seed)
        q, k = q.abs(), k.clone()
        k[:, 5] = 60.0
        return q, k, v, do

    ORACLE.assert_right(functools.partial(flash, causal=causal), make, causal=causal)


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_scale(scale, tiles) -> None:
    tiles(16, 16)
    ORACLE.assert_right(
        functools.partial(packed, scale=scale), lambda seed: inputs((1, 33, 2, 16), seed=seed), scale=scale
    )


def test_tf32_is_within_its_own_rounding(tiles) -> None:
    """TF32 has 10 bits of mantissa, so the error is that of float16 inputs."""
    tiles(16, 16)
    q, k, v, do = inputs((1, 40, 2, 64))
    truth = exact(q, k, v, do)
    for ours, reference in zip(flash(q, k, v, do, allow_tf32=True), truth, strict=True):
        assert maximum(ours.double() - reference) <= 8 * 2**-11 * maximum(reference)


def faults() -> dict[str, Compute]:
    """Faults planted in a correct computation."""

    def zero_dq(*args: Tensor) -> Results:
        o, dq, dk, dv = flash(*args)
        return o, torch.zeros_like(dq), dk, dv

    def delta_forgotten(q, k, v, do) -> Results:
        o, lse = attention_forward(q, k, v, True, q.size(-1) ** -0.5, False)
        dqkv, _ = attention_backward(do, q, k, v, torch.zeros_like(o), lse, True, q.size(-1) ** -0.5, False)
        return o, *dqkv.unbind(2)

    def mask_off_by(shift: int) -> Compute:
        def function(q, k, v):
            T = q.size(1)
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1 + shift)
            scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * q.size(-1) ** -0.5
            # Not -inf: a row that sees nothing becomes uniform, so that the fault is found by its size, not by NaN.
            weights = scores.masked_fill(future, -1e4).softmax(-1)
            return (weights @ v.transpose(1, 2)).transpose(1, 2)

        return lambda q, k, v, do: differentiate(function, (q, k, v), (do,))

    def last_row_lost(*args: Tensor) -> Results:
        return tuple(torch.cat((x[:, :-1], x[:, -2:-1]), 1) for x in flash(*args))

    return {
        "zero dq": zero_dq,
        "delta forgotten": delta_forgotten,
        "sees one key more": mask_off_by(1),
        "sees one key less": mask_off_by(-1),
        "scale 2% off": lambda q, k, v, do: flash(q, k, v, do, scale=1.02 * q.size(-1) ** -0.5),
        "last row lost": last_row_lost,
        "heads swapped": lambda *args: tuple(x.flip(2) for x in flash(*args)),
        "bfloat16 inside": lambda *args: tuple(x.float() for x in naive(*(x.bfloat16() for x in args))),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_found(fault, tiles) -> None:
    tiles(16, 16)
    ORACLE.assert_wrong(faults()[fault], lambda seed: inputs((1, 33, 2, 16), seed=seed))


@pytest.mark.parametrize("fault", ["zero dq", "delta forgotten", "sees one key less", "heads swapped"])
def test_a_planted_fault_is_found_in_bfloat16(fault, tiles) -> None:
    tiles(16, 16)
    make = lambda seed: inputs((1, 33, 2, 16), torch.bfloat16, seed=seed)  # noqa: E731
    ORACLE.assert_wrong(faults()[fault], make)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 2, 17, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 2048])
def test_full_lengths(T, dtype) -> None:
    for causal in (True, False):
        make = lambda seed: inputs((2, T, 3, 64), dtype, seed=seed)  # noqa: E731
        ORACLE.assert_right(functools.partial(packed, causal=causal), make, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("gain", [1.0, 50.0])
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
def test_full_head_sizes(D, gain) -> None:
    ORACLE.assert_right(packed, lambda seed: inputs((2, 1000, 3, D), torch.bfloat16, seed=seed, gain=gain))
