"""Functions and tokens given from outside, checked: functions before the run, tokens at every step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import ConfigError, ModelConfig
from fastgpt2.data import DataError
from fastgpt2.model import GPT
from fastgpt2.ops import Ops
from fastgpt2.outside import told

Source = Callable[[int], Tensor]
"""From a step counted from 0 to its tokens: int64, CPU, (grad_accum, batch_size, block_size + 1).

Several processes that train together each ask for rows of their own: `fastgpt2.parallel.current()` has the `rank` of
this one and their number, `world`.
"""

TRIED_TOKENS = 1024
"""Longest sequence of a trial: PyTorch's loss holds all its logits."""


def try_ops(ops: Ops, names: Mapping[str, str], shape: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
    """Call functions as a model of one block does, on one sequence, and compare what they return with PyTorch's.

    Args:
        names: the slots to try, and the name of the function in each.
        dtype: what the matmuls compute in, which is autocast's where that is on.

    Raises:
        ConfigError: a function raises, returns another shape or dtype, NaN or infinity, has no gradient for an
            argument, or is an attention that sees later tokens.
    """
    plain = Ops()
    tried: dict[str, Any] = {
        slot: _tried(f"--{slot} {name}", getattr(ops, slot), getattr(plain, slot), dtype, CHECKS.get(slot))
        for slot, name in names.items()
    }
    model = GPT(dataclasses.replace(shape, n_layer=1), dataclasses.replace(plain, **tried))
    model.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    tokens = torch.zeros(1, min(shape.block_size, TRIED_TOKENS), dtype=torch.int64, device=device)
    with torch.autocast(device.type, dtype=dtype, enabled=dtype.itemsize == 2):
        model(tokens, tokens)


def _tried(
    what: str,
    function: Callable[..., Any],
    plain: Callable[..., Any],
    dtype: torch.dtype,
    check: Callable[..., str] | None,
) -> Any:
    """PyTorch's form of a slot, which checks the function whenever it is called."""

    def call(*inputs: Any, **options: Any) -> Any:
        named = dict(zip(signature(plain).parameters, inputs, strict=False))
        leaves = {
            name: x.detach().requires_grad_()
            for name, x in named.items()
            if isinstance(x, Tensor) and x.is_floating_point()
        }
        expected = plain(*(named | leaves).values(), **options)
        # A function may write into an argument, which PyTorch forbids for leaves.
        arguments = named | {name: leaf.clone() for name, leaf in leaves.items()}
        try:
            found = function(*arguments.values(), **options)
            if not _is_like(found, expected, dtype):
                raise ConfigError(f"{what} must return {_shown(expected)}, got {_shown(found)}")
            if not all(y.isfinite().all() for y in _tensors(found)):
                raise ConfigError(f"{what} returned NaN or infinity for finite arguments")
            lost = _without_gradient(found, expected, leaves)
            if check is not None and (fault := check(function, found, *inputs, **options)):
                raise ConfigError(f"{what} {fault}")
        except ConfigError:
            raise
        except Exception as error:
            called = f"; it is called as f({', '.join(signature(plain).parameters)})" * isinstance(error, TypeError)
            raise ConfigError(f"{what} can't be used here: {told(error)}{called}") from error
        if lost:
            raise ConfigError(
                f"{what} has no gradient for {', '.join(lost)}: it must be differentiable in each argument"
            )
        return expected

    return call


def _is_like(found: Any, expected: Any, dtype: torch.dtype) -> bool:
    """Whether both are alike. In mixed precision activations may have either dtype, a loss is float32."""
    if isinstance(expected, tuple):
        same = isinstance(found, tuple) and len(found) == len(expected)
        return same and all(_is_like(*pair, dtype) for pair in zip(found, expected, strict=True))
    if not isinstance(found, Tensor) or not isinstance(expected, Tensor):
        return type(found) is type(expected)
    dtypes = (expected.dtype, dtype) if expected.ndim else (expected.dtype,)
    return found.shape == expected.shape and found.device == expected.device and found.dtype in dtypes


def _tensors(found: Any) -> list[Tensor]:
    return [y for y in (found if isinstance(found, tuple) else (found,)) if isinstance(y, Tensor)]


def _without_gradient(found: Any, expected: Any, leaves: dict[str, Tensor]) -> list[str]:
    """The arguments, and of a packed projection the parts, that lost a gradient which PyTorch's form has."""
    got, wanted = _gradients(found, leaves), _gradients(expected, leaves)
    return [name for name, gradient in wanted.items() if gradient.any() and not got[name].any()]


def _gradients(found: Any, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """By argument, q, k and v apart; zeros where nothing that was returned depends on it."""
    outputs = [y for y in _tensors(found) if y.requires_grad]
    zeros = [torch.zeros_like(leaf) for leaf in leaves.values()]
    gradients: Sequence[Tensor | None] = zeros
    if outputs:
        with torch.autocast(outputs[0].device.type, enabled=False):  # as in a step, where the backward is outside it
            # Not ones: a LayerNorm's outputs have a constant sum.
            upstream = [(torch.arange(y.numel(), device=y.device) % 7 - 3).to(y.dtype).view_as(y) for y in outputs]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    named: dict[str, Tensor] = {}
    for name, gradient, zero in zip(leaves, gradients, zeros, strict=True):
        whole = zero if gradient is None else gradient
        named |= dict(zip("qkv", whole.unbind(2), strict=True)) if name == "qkv" else {name: whole}
    return named


def _sees_later_tokens(
    attention: Callable[..., Any], found: Tensor, qkv: Tensor, dropout_p: float = 0.0, documents: Tensor | None = None
) -> str:
    """What is wrong if the last token moves what is returned for those before it; random dropout hides that."""
    if dropout_p:
        return ""
    moved = qkv.detach().clone()
    moved[:, -1] += 10.0
    before, after = found[:, :-1].float(), attention(moved, dropout_p=dropout_p, documents=documents)[:, :-1].float()
    # The same products in the same order; a tolerance, as a function may sum in any order.
    causal = torch.allclose(before, after, rtol=1e-2, atol=1e-2 * float(found.detach().float().abs().max()))
    return "" if causal else "is not causal: a token's output changes with a later token"


CHECKS: dict[str, Callable[..., str]] = {"attn": _sees_later_tokens}
"""By slot: a check of its own, which returns what is wrong."""


def _shown(value: Any) -> str:
    """A result's dtypes and shapes: "float32 (1, 64, 2, 16)"."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_shown, value))})"
    if isinstance(value, Tensor):
        place = "" if value.device.type == "cpu" else f" on {value.device}"
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}{place}"
    return "None" if value is None else type(value).__name__


class GivenTokens:
    """Training tokens given in Python in place of --data's, each batch checked.

    Raises:
        ConfigError: the source is no function.
    """

    batches, fingerprint = 0, ""

    def __init__(self, source: Source, shape: tuple[int, int, int], vocab_size: int) -> None:
        self.source, self.shape, self.vocab_size = source, shape, vocab_size
        self.notes: list[str] = []
        if not callable(source):
            raise ConfigError(
                f"source must be a function of the step that returns {self._expected} "
                f"(grad_accum, batch_size, block_size + 1), got {type(source).__name__}"
            )

    def tokens(self, step: int) -> Tensor:
        """The source's batch of a step for this process.

        Raises:
            DataError: it has another shape or dtype, is not on the CPU, or holds a token outside the vocabulary.
        """
        tokens = self.source(step)
        if _shown(tokens) != self._expected:
            raise DataError(f"source({step}) must return {self._expected}, got {_shown(tokens)}")
        low, high = (int(x) for x in tokens.aminmax())
        if low < 0 or high >= self.vocab_size:
            raise DataError(f"source({step}) must be in [0, {self.vocab_size}), the vocabulary; got {low} to {high}")
        return tokens

    def begin_at(self, step: int, samples: int) -> None:
        """Do nothing: the step decides the batch."""

    def check(self) -> None:
        """Do nothing: each batch was checked."""

    @property
    def _expected(self) -> str:
        return f"int64 {self.shape}"
