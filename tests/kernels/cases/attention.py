"""Inputs of the attention and its forms: ours, the oracle, and the peers that set the budget."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt2.kernels import flash_attention, flash_attention_qkv
from fastgpt2.kernels.attention import attention_reference
from tests.kernels.oracle import DEVICE, Oracle, Results, differentiate
from tests.seeds import generator

NAMES = ("o", "dq", "dk", "dv")


def inputs(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float32, *, seed: int = 0, gain: float = 1.0
) -> Results:
    """q, k, v and do, each (B, T, H, D); gain multiplies the logits."""
    rng = generator(seed, DEVICE)
    q, k, v, do = (torch.randn(shape, generator=rng, dtype=torch.float64, device=DEVICE) for _ in range(4))
    return tuple(x.to(dtype) for x in (q * gain, k, v, do))


def bounds(T: int, *openings: Iterable[int]) -> Tensor:
    """documents (2, B, T) of rows where documents begin at 0 and at the openings."""
    rows = []
    for row in openings:
        starts = [*sorted({0, *row}), T]
        spans = [(a, b) for a, b in itertools.pairwise(starts) for _ in range(a, b)]
        rows.append(spans)
    return torch.tensor(rows, dtype=torch.int32, device=DEVICE).permute(2, 0, 1).contiguous()


def flash(q: Tensor, k: Tensor, v: Tensor, do: Tensor, **options) -> Results:
    return differentiate(functools.partial(flash_attention, **options), (q, k, v), (do,))


def packed(q: Tensor, k: Tensor, v: Tensor, do: Tensor, **options) -> Results:
    o, dqkv = differentiate(functools.partial(flash_attention_qkv, **options), (torch.stack((q, k, v), 2),), (do,))
    return (o, *dqkv.unbind(2))


def naive(q: Tensor, k: Tensor, v: Tensor, do: Tensor, **options) -> Results:
    return differentiate(functools.partial(attention_reference, **options), (q, k, v), (do,))


def exact(*tensors: Tensor, **options) -> Results:
    return naive(*(x.double() for x in tensors), **options)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    do: Tensor,
    causal: bool = True,
    scale: float | None = None,
    documents: Tensor | None = None,
) -> Results:
    position, mask = torch.arange(q.size(1), device=q.device), None
    if documents is not None:
        mask = (position <= position[:, None]) & (position >= documents[0][:, None, :, None])

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.transpose(1, 2) for x in (q, k, v))
        options = {"attn_mask": mask, "is_causal": causal and mask is None, "scale": scale}
        return F.scaled_dot_product_attention(*heads, **options).transpose(1, 2)

    return differentiate(function, (q, k, v), (do,))


def terms(tensors: Results) -> dict[str, Results]:
    """At T = 1 dQ and dK are dP - delta, which is zero but for the rounding of o."""
    q, k, v, do = tensors
    return {"dq": (do, v, k), "dk": (do, v, q)}


ORACLE = Oracle(NAMES, exact, (naive, sdpa), terms)
REPLAYED = Oracle(NAMES, exact, (naive,), terms)
"""With dropout's mask given, which SDPA can't take."""
