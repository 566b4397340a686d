"""The attention's forms in PyTorch: documents against the naive mask, and what each backend can and can't do."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask

from fastgpt2.accuracy import named, pooled
from fastgpt2.backends import attention
from fastgpt2.backends.attention import (
    block_mask,
    cudnn_attention,
    cudnn_why_not,
    flex_attention,
    flex_why_not,
    naive_attention,
    sdpa_attention,
    sdpa_picks,
)
from fastgpt2.documents import document_bounds, visible
from tests.seeds import generator

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
END = 7
FORMS = [naive_attention, sdpa_attention, cudnn_attention, flex_attention]
pytestmark = [
    pytest.mark.numeric,
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning"),
]
Op = Callable[..., Tensor]


def tokens(T: int, *openings: tuple[int, ...]) -> Tensor:
    """(B, T) of tokens that aren't END but at the openings."""
    rows = torch.arange(len(openings) * T).reshape(-1, T) % END
    for row, positions in zip(rows, openings, strict=True):
        row[list(positions)] = END
    return rows.to(DEVICE)


OPENINGS = {
    "none": ((), ()),
    "every token": (tuple(range(40)), tuple(range(40))),
    "first and last": ((0,), (39,)),
    "edges of tiles": ((16, 32), (15, 17, 31, 33)),
    "several": ((3, 4, 20), (1, 39, 22)),
}


@pytest.mark.parametrize("kind", OPENINGS)
def test_document_bounds(kind) -> None:
    T = 40
    first, last = document_bounds(tokens(T, *OPENINGS[kind]), END).tolist()
    for b, openings in enumerate(OPENINGS[kind]):
        starts = [*sorted({0, *openings}), T]
        expected = [(begin, end) for begin, end in itertools.pairwise(starts) for _ in range(begin, end)]
        assert list(zip(first[b], last[b], strict=True)) == expected


def test_document_bounds_trace_whole() -> None:
    torch._dynamo.reset()
    x = tokens(40, *OPENINGS["several"])
    compiled = torch.compile(document_bounds, fullgraph=True, backend="aot_eager")(x, END)
    bounds = document_bounds(x, END)
    assert torch.equal(compiled, bounds) and compiled.stride() == bounds.stride()
    assert bounds.dtype == torch.int32 and bounds.shape == (2, 2, 40)


def by_document(qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None) -> Tensor:
    """Each document attended to alone, as if there were no others."""
    assert documents is not None
    rows = []
    for row, first, last in zip(qkv, *documents.tolist(), strict=True):
        spans = sorted(set(zip(first, last, strict=True)))
        rows.append(torch.cat([naive_attention(row[None, begin:end]) for begin, end in spans], 1))
    return torch.cat(rows)


def results(op: Op, qkv: Tensor, do: Tensor, documents: Tensor | None) -> tuple[Tensor, Tensor]:
    qkv = qkv.detach().requires_grad_()
    o = op(qkv, documents=documents)
    return o.detach(), torch.autograd.grad(o, qkv, do)[0]


def worst(op: Op, kind: str, dtype: torch.dtype, T: int = 40, H: int = 2, D: int = 16) -> float:
    """Error over budget: that of the output and of the gradient, by maximum and by norm; right is at most 1.

    The truth is each document alone in float64. Without a GPU one seed of ours stands against five of the peers':
    Triton's interpreter is slow.
    """
    documents = document_bounds(tokens(T, *OPENINGS[kind]), END)

    def make(seed: int) -> tuple[Tensor, Tensor]:
        B, rng = documents.size(1), generator(seed)
        return tuple(torch.randn(B, T, *rest, generator=rng).to(DEVICE, dtype) for rest in ((3, H, D), (H, D)))

    def computed(op: Op) -> Callable[..., dict[str, Tensor]]:
        return named(("o", "dqkv"), lambda qkv, do: results(op, qkv, do, documents))

    def truth(inputs: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return computed(by_document)([x.double() for x in inputs])

    peers = [computed(peer) for peer in (naive_attention, sdpa_attention)]
    return max(pooled(make, computed(op), peers, truth, once=DEVICE == "cpu").excess().values())


def triton_attention(qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None) -> Tensor:
    kernel = pytest.importorskip("fastgpt2.kernels.attention", reason="Triton is published for Linux")
    return kernel.flash_attention_qkv(qkv, dropout_p, documents)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", [naive_attention, sdpa_attention, triton_attention], ids=lambda op: op.__name__)
@pytest.mark.parametrize("kind", OPENINGS)
def test_documents_are_attended_to_alone(kind, op, dtype) -> None:
    assert worst(op, kind, dtype, H=1) <= 1.0


@pytest.mark.parametrize("fault", ["ignored", "begins late", "begins early", "of another row"])
@pytest.mark.parametrize("op", [naive_attention, sdpa_attention], ids=lambda op: op.__name__)
def test_a_planted_fault_is_found(op, fault) -> None:
    def wrong(qkv: Tensor, documents: Tensor) -> Tensor:
        first, last = documents
        position = torch.arange(first.size(1), dtype=torch.int32, device=first.device)
        match fault:
            case "ignored":
                return op(qkv)
            case "begins late":
                first = torch.minimum(first + 1, position)
            case "begins early":
                first = (first - 1).clamp(min=0)
            case "of another row":
                first, last = first.flip(0), last.flip(0)
        return op(qkv, documents=torch.stack((first, last)))

    for dtype in (torch.float32, torch.bfloat16):
        assert worst(wrong, "several", dtype, H=1) > 2.0


@pytest.mark.parametrize("T", [1, 100, 128, 129, 500])
def test_block_masks_are_those_of_every_element(T) -> None:
    def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return q >= k

    rng = torch.Generator().manual_seed(T)
    openings = [tuple(torch.randint(T, (n,), generator=rng).tolist()) for n in (0, 1, 3, 50)]
    documents = document_bounds(tokens(T, *openings, tuple(range(0, T, 128)), tuple(range(127, T, 128))), END)

    def within(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (k >= documents[0][b, q])

    device = torch.device(DEVICE)
    for ours, mod, B in (
        (block_mask(T, None, device), causal, None),
        (block_mask(T, documents, device), within, documents.size(1)),
    ):
        theirs = create_block_mask(mod, B, None, T, T, device=DEVICE)
        assert ours.shape == theirs.shape
        for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
        assert torch.equal(ours.to_dense(), theirs.to_dense())


@pytest.mark.parametrize("kind", [None, *OPENINGS])
def test_flex_forward_is_the_naive_mask(kind) -> None:
    """On a CPU flex_attention has no backward; the forward, which stores all scores there, tells the mask."""
    documents = None if kind is None else document_bounds(tokens(40, *OPENINGS[kind]), END)
    qkv = torch.randn(2, 40, 3, 2, 16, generator=generator()).to(DEVICE)
    o, expected = flex_attention(qkv, documents=documents), naive_attention(qkv, documents=documents)
    torch.testing.assert_close(o, expected, rtol=1e-5, atol=1e-5)
    assert o.shape == expected.shape
    if kind == "several":
        assert not torch.allclose(o, naive_attention(qkv, documents=documents.flip(1)), atol=1e-2)


def test_flex_keeps_one_causal_mask_a_length() -> None:
    attention._causal_block_mask.cache_clear()
    qkv = torch.randn(1, 20, 3, 1, 16, device=DEVICE)
    for _ in range(3):
        flex_attention(qkv)
    assert attention._causal_block_mask.cache_info().misses == 1


def test_flex_has_no_dropout() -> None:
    with pytest.raises(ValueError, match=r"flex attention has no dropout, got 0\.1"):
        flex_attention(torch.randn(1, 4, 3, 1, 16), 0.1)


@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("op", FORMS, ids=lambda f: f.__name__)
def test_every_form_traces_whole(op, documents, monkeypatch) -> None:
    """cudnn_attention is traced with the plain kernel in cuDNN's place, and flex_attention forward, without a GPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(attention, "CUDNN", SDPBackend.MATH)
    grad = op is not flex_attention
    bounds = document_bounds(tokens(40, *OPENINGS["several"]), END) if documents else None
    qkv = torch.randn(2, 40, 3, 2, 16, device=DEVICE, requires_grad=grad)

    def layer(qkv: Tensor, documents: Tensor | None) -> Tensor:
        return op(2.0 * qkv, documents=documents).sin()

    outputs = [f(qkv, bounds) for f in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"))]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)
    if grad:
        gradients = [torch.autograd.grad(o.square().sum(), qkv)[0] for o in outputs]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", [sdpa_attention, cudnn_attention], ids=lambda f: f.__name__)
def test_pytorchs_own_kernels_are_told_mask_and_dropout(op, monkeypatch) -> None:
    told = []

    def answer(q: Tensor, k: Tensor, v: Tensor, **options: object) -> Tensor:
        told.append(options)
        return v

    monkeypatch.setattr(F, "scaled_dot_product_attention", answer)
    documents, qkv = document_bounds(tokens(40, *OPENINGS["several"]), END), torch.randn(2, 40, 3, 2, 16, device=DEVICE)
    assert torch.equal(op(qkv, 0.25, documents), qkv[:, :, 2])
    mask = told[0].pop("attn_mask")
    assert torch.equal(mask, visible(40, documents, qkv.device))
    op(qkv)
    assert told == [{"dropout_p": 0.25, "is_causal": False}, {"attn_mask": None, "dropout_p": 0.0, "is_causal": True}]


@pytest.mark.skipif(DEVICE == "cuda", reason="says what happens without a GPU")
def test_cudnn_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match=r"[Nn]o (available|viable)|kernel"):
        cudnn_attention(torch.randn(1, 4, 3, 1, 16))


def test_why_not_says_what_is_missing(monkeypatch) -> None:
    cpu, cuda, bf16 = torch.device("cpu"), torch.device("cuda"), torch.bfloat16
    assert "CUDA GPU only, got cpu" in str(cudnn_why_not(cpu, bf16, 64, 0.0))
    assert "CUDA GPU only, got cpu" in str(flex_why_not(cpu, 64, 0.0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "compute capability 8.0" in str(cudnn_why_not(cuda, bf16, 64, 0.0))
    assert "compute capability 8.0" in str(flex_why_not(cuda, 64, 0.0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500)
    assert cudnn_why_not(cuda, bf16, 64, 0.1) is None
    assert flex_why_not(cuda, 64, 0.0) is None
    assert "bfloat16 or float16, got torch.float32" in str(cudnn_why_not(cuda, torch.float32, 64, 0.0))
    assert "at most 128, got 160" in str(cudnn_why_not(cuda, bf16, 160, 0.0))
    assert "multiple of 8" in str(cudnn_why_not(cuda, bf16, 20, 0.0))
    assert "at least 16, got 8" in str(flex_why_not(cuda, 8, 0.0))
    assert "no dropout, got 0.1" in str(flex_why_not(cuda, 64, 0.1))
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91300)
    assert "cuDNN 91300 has no dropout" in str(cudnn_why_not(cuda, bf16, 64, 0.1))
    assert cudnn_why_not(cuda, bf16, 64, 0.0) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert "deterministic" in str(cudnn_why_not(cuda, bf16, 64, 0.0))
        torch.use_deterministic_algorithms(True, warn_only=True)
        assert cudnn_why_not(cuda, bf16, 64, 0.0) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", [*FORMS[1:], triton_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("T", [128, 200, 1024])
def test_every_backend_attends_to_documents_alone(T, op, dtype, monkeypatch) -> None:
    torch._dynamo.reset()  # past its eighth shape flex_attention would no longer be compiled
    rng = torch.Generator().manual_seed(T)
    drawn = [tuple(torch.randint(T, (n,), generator=rng).tolist()) for n in (0, 1, 30)]
    monkeypatch.setitem(OPENINGS, "drawn", (*drawn, tuple(range(0, T, 64))))
    assert worst(op, "drawn", dtype, T=T, H=3, D=64) <= 1.0


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], ids=lambda backend: backend.name)
def test_sdpa_picks_what_it_is_held_to(backend) -> None:
    with sdpa_kernel(backend):
        assert sdpa_picks((2, 40, 3, 2, 32), torch.float32, torch.device("cpu")) == backend


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", [True, False])
def test_sdpa_picks_what_then_runs(deterministic) -> None:
    qkv = torch.randn(2, 256, 3, 4, 64, device=DEVICE, dtype=torch.bfloat16)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(deterministic)
    try:
        pick = sdpa_picks(tuple(qkv.shape), qkv.dtype, qkv.device)
        with sdpa_kernel(pick):
            held = sdpa_attention(qkv)
        assert torch.equal(sdpa_attention(qkv.requires_grad_()), held)
    finally:
        torch.use_deterministic_algorithms(before)
    assert not (deterministic and pick == SDPBackend.CUDNN_ATTENTION)


@pytest.mark.gpu
@pytest.mark.parametrize("op", [cudnn_attention, flex_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("T", [2, 127, 128, 1000, 1024])
def test_cudnn_and_flex_without_documents(T, op) -> None:
    torch._dynamo.reset()
    causal = functools.partial(lambda op, qkv, documents: op(qkv), op)
    assert worst(causal, "none", torch.bfloat16, T=T, H=3, D=64) <= 1.0


@pytest.mark.gpu
@pytest.mark.parametrize("op", [cudnn_attention, flex_attention, sdpa_attention], ids=lambda f: f.__name__)
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
def test_backends_train_inside_a_compiled_layer(documents, op) -> None:
    torch._dynamo.reset()
    bounds = document_bounds(tokens(256, (3, 200), (128,)), END) if documents else None
    weight = torch.randn(192, 192, device=DEVICE, dtype=torch.bfloat16, requires_grad=True)
    x = torch.randn(2, 256, 192, device=DEVICE, dtype=torch.bfloat16)

    def layer(x: Tensor, documents: Tensor | None) -> Tensor:
        return op(F.linear(x, weight / 14).unflatten(-1, (3, 1, 64)), documents=documents)

    compiled = torch.compile(layer, fullgraph=True)
    gradients = [torch.autograd.grad(f(x, bounds).float().square().sum(), weight)[0] for f in (layer, compiled)]
    error = (gradients[0] - gradients[1]).float().norm() / gradients[0].float().norm()
    assert error < 0.02
