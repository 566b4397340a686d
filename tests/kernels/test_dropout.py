"""Dropout inside the attention: the mask comes from Philox, is uniform and independent, and the gradient replays it."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels import attention, flash_attention, flash_attention_qkv
from fastgpt2.kernels.dropout import BITS, draw_seed, dropout_mask, weights_to_drop
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configurations
from tests.kernels.cases.attention import REPLAYED, bounds, inputs, naive, packed
from tests.kernels.oracle import DEVICE, Compute, assert_same

P = 0.2
ROUNDED_P = weights_to_drop(P) / 2**BITS


def seed(n: int = 1) -> Tensor:
    return torch.tensor([n], device=DEVICE)


@pytest.fixture(params=[(16, 16), (32, 16), (16, 64)], ids=lambda x: "x".join(map(str, x)))
def tiles(request, monkeypatch: pytest.MonkeyPatch) -> None:
    """Force the tiles of every kernel; on a GPU the shipped ones stay."""
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "lookup", lambda *_: LaunchConfig(*request.param))


def philox(counter: list[int], key: tuple[int, int], rounds: int) -> list[int]:
    """Philox4x32 of the paper, in Python's integers."""
    for _ in range(rounds):
        a, b = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        low = 0xFFFFFFFF
        counter = [(b >> 32) ^ counter[1] ^ key[0], b & low, (a >> 32) ^ counter[3] ^ key[1], a & low]
        key = (key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low
    return counter


def test_the_mask_is_philox_of_the_place() -> None:
    # The known answer from the authors' own test: ten rounds of zeros.
    assert philox([0] * 4, (0, 0), 10) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    number = -(2**63) + 12345678901  # both halves of the key count
    mask = dropout_mask(seed(number), 0.5, 2, 3, 200)
    for head, query, key in itertools.product(range(6), (0, 9, 24, 130, 199), (0, 7, 8, 16, 31, 133, 199)):
        words = philox([query & ~8, key & ~24, head, 0], (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF), 7)
        word = words[2 * (query >> 3 & 1) + (key >> 3 & 1)]
        bits = word >> 16 if key & 16 else word & 0xFFFF
        assert mask[head // 3, head % 3, query, key] == (bits >= 2**15)


def uniform(number: int, B: int = 1, H: int = 1, T: int = 256, steps: int = 16) -> Tensor:
    """The random numbers behind a mask, (B, H, T, T), to 1 / steps: the largest p that keeps each weight."""
    return sum(dropout_mask(seed(number), i / steps, B, H, T).int() for i in range(1, steps))


def chi_square(counts: Tensor) -> float:
    """How many standard deviations the chi-square of the counts is from its expectation under equal odds."""
    expected = counts.sum() / counts.numel()
    freedom = counts.numel() - 1
    return ((((counts - expected) ** 2 / expected).sum() - freedom) / (2 * freedom) ** 0.5).item()


def test_the_numbers_are_uniform_wherever_they_are_looked_at() -> None:
    numbers = uniform(7, H=2)
    assert abs(chi_square(torch.bincount(numbers.flatten(), minlength=16).double())) < 5
    position = torch.arange(256, device=DEVICE)
    for bit in range(8):  # which of a call's numbers a weight takes depends on three of these
        for axis in (2, 3):
            half = numbers.index_select(axis, position[position >> bit & 1 == 1])
            assert abs(chi_square(torch.bincount(half.flatten(), minlength=16).double())) < 5, (bit, axis)
    kept = (numbers >= 8).double()
    for axis in (2, 3):  # rows, and columns, each have their share
        share = kept.mean(axis)
        assert abs(share.std().item() / (0.5 / 256**0.5) - 1) < 0.2
        assert (share - 0.5).abs().max() < 5.5 * 0.5 / 256**0.5


@pytest.mark.parametrize("p", [1e-9, 0.1, 0.5, 0.9])
def test_as_many_are_dropped_as_asked_for(p) -> None:
    dropped = (~dropout_mask(seed(3), p, 1, 4, 300)).double().mean().item()
    exact = weights_to_drop(p) / 2**BITS
    assert abs(exact - p) <= 2**-16
    assert abs(dropped - exact) < 5 * (exact * (1 - exact) / (4 * 300**2)) ** 0.5


def correlation(x: Tensor, y: Tensor) -> float:
    """The correlation in standard deviations of independent numbers."""
    x, y = x.double() - x.double().mean(), y.double() - y.double().mean()
    return ((x * y).mean() / (x.std() * y.std()) * x.numel() ** 0.5).item()


def test_masks_of_seeds_heads_batches_and_neighbours_are_unrelated() -> None:
    numbers = uniform(11, B=2, H=2)
    first = numbers[0, 0]
    others = [uniform(n)[0, 0] for n in (12, 11 + 2**32, -11)] + [numbers[0, 1], numbers[1, 0], numbers[1, 1], first.T]
    shifted = [first.roll((i, j), (0, 1)) for i in (0, 1, 8, 16) for j in (0, 1, 8, 16, 24) if (i, j) != (0, 0)]
    for other in others + shifted:
        assert not torch.equal(first, other)
        assert abs(correlation(first, other)) < 5


def test_a_transposed_or_repeated_mask_would_be_found() -> None:
    """The statistics above detect what they are for."""
    numbers = uniform(11)[0, 0]
    repeated = numbers[:, torch.arange(256, device=DEVICE) & ~8]
    assert abs(correlation(repeated, repeated.roll(8, 1))) > 50
    biased = numbers.clamp(min=1)
    assert chi_square(torch.bincount(biased.flatten(), minlength=16).double()) > 50


def dropping(**options) -> Compute:
    return functools.partial(packed, dropout_p=P, **options)


def replay(make, **options) -> dict:
    """Options by which the reference replays the mask of seed 1."""
    B, T, H, _ = make(0)[0].shape
    return {"keep": dropout_mask(seed(), P, B, H, T), "dropout_p": ROUNDED_P, **options}


@pytest.mark.numeric
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "full", "documents"])
def test_output_and_gradient_replay_the_mask(kind, dtype, tiles) -> None:
    options = {"documents": bounds(75, (16, 40), (3, 64, 65))} if kind == "documents" else {"causal": kind == "causal"}
    make = lambda n: inputs((2, 75, 1, 16), dtype, seed=n)  # noqa: E731
    REPLAYED.assert_right(dropping(seed=seed(), **options), make, **replay(make, **options))


@pytest.mark.parametrize("arch", architectures())
def test_shipped_tiles_replay_the_mask(arch, monkeypatch) -> None:
    if DEVICE == "cpu":
        monkeypatch.setattr(attention, "lookup", lambda op, *_: configurations(arch)[op, "bfloat16", 64])
    make = lambda n: inputs((1, 200, 2, 64), seed=n)  # noqa: E731
    REPLAYED.assert_right(dropping(seed=seed()), make, **replay(make))


def faults() -> dict[str, Compute]:
    """Faults planted in a correct computation."""

    def with_mask(change, p: float = ROUNDED_P) -> Compute:
        def compute(q, k, v, do):
            keep = change(dropout_mask(seed(), P, q.size(0), q.size(2), q.size(1)))
            return naive(q, k, v, do, keep=keep, dropout_p=p)

        return compute

    def other_mask_in_the_backward(q, k, v, do):
        _, dq, dk, dv = dropping(seed=seed(2))(q, k, v, do)
        return dropping(seed=seed())(q, k, v, do)[0], dq, dk, dv

    return {
        "another seed": dropping(seed=seed(2)),
        "another mask in the backward": other_mask_in_the_backward,
        "none": packed,
        "not scaled": with_mask(lambda keep: keep, p=0.0),
        "transposed": with_mask(lambda keep: keep.mT),
        "a row off": with_mask(lambda keep: keep.roll(1, -2)),
        "one head's for all": with_mask(lambda keep: keep[:, :1].expand(keep.shape)),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_found(fault, monkeypatch) -> None:
    make = lambda n: inputs((1, 33, 2, 16), seed=n)  # noqa: E731
    REPLAYED.assert_wrong(faults()[fault], make, **replay(make))


def test_the_expectation_is_the_attention_without_dropout() -> None:
    q, k, v, _ = inputs((1, 16, 1, 16))
    q, k, v = (x.expand(200, -1, -1, -1) for x in (q, k, v))
    o = flash_attention(q, k, v, 0.5)
    error = (o.mean(0) - flash_attention(q[:1], k[:1], v[:1])[0]) / (o.std(0) / 200**0.5).clamp(min=1e-3)
    assert error.abs().max() < 5.5


def test_the_seed_comes_from_torchs_generator() -> None:
    qkv = torch.stack(inputs((1, 20, 2, 16))[:3], 2)
    torch.manual_seed(0)
    first, second = flash_attention_qkv(qkv, 0.5), flash_attention_qkv(qkv, 0.5)
    torch.manual_seed(0)
    again, drawn = flash_attention_qkv(qkv, 0.5), draw_seed(qkv.device)
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert torch.equal(second, flash_attention_qkv(qkv, 0.5, seed=drawn))
    state = torch.get_rng_state()
    flash_attention_qkv(qkv)
    assert torch.equal(state, torch.get_rng_state()), "without dropout nothing is drawn"


def test_recomputation_draws_the_same_mask() -> None:
    qkv = torch.stack(inputs((1, 20, 2, 16))[:3], 2).requires_grad_()
    gradients = []
    for recompute in (False, True):
        torch.manual_seed(0)
        layer = functools.partial(flash_attention_qkv, dropout_p=0.5)
        o = checkpoint(layer, qkv, use_reentrant=False) if recompute else layer(qkv)
        gradients.append(torch.autograd.grad(o.square().sum(), qkv)[0])
    assert torch.equal(*gradients)


def test_a_drawn_seed_compiles_whole() -> None:
    torch._dynamo.reset()
    qkv = torch.stack(inputs((1, 20, 2, 16))[:3], 2).requires_grad_()
    layer = functools.partial(flash_attention_qkv, dropout_p=0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results = []
    for function in (layer, compiled):
        torch.manual_seed(0)
        o = function(qkv)
        results.append((o.detach(), torch.autograd.grad(o.square().sum(), qkv)[0]))
    assert_same(*results)
    assert not torch.equal(compiled(qkv), compiled(qkv))


def test_errors() -> None:
    for p in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match="dropout_p must be at least 0 and less than 1"):
            weights_to_drop(p)
    assert [weights_to_drop(p) for p in (0.0, 1e-30, 0.5, 1 - 1e-12)] == [0, 1, 2**15, 2**16 - 1]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 17, 127, 129, 1000, 1024, 2048])
def test_full_lengths(T, dtype) -> None:
    make = lambda n: inputs((2, T, 3, 64), dtype, seed=n)  # noqa: E731
    REPLAYED.assert_right(dropping(seed=seed()), make, **replay(make))


@pytest.mark.gpu
@pytest.mark.parametrize("D", attention.HEAD_DIMS)
def test_full_head_sizes(D) -> None:
    make = lambda n: inputs((2, 1000, 3, D), torch.bfloat16, seed=n)  # noqa: E731
    REPLAYED.assert_right(dropping(seed=seed()), make, **replay(make))


@pytest.mark.gpu
def test_a_gpus_mask_is_the_interpreters() -> None:
    """Checked against Philox in Python's integers, past 2^31 weights."""
    mask = dropout_mask(seed(5), 0.5, 1, 33, 8192)
    assert mask.numel() > 2**31
    for head, query, key in ((0, 0, 0), (32, 8191, 8191), (32, 8184, 8167), (17, 4104, 8)):
        word = philox([query & ~8, key & ~24, head, 0], (5, 0), 7)[2 * (query >> 3 & 1) + (key >> 3 & 1)]
        assert mask[0, head, query, key] == ((word >> 16 if key & 16 else word & 0xFFFF) >= 2**15)


@pytest.mark.gpu
def test_replays_of_a_graph_draw_new_masks() -> None:
    qkv = torch.stack(inputs((2, 256, 2, 64), torch.bfloat16)[:3], 2).requires_grad_()

    def step() -> tuple[Tensor, Tensor]:
        o = flash_attention_qkv(qkv, 0.5)
        return o, torch.autograd.grad(o.float().square().sum(), qkv)[0]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    torch.manual_seed(0)
    replays = []
    for _ in range(5):
        graph.replay()
        replays.append([x.clone() for x in captured])
    assert all(not torch.equal(x[0], y[0]) for x, y in itertools.combinations(replays, 2))
    torch.manual_seed(0)
    graph.replay()
    assert all(torch.equal(x, y) for x, y in zip(captured, replays[0], strict=True))
