"""What a kernel is held to: its own reference in float64, within a budget that plain forms of the same precision set.

The oracle of a kernel is the `*_reference` function in its file, which knows every option of the kernel. The oracle of
the model is the plain form in fastgpt2/backends; test_references.py holds that the two are the same function. The
budget is fastgpt2.accuracy's in both cases.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt2.accuracy import Op, maximum, named, pooled

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

Results = tuple[Tensor, ...]
Compute = Callable[..., Results]
"""(*inputs, **options) -> outputs and gradients."""


def differentiate(function: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> Results:
    """Outputs, then the gradient of each input.

    Args:
        function: (*inputs) -> an output or a tuple of them.
        upstream: the gradient of each output; it takes the output's dtype.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]
    made = function(*leaves)
    outputs = made if isinstance(made, tuple) else (made,)
    received = [g.to(y.dtype) for g, y in zip(upstream, outputs, strict=True)]
    return (*(y.detach() for y in outputs), *torch.autograd.grad(outputs, leaves, received))


@dataclass(frozen=True)
class Oracle:
    """The truth about an operation, and the plain forms whose rounding errors set the budget.

    Args:
        names: of the results.
        exact: the reference in float64.
        peers: plain forms in the precision of the inputs. Ours must have the dtypes of the first one's results.
        terms: as in accuracy.pooled.
    """

    names: Sequence[str]
    exact: Compute
    peers: Sequence[Compute]
    terms: Callable[[Any], Any] | None = None

    def excess(
        self, compute: Compute, make: Callable[[int], Sequence[Any]], *, once: bool = DEVICE == "cpu", **options: Any
    ) -> dict[str, float]:
        """Error over budget of each result, by maximum and by norm: at most 1 is right.

        Args:
            compute: what is tested, called with the inputs alone.
            make: seed -> inputs.
            once: one seed of ours, five of the peers': interpreted kernels are slow.
            options: of the reference and the peers.
        """
        dtypes: list[torch.dtype] = []

        def first_peer(*inputs: Any) -> Results:
            results = self.peers[0](*inputs, **options)
            dtypes[:] = [x.dtype for x in results]
            return results

        def checked(*inputs: Any) -> Results:
            results = compute(*inputs)
            assert [x.dtype for x in results] == dtypes
            return results

        def op(function: Compute, **options: Any) -> Op:
            return named(self.names, function, **options)

        peers = [op(first_peer), *(op(peer, **options) for peer in self.peers[1:])]
        return pooled(make, op(checked), peers, op(self.exact, **options), once=once, terms=self.terms).excess()

    def assert_right(self, compute: Compute, make: Callable[[int], Sequence[Any]], **options: Any) -> None:
        """No result is over its budget."""
        over = {key: factor for key, factor in self.excess(compute, make, **options).items() if factor > 1.0}
        assert not over, over

    def assert_wrong(self, compute: Compute, make: Callable[[int], Sequence[Any]], **options: Any) -> None:
        """Some result is far over its budget: a planted fault is found with room to spare."""
        excess = self.excess(compute, make, **options)
        assert max(excess.values()) > 2.0, excess


def assert_equal(ours: Results, theirs: Results) -> None:
    """To the bit."""
    for x, y in zip(ours, theirs, strict=True):
        assert torch.equal(x, y)


def assert_same(ours: Results, theirs: Results, units: float = 80) -> None:
    """To the bit on a CPU. On a GPU the order of a sum may follow the memory layout.

    units: in the last place of the maximum, allowed on a GPU.
    """
    for x, y in zip(ours, theirs, strict=True):
        allowed = 0.0 if DEVICE == "cpu" else units * torch.finfo(y.dtype).eps * maximum(y)
        torch.testing.assert_close(x, y, rtol=0, atol=allowed)
