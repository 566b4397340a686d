"""Elements more than 2^31 apart, without a GPU: in virtual memory only the pages that are touched cost any.

The gpu tests named test_offsets_past_32_bits fill a card for the same.
"""

from __future__ import annotations

import functools
import importlib
import math
import mmap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

import triton
import triton.language as tl

from kernels import add_layer_norm, flash_attention, layer_norm
from kernels.cross_entropy import cross_entropy_rows
from kernels.tiles import load_tile, store_tile
from kernels.tuning import LaunchConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that costs nothing")
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Take the pages when they are touched. Python knows the name from 3.13 on."""
# The kernels reach rows of a tile by 32 bits, and copy what lies further apart: 127 times CLOSE fits, 127 times FAR
# does not.
CLOSE, FAR = 2**24 - 16, 2**24 + 2**18
load_matrix, store_matrix = (getattr(importlib.import_module("kernels.gelu_mlp"), name) for name in ("_load", "_store"))


def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
    """float16 zeros that may end 2^32 elements after they begin. An offset that wrapped at 32 bits stays within the
    memory, and finds another zero."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, 2 * (2**31 + 2**32), flags=flags), dtype=torch.float16)
    return memory.as_strided(shape, strides, storage_offset=2**31)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).half() for shape in shapes]


def differentiate(function, inputs: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    results = function(*leaves)
    results = results if isinstance(results, tuple) else (results,)
    return *results, *torch.autograd.grad(results, leaves, upstream)


def assert_distance_changes_nothing(function, inputs: list[Tensor], upstream: list[Tensor], strides, moved: int) -> None:
    """moved: which of the inputs, and of the gradients after them, lies with the strides."""
    args = [*inputs, *upstream]
    expected = differentiate(function, inputs, upstream)
    args[moved] = far(args[moved].shape, strides).copy_(args[moved])
    found = differentiate(function, args[: len(inputs)], args[len(inputs) :])
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("moved", range(4), ids=["q", "k", "v", "do"])
@pytest.mark.parametrize(
    ("shape", "strides", "tile"),
    [
        ((3, 5, 1, 16), (2**30 + 16, 16, 16, 1), 16),
        ((1, 5, 3, 16), (16, 16, 2**30 + 16, 1), 16),
        ((1, 193, 1, 16), (16, CLOSE, 16, 1), 64),
        ((1, 128, 1, 16), (16, FAR, 16, 1), 128),
    ],
    ids=["batches", "heads", "tiles", "rows of a tile"],
)
def test_attention(shape, strides, tile, moved, monkeypatch) -> None:
    monkeypatch.setattr("kernels.attention.lookup", lambda *_: LaunchConfig(tile, tile))
    q, k, v, do = draw(*4 * [shape])
    assert_distance_changes_nothing(flash_attention, [q, k, v], [do], strides, moved)


@pytest.mark.parametrize(("rows", "stride", "block"), [(145, CLOSE, 16), (128, FAR, 128)], ids=["tiles", "rows of a tile"])
@pytest.mark.parametrize("kind", ["alone", "add"])
def test_layer_norm(kind, rows, stride, block, monkeypatch) -> None:
    monkeypatch.setattr(importlib.import_module("kernels.layer_norm"), "lookup", lambda *_: LaunchConfig(block))
    weight, bias, *args = draw((20,), (20,), *4 * [(rows, 20)])
    function, streams = (layer_norm, 1) if kind == "alone" else (add_layer_norm, 2)
    function = functools.partial(function, weight=weight, bias=bias)
    inputs, upstream = args[:streams], args[streams : 2 * streams]
    for moved in range(2 * streams):
        assert_distance_changes_nothing(function, inputs, upstream, (stride, 1), moved)


def test_rows_of_the_loss() -> None:
    """Rows of 2^30 logits, of which the vocabulary is the first 100."""
    V, stride = 100, 2**30 + 64
    (logits,) = draw((3, V))
    targets = torch.tensor([5, 0, 99])
    spread = far((3, stride), (stride, 1))
    spread[:, :V] = logits
    losses, lse = torch.empty(2, 3)
    cross_entropy_rows(spread, targets, losses, lse, None, V, -100, False, LaunchConfig(block_n=64))
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), targets, reduction="none"))


@triton.jit
def _copy_tile(source_ptr, target_ptr, start, stride, T, TILE: tl.constexpr):
    store_tile(target_ptr, load_tile(source_ptr, start, stride, T, TILE, TILE, True), start, stride, T, TILE, TILE)


@triton.jit
def _copy_tile_of_the_mlp(source_ptr, target_ptr, start, stride, T, TILE: tl.constexpr):
    x = load_matrix(source_ptr, start, 0, T, stride, TILE, TILE, False, False, False)
    store_matrix(target_ptr, x, start, 0, T, stride, TILE, TILE, False)


@pytest.mark.parametrize("kernel", [_copy_tile, _copy_tile_of_the_mlp], ids=lambda kernel: kernel.__name__)
def test_tiles(kernel) -> None:
    """Rows past 2^31 elements of a contiguous matrix, as a norm's or the MLP's of many tokens has them."""
    start, stride, TILE = 272, 2**23, 16
    assert start * stride > 2**31
    source, target = (far((start + TILE, TILE), (stride, 1)) for _ in range(2))
    source[start:] = draw((TILE, TILE))[0]
    kernel[(1,)](source, target, start, stride, start + TILE, TILE)
    assert torch.equal(target[start:], source[start:]) and math.isfinite(source[start:].sum())
