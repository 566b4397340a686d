"""LayerNorm against a float64 reference, within twice what PyTorch itself loses in the same precision.

Without a GPU the kernels run in Triton's interpreter, two programs with small tiles, so that a few rows make sums
of several; with one, the same tests run there with the shipped tiles, and those marked gpu add the full sizes.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.accuracy import maximum, named, pooled
from fastgpt2.kernels import add_layer_norm, launch, layer_norm
from fastgpt2.kernels.norm import (
    MAX_CHANNELS,
    layer_norm_backward,
    layer_norm_forward,
    layer_norm_reference,
    why_unsupported,
)
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configuration, configurations
from tests.kernels.guards import guarded
from tests.seeds import generator

MODULE = sys.modules["fastgpt2.kernels.norm"]
# With eps = 0 the rows past the last are divided by zero, and not stored.
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:(divide by zero|invalid value) encountered in:RuntimeWarning"),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("y", "sum", "dx", "dresidual", "dw", "db")

Results = tuple[Tensor, ...]


@dataclass(frozen=True)
class Case:
    """x, residual, weight, bias and the gradients of y and of the sum."""

    x: Tensor
    residual: Tensor
    weight: Tensor
    bias: Tensor
    dy: Tensor
    dtotal: Tensor
    eps: float = 1e-5

    def to(self, dtype: torch.dtype) -> Case:
        tensors = (self.x, self.residual, self.weight, self.bias, self.dy, self.dtotal)
        return Case(*(t.to(dtype) for t in tensors), self.eps)


# (x, residual, y); weight and bias are float32, as the trainer has them.
PRECISIONS = {
    "float32": (torch.float32, torch.float32, torch.float32),
    "bfloat16": (torch.bfloat16, torch.bfloat16, torch.bfloat16),
    "float16": (torch.float16, torch.float16, torch.float16),
    "bfloat16 autocast": (torch.bfloat16, torch.float32, torch.bfloat16),
    "float16 autocast": (torch.float16, torch.float32, torch.float16),
}

every_precision = pytest.mark.parametrize("precision", PRECISIONS)


def case(
    shape: tuple[int, ...], precision: str = "float32", *, seed: int = 0, mean: float = 0.0, eps: float = 1e-5
) -> Case:
    """Rows whose means lie around `mean`."""
    rng = generator(seed, DEVICE)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=rng, dtype=torch.float64, device=DEVICE)

    x_dtype, residual_dtype, y_dtype = PRECISIONS[precision]
    C = shape[-1]
    x, residual = draw(*shape).to(x_dtype), (draw(*shape) + mean).to(residual_dtype)
    weight, bias = (1 + 0.3 * draw(C)).float(), draw(C).float()
    dy, dtotal = draw(*shape).to(y_dtype), draw(*shape).to(torch.promote_types(x_dtype, residual_dtype))
    return Case(x, residual, weight, bias, dy, dtotal, eps)


Norm = Callable[..., tuple[Tensor, Tensor]]
"""(x, residual, weight, bias, eps, y's dtype) -> (y, the sum)"""
Compute = Callable[[Case], Results]


def differentiate(norm: Norm, c: Case) -> Results:
    leaves = [t.detach().requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
    y, total = norm(*leaves, c.eps, c.dy.dtype)
    return (y.detach(), total.detach(), *torch.autograd.grad((y, total), leaves, (c.dy, c.dtotal)))


def plain(x, residual, weight, bias, eps, dtype) -> tuple[Tensor, Tensor]:
    """PyTorch's own, in the weight's precision, as under autocast."""
    total = x + residual
    return F.layer_norm(total.to(weight.dtype), weight.shape, weight, bias, eps).to(dtype), total


def fused(x, residual, weight, bias, eps, dtype) -> tuple[Tensor, Tensor]:
    enabled = dtype != torch.promote_types(x.dtype, residual.dtype)
    with torch.autocast(DEVICE, dtype, enabled=enabled):
        return add_layer_norm(x, residual, weight, bias, eps=eps)


ours = functools.partial(differentiate, fused)


def exact(c: Case) -> Results:
    return differentiate(layer_norm_reference, c.to(torch.float64))


def alone(c: Case) -> Results:
    """layer_norm of the sum, in add_layer_norm's terms."""

    def norm(x, residual, weight, bias, eps, dtype) -> tuple[Tensor, Tensor]:
        total = x + residual
        with torch.autocast(DEVICE, dtype, enabled=dtype != total.dtype):
            return layer_norm(total, weight, bias, eps=eps), total

    return differentiate(norm, c)


def last(x, residual, weight, bias, eps, dtype) -> Tensor:
    """layer_norm of a sum that isn't written."""
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.promote_types(x.dtype, residual.dtype)):
        return layer_norm(x, weight, bias, eps=eps, residual=residual)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Force the rows of every kernel's tile; on a GPU the shipped ones stay."""

    def force(block_m: int) -> None:
        if DEVICE == "cpu":
            monkeypatch.setattr(MODULE, "lookup", lambda *_: LaunchConfig(block_m))

    return force


def excess(compute: Compute, make: Callable[[int], Case], slow: bool = False) -> dict[str, float]:
    """Error over budget for each result, by maximum and by norm: right is at most 1.

    The peers are PyTorch's own form and the one written out. slow: one seed of ours.
    """

    def own(c: Case) -> Results:
        return differentiate(plain, c)

    def written_out(c: Case) -> Results:
        return differentiate(layer_norm_reference, c)

    def checked(c: Case) -> Results:
        results = compute(c)
        assert [r.dtype for r in results] == [r.dtype for r in own(c)]
        return results

    mine, *peers, truth = (named(NAMES, f) for f in (checked, own, written_out, exact))
    return pooled(lambda seed: (make(seed),), mine, peers, truth, once=slow).excess()


def assert_right(compute: Compute, make: Callable[[int], Case], **options) -> None:
    over = {key: factor for key, factor in excess(compute, make, **options).items() if factor > 1.0}
    assert not over, over


def assert_equal(ours: Results, theirs: Results) -> None:
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def assert_same(ours: Results, theirs: Results) -> None:
    """To the bit, but on a GPU, where the order of a sum follows from how wide the loads are."""
    for x, y in zip(ours, theirs, strict=True):
        atol = 0.0 if DEVICE == "cpu" else 8 * torch.finfo(y.dtype).eps * maximum(y)
        torch.testing.assert_close(x, y, rtol=0, atol=atol)


@pytest.mark.parametrize("compute", [ours, alone], ids=["add", "alone"])
@pytest.mark.parametrize("C", [768, 1600])
@pytest.mark.parametrize("R", [1, 77, 289])
def test_every_number_of_rows(R, C, compute, rows) -> None:
    rows(32)
    assert_right(compute, lambda seed: case((R, C), seed=seed))


@pytest.mark.parametrize("shape", [(5, 1), (3, 2), (2, 3, 20), (1,), (20,), (2, 1, 3, 33), (3, MAX_CHANNELS)], ids=str)
def test_every_shape(shape, rows) -> None:
    rows(4)
    assert_right(ours, lambda seed: case(shape, seed=seed))


@pytest.mark.parametrize("compute", [ours, alone], ids=["add", "alone"])
@every_precision
def test_every_precision(precision, compute, rows) -> None:
    rows(16)
    assert_right(compute, lambda seed: case((70, 100), precision, seed=seed))


@every_precision
def test_rows_far_from_zero(precision, rows) -> None:
    """The variance is a thousandth of the mean's square, or a millionth in float32."""
    rows(16)
    mean = 1000.0 if precision == "float32" else 30.0
    assert_right(ours, lambda seed: case((33, 64), precision, seed=seed, mean=mean))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_sum_of_16_bits_is_rounded_before_it_is_normalised(precision, rows) -> None:
    """As PyTorch's plain form has it, forward and backward: every result is that of the rounded sum, rounded once."""
    rows(16)
    c = case((33, 100), precision)
    total = c.x + c.residual
    truth = exact(replace(c, x=total, residual=torch.zeros_like(total)))
    results = ours(c)
    assert torch.equal(results[1], total)
    for name, result, want in zip(NAMES, results, truth, strict=True):
        half_a_place = torch.finfo(result.dtype).eps / 2
        allowed = 1.01 * half_a_place * want.abs() + 1e-6 * maximum(want)
        assert ((result.double() - want).abs() <= allowed).all(), name


@pytest.mark.parametrize("eps", [0.0, 1e-6, 0.1])
def test_eps(eps, rows) -> None:
    rows(16)
    assert_right(ours, lambda seed: case((9, 20), seed=seed, eps=eps))


def test_a_constant_row_is_the_bias(rows) -> None:
    rows(4)
    c = case((3, 32))
    y, _, dx, *_ = ours(replace(c, x=torch.full_like(c.x, 2.5), residual=torch.full_like(c.x, -1.0)))
    assert torch.equal(y, c.bias.expand(y.shape))
    assert dx.isfinite().all()


@pytest.mark.parametrize("arch", architectures())
@pytest.mark.parametrize("C", [100, 768, 1280])
def test_shipped_tiles(arch, C, monkeypatch) -> None:
    """A GPU's own tiles, interpreted; a seed of ours is slow, as they are small."""
    if DEVICE == "cpu":
        monkeypatch.setattr(MODULE, "lookup", lambda op, *_: configuration(arch, op, "bfloat16", C))
    assert_right(ours, lambda seed: case((11, C), seed=seed), slow=DEVICE == "cpu")


@pytest.mark.parametrize("arch", architectures())
def test_tables_cover_every_kernel_and_precision(arch) -> None:
    entries = [key for key in configurations(arch) if key[0].startswith("layer_norm")]
    sizes = (256, 768, 1024, 1280, 1600, 2048, 4096, MAX_CHANNELS)
    precisions = ("bfloat16", "float16", "float32")
    assert sorted(entries) == sorted((op, p, C) for op in MODULE.KERNELS for p in precisions for C in sizes)


def faults() -> dict[str, tuple[str, float, Compute]]:
    """Planted in a computation that is right: (precision, mean of the rows, computation)."""

    def backward(change: Callable[..., tuple]) -> Compute:
        def compute(c: Case) -> Results:
            y, total, mean, rstd = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype)
            dy, dtotal, mean, rstd = change(c.dy, c.dtotal, mean, rstd)
            dx, _, sums = layer_norm_backward(dy, dtotal, total, mean, rstd, c.weight, c.x.dtype, c.residual.dtype)
            return y, total, dx, dx, sums[0], sums[1]

        return compute

    def forward(variance: Callable[[Tensor], Tensor]) -> Compute:
        def norm(x, residual, weight, bias, eps, dtype) -> tuple[Tensor, Tensor]:
            total = x + residual
            n = (total - total.mean(-1, keepdim=True)) * (variance(total) + eps).rsqrt()
            return (weight * n + bias).to(dtype), total

        return functools.partial(differentiate, norm)

    def change(**results: Callable[[Tensor], Tensor]) -> Compute:
        return lambda c: tuple(results.get(n, lambda t: t)(t) for n, t in zip(NAMES, ours(c), strict=True))

    def rows_missing_from_dw(c: Case) -> Results:
        first = Case(c.x[:16], c.residual[:16], c.weight, c.bias, c.dy[:16], c.dtotal[:16], c.eps)
        return (*ours(c)[:4], *ours(first)[4:])

    def last_row_lost(t: Tensor) -> Tensor:
        return torch.cat((t[:-1], t[-2:-1]))

    return {
        "nothing": ("float32", 0.0, backward(lambda *args: args)),
        "the stream's gradient forgotten": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, None, m, r))),
        "the stream's gradient twice": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, 2 * ds, m, r))),
        "mean forgotten": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, ds, 0 * m, r))),
        "rstd 0.01% off": ("float32", 0.0, backward(lambda dy, ds, m, r: (dy, ds, m, 1.0001 * r))),
        "E[s^2] - mean^2": (
            "float32",
            1000.0,
            forward(lambda s: s.square().mean(-1, True) - s.mean(-1, True).square()),
        ),
        "variance over C - 1": ("float32", 0.0, forward(lambda s: s.var(-1, keepdim=True))),
        "padding counted": ("float32", 0.0, forward(lambda s: s.var(-1, keepdim=True, correction=0) * 100 / 128)),
        "eps ten times": ("float32", 0.0, lambda c: ours(replace(c, eps=10 * c.eps))),
        "eps forgotten": ("float32", 0.0, lambda c: ours(replace(c, eps=0.0))),
        "rows missing from dw": ("float32", 0.0, rows_missing_from_dw),
        "last row lost": ("float32", 0.0, change(y=last_row_lost)),
        "last row's gradient lost": ("bfloat16", 0.0, change(dx=last_row_lost)),
        "the stream in bfloat16": ("bfloat16 autocast", 0.0, change(sum=lambda t: t.bfloat16().float())),
        "its gradient in bfloat16": ("bfloat16 autocast", 0.0, change(dresidual=lambda t: t.bfloat16().float())),
        "dw through bfloat16": ("bfloat16 autocast", 0.0, change(dw=lambda t: t.bfloat16().float())),
        "db through float16": ("float16 autocast", 0.0, change(db=lambda t: t.half().float())),
        "dw and db swapped": ("bfloat16", 0.0, lambda c: (*(r := ours(c))[:4], r[5], r[4])),
        "y of the norm before": ("bfloat16", 0.0, lambda c: ours(replace(c, residual=0 * c.residual))),
    }


@pytest.mark.parametrize("fault", faults())
def test_a_planted_fault_is_found(fault, rows) -> None:
    rows(16)
    precision, mean, compute = faults()[fault]
    most = max(excess(compute, lambda seed: case((40, 100), precision, seed=seed, mean=mean)).values())
    assert most <= 1.0 if fault == "nothing" else most > 2.0


@pytest.mark.parametrize("programs", [1, 3, 7])
def test_any_number_of_programs(programs) -> None:
    """7 is more than there are tiles."""
    config = LaunchConfig(8)

    def compute(c: Case) -> Results:
        y, total, mean, rstd = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype, config)
        dx, _, sums = layer_norm_backward(
            c.dy, c.dtotal, total, mean, rstd, c.weight, c.x.dtype, c.residual.dtype, config, programs
        )
        return y, total, dx, dx, *sums

    assert_right(compute, lambda seed: case((41, 20), seed=seed))


def strided(kind: str, t: Tensor) -> Tensor:
    """A (B, T, C) tensor's values in another memory layout."""
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
    results = ours(replace(c, **given))
    assert all(r.is_contiguous() for r in results[:2])
    assert_same(results, ours(replace(c, **{name: t.contiguous() for name, t in given.items()})))


@pytest.mark.parametrize("kind", LAYOUTS)
@pytest.mark.parametrize(("name", "summed"), [("x", False), ("x", True), ("residual", True)])
def test_layouts_of_what_the_norm_keeps_change_nothing(name, summed, kind, rows) -> None:
    """Where no sum is written it is x itself, and the residual, that the backward reads again."""
    rows(4)
    c = case((2, 5, 20))

    def results(given: Tensor) -> Results:
        here = replace(c, **{name: given})
        leaves = [t.detach().requires_grad_() for t in (here.x, c.weight, c.bias, here.residual)[: 3 + summed]]
        y = layer_norm(*leaves[:3], residual=leaves[3] if summed else None)
        return (y.detach(), *torch.autograd.grad(y, leaves, c.dy))

    given = strided(kind, getattr(c, name))
    assert_same(results(given), results(given.contiguous()))


@every_precision
def test_the_norm_of_a_sum_that_is_not_written_is_the_same(precision, rows) -> None:
    """y and every gradient, to the bit, those of add_layer_norm whose sum gets a gradient of zeros."""
    rows(16)
    c = case((33, 100), precision)
    leaves = [t.detach().requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
    y = last(*leaves, c.eps, c.dy.dtype)
    want, _, *gradients = ours(replace(c, dtotal=torch.zeros_like(c.dtotal)))
    assert_same((y.detach(), *torch.autograd.grad(y, leaves, c.dy)), (want, *gradients))
    _, empty, _, _ = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype, want_sum=False)
    assert empty.numel() == 0


@pytest.mark.parametrize("precision", ["float32", "bfloat16 autocast"])
@pytest.mark.parametrize(("shape", "block_m"), [((17, 20), 16), ((33, 32), 8), ((3, 7, 100), 4)], ids=str)
def test_every_element_is_written_and_nothing_beside_it(shape, block_m, precision, rows, monkeypatch) -> None:
    rows(block_m)
    c = case(shape, precision)
    with guarded(monkeypatch) as made:
        _, total, mean, rstd = layer_norm_forward(c.x, c.residual, c.weight, c.bias, c.eps, c.dy.dtype)
        layer_norm_backward(c.dy, c.dtotal, total, mean, rstd, c.weight, c.x.dtype, c.residual.dtype)
    assert len(made) == 7  # y, sum, mean, rstd; dx, dresidual, partial sums
    for whole, middle in made:
        assert not middle.isnan().any()
        assert whole.isnan().sum() == whole.numel() - middle.numel()


def test_the_guards_find_a_row_not_written(monkeypatch) -> None:
    with guarded(monkeypatch) as made:
        y = torch.empty((3, 16), dtype=torch.float32, device=DEVICE)
        y[:2] = 0.0
    assert made[0][1].isnan().any()


def test_inputs_are_not_read_past_their_ends(rows) -> None:
    """Every input sits in NaN: a row or column too many would spread."""
    rows(16)
    c = case((20, 50))
    framed = {}
    for name in ("x", "residual", "weight", "bias", "dy", "dtotal"):
        t = getattr(c, name)
        frame = torch.full([n + 64 for n in t.shape], math.nan, device=DEVICE)
        inside = frame[tuple(slice(32, 32 + n) for n in t.shape)]
        inside[:] = t
        framed[name] = inside
    assert_same(ours(replace(c, **framed)), ours(c))


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
    """The last norm's stream ends there; and a stream may be used without the norm."""
    rows(16)
    c = case((9, 20), "bfloat16 autocast")
    read = []
    backward = layer_norm_backward
    monkeypatch.setattr(
        torch.ops.fastgpt2,
        "layer_norm_backward",
        lambda dy, ds, *rest, **how: (read.append(ds), backward(dy, ds, *rest, **how))[1],
    )
    leaves = [t.detach().requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
    y, total = fused(*leaves, c.eps, c.dy.dtype)
    if used == "y":
        grads = torch.autograd.grad(y, leaves, c.dy)
        zero = replace(c, dtotal=torch.zeros_like(c.dtotal))
        assert_same(grads, ours(zero)[2:])
        assert read[0] is None
    else:
        dx, dresidual, dw, db = torch.autograd.grad(total, leaves, c.dtotal, allow_unused=True)
        assert torch.equal(dx, c.dtotal.to(c.x.dtype)) and torch.equal(dresidual, c.dtotal)
        assert dw is db is None and read == []


def test_gradients_of_x_and_residual_do_not_share_memory_once_accumulated(rows) -> None:
    """One tensor is handed to autograd for both: what it keeps, and adds to, must be apart."""
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
    c = replace(c, residual=c.x)
    x = c.x.clone().requires_grad_()
    dx = torch.autograd.grad(fused(x, x, c.weight, c.bias, c.eps, c.dy.dtype), x, (c.dy, c.dtotal))[0]
    assert torch.equal(dx, 2 * ours(c)[2])


def test_a_chain_of_norms_on_one_stream(rows) -> None:
    """Three blocks: the stream's gradient comes from every norm after; float32 throughout."""
    rows(16)

    def stream(norm: Norm, dtype: torch.dtype) -> Callable[[int], Results]:
        def gradients(seed: int) -> Results:
            c, *branches = (case((2, 5, 32), seed=4 * seed + i).to(dtype) for i in range(4))
            leaves = [t.requires_grad_() for t in (c.residual, c.weight, c.bias, *(branch.x for branch in branches))]
            total, weight, bias, *xs = leaves
            y: Tensor | float = 0.0
            for x in xs:
                y, total = norm(x + y, total, weight, bias, c.eps, dtype)
            return torch.autograd.grad((y * c.dy).sum(), leaves)

        return gradients

    names = ("dstream", "dw", "db", "dx0", "dx1", "dx2")
    forms = ((fused, torch.float32), (plain, torch.float32), (plain, torch.float64))
    mine, peer, truth = (named(names, stream(*form)) for form in forms)
    assert max(pooled(lambda seed: (seed,), mine, [peer], truth).excess().values()) <= 1.0


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
    torch.library.opcheck(torch.ops.fastgpt2.layer_norm_backward.default, arguments, {"residual": again})


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiles_whole(backend, dynamic, rows) -> None:
    rows(16)
    torch._dynamo.reset()
    c = case((2, 5, 20))

    def block(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            y, total = add_layer_norm((2.0 * x).bfloat16(), residual.sin(), weight, bias)
            y, total = add_layer_norm(y.sin(), total, weight, bias)
            return layer_norm(y.float(), weight, bias, residual=total)

    results = []
    for function in (block, torch.compile(block, fullgraph=True, backend=backend, dynamic=dynamic)):
        leaves = [t.detach().requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
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
    leaves = [t.detach().requires_grad_() for t in (c.x, c.residual, c.weight, c.bias)]
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
    rounded = replace(c, weight=c.weight.bfloat16().float(), bias=c.bias.half().float())
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


def test_the_package_names_the_function_whatever_was_imported() -> None:
    import fastgpt2.kernels.norm

    assert fastgpt2.kernels.norm is layer_norm is MODULE.layer_norm


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
    assert "--norm torch" in str(why_unsupported(cuda, torch.float32, 10000))


@pytest.mark.gpu
@pytest.mark.parametrize("C", [768, 1024, 1280, 1600, MAX_CHANNELS, 20, 33])
@every_precision
def test_full_sizes(precision, C) -> None:
    # The most rows are of GPT-2's widths: at 8192 channels float64 would take gigabytes of each of the tests beside it.
    for R in (1, 77, 289, 1025 if C == MAX_CHANNELS else 8 * 1024 + 1):
        assert_right(ours, lambda seed, R=R: case((R, C), precision, seed=seed))


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
    """The tensors pass 2^31 elements: the last rows must be computed like the first."""
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
