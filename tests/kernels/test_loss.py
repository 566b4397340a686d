"""The head and its loss against a float64 reference, within twice what PyTorch's plain forms lose in that precision.

Both implementations of the rows' step go through the same tests; without a GPU Triton's runs in the interpreter.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.accuracy import maximum, named, pooled, rms
from fastgpt2.kernels import cross_entropy, launch, linear_cross_entropy
from fastgpt2.kernels.cross_entropy import cross_entropy_reference
from fastgpt2.kernels.loss import (
    chunk_rows,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    linear_cross_entropy_reference,
    why_unsupported,
)
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configurations
from tests.kernels.guards import guarded
from tests.seeds import generator

# `fastgpt2.kernels.loss` is the function.
driver = importlib.import_module("fastgpt2.kernels.loss")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.numeric
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# N, V, padded V, C; and a budget that makes three chunks of it, the last of them short.
SMALL = (11, 100, 112, 16)
THREE_CHUNKS = 4 * 128

every_implementation = pytest.mark.parametrize("implementation", ["chunked", "triton"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_reduction = pytest.mark.parametrize("reduction", ["mean", "sum", "none"])

# (hidden (N, C), weight (padded V, C), targets (N,), upstream: a scalar, or (N,) for "none")
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
# Of the inputs: (loss, dhidden, dweight).
Compute = Callable[..., tuple[Tensor, Tensor, Tensor]]


def inputs(
    size: tuple[int, int, int, int] = SMALL,
    dtype: torch.dtype = torch.float32,
    *,
    reduction: str = "mean",
    seed: int = 0,
    gain: float = 1.0,
    ignored: bool = True,
) -> Inputs:
    """Logits of standard deviation `gain`; every fifth target is ignored."""
    N, V, padded, C = size
    rng = generator(seed, DEVICE)
    draw = functools.partial(torch.randn, generator=rng, dtype=torch.float64, device=DEVICE)
    hidden, weight = draw(N, C), draw(padded, C) * gain / math.sqrt(C)
    targets = torch.randint(V, (N,), generator=rng, device=DEVICE)
    if ignored:
        targets[2::5] = -100
    upstream = draw(N) if reduction == "none" else torch.tensor(1.7, device=DEVICE)
    return hidden.to(dtype), weight.to(dtype), targets, upstream.to(torch.promote_types(dtype, torch.float32))


def differentiate(
    function: Callable[..., Tensor], hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss = function(*leaves, targets)
    return (loss.detach(), *torch.autograd.grad(loss, leaves, upstream.to(loss.dtype)))


def ours(*args: Tensor, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return differentiate(functools.partial(linear_cross_entropy, **options), *args)


def exact(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, **options: Any):
    function = functools.partial(linear_cross_entropy_reference, **options)
    return differentiate(function, hidden.double(), weight.double(), targets, upstream)


def plain(*args: Tensor, **options: Any):
    return differentiate(functools.partial(linear_cross_entropy_reference, **options), *args)


def plain_16_bits(*args: Tensor, vocab_size: int, **options: Any):
    """As F.cross_entropy takes the logits, in their own dtype."""
    return differentiate(lambda h, w, t: F.cross_entropy(F.linear(h, w[:vocab_size]), t, **options), *args)


def scaled_after(hidden: Tensor, weight: Tensor, targets: Tensor, upstream: Tensor, *, reduction="mean", **options):
    """The upstream gradient's scale and the mean's count multiply after the products, not before.

    A sum of 50257 terms rounds otherwise where each is multiplied by a constant: by 2.5 times as much was seen.
    """
    count = (targets != options.get("ignore_index", -100)).sum() if reduction == "mean" else 1
    function = functools.partial(
        linear_cross_entropy_reference, reduction="none" if reduction == "none" else "sum", **options
    )
    largest = upstream.abs().max()
    loss, *gradients = differentiate(function, hidden, weight, targets, upstream / largest)
    return loss / count, *(gradient * (largest / count) for gradient in gradients)


def excess(
    compute: Compute, make: Callable[[int], Inputs], *, vocab_size: int, slow: bool = False, **options: Any
) -> dict[str, float]:
    """Error over budget for the loss and both gradients, by maximum and by norm: right is at most 1.

    slow: one seed of ours, as interpreted kernels take long.
    """

    names = ("loss", "dhidden", "dweight")
    forms = (compute, plain, plain_16_bits, scaled_after, exact)
    mine, *peers, truth = (named(names, f, vocab_size=vocab_size, **options) for f in forms)
    return pooled(make, mine, peers, truth, once=slow).excess()


def assert_right(compute: Compute, make: Callable[[int], Inputs], **options: Any) -> None:
    over = {key: factor for key, factor in excess(compute, make, **options).items() if factor > 1.0}
    assert not over, over


def interpreted(implementation: str) -> bool:
    return implementation == "triton" and DEVICE == "cpu"


@every_implementation
@every_reduction
@every_dtype
def test_within_the_budget(dtype, reduction, implementation) -> None:
    assert_right(
        functools.partial(ours, implementation=implementation, memory_budget=THREE_CHUNKS * dtype.itemsize),
        lambda seed: inputs(SMALL, dtype, reduction=reduction, seed=seed),
        vocab_size=SMALL[1],
        reduction=reduction,
        slow=interpreted(implementation),
    )


ODD = [(1, 128256, 128256), (77, 50257, 50304), (289, 50257, 50257)]


@pytest.mark.parametrize(("N", "V", "padded"), ODD)
@every_implementation
def test_odd_shapes(N, V, padded, implementation) -> None:
    make = lambda seed: inputs((N, V, padded, 4), seed=seed, ignored=N > 2)  # noqa: E731
    compute = functools.partial(ours, implementation=implementation)
    assert_right(compute, make, vocab_size=V, slow=interpreted(implementation))


@every_implementation
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_a_large_vocabulary_in_16_bits(dtype, implementation) -> None:
    """Several blocks of vocabulary rows, each added to the float32 gradient by itself."""
    size = (11, 2500, 2560, 16)
    assert size[2] > 2 * driver.PRODUCT_ROWS
    make = lambda seed: inputs(size, dtype, seed=seed)  # noqa: E731
    compute = functools.partial(ours, implementation=implementation)
    assert_right(compute, make, vocab_size=size[1], slow=interpreted(implementation))


@pytest.mark.parametrize("V", [1, 7, 16, 17, 33, 64, 65])
def test_the_ends_of_the_kernels_blocks(V, monkeypatch) -> None:
    """Blocks of 16 columns: none whole, some whole, a vocabulary that ends within, at and before the end of one."""
    monkeypatch.setattr(cross_entropy, "lookup", lambda *_: LaunchConfig(block_n=16))
    make = lambda seed: inputs((6, V, V + 3, 8), seed=seed)  # noqa: E731
    assert_right(functools.partial(ours, implementation="triton"), make, vocab_size=V, slow=DEVICE == "cpu")


@pytest.mark.parametrize("arch", architectures())
def test_shipped_blocks(arch, monkeypatch) -> None:
    shipped = configurations(arch)["cross_entropy", "bfloat16", 50304]
    monkeypatch.setattr(cross_entropy, "lookup", lambda *_: shipped)
    size = (3, 50257, 50304, 8)
    assert_right(functools.partial(ours, implementation="triton"), lambda seed: inputs(size, seed=seed),
                 vocab_size=size[1], slow=DEVICE == "cpu")  # fmt: skip


@every_implementation
@every_reduction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_extreme_logits(dtype, reduction, implementation) -> None:
    """Logits in the tens of thousands: one takes all, and losses keep their digits."""
    assert_right(
        functools.partial(ours, implementation=implementation),
        lambda seed: inputs(SMALL, dtype, reduction=reduction, seed=seed, gain=1e4),
        vocab_size=SMALL[1],
        reduction=reduction,
        slow=interpreted(implementation),
    )


@every_implementation
@pytest.mark.parametrize("logit", [30_000.0, -30_000.0])
def test_small_losses_keep_their_digits(logit, implementation) -> None:
    """Targets that win by a little at large logits: log-sum-exp minus logit would round to nothing."""
    hidden = torch.ones(4, 1, device=DEVICE)
    weight = torch.full((8, 1), logit, device=DEVICE)
    weight[3] += 6.0
    losses = linear_cross_entropy(hidden, weight, torch.full((4,), 3, device=DEVICE), reduction="none",
                                  implementation=implementation)  # fmt: skip
    expected = math.log1p(7 * math.exp(-6.0))
    # To a float32 the logits are 2e-3 apart; without the fused multiply-add of a GPU some of that is left.
    assert (losses - expected).abs().max().item() < 3e-5


@every_implementation
def test_first_and_last_target(implementation) -> None:
    hidden, weight, targets, upstream = inputs((2, 100, 112, 16), ignored=False)
    targets[:] = torch.tensor([0, 99])
    results = ours(hidden, weight, targets, upstream, vocab_size=100, implementation=implementation)
    for mine, truth in zip(results, exact(hidden, weight, targets, upstream, vocab_size=100), strict=True):
        torch.testing.assert_close(mine.double(), truth, rtol=1e-5, atol=1e-6)


@every_implementation
@every_reduction
def test_all_ignored(reduction, implementation) -> None:
    hidden, weight, targets, upstream = inputs(reduction=reduction)
    targets[:] = -100
    options = {"vocab_size": SMALL[1], "reduction": reduction}
    loss, dhidden, dweight = ours(hidden, weight, targets, upstream, implementation=implementation, **options)
    torch.testing.assert_close(loss, plain(hidden, weight, targets, upstream, **options)[0], equal_nan=True)
    assert loss.isnan().all() == (reduction == "mean")
    assert not dhidden.any() and not dweight.any()


@every_implementation
def test_an_ignored_class_may_be_one_of_the_vocabulary(implementation) -> None:
    args = inputs(ignored=False)
    args[2][::2] = 5
    options = {"vocab_size": SMALL[1], "ignore_index": 5}
    results = ours(*args, implementation=implementation, **options)
    for mine, theirs in zip(results, exact(*args, **options), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-6)


@every_implementation
@every_reduction
@pytest.mark.parametrize("wrong", [-1, 100, 111, 2**40, -(2**40)])
def test_a_target_outside_the_vocabulary_is_found(wrong, reduction, implementation) -> None:
    hidden, weight, targets, upstream = inputs(reduction=reduction, ignored=False)
    targets[4] = wrong
    options = {"vocab_size": SMALL[1], "implementation": implementation}
    loss, dhidden, dweight = ours(hidden, weight, targets, upstream, reduction=reduction, **options)
    assert loss.isnan().sum() == 1 and (reduction != "none" or loss[4].isnan())
    assert not dhidden[4].any() and dhidden[[0, 1, 2, 3, 5]].all()
    # The others' gradients are those of a batch in which that row is ignored, up to what the mean divides by.
    ignored = targets.masked_fill(targets == wrong, -100)
    _, dhidden2, dweight2 = ours(hidden, weight, ignored, upstream, reduction=reduction, **options)
    ratio = 10 / 11 if reduction == "mean" else 1.0
    torch.testing.assert_close((dhidden, dweight), (dhidden2 * ratio, dweight2 * ratio))


@every_implementation
def test_the_padding_of_the_vocabulary_is_outside(implementation) -> None:
    """Whatever the weight's rows past vocab_size hold, their gradient is exactly zero and nothing else changes."""
    hidden, weight, targets, upstream = inputs()
    loud = weight.clone()
    loud[SMALL[1] :] = 1e4
    options = {"vocab_size": SMALL[1], "implementation": implementation}
    results = ours(hidden, weight, targets, upstream, **options)
    for quiet, found in zip(results, ours(hidden, loud, targets, upstream, **options), strict=True):
        torch.testing.assert_close(found, quiet)
    assert not results[2][SMALL[1] :].any() and results[2][: SMALL[1]].any(1).all()


def faults() -> dict[str, Compute]:
    """Planted in a computation that is right."""

    def with_step(change: Callable[[dict[str, Any]], None], **options: Any) -> Compute:
        """The rows' step with something changed before or after it."""

        def compute(*args: Tensor, **given: Any):
            step = driver.cross_entropy_rows

            def faulty(*values: Any) -> None:
                names = ("logits", "targets", "losses", "lse", "upstream", "vocab_size", "ignore_index", "gradient")
                here = dict(zip(names, values, strict=True))
                change(here)
                step(*(here[name] for name in names))
                if after := here.get("after"):
                    after()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(driver, "cross_entropy_rows", faulty)
                return ours(*args, implementation="chunked", memory_budget=THREE_CHUNKS * 4, **options | given)

        return compute

    def one_hot_forgotten(here: dict[str, Any]) -> None:
        rows, targets = here["logits"], here["targets"].clamp(min=0)[:, None]
        kept = (here["targets"] >= 0).to(rows.dtype)[:, None]
        here["after"] = lambda: rows.scatter_add_(1, targets, kept)

    def last_row_of_a_chunk_lost(here: dict[str, Any]) -> None:
        here["after"] = lambda: here["logits"][-1].zero_()

    def gradient_in_bfloat16(here: dict[str, Any]) -> None:
        here["after"] = lambda: here["logits"].copy_(here["logits"].bfloat16())

    def losses_in_bfloat16(here: dict[str, Any]) -> None:
        here["after"] = lambda: here["losses"].copy_(here["losses"].bfloat16())

    def padding_in_the_softmax(*args: Tensor, vocab_size: int, **options: Any):
        return ours(*args, implementation="chunked", **options)

    def ignored_counted(hidden, weight, targets, upstream, **options: Any):
        share = (targets >= 0).float().mean()
        return tuple(x * share for x in ours(hidden, weight, targets, upstream, implementation="chunked", **options))

    def zero_dweight(*args: Tensor, **options: Any):
        loss, dhidden, dweight = ours(*args, implementation="chunked", **options)
        return loss, dhidden, torch.zeros_like(dweight)

    return {
        "one-hot forgotten": with_step(one_hot_forgotten),
        "last row of a chunk lost": with_step(last_row_of_a_chunk_lost),
        "gradient in bfloat16": with_step(gradient_in_bfloat16),
        "losses in bfloat16": with_step(losses_in_bfloat16),
        "padding in the softmax": padding_in_the_softmax,
        "ignored counted": ignored_counted,
        "zero dweight": zero_dweight,
    }


@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_found(fault) -> None:
    factors = excess(faults()[fault], lambda seed: inputs(seed=seed), vocab_size=SMALL[1], reduction="mean")
    assert max(factors.values()) > 2.0


def test_a_first_chunk_forgotten_by_the_sum_is_found(monkeypatch) -> None:
    accumulate = driver._accumulate
    monkeypatch.setattr(driver, "_accumulate", lambda *args, first: accumulate(*args, first=True))
    compute = functools.partial(ours, implementation="chunked", memory_budget=THREE_CHUNKS * 4)
    assert excess(compute, lambda seed: inputs(seed=seed), vocab_size=SMALL[1])["dweight by norm"] > 2.0


@pytest.mark.parametrize("fault", ["one-hot forgotten", "last row of a chunk lost", "padding in the softmax"])
def test_a_planted_fault_is_found_in_bfloat16(fault) -> None:
    make = lambda seed: inputs(dtype=torch.bfloat16, seed=seed)  # noqa: E731
    assert max(excess(faults()[fault], make, vocab_size=SMALL[1], reduction="mean").values()) > 2.0


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_is_written_and_nothing_beside_it(dtype, implementation, monkeypatch) -> None:
    hidden, weight, targets, _ = inputs(dtype=dtype)
    budget = THREE_CHUNKS * dtype.itemsize
    options = (dtype, SMALL[1], -100, implementation == "triton", budget, True, True)
    upstream = torch.ones(SMALL[0], device=DEVICE)
    with guarded(monkeypatch) as made:
        _, lse, *gradients = linear_cross_entropy_forward(hidden, weight, targets, *options)
        again = linear_cross_entropy_backward(upstream, lse, hidden, weight, targets, *options)
    for whole, middle in made:
        assert not middle.isnan().any()
        assert whole.isnan().sum() == whole.numel() - middle.numel()
    assert len(made) >= 2 + 2 * 3
    for first, second in zip(gradients, again, strict=True):
        torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@every_implementation
@every_dtype
def test_rows_whatever_lies_past_the_vocabulary(dtype, implementation) -> None:
    """The rows' step alone, on logits that NaN surrounds: losses, log-sum-exps, gradient, and zeros past the end."""
    N, V, stride = 5, 100, 128
    logits = torch.full((N, stride), math.nan, dtype=dtype, device=DEVICE)
    logits[:, :V] = torch.randn(N, V, generator=generator()).to(dtype)
    targets = torch.tensor([0, 99, -100, 7, 3], device=DEVICE)
    wanted = cross_entropy_reference(logits[:, :V].double(), targets)
    losses, lse = (torch.full((N,), math.nan, device=DEVICE) for _ in range(2))
    step = cross_entropy.cross_entropy_rows if implementation == "triton" else driver.cross_entropy_rows
    before = logits.clone()
    for upstream in (None, torch.full((N,), 0.5, device=DEVICE)):
        rows = before.clone()
        step(rows, targets, losses, lse, upstream, V, -100, True)
        gradient = wanted[2] * (1.0 if upstream is None else 0.5)
        assert maximum(rows[:, :V].double() - gradient) <= 1.01 * torch.finfo(dtype).eps / 2 + 1e-6
        assert not rows[:, V:].any()
    torch.testing.assert_close(losses.double(), wanted[0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-6, atol=1e-6)


@every_implementation
@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided"])
def test_upstream_gradients_of_any_layout(kind, implementation) -> None:
    hidden, weight, targets, upstream = inputs((12, 100, 112, 16), reduction="none")
    hidden, targets, upstream = hidden.view(3, 4, 16), targets.view(3, 4), upstream.view(3, 4)
    match kind:
        case "expanded":
            upstream = torch.full((), 0.3, device=DEVICE).expand(3, 4)
        case "transposed":
            upstream = upstream.T.contiguous().T
        case "strided":
            upstream = F.pad(upstream[..., None], (0, 2))[..., 0]
    options = {"vocab_size": 100, "reduction": "none", "implementation": implementation}
    strange = ours(hidden, weight, targets, upstream, **options)
    usual = ours(hidden, weight, targets, upstream.contiguous(), **options)
    assert strange[0].shape == targets.shape and strange[1].shape == hidden.shape
    assert all(torch.equal(x, y) for x, y in zip(strange, usual, strict=True))


@every_implementation
def test_hidden_and_targets_of_any_layout(implementation) -> None:
    hidden, weight, targets, upstream = inputs((12, 100, 112, 16))
    options = {"vocab_size": 100, "implementation": implementation}
    usual = ours(hidden.view(3, 4, 16), weight, targets.view(3, 4), upstream, **options)
    strange = ours(
        hidden.view(3, 4, 16).transpose(0, 1).contiguous().transpose(0, 1),
        weight.T.contiguous().T,
        targets.view(3, 4).T.contiguous().T,
        upstream,
        **options,
    )
    torch.testing.assert_close(strange, usual)


@every_implementation
def test_targets_and_upstream_of_any_stride(implementation) -> None:
    """Of one dimension, which the public function passes on as it lies."""
    hidden, weight, targets, upstream = inputs(reduction="none")
    options = (hidden.dtype, SMALL[1], -100, implementation == "triton", THREE_CHUNKS * 4, True, True)
    results = []
    for t, u in ((targets, upstream), (targets.repeat_interleave(2)[::2], upstream.repeat_interleave(2)[::2])):
        losses, lse, *gradients = linear_cross_entropy_forward(hidden, weight, t, *options)
        results.append((losses, *gradients, *linear_cross_entropy_backward(u, lse, hidden, weight, t, *options)))
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@every_implementation
@pytest.mark.parametrize(("dtype", "other"), [DTYPES[1:], DTYPES[:0:-1]], ids=str)
def test_the_backward_is_outside_the_callers_autocast(dtype, other, implementation) -> None:
    hidden, weight, targets, upstream = inputs(dtype=dtype, reduction="none")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = linear_cross_entropy(*leaves, targets, reduction="none", implementation=implementation)
    outside = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
    with torch.autocast(DEVICE, other):
        inside = torch.autograd.grad(losses, leaves, upstream)
    assert all(torch.equal(x, y) for x, y in zip(inside, outside, strict=True))


@every_implementation
def test_ignored_rows_may_have_any_upstream_gradient(implementation) -> None:
    hidden, weight, targets, upstream = inputs(reduction="none")
    options = {"vocab_size": SMALL[1], "reduction": "none", "implementation": implementation}
    usual = ours(hidden, weight, targets, upstream, **options)
    loud = upstream.masked_fill(targets == -100, math.nan)
    assert all(torch.equal(x, y) for x, y in zip(usual, ours(hidden, weight, targets, loud, **options), strict=True))


@every_implementation
@every_reduction
@pytest.mark.parametrize("scale", [1e-12, 0.0, 1e12, -1e12])
def test_small_and_large_upstream_gradients_survive_16_bits(scale, reduction, implementation) -> None:
    """Under autocast to float16 the weight's gradient is float32: the upstream gradient must not pass float16."""
    hidden, weight, targets, upstream = inputs(reduction=reduction)
    upstream = upstream.abs()
    options = {"vocab_size": SMALL[1], "reduction": reduction}
    with torch.autocast(DEVICE, torch.float16):
        _, dhidden, dweight = ours(hidden, weight, targets, upstream * scale, implementation=implementation, **options)
    _, dhidden_exact, dweight_exact = exact(hidden, weight, targets, upstream * scale, **options)
    for mine, truth in ((dhidden, dhidden_exact), (dweight, dweight_exact)):
        assert mine.dtype == torch.float32
        assert maximum(mine.double() - truth) <= 4e-3 * maximum(truth)


@every_implementation
def test_autocast_decides_the_dtype_and_never_rounds_the_weights_gradient(implementation) -> None:
    hidden, weight, targets, upstream = inputs(ignored=False)
    options = {"vocab_size": SMALL[1], "implementation": implementation, "memory_budget": THREE_CHUNKS * 2}
    with torch.autocast(DEVICE, torch.bfloat16):
        loss, dhidden, dweight = ours(hidden, weight, targets, upstream, **options)
        half, *_ = ours(hidden.bfloat16(), weight, targets, upstream, **options)
    assert {loss.dtype, dhidden.dtype, dweight.dtype} == {torch.float32}
    explicit = ours(hidden.bfloat16(), weight.bfloat16(), targets, upstream, **options)
    assert [x.dtype for x in explicit] == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert torch.equal(loss, explicit[0]) and torch.equal(loss, half)
    assert torch.equal(dweight.bfloat16(), explicit[2])
    assert not torch.equal(dweight.bfloat16().float(), dweight)


@every_reduction
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_no_chunks_share_of_the_weights_gradient_is_rounded_to_16_bits(dtype, reduction) -> None:
    """64 equal logits have a gradient that 16 bits hold exactly: all error is that of the products with the hidden
    states, and of their sum over eight chunks."""
    N, V, C = 64, 64, 16
    hidden, _, targets, _ = inputs((N, V, V, C), dtype)
    weight, upstream = torch.zeros(V, C, device=DEVICE), torch.ones((N,) if reduction == "none" else (), device=DEVICE)
    args, options = (hidden, weight, targets, upstream), {"reduction": reduction}
    with torch.autocast(DEVICE, dtype):
        *_, dweight = ours(*args, implementation="chunked", memory_budget=1, **options)
    *_, truth = exact(*args, **options)
    assert rms(dweight.double() - truth) <= 2**-17 * rms(truth)


class Spy(TorchDispatchMode):
    """Counts operators, and the elements of the largest tensor that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        self.calls.append(func.overloadpacket.__name__)
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, Tensor) and not func.is_view:
                self.largest = max(self.largest, x.numel())
        return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_logits_never_exist_whole(dtype) -> None:
    N, V, C = 64, 512, 4
    hidden, weight, targets, _ = inputs((N, V, V, C), dtype)
    options = (dtype, V, -100, False, N * V * dtype.itemsize // 8, True, True)
    with Spy() as spy:
        linear_cross_entropy_forward(hidden, weight, targets, *options)
    assert spy.calls.count("mm") >= 3 and spy.largest == N * V // 8


def test_forward_only_computes_no_gradient() -> None:
    hidden, weight, targets, _ = inputs()
    options = (torch.float32, SMALL[1], -100, False, THREE_CHUNKS * 4)
    with Spy() as spy:
        _, _, *gradients = linear_cross_entropy_forward(hidden, weight, targets, *options, False, False)
    assert spy.calls.count("mm") == 3 and "addmm_" not in spy.calls
    assert [x.numel() for x in gradients] == [0, 0]
    # The public function asks for what can be used: nothing, or one gradient.
    asked = []
    original = torch.ops.fastgpt2.linear_cross_entropy_forward

    def forward(*args):
        asked.append(args[-2:])
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.fastgpt2, "linear_cross_entropy_forward", forward)
        linear_cross_entropy(hidden, weight, targets)
        linear_cross_entropy(hidden, weight.requires_grad_(), targets)
        with torch.no_grad():
            linear_cross_entropy(hidden, weight, targets)
    assert asked == [(False, False), (False, True), (False, False)]


@every_implementation
@every_reduction
def test_one_gradient_without_the_other(reduction, implementation) -> None:
    hidden, weight, targets, upstream = inputs(reduction=reduction)
    options = {"vocab_size": SMALL[1], "reduction": reduction, "implementation": implementation}
    loss, *both = ours(hidden, weight, targets, upstream, **options)
    for i, wanted in enumerate(both):
        leaves = [x.clone().requires_grad_(i == j) for j, x in enumerate((hidden, weight))]
        alone = linear_cross_entropy(leaves[0], leaves[1], targets, **options)
        alone.backward(upstream)
        assert torch.equal(alone.detach(), loss)
        grad = leaves[i].grad
        assert grad is not None and torch.equal(grad, wanted)
        assert leaves[1 - i].grad is None
    with torch.no_grad():
        assert torch.equal(linear_cross_entropy(hidden, weight, targets, **options), loss)


def test_a_retained_graph_gives_the_same_gradient_again() -> None:
    hidden, weight, targets, _ = inputs()
    weight.requires_grad_()
    loss = linear_cross_entropy(hidden, weight, targets)
    first, second = (torch.autograd.grad(loss, weight, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_chunks() -> None:
    """(rows, bytes a row, budget) -> rows of a chunk: 1 to 8 chunks, whole tiles where there are any."""
    row = 50304 * 2
    assert chunk_rows(65536, row, 2**30) == 9472 and -(-65536 // 9472) == 7
    assert chunk_rows(65536, row, 2**40) == 65536
    assert chunk_rows(65536, row, 1) == 8192
    assert chunk_rows(8192, 50304 * 4, 2**28) == 1280
    assert chunk_rows(1, row, 1) == 1 and chunk_rows(3, row, 1) == 1 and chunk_rows(0, row, 1) == 1
    assert chunk_rows(77, 4, 1) == 10
    for rows in (1, 2, 7, 8, 9, 127, 129, 1000, 1025, 8192, 8193, 65537):
        for budget in (1, 100, 1000, 10**6):
            each = chunk_rows(rows, 10, budget)
            chunks = -(-rows // each)
            assert 1 <= chunks <= 8
            assert each * 10 <= budget or each <= -(-rows // 8) * 9 / 8


@every_implementation
@pytest.mark.parametrize("chunks", [1, 2, 8])
def test_the_budget_changes_nothing_else(chunks, implementation) -> None:
    args = inputs()
    options = {"vocab_size": SMALL[1], "implementation": implementation}
    budget = -(-SMALL[0] // chunks) * 128 * 4
    few = ours(*args, memory_budget=budget, **options)
    torch.testing.assert_close(few, ours(*args, **options), rtol=1e-5, atol=1e-6)


@every_implementation
@every_reduction
def test_repeats_are_bitwise_equal(reduction, implementation) -> None:
    args = inputs(reduction=reduction)
    options = {"vocab_size": SMALL[1], "reduction": reduction, "implementation": implementation}
    for first, second in zip(ours(*args, **options), ours(*args, **options), strict=True):
        assert torch.equal(first, second)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
@every_implementation
@every_reduction
def test_gradcheck(reduction, implementation) -> None:
    hidden, weight, targets, _ = inputs((3, 4, 5, 2), torch.float64)
    options = {"vocab_size": 4, "reduction": reduction, "implementation": implementation, "memory_budget": 2 * 64 * 8}
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy(h, w, targets, **options), (hidden, weight))


@every_implementation
def test_operators_pass_opcheck(implementation) -> None:
    hidden, weight, targets, upstream = inputs((3, 7, 8, 4), torch.bfloat16, reduction="none")
    options = (torch.bfloat16, 7, -100, implementation == "triton", 64 * 2)
    lse = torch.randn(3, device=DEVICE)
    for wanted in ((True, True), (False, True), (False, False)):
        args = (hidden, weight, targets, *options, *wanted)
        torch.library.opcheck(torch.ops.fastgpt2.linear_cross_entropy_forward.default, args)
    args = (upstream, lse, hidden, weight, targets, *options, True, True)
    torch.library.opcheck(torch.ops.fastgpt2.linear_cross_entropy_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("implementation", "reduction"), [("chunked", "mean"), ("chunked", "none"), ("triton", "sum"), ("triton", "none")]
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_whole(backend, dynamic, reduction, implementation) -> None:
    torch._dynamo.reset()

    def head(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = linear_cross_entropy(
                x.sin(), weight, targets, vocab_size=100, reduction=reduction, implementation=implementation
            )
        return (loss * loss).sum()

    hidden, weight, targets, _ = inputs((6, 100, 112, 16))
    hidden, targets = hidden.view(2, 3, 16), targets.view(2, 3)
    results = []
    for function in (head, torch.compile(head, fullgraph=True, backend=backend, dynamic=dynamic)):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss = function(*leaves, targets)
        results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
        with torch.no_grad():
            results[-1] += (function(*leaves, targets),)
    for eager, compiled in zip(*results, strict=True):
        assert eager.stride() == compiled.stride()
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-6)


@every_reduction
def test_a_batch_of_nothing(reduction) -> None:
    hidden, weight, targets, _ = inputs()
    upstream = torch.ones(0 if reduction == "none" else (), device=DEVICE)
    args = (hidden[:0], weight, targets[:0], upstream)
    loss, dhidden, dweight = ours(*args, reduction=reduction)
    torch.testing.assert_close(loss, plain(*args, reduction=reduction)[0], equal_nan=True)
    assert dhidden.shape == (0, SMALL[3]) and dweight.shape == weight.shape and not dweight.any()


@every_reduction
def test_second_derivatives_are_an_error(reduction) -> None:
    hidden, weight, targets, _ = inputs()
    weight.requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(linear_cross_entropy(hidden, weight, targets, reduction=reduction).sum(), weight,
                            create_graph=True)  # fmt: skip


@pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="torch has linear_cross_entropy from 2.13 on")
@every_implementation
@every_reduction
def test_agrees_with_torchs_own(reduction, implementation) -> None:
    args = inputs((11, 100, 100, 16), reduction=reduction)
    theirs = differentiate(functools.partial(F.linear_cross_entropy, reduction=reduction), *args)
    mine = ours(*args, reduction=reduction, implementation=implementation)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-6)


def test_errors_name_the_argument() -> None:
    h, w, t, _ = inputs()
    call = linear_cross_entropy
    for function, message in (
        (lambda: call(torch.ones((), device=DEVICE), w, t), r"hidden must be \(\.\.\., C\)"),
        (lambda: call(h, w[:, :3], t), r"weight must be \(V, C\) with C = 16, got shape \(112, 3\)"),
        (lambda: call(h, w[0], t), "weight must be"),
        (lambda: call(h, w, t[:3]), r"targets must have hidden's shape without C, \(11,\), got \(3,\)"),
        (lambda: call(h, w, t.int()), "targets must be torch.int64, got torch.int32"),
        (lambda: call(h, w, t.to("meta")), "targets must be on hidden's device"),
        (lambda: call(h, w.to("meta"), t), "weight must be on hidden's device"),
        (lambda: call(h.long(), w, t), "hidden must be bfloat16"),
        (lambda: call(h, w.bfloat16(), t), "weight must have hidden's dtype, torch.float32, got torch.bfloat16"),
        (lambda: call(h, w, t, vocab_size=113), "vocab_size must be from 1 to weight's 112 rows, got 113"),
        (lambda: call(h, w, t, vocab_size=0), "vocab_size must be"),
        (lambda: call(h, w, t, reduction="max"), "reduction must be one of mean, sum, none, got 'max'"),
        (lambda: call(h, w, t, memory_budget=0), "memory_budget must be positive"),
        (lambda: call(h, w, t, implementation="cuda"), "implementation must be one of auto, triton, chunked"),
    ):
        with pytest.raises(ValueError, match=message):
            function()


def test_the_implementation_is_what_runs(monkeypatch) -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    monkeypatch.setattr(launch, "interpreting", lambda: True)
    assert driver._takes_triton("triton", cpu, torch.float32)
    assert not driver._takes_triton("auto", cpu, torch.float32)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    with pytest.raises(ValueError, match='implementation="chunked"'):
        driver._takes_triton("triton", cpu, torch.float32)
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    assert driver._takes_triton("auto", cuda, torch.bfloat16)
    assert not driver._takes_triton("chunked", cuda, torch.bfloat16)
    assert not driver._takes_triton("auto", cuda, torch.float64)
    monkeypatch.setattr(launch, "capability", lambda _: (7, 5))
    assert not driver._takes_triton("auto", cuda, torch.float16)
    monkeypatch.setattr(driver, "_has_triton", lambda: False)
    assert "triton package" in str(why_unsupported(cuda, torch.bfloat16))
    assert not driver._takes_triton("auto", cuda, torch.bfloat16)


@pytest.mark.skipif(DEVICE == "cuda", reason="the GPU's own test of the tuner times it")
def test_the_tuners_example_does_not_depend_on_the_configuration(monkeypatch) -> None:
    monkeypatch.setattr(cross_entropy, "EXAMPLE_ROWS", 20)
    first, other = (
        cross_entropy.TUNING["cross_entropy"].example("bfloat16", 96, torch.device("cpu"), i) for i in (0, 1)
    )
    results = [f(config) for f in (first, other) for config in (LaunchConfig(block_n=32), LaunchConfig(block_n=64))]
    torch.testing.assert_close(results[0], results[1])
    assert not torch.equal(results[0][0], results[2][0])


FULL = (2048, 50257, 50304, 768)
"""In four chunks of 16 bits or seven of 32; in float64 its logits are 0.8 GB, some five of them in each process."""


@pytest.mark.gpu
@every_implementation
@every_reduction
@every_dtype
def test_full_size(dtype, reduction, implementation) -> None:
    assert_right(
        functools.partial(ours, implementation=implementation, memory_budget=2**26),
        lambda seed: inputs(FULL, dtype, reduction=reduction, seed=seed),
        vocab_size=FULL[1],
        reduction=reduction,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("N", [1, 77, 289])
@pytest.mark.parametrize(("V", "padded"), [(50257, 50257), (50257, 50304), (128256, 128256)])
@every_dtype
def test_full_odd_shapes(dtype, V, padded, N) -> None:
    make = lambda seed: inputs((N, V, padded, 768), dtype, seed=seed, ignored=N > 2)  # noqa: E731
    assert_right(functools.partial(ours, implementation="triton"), make, vocab_size=V)


@pytest.mark.gpu
@every_reduction
def test_250_repeats_are_bitwise_equal(reduction) -> None:
    args = inputs(FULL, torch.bfloat16, reduction=reduction)
    options = {"vocab_size": FULL[1], "reduction": reduction, "memory_budget": 2**26}
    first = ours(*args, **options)
    for _ in range(250):
        assert all(torch.equal(x, y) for x, y in zip(ours(*args, **options), first, strict=True))


@pytest.mark.gpu
@pytest.mark.xdist_group("fills the card")
def test_offsets_past_32_bits() -> None:
    """One chunk of more than 2^31 logits: the last rows must be computed like the first."""
    N, V = 44032, 50304
    assert N * V > 2**31
    hidden, weight, targets, _ = inputs((128, V, V, 64), torch.bfloat16, ignored=False)
    hidden, targets = hidden.repeat(N // 128, 1).requires_grad_(), targets.repeat(N // 128)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", memory_budget=2**34)
    loss.backward()
    assert hidden.grad is not None
    # cuBLAS may cut the sums over V in other places in other rows.
    place = 2**-7 * hidden.grad[:128].abs().max().item()
    torch.testing.assert_close(hidden.grad[:128], hidden.grad[-128:], rtol=0, atol=place)
    losses = linear_cross_entropy(hidden.detach(), weight, targets, reduction="none", memory_budget=2**34)
    torch.testing.assert_close(losses[:128], losses[-128:], rtol=0, atol=2**-6)


@pytest.mark.gpu
@every_implementation
@every_reduction
def test_no_wait_and_capturable(reduction, implementation) -> None:
    """A step in a CUDA graph, replayed on other inputs, under torch's check for synchronisations."""
    args = inputs((1000, 50257, 50304, 64), torch.bfloat16, reduction=reduction)
    options = {"vocab_size": 50257, "reduction": reduction, "implementation": implementation, "memory_budget": 2**25}
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        ours(*args, **options)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        captured = ours(*args, **options)
    other = inputs((1000, 50257, 50304, 64), torch.bfloat16, reduction=reduction, seed=1)
    for x, y in zip(args, other, strict=True):
        x.copy_(y)
    graph.replay()
    for mine, eager in zip(captured, ours(*other, **options), strict=True):
        assert torch.equal(mine, eager)


@pytest.mark.gpu
def test_the_weights_gradient_is_summed_in_float32() -> None:
    """8 chunks under autocast lose no more than one: cuBLAS adds to the float32 sum, without a 16-bit product."""
    hidden, weight, targets, upstream = inputs((4096, 50257, 50304, 128), ignored=False)
    errors = []
    for budget in (1, 2**40):
        with torch.autocast("cuda", torch.bfloat16):
            *_, dweight = ours(hidden, weight, targets, upstream, vocab_size=50257, memory_budget=budget)
        rounded = (hidden.bfloat16(), weight.bfloat16(), targets, upstream)
        *_, truth = exact(*rounded, vocab_size=50257)
        errors.append(rms(dweight.double() - truth))
    assert errors[0] <= 1.05 * errors[1]
