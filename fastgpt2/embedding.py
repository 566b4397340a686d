"""Rows of a table by token, and the table's gradient as one operator that torch.compile takes whole.

By default torch.compile turns the gradient into an indexed sum. Its deterministic form copies all rows first, and on
CUDA one warp adds the rows of a token one by one; in text a single token can fill a twentieth of the rows. Eager
PyTorch adds them in pieces, also in a fixed order.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def embedding_backward(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
    """The sum of the gradient's rows (..., C) by their tokens (...): (rows, C)."""
    return torch.ops.aten.embedding_dense_backward(gradient, tokens, rows, -1, False)


torch.library.define("fastgpt2::embedding_backward", "(Tensor gradient, Tensor tokens, int rows) -> Tensor")
torch.library.impl("fastgpt2::embedding_backward", "default", embedding_backward)


@torch.library.register_fake("fastgpt2::embedding_backward")
def _(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
    from fastgpt2.kernels.launch import register_inductor_fallback

    register_inductor_fallback("fastgpt2::embedding_backward")
    return gradient.new_empty(rows, gradient.size(-1))


@torch.library.register_vmap("fastgpt2::embedding_backward")
def _(info: Any, in_dims: tuple[int | None, int | None, None], gradient: Tensor, tokens: Tensor, rows: int) -> Any:
    """The tables of a batch one below the other, as one gradient: (batch, rows, C), and where the batch is."""
    batch = info.batch_size
    gradient, tokens = (
        x.expand(batch, *x.shape) if dim is None else x.movedim(dim, 0)
        for x, dim in zip((gradient, tokens), in_dims, strict=False)
    )
    table = torch.arange(batch, device=tokens.device).view(-1, *(1 for _ in tokens.shape[1:]))
    below = torch.ops.fastgpt2.embedding_backward(gradient, tokens + table * rows, batch * rows)
    return below.unflatten(0, (batch, rows)), 0


# torch.func requires setup_context and a torch.vmap rule of both Functions. The derivative of the operator is one, too,
# since what torch.library.register_autograd makes has neither.
class _EmbeddingBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(gradient: Tensor, tokens: Tensor, rows: int) -> Tensor:
        return torch.ops.fastgpt2.embedding_backward(gradient, tokens, rows)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
        _, tokens, ctx.rows = inputs
        ctx.save_for_backward(tokens)
        ctx.save_for_forward(tokens)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (tokens,) = ctx.saved_tensors
        return embedding(tokens, upstream), None, None


class _EmbeddingBackwardWithTangents(_EmbeddingBackward):
    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        (tokens,) = ctx.saved_tensors
        return _eagerly(_EmbeddingBackward).apply(tangent, tokens, ctx.rows)


class _Embedding(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(tokens: Tensor, weight: Tensor) -> Tensor:
        return F.embedding(tokens, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        tokens, weight = inputs
        ctx.save_for_backward(tokens)
        ctx.save_for_forward(tokens)
        ctx.rows = weight.size(0)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (tokens,) = ctx.saved_tensors
        return None, _eagerly(_EmbeddingBackward).apply(gradient, tokens, ctx.rows)


class _EmbeddingWithTangents(_Embedding):
    @staticmethod
    def jvp(ctx: Any, _: None, tangent: Tensor) -> Tensor:
        (tokens,) = ctx.saved_tensors
        return embedding(tokens, tangent)


_WITH_TANGENTS: dict[Any, Any] = {
    _Embedding: _EmbeddingWithTangents,
    _EmbeddingBackward: _EmbeddingBackwardWithTangents,
}


def _eagerly(function: Any) -> Any:
    """The Function with forward mode, except under torch.compile, which refuses one that has it."""
    return function if torch.compiler.is_compiling() else _WITH_TANGENTS[function]


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """weight[tokens]: tokens (...) integer, weight (rows, C), the result (..., C)."""
    return _eagerly(_Embedding).apply(tokens, weight)


class Embedding(nn.Embedding):
    """PyTorch's, by the function above: (...) integer -> (..., C)."""

    def forward(self, tokens: Tensor) -> Tensor:
        return embedding(tokens, self.weight)
