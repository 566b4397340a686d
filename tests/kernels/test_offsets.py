"""Elements more than 2^31 apart, without a GPU: virtual memory costs only the pages that are touched.

The gpu tests named test_offsets_past_32_bits fill a card for the same.
"""

from __future__ import annotations

import functools
import mmap
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton", reason="Triton is published for Linux")

import triton
import triton.language as tl

from fastgpt2.kernels import add_layer_norm, attention, flash_attention, layer_norm, mlp_device, norm
from fastgpt2.kernels.cross_entropy import cross_entropy_rows
from fastgpt2.kernels.tiles import load_tile, store_tile
from fastgpt2.kernels.tuning import LaunchConfig

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has no memory that costs nothing")
NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Allocate pages when they are touched. Python has the name from 3.13 on."""
CLOSE, FAR = 2**24 - 16, 2**24 + 2**18
"""Strides of rows. A tile has up to 128 rows and 32-bit offsets: CLOSE fits, a tensor with stride FAR is copied."""


def far(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """x with these strides, over up to 2^32 elements of memory, in zeros: an offset that wrapped at 32 bits finds one
    of them rather than crash."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | NORESERVE
    memory = torch.frombuffer(mmap.mmap(-1, (2**31 + 2**32) * x.itemsize, flags=flags), dtype=x.dtype)
    return memory.as_strided(x.shape, strides, storage_offset=2**31).copy_(x)


def draw(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).half() for shape in shapes]


def differentiate(function: Callable, inputs: list[Tensor], upstream: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    made = function(*leaves)
    results = made if isinstance(made, tuple) else (made,)
    return *results, *torch.autograd.grad(results, leaves, upstream)


def assert_strides_change_nothing(
    function: Callable, inputs: list[Tensor], upstream: list[Tensor], strides: tuple[int, ...], moved: int
) -> None:
    """moved: index of the tensor that gets the strides, among inputs and then upstream gradients."""
    args = [*inputs, *upstream]
    args[moved] = far(args[moved], strides)
    found = differentiate(function, args[: len(inputs)], args[len(inputs) :])
    for x, y in zip(found, differentiate(function, inputs, upstream), strict=True):
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
    monkeypatch.setattr(attention, "lookup", lambda *_: LaunchConfig(tile, tile))
    q, k, v, do = draw(*4 * [shape])
    assert_strides_change_nothing(flash_attention, [q, k, v], [do], strides, moved)


def last_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return layer_norm(x, weight, bias, residual=residual)


@pytest.mark.parametrize(
    ("rows", "stride", "tile"), [(193, CLOSE, 64), (128, FAR, 128)], ids=["tiles", "rows of a tile"]
)
@pytest.mark.parametrize(
    ("function", "streams", "results"),
    [(layer_norm, 1, 1), (add_layer_norm, 2, 2), (last_norm, 2, 1)],
    ids=["alone", "add", "last"],
)
def test_layer_norm(function, streams, results, rows, stride, tile, monkeypatch) -> None:
    monkeypatch.setattr(norm, "lookup", lambda *_: LaunchConfig(tile))
    weight, bias, *args = draw((20,), (20,), *(streams + results) * [(rows, 20)])
    function = functools.partial(function, weight=weight, bias=bias)
    for moved in range(streams + results):
        assert_strides_change_nothing(function, args[:streams], args[streams:], (stride, 1), moved)


def test_rows_of_the_loss() -> None:
    """Rows are 2^30 logits apart; the vocabulary is the first 100."""
    V, stride = 100, 2**30 + 64
    (logits,) = draw((3, V))
    targets, (losses, lse) = torch.tensor([5, 0, 99]), torch.empty(2, 3)
    rows = far(logits, (stride, 1)).as_strided((3, stride), (stride, 1))
    cross_entropy_rows(rows, targets, losses, lse, None, V, -100, False, LaunchConfig(block_n=64))
    torch.testing.assert_close(losses, F.cross_entropy(logits.float(), targets, reduction="none"))


@triton.jit
def _copy(source_ptr, target_ptr, start, stride, T, TILE: tl.constexpr):
    store_tile(target_ptr, load_tile(source_ptr, start, stride, T, TILE, TILE, True), start, stride, T, TILE, TILE)


@triton.jit
def _copy_of_the_mlp(source_ptr, target_ptr, start, stride, T, TILE: tl.constexpr):
    x = mlp_device._load(source_ptr, start, 0, T, stride, TILE, TILE, False, False, False)
    mlp_device._store(target_ptr, x, start, 0, T, stride, TILE, TILE, False)


@pytest.mark.parametrize("copy", [_copy, _copy_of_the_mlp], ids=["load_tile and store_tile", "the MLP's"])
def test_tiles_of_contiguous_rows(copy) -> None:
    """So many rows that there are 2^31 elements, as tensors of a norm and of the MLP may have."""
    start, stride, TILE = 272, 2**23, 16
    source = torch.cat((torch.zeros(start, TILE, dtype=torch.float16), *draw((TILE, TILE))))
    source, target = far(source, (stride, 1)), far(torch.zeros_like(source), (stride, 1))
    copy[(1,)](source, target, start, stride, len(source), TILE)
    assert torch.equal(target, source)
