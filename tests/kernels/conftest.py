"""Small tiles for the interpreter, and poisoned memory around what a launcher allocates."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.oracle import DEVICE

MARGIN = 8192


def force_tiles(monkeypatch: pytest.MonkeyPatch, kernel: str, *blocks: int) -> None:
    """Launch every kernel of a file with this configuration; on a GPU the shipped ones stay."""
    from fastgpt2.kernels.tuning import LaunchConfig

    if DEVICE == "cpu":
        module = importlib.import_module(f"fastgpt2.kernels.{kernel}")
        monkeypatch.setattr(module, "lookup", lambda *_: LaunchConfig(*blocks))


@pytest.fixture
def tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Force the tiles of the attention's kernels, so that a few tokens make several."""
    return lambda block_m, block_n: force_tiles(monkeypatch, "attention", block_m, block_n)


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Force the rows of a tile of the norm's kernels."""
    return lambda block_m: force_tiles(monkeypatch, "norm", block_m)


@pytest.fixture
def mlp_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few tiles to a small problem of the MLP's kernels."""
    force_tiles(monkeypatch, "mlp", 32, 64, 32)


@pytest.fixture(params=["descriptors", "pointers"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways by which the MLP reaches memory; descriptors are taken wherever the matrices allow."""
    mlp = importlib.import_module("fastgpt2.kernels.mlp")
    possible = mlp._descriptors
    by_descriptors = request.param == "descriptors"
    monkeypatch.setattr(mlp, "_descriptors", lambda *matrices: possible(*matrices) and by_descriptors)
    return request.param


class Made(list[tuple[Tensor, Tensor]]):
    """(the whole, the middle) of every tensor allocated: the middle is what the caller got."""

    def assert_written(self) -> None:
        """Every element of each middle was written, and nothing around it."""
        for whole, middle in self:
            assert not middle.isnan().any()
            assert whole.isnan().sum() == whole.numel() - middle.numel()


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Made]:
    """Every torch.empty is NaN, and torch.zeros 0, in the middle of a larger tensor of NaN."""
    tensors = Made()

    def empty(size, *, dtype, device):
        if not dtype.is_floating_point:  # scratch of Triton's own
            return torch.full(size, 0, dtype=dtype, device=device)
        length = math.prod(size)
        whole = torch.full((length + 2 * MARGIN,), math.nan, dtype=dtype, device=device)
        tensors.append((whole, whole[MARGIN : MARGIN + length].view(size)))
        return tensors[-1][1]

    def zeros(size, *, dtype, device):
        return empty(size, dtype=dtype, device=device).zero_()

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "zeros", zeros)
        yield tensors
