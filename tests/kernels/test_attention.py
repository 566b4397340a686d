"""Flash attention against a float64 reference, within twice what PyTorch itself loses in the same precision.

Without a GPU the kernels run in Triton's interpreter with small tiles, so that a few tokens make several;
with one, the same tests run there with the shipped tiles, and those marked gpu add the full sizes.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

import triton
import triton.language as tl

from fastgpt2.accuracy import maximum, named, pooled
from fastgpt2.kernels import attention, flash_attention, flash_attention_qkv, launch
from fastgpt2.kernels.attention import attention_backward, attention_forward, attention_reference, why_unsupported
from fastgpt2.kernels.tiles import dot, load_tile, store_tile
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configurations
from tests.kernels.guards import guarded
from tests.seeds import generator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {"aot_eager": {"rtol": 1e-5, "atol": 1e-6}, "inductor": {"rtol": 1e-4, "atol": 1e-5}}
"""What compiling may change: for "inductor" the elementwise functions are others, of which each may round otherwise."""
# Scores above a masked one's place overflow before the mask removes them, on the CPU with a warning.
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),
]

# (q, k, v, do) -> (o, dq, dk, dv), all (B, T, H, D).
Results = tuple[Tensor, ...]
Compute = Callable[[Tensor, Tensor, Tensor, Tensor], Results]


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Force the tiles of every kernel; on a GPU the shipped ones stay."""

    def force(block_m: int, block_n: int) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(attention, "lookup", lambda *_: LaunchConfig(block_m, block_n))

    return force


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *, seed: int = 0, gain: float = 1.0
) -> Results:
    """q, k, v and do; gain multiplies the logits."""
    rng = generator(seed, DEVICE)
    q, k, v, do = (torch.randn(shape, generator=rng, dtype=torch.float64, device=DEVICE) for _ in range(4))
    return tuple(x.to(dtype) for x in (q * gain, k, v, do))


def differentiate(function: Callable[[Tensor, Tensor, Tensor], Tensor], q, k, v, do) -> Results:
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    o = function(*leaves)
    return (o.detach(), *torch.autograd.grad(o, leaves, do))


def naive(q, k, v, do, **options) -> Results:
    return differentiate(functools.partial(attention_reference, **options), q, k, v, do)


def exact(q, k, v, do, **options) -> Results:
    return naive(q.double(), k.double(), v.double(), do.double(), **options)


def sdpa(q, k, v, do, causal: bool = True, scale: float | None = None, documents: Tensor | None = None) -> Results:
    position, mask = torch.arange(q.size(1), device=q.device), None
    if documents is not None:
        mask = (position <= position[:, None]) & (position >= documents[0][:, None, :, None])

    def function(q, k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        options = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scale}
        return F.scaled_dot_product_attention(*heads, **options).transpose(1, 2)

    return differentiate(function, q, k, v, do)


def flash(q, k, v, do, **options) -> Results:
    return differentiate(functools.partial(flash_attention, **options), q, k, v, do)


def packed(q, k, v, do, **options) -> Results:
    qkv = torch.stack((q, k, v), 2).requires_grad_()
    o = flash_attention_qkv(qkv, **options)
    (dqkv,) = torch.autograd.grad(o, qkv, do)
    return (o.detach(), *dqkv.unbind(2))


def assert_same(ours: Results, theirs: Results) -> None:
    """To the bit, but for delta's sum on a GPU, whose order follows the memory layout."""
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0 if DEVICE == "cpu" else 1e-5 * maximum(y))


def excess(compute: Compute, make: Callable[[int], Results], **options) -> dict[str, float]:
    """Error over budget for o, dq, dk and dv, by maximum and by norm: right is at most 1.

    options: the reference's. SDPA can't replay a dropout's mask: naive alone is the peer there.
    """

    def terms(tensors: Results) -> dict[str, Results]:
        """At T = 1 dP less delta, which is made of the o that was rounded, is zero."""
        q, k, v, do = tensors
        return {"dq": (do, v, k), "dk": (do, v, q)}

    names = ("o", "dq", "dk", "dv")
    peers = [named(names, f, **options) for f in ((naive,) if "keep" in options else (naive, sdpa))]
    truth = named(names, exact, **options)
    return pooled(make, named(names, compute), peers, truth, once=DEVICE == "cpu", terms=terms).excess()


def assert_right(compute: Compute, make: Callable[[int], Results], **options) -> None:
    over = {key: factor for key, factor in excess(compute, make, **options).items() if factor > 1.0}
    assert not over, over


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
    assert_right(functools.partial(flash, causal=causal), lambda seed: inputs(shape, seed=seed), causal=causal)


@triton.jit
def _note_place(places_ptr, T, H, LAST_FIRST: tl.constexpr):
    """Where a program of 4096 rows of 128 float32 is at work."""
    batch, head, row = attention._place(T, H, 128, 4096, 4, LAST_FIRST)
    place = places_ptr + 3 * tl.program_id(0)
    tl.store(place, batch)
    tl.store(place + 1, head)
    tl.store(place + 2, row)


@pytest.mark.parametrize("last_first", [True, False])
@pytest.mark.parametrize(("T", "group"), [(5000, 3), (8192, 2), (20_000, 1), (1000, 8)])
def test_heads_in_groups_that_fit_in_l2(T, group, last_first) -> None:
    """16,384 rows of k and v fit: every tile of every head once, a group's first tiles before its second."""
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
    """A GPU's own tiles, interpreted, in float32, where they can't hide an error."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "lookup", lambda op, *_: configurations(arch)[op, precision, D])
    assert_right(packed, lambda seed: inputs((1, 200, 1, D), seed=seed))


@pytest.mark.parametrize("T", [1000, 1025])
def test_gpt2s_length_in_shipped_tiles(T, monkeypatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "lookup", lambda op, *_: configurations("sm_90")[op, "bfloat16", 64])
    assert_right(packed, lambda seed: inputs((1, T, 1, 64), seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
def test_every_head_size_and_dtype(D, dtype, tiles) -> None:
    tiles(16, 16)
    assert_right(packed, lambda seed: inputs((1, 35, 2, D), dtype, seed=seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_peaked_logits(dtype, tiles) -> None:
    tiles(16, 16)
    assert_right(flash, lambda seed: inputs((1, 49, 2, 32), dtype, seed=seed, gain=50.0))


def test_peaked_logits_of_gpt2s_head_size(tiles) -> None:
    tiles(16, 16)
    assert_right(packed, lambda seed: inputs((1, 100, 2, 64), seed=seed, gain=30.0))


@triton.jit
def _both_ways(a_ptr, b_ptr, ab_ptr, ba_ptr, SIZE: tl.constexpr, DEPTH: tl.constexpr):
    """ab = a b^T and ba = b a^T of (SIZE, DEPTH) matrices."""
    a = load_tile(a_ptr, 0, DEPTH, SIZE, DEPTH, SIZE, False)
    b = load_tile(b_ptr, 0, DEPTH, SIZE, DEPTH, SIZE, False)
    store_tile(ab_ptr, dot(a, tl.trans(b), None, "ieee"), 0, SIZE, SIZE, SIZE, SIZE)
    store_tile(ba_ptr, dot(b, tl.trans(a), None, "ieee"), 0, SIZE, SIZE, SIZE, SIZE)


@pytest.mark.skipif(DEVICE == "cuda", reason="the interpreter's products; a GPU sums in an order of its own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_interpreted_products_are_rounded_once(dtype) -> None:
    """So the backward's k q^T is to the bit the transpose of the forward's q k^T."""
    q, k, _, _ = (x[0, :, 0].contiguous() for x in inputs((1, 64, 1, 64), dtype))
    scores, transposed = torch.empty(2, 64, 64)
    _both_ways[(1,)](q, k, scores, transposed, SIZE=64, DEPTH=64)
    assert torch.equal(scores, (q.double() @ k.double().T).float())
    assert torch.equal(scores, transposed.T)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_rows_where_one_key_takes_all(causal, tiles) -> None:
    """Key 5 wins by hundreds of powers of two, the other weights underflow to nothing."""
    tiles(16, 16)

    def make(seed: int) -> Results:
        q, k, v, do = inputs((1, 40, 2, 16), seed=seed)
        q, k = q.abs(), k.clone()
        k[:, 5] = 60.0
        return q, k, v, do

    assert_right(functools.partial(flash, causal=causal), make, causal=causal)


def bounds(T: int, *openings: Iterable[int]) -> Tensor:
    """documents (2, B, T) of rows where documents begin at 0 and at the openings."""
    rows = []
    for row in openings:
        starts = [*sorted({0, *row}), T]
        spans = [(a, b) for a, b in itertools.pairwise(starts) for _ in range(a, b)]
        rows.append(spans)
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).permute(2, 0, 1).contiguous()


DOCUMENTS = {
    "one": ((), ()),
    "each token its own": (range(75), range(75)),
    "edges of tiles": ((16, 32, 48, 64), (15, 17, 31, 33, 63, 65)),
    "long and short": ((40,), (3, 4, 5, 6, 70)),
}


@pytest.mark.parametrize(
    ("tile", "dtype"), [((16, 16), torch.float32), ((32, 16), torch.bfloat16), ((16, 64), torch.float32)], ids=str
)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(kind, tile, dtype, tiles) -> None:
    tiles(*tile)
    documents = bounds(75, *DOCUMENTS[kind])
    compute = functools.partial(packed, documents=documents)
    assert_right(compute, lambda seed: inputs((2, 75, 1, 16), dtype, seed=seed), documents=documents)


def test_one_document_a_row_is_no_document_at_all(tiles) -> None:
    tiles(16, 16)
    args = inputs((2, 40, 2, 16))
    assert_same(packed(*args, documents=bounds(40, (), ())), packed(*args))


def test_documents_of_any_layout(tiles) -> None:
    tiles(16, 16)
    args, documents = inputs((2, 20, 1, 16)), bounds(20, (7,), (12,))
    assert_same(packed(*args, documents=documents.mT.contiguous().mT), packed(*args, documents=documents))


def test_peaked_logits_in_documents(tiles) -> None:
    """The first tile hides all keys of some queries, whose maximum may be far below zero."""
    tiles(16, 16)
    documents = bounds(49, (14, 33))
    make = lambda seed: inputs((1, 49, 2, 32), seed=seed, gain=50.0)  # noqa: E731
    assert_right(functools.partial(packed, documents=documents), make, documents=documents)


@pytest.mark.parametrize("documents", [None, bounds(33, range(33))], ids=["first token", "documents"])
def test_a_key_alone_has_all_the_weight_however_low_its_logit(documents, tiles) -> None:
    """The running maximum begins below it."""
    tiles(16, 16)
    _, _, v, do = inputs((1, 1 if documents is None else 33, 2, 16))
    q = torch.full_like(v, 64.0)
    o, _, _, dv = packed(q, -q, v, do, documents=documents)
    torch.testing.assert_close((o, dv), (v, do), rtol=0.01, atol=0.01)


@pytest.mark.parametrize("fault", ["ignored", "begins late", "begins early", "ends early", "of another row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_planted_fault_in_documents_is_found(fault, dtype, tiles) -> None:
    tiles(16, 16)
    documents = bounds(40, (9, 32), (16, 17, 20))
    position = torch.arange(40, dtype=torch.int32, device=DEVICE)
    first, last = documents
    wrong = {
        "ignored": None,
        "begins late": torch.stack((torch.minimum(first + 1, position), last)),
        "begins early": torch.stack(((first - 1).clamp(min=0), last)),
        "ends early": torch.stack((first, torch.maximum(last - 1, position + 1))),
        "of another row": documents.flip(1),
    }[fault]
    compute = functools.partial(packed, documents=wrong)
    make = lambda seed: inputs((2, 40, 1, 16), dtype, seed=seed)  # noqa: E731
    assert max(excess(compute, make, documents=documents).values()) > 2.0


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_tiles_outside_a_document_are_not_read(tiles) -> None:
    """Queries of the second document skip the NaN keys of the first, and keys of the first the NaN queries after it."""
    tiles(16, 16)
    q, k, v, do = inputs((1, 64, 1, 16))
    documents = bounds(64, (32,))
    o, lse = attention_forward(q, k, v, True, 0.25, False, documents)
    before = [torch.cat((torch.full_like(x[:, :32], math.nan), x[:, 32:]), 1) for x in (k, v)]
    poisoned, _ = attention_forward(q, *before, True, 0.25, False, documents)
    assert torch.equal(poisoned[:, 32:], o[:, 32:])
    after = [torch.cat((x[:, :32], torch.full_like(x[:, 32:], math.nan)), 1) for x in (q, do)]
    options = (o, lse, True, 0.25, False, documents)
    dqkv, poisoned = attention_backward(do, q, k, v, *options), attention_backward(after[1], after[0], k, v, *options)
    assert torch.equal(poisoned[:, :32], dqkv[:, :32])


@pytest.mark.parametrize("scale", [1.0, 0.03])
def test_scale(scale, tiles) -> None:
    tiles(16, 16)
    assert_right(functools.partial(packed, scale=scale), lambda seed: inputs((1, 33, 2, 16), seed=seed), scale=scale)


def test_tf32_is_within_its_own_rounding(tiles) -> None:
    """10 bits of mantissa: the error of float16 inputs, and on a GPU more than float32's."""
    tiles(16, 16)
    q, k, v, do = inputs((1, 40, 2, 64))
    truth = exact(q, k, v, do)
    for ours, reference in zip(flash(q, k, v, do, allow_tf32=True), truth, strict=True):
        assert maximum(ours.double() - reference) <= 8 * 2**-11 * maximum(reference)


def faults() -> dict[str, Compute]:
    """Planted in a computation that is right."""

    def zero_dq(*args: Tensor) -> Results:
        o, dq, dk, dv = flash(*args)
        return o, torch.zeros_like(dq), dk, dv

    def delta_forgotten(q, k, v, do) -> Results:
        o, lse = attention_forward(q, k, v, True, q.size(-1) ** -0.5, False)
        dqkv = attention_backward(do, q, k, v, torch.zeros_like(o), lse, True, q.size(-1) ** -0.5, False)
        return o, *dqkv.unbind(2)

    def mask_off_by(shift: int) -> Compute:
        def function(q, k, v):
            T = q.size(1)
            future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1 + shift)
            scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)) * q.size(-1) ** -0.5
            # A row that sees nothing becomes uniform rather than NaN: the fault must be found by its size.
            weights = scores.masked_fill(future, -1e4).softmax(-1)
            return (weights @ v.transpose(1, 2)).transpose(1, 2)

        return functools.partial(differentiate, function)

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
    assert max(excess(faults()[fault], lambda seed: inputs((1, 33, 2, 16), seed=seed)).values()) > 2.0


@pytest.mark.parametrize("fault", ["zero dq", "delta forgotten", "sees one key less", "heads swapped"])
def test_a_planted_fault_is_found_in_bfloat16(fault, tiles) -> None:
    tiles(16, 16)
    make = lambda seed: inputs((1, 33, 2, 16), torch.bfloat16, seed=seed)  # noqa: E731
    assert max(excess(faults()[fault], make).values()) > 2.0


def strided(kind: str, shape: tuple[int, int, int, int]) -> Results:
    """q, k and v with values that don't depend on the kind, in that kind's memory layout."""
    q, k, v, do = inputs(shape)
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
    shape = (2, 20, 3, 16)
    assert_same(flash(*strided(kind, shape)), flash(*inputs(shape)))


@pytest.mark.parametrize("kind", ["expanded", "transposed", "last dimension strided", "broadcast over heads"])
def test_gradients_of_any_layout(kind, tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs((2, 20, 3, 16))
    match kind:
        case "expanded":
            do = torch.ones((), device=DEVICE).expand(do.shape)
        case "transposed":
            do = do.transpose(1, 2).contiguous().transpose(1, 2)
        case "last dimension strided":
            do = do.mT.contiguous().mT
        case "broadcast over heads":
            do = do[:, :, :1].expand(do.shape)
    assert_same(packed(q, k, v, do), packed(q, k, v, do.contiguous()))


def test_packed_and_apart_agree_and_the_packed_gradient_is_one_tensor(tiles) -> None:
    tiles(16, 16)
    q, k, v, do = inputs((2, 20, 3, 16))
    assert_same(packed(q, k, v, do), flash(q, k, v, do))
    qkv = torch.stack((q, k, v), 2).requires_grad_()
    flash_attention_qkv(qkv).backward(do)
    assert qkv.grad is not None and qkv.grad.shape == qkv.shape and qkv.grad.is_contiguous()


@pytest.mark.parametrize("kind", ["causal", "full", "documents and dropout"])
@pytest.mark.parametrize(("T", "D", "tile"), [(17, 80, (16, 16)), (33, 16, (32, 16)), (20, 32, (16, 64))])
def test_every_element_is_written_and_nothing_beside_it(T, D, tile, kind, tiles, monkeypatch) -> None:
    tiles(*tile)
    q, k, v, do = inputs((2, T, 3, D))
    options = (kind != "full", 0.25, False)
    if kind == "documents and dropout":
        options = (*options, bounds(T, (1, 5, 16), (7,)), torch.tensor([3], device=DEVICE), 0.5)
    with guarded(monkeypatch) as made:
        o, lse = attention_forward(q, k, v, *options)
        attention_backward(do, q, k, v, o, lse, *options)
    assert len(made) == 4  # o, lse, dqkv, delta
    for whole, middle in made:
        assert not middle.isnan().any()
        assert whole.isnan().sum() == whole.numel() - middle.numel()


def test_the_guards_find_a_row_not_written(tiles, monkeypatch) -> None:
    tiles(16, 16)
    with guarded(monkeypatch) as made:
        o = torch.empty((1, 3, 1, 16), dtype=torch.float32, device=DEVICE)
        o[:, :2] = 0.0
    assert made[0][1].isnan().any()


def test_inputs_are_not_read_past_their_ends(tiles) -> None:
    """q, k and v sit in NaN: a row or column too many would spread."""
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
    for first, second in zip(flash(*args), flash(*args), strict=True):
        assert torch.equal(first, second)


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_hands_over_what_it_hands_to_a_matmul(dtype) -> None:
    x = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert launch.autocast_dtype(x) == launch.autocast_dtype(x.half(), dtype) == (x @ x).dtype
    assert launch.autocast_dtype(x) == dtype


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
        (lambda: flash_attention_qkv(qkv.transpose(-1, -2)), "head sizes"),
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
    assert "sdpa" in str(why_unsupported(cuda, torch.float16, 64, 0.0))


def test_an_interpreter_that_would_fail_is_refused() -> None:
    assert "pip install 'numpy<2.4'" in str(launch.interpreter_clash("3.6.0", "2.5.2"))
    assert launch.interpreter_clash("3.6.0", "2.3.5") is None
    assert launch.interpreter_clash("3.7.1", "2.5.5") is None
    assert launch.interpreter_clash("3.10.0", "2.5.5") is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 2, 17, 63, 64, 65, 127, 128, 129, 1000, 1023, 1024, 1025, 2048])
def test_full_lengths(T, dtype) -> None:
    for causal in (True, False):
        make = lambda seed: inputs((2, T, 3, 64), dtype, seed=seed)  # noqa: E731
        assert_right(functools.partial(packed, causal=causal), make, causal=causal)


@pytest.mark.gpu
@pytest.mark.parametrize("gain", [1.0, 50.0])
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
def test_full_head_sizes(D, gain) -> None:
    assert_right(packed, lambda seed: inputs((2, 1000, 3, D), torch.bfloat16, seed=seed, gain=gain))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 127, 128, 129, 1000, 1024, 2048])
def test_full_lengths_in_documents(T, dtype) -> None:
    generator = torch.Generator().manual_seed(T)
    openings = [torch.randint(T, (n,), generator=generator).tolist() for n in (0, 3, 40)]
    documents = bounds(T, *openings, [*range(0, T, 64)])
    make = lambda seed: inputs((4, T, 3, 64), dtype, seed=seed)  # noqa: E731
    assert_right(functools.partial(packed, documents=documents), make, documents=documents)


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
        assert all(torch.equal(x, y) for x, y in zip(packed(*args, **options), first, strict=True))


@pytest.mark.gpu
@pytest.mark.xdist_group("fills the card")
@pytest.mark.parametrize("documents", [False, True], ids=["plain", "documents"])
def test_offsets_past_32_bits(documents) -> None:
    """B T 3 H D passes 2^31: the last batch must be computed like the first."""
    B, T, H, D = 1000, 1024, 12, 64
    qkv = torch.empty((B, T, 3, H, D), dtype=torch.bfloat16, device="cuda")
    assert qkv.numel() > 2**31
    qkv[:] = torch.randn(1, T, 3, H, D, device="cuda").bfloat16()
    spans = bounds(T, (100, 700)).expand(2, B, T) if documents else None
    o = flash_attention_qkv(qkv.requires_grad_(), documents=spans)
    o.backward(o.detach()[:1].expand(o.shape))
    assert qkv.grad is not None
    assert torch.equal(o[0], o[-1]) and torch.equal(qkv.grad[0], qkv.grad[-1])
