"""Flash attention within documents: the same budget, and no tile of another document is read."""

from __future__ import annotations

import functools
import math

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux")


from fastgpt2.kernels.attention import attention_backward, attention_forward
from tests.kernels.cases.attention import ORACLE, bounds, inputs, packed
from tests.kernels.oracle import DEVICE, assert_same

# Masked scores may overflow before the mask removes them; numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")


DOCUMENTS = {
    "one": ((), ()),
    "each token its own": (range(75), range(75)),
    "edges of tiles": ((16, 32, 48, 64), (15, 17, 31, 33, 63, 65)),
    "long and short": ((40,), (3, 4, 5, 6, 70)),
}


@pytest.mark.numeric
@pytest.mark.parametrize(
    ("tile", "dtype"), [((16, 16), torch.float32), ((32, 16), torch.bfloat16), ((16, 64), torch.float32)], ids=str
)
@pytest.mark.parametrize("kind", DOCUMENTS)
def test_documents(kind, tile, dtype, tiles) -> None:
    tiles(*tile)
    documents = bounds(75, *DOCUMENTS[kind])
    compute = functools.partial(packed, documents=documents)
    ORACLE.assert_right(compute, lambda seed: inputs((2, 75, 1, 16), dtype, seed=seed), documents=documents)


def test_one_document_a_row_is_no_document_at_all(tiles) -> None:
    tiles(16, 16)
    args = inputs((2, 40, 2, 16))
    assert_same(packed(*args, documents=bounds(40, (), ())), packed(*args))


def test_documents_of_any_layout(tiles) -> None:
    tiles(16, 16)
    args, documents = inputs((2, 20, 1, 16)), bounds(20, (7,), (12,))
    assert_same(packed(*args, documents=documents.mT.contiguous().mT), packed(*args, documents=documents))


def test_peaked_logits_in_documents(tiles) -> None:
    """The first tile hides every key of some queries, and their maximum may be far below zero."""
    tiles(16, 16)
    documents = bounds(49, (14, 33))
    make = lambda seed: inputs((1, 49, 2, 32), seed=seed, gain=50.0)  # noqa: E731
    ORACLE.assert_right(functools.partial(packed, documents=documents), make, documents=documents)


@pytest.mark.parametrize("documents", [None, bounds(33, range(33))], ids=["first token", "documents"])
def test_a_key_alone_has_all_the_weight_however_low_its_logit(documents, tiles) -> None:
    """The running maximum starts lower than any logit."""
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
    ORACLE.assert_wrong(compute, make, documents=documents)


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_tiles_outside_a_document_are_not_read(tiles) -> None:
    """Queries of the second document skip NaN keys in the first; keys of the first skip NaN queries in the second."""
    tiles(16, 16)
    q, k, v, do = inputs((1, 64, 1, 16))
    documents = bounds(64, (32,))
    o, lse = attention_forward(q, k, v, True, 0.25, False, documents)
    before = [torch.cat((torch.full_like(x[:, :32], math.nan), x[:, 32:]), 1) for x in (k, v)]
    poisoned, _ = attention_forward(q, *before, True, 0.25, False, documents)
    assert torch.equal(poisoned[:, 32:], o[:, 32:])
    after = [torch.cat((x[:, :32], torch.full_like(x[:, 32:], math.nan)), 1) for x in (q, do)]
    options = (o, lse, True, 0.25, False, documents)
    dqkv, _ = attention_backward(do, q, k, v, *options)
    poisoned, _ = attention_backward(after[1], after[0], k, v, *options)
    assert torch.equal(poisoned[:, :32], dqkv[:, :32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T", [1, 127, 128, 129, 1000, 1024, 2048])
def test_full_lengths_in_documents(T, dtype) -> None:
    generator = torch.Generator().manual_seed(T)
    openings = [torch.randint(T, (n,), generator=generator).tolist() for n in (0, 3, 40)]
    documents = bounds(T, *openings, [*range(0, T, 64)])
    make = lambda seed: inputs((4, T, 3, 64), dtype, seed=seed)  # noqa: E731
    ORACLE.assert_right(functools.partial(packed, documents=documents), make, documents=documents)
