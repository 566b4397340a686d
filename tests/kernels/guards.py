"""Poisoned memory: what a launcher allocates is NaN, and so is what lies around it."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

MARGIN = 8192


@contextlib.contextmanager
def guarded(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Every torch.empty is NaN, in the middle of a larger tensor of NaN: (the whole, the middle)."""
    made: list[tuple[Tensor, Tensor]] = []

    def empty(size, *, dtype, device):
        if not dtype.is_floating_point:  # scratch of Triton's own
            return torch.zeros(size, dtype=dtype, device=device)
        length = math.prod(size)
        whole = torch.full((length + 2 * MARGIN,), math.nan, dtype=dtype, device=device)
        made.append((whole, whole[MARGIN : MARGIN + length].view(size)))
        return made[-1][1]

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield made
