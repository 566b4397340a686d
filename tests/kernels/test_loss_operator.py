"""The head and its loss as an operator: memory layouts, chunks, autocast, autograd, compiling, errors."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels import launch, linear_cross_entropy
from fastgpt2.kernels import loss as module
from fastgpt2.kernels.loss import (
    MEMORY_SHARE,
    chunk_rows,
    default_budget,
    linear_cross_entropy_backward,
    linear_cross_entropy_forward,
    why_unsupported,
)
from tests.kernels.cases.loss import (
    FULL,
    SMALL,
    THREE_CHUNKS,
    every_implementation,
    every_reduction,
    inputs,
    ours,
    plain,
)
from tests.kernels.conftest import Made
from tests.kernels.oracle import DEVICE, DTYPES, assert_equal

pytestmark = pytest.mark.numeric


@every_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_element_is_written_and_nothing_beside_it(dtype, implementation, made: Made) -> None:
    hidden, weight, targets, _ = inputs(dtype=dtype)
    budget = THREE_CHUNKS * dtype.itemsize
    options = (dtype, SMALL[1], -100, implementation == "triton", budget, True, True)
    upstream = torch.ones(SMALL[0], device=DEVICE)
    _, lse, *gradients = linear_cross_entropy_forward(hidden, weight, targets, *options)
    again = linear_cross_entropy_backward(upstream, lse, hidden, weight, targets, *options)
    made.assert_written()
    assert len(made) >= 2 + 2 * 3
    for first, second in zip(gradients, again, strict=True):
        torch.testing.assert_close(first, second, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


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
    assert_equal(strange, usual)


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
    """The public function passes one-dimensional targets and gradients on with their strides."""
    hidden, weight, targets, upstream = inputs(reduction="none")
    options = (hidden.dtype, SMALL[1], -100, implementation == "triton", THREE_CHUNKS * 4, True, True)
    results = []
    for t, u in ((targets, upstream), (targets.repeat_interleave(2)[::2], upstream.repeat_interleave(2)[::2])):
        losses, lse, *gradients = linear_cross_entropy_forward(hidden, weight, t, *options)
        results.append((losses, *gradients, *linear_cross_entropy_backward(u, lse, hidden, weight, t, *options)))
    assert_equal(*results)


@every_implementation
@pytest.mark.parametrize(("dtype", "other"), [DTYPES[1:], DTYPES[:0:-1]], ids=str)
def test_the_backward_is_outside_the_callers_autocast(dtype, other, implementation) -> None:
    hidden, weight, targets, upstream = inputs(dtype=dtype, reduction="none")
    leaves = [hidden.requires_grad_(), weight.requires_grad_()]
    losses = linear_cross_entropy(*leaves, targets, reduction="none", implementation=implementation)
    outside = torch.autograd.grad(losses, leaves, upstream, retain_graph=True)
    with torch.autocast(DEVICE, other):
        inside = torch.autograd.grad(losses, leaves, upstream)
    assert_equal(inside, outside)


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


class Spy(TorchDispatchMode):
    """Records the operators called and the size of the largest tensor that one of them made."""

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
    # The public function asks only for the gradients that can be used.
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
    """(rows, bytes a row, budget) -> rows a chunk: 1 to 8 chunks, of whole tiles if there are enough rows."""
    row = 50304 * 2
    assert chunk_rows(65536, row, 2**30) == 9472 and -(-65536 // 9472) == 7
    assert chunk_rows(65536, row, 85_000_000_000 // MEMORY_SHARE) == 16384
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


@pytest.mark.parametrize(
    ("memory", "budget"),
    [(8 * 2**30, 2**30), (40 * 2**30, 2**30), (79 * 2**30, 79 * 2**30 // 48), (140 * 2**30, 140 * 2**30 // 48)],
)
def test_the_default_budget_follows_the_cards_memory(memory, budget, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    assert default_budget(torch.device("cuda", 0)) == budget
    assert default_budget(torch.device("cpu")) == 2**28


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
    assert_equal(ours(*args, **options), ours(*args, **options))


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
    assert module._takes_triton("triton", cpu, torch.float32)
    assert not module._takes_triton("auto", cpu, torch.float32)
    monkeypatch.setattr(launch, "interpreting", lambda: False)
    with pytest.raises(ValueError, match='implementation="chunked"'):
        module._takes_triton("triton", cpu, torch.float32)
    monkeypatch.setattr(launch, "capability", lambda _: (9, 0))
    assert module._takes_triton("auto", cuda, torch.bfloat16)
    assert not module._takes_triton("chunked", cuda, torch.bfloat16)
    assert not module._takes_triton("auto", cuda, torch.float64)
    monkeypatch.setattr(launch, "capability", lambda _: (7, 5))
    assert not module._takes_triton("auto", cuda, torch.float16)
    monkeypatch.setattr(module, "_has_triton", lambda: False)
    assert "triton package" in str(why_unsupported(cuda, torch.bfloat16))
    assert not module._takes_triton("auto", cuda, torch.bfloat16)


@pytest.mark.gpu
@every_reduction
def test_250_repeats_are_bitwise_equal(reduction) -> None:
    args = inputs(FULL, torch.bfloat16, reduction=reduction)
    options = {"vocab_size": FULL[1], "reduction": reduction, "memory_budget": 2**26}
    first = ours(*args, **options)
    for _ in range(250):
        assert_equal(ours(*args, **options), first)


@pytest.mark.gpu
@pytest.mark.xdist_group("fills the card")
def test_offsets_past_32_bits() -> None:
    """One chunk has more than 2^31 logits: the last rows must equal the first."""
    N, V = 44032, 50304
    assert N * V > 2**31
    hidden, weight, targets, _ = inputs((128, V, V, 64), torch.bfloat16, ignored=False)
    hidden, targets = hidden.repeat(N // 128, 1).requires_grad_(), targets.repeat(N // 128)
    loss = linear_cross_entropy(hidden, weight, targets, reduction="sum", memory_budget=2**34)
    loss.backward()
    assert hidden.grad is not None
    # cuBLAS may split the sums over V differently in different rows.
    place = 2**-7 * hidden.grad[:128].abs().max().item()
    torch.testing.assert_close(hidden.grad[:128], hidden.grad[-128:], rtol=0, atol=place)
    losses = linear_cross_entropy(hidden.detach(), weight, targets, reduction="none", memory_budget=2**34)
    torch.testing.assert_close(losses[:128], losses[-128:], rtol=0, atol=2**-6)


@pytest.mark.gpu
@every_implementation
@every_reduction
def test_no_wait_and_capturable(reduction, implementation) -> None:
    """No synchronisation in a step, and its CUDA graph replays on other inputs."""
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
    assert_equal(captured, ours(*other, **options))
