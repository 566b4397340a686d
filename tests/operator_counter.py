"""Counts what passes through PyTorch's dispatcher: operators, bytes, FLOPs, waits, and the launches of our kernels."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from fastgpt2.kernels.specs import all_kernels

OPERATIONS = {"attention": "attention", "gelu_mlp": "mlp", "layer_norm": "norm", "linear_cross_entropy": "loss"}
"""File of the kernels, by operation. Operators are fastgpt2::<operation>_forward and _backward, each launched by the
file's function of the same name; the embedding's is in fastgpt2.embedding."""
SYNCHRONISING = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
"""Operators whose result the host has to wait for."""

Counts = dict[str, Any]


# ------------------------------------------------------------------------------------------------ FLOPs


def _attention_forward(q: Tensor, *_: Any, **__: Any) -> int:
    batch, tokens, heads, size = q.shape
    return sdpa_flop_count(*[(batch, heads, tokens, size)] * 3)


def _attention_backward(do: Tensor, *_: Any, **__: Any) -> int:
    batch, tokens, heads, size = do.shape
    return sdpa_backward_flop_count(*[(batch, heads, tokens, size)] * 4)


def _mlp_forward(x: Tensor, w_fc: Tensor, b_fc: Tensor, w_proj: Tensor, *_: Any, **__: Any) -> int:
    return 2 * x.numel() // x.size(-1) * (w_fc.numel() + w_proj.numel())


def _mlp_backward(dy: Tensor, x: Tensor, w_fc: Tensor, w_proj: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _mlp_forward(x, w_fc, dy, w_proj)


def _loss_forward(hidden: Tensor, weight: Tensor, *options: Any, **__: Any) -> int:
    """The logits, and each gradient that the last two options ask for."""
    return 2 * hidden.size(0) * weight.numel() * (1 + sum(options[-2:]))


def _loss_backward(upstream: Tensor, lse: Tensor, hidden: Tensor, weight: Tensor, *options: Any, **__: Any) -> int:
    return _loss_forward(hidden, weight, *options)


def _cpu_attention_forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _cpu_attention_backward(do: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_backward_flop_count(do.shape, q.shape, k.shape, v.shape)


FLOPS: dict[str, Callable[..., int]] = {
    "fastgpt2::attention_forward": _attention_forward,
    "fastgpt2::attention_backward": _attention_backward,
    "fastgpt2::gelu_mlp_forward": _mlp_forward,
    "fastgpt2::gelu_mlp_backward": _mlp_backward,
    "fastgpt2::linear_cross_entropy_forward": _loss_forward,
    "fastgpt2::linear_cross_entropy_backward": _loss_backward,
    "aten::_scaled_dot_product_flash_attention_for_cpu": _cpu_attention_forward,
    "aten::_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_attention_backward,
}
"""FLOPs of a call, beside those that PyTorch knows, by its convention: the matmuls alone, attention as if without its
mask, and five products in its backward, which computes the scores again."""


def flops(function: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> int:
    if formula := FLOPS.get(function._schema.name):
        return formula(*args, **kwargs)
    if formula := flop_registry.get(function._overloadpacket):
        return formula(*args, **kwargs, out_val=result)
    return 0


# ------------------------------------------------------------------------------------------------ counting


class OperatorCounter(TorchDispatchMode):
    """Counts what passes through PyTorch's dispatcher.

    Bytes are those of storages that an operator made: all of them, and the most that were there at once. Who asks a
    fake tensor for its value is counted, and told 1.

    Args:
        look_inside: count what our own operators' launchers call, rather than the operators alone.
    """

    def __init__(self, *, look_inside: bool = True) -> None:
        super().__init__()
        self.look_inside = look_inside
        self.calls: Counter[str] = Counter()
        self.views = self.synchronisations = self.flops = 0
        self.allocated = self.live = self.peak = 0
        self.storages: dict[int, int] = {}
        self.inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name
        if name.startswith(("prim::", "profiler::")):  # bookkeeping of fake tensors and of the optimizer
            return func(*args, **kwargs)
        if self.inside and _is_composite(func):  # outside, autograd has taken it apart already
            with self:
                return func.decompose(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)}
        if name in SYNCHRONISING:
            self.synchronisations += 1
        result = self._result(func, name, args, kwargs)
        made = [x.untyped_storage() for x in tree_iter(result) if isinstance(x, Tensor)]
        if given or made:  # what takes and gives no tensor, as promote_types, is a function of the host
            self.calls[name.removeprefix("aten::")] += 1
            self.views += _is_view(func)
        for storage in made:
            if storage._cdata not in given:
                self._allocate(storage)
        return result

    def _result(self, func: Any, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """What an operator returns. For ours the launcher runs, and what it does inside is counted."""
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            return 1.0 if args[0].is_floating_point() else 1
        if not (self.look_inside and name.startswith("fastgpt2::")):
            result = func(*args, **kwargs)
            self.flops += 0 if self.inside else flops(func, args, kwargs, result)
            return result
        self.flops += flops(func, args, kwargs, None)
        self.inside = True
        with self:
            result = _launcher(name)(*args, **kwargs)
        self.inside = False
        return result

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.storages:
            return
        self.storages[key] = storage.nbytes()
        self.allocated += self.storages[key]
        self.live += self.storages[key]
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.storages.pop(key)


@functools.cache
def _is_composite(func: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")


@functools.cache
def _is_view(func: Any) -> bool:
    """Whether all that it returns is its arguments' memory, and that not written."""
    aliases = [result.alias_info for result in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _launcher(operator: str) -> Callable[..., Any]:
    name = operator.removeprefix("fastgpt2::")
    operation = name.rpartition("_")[0]
    home = f"kernels.{OPERATIONS[operation]}" if operation in OPERATIONS else operation
    return getattr(import_module(f"fastgpt2.{home}"), name)


class _Tally:
    """Stands for a Triton kernel: counts its launches."""

    def __init__(self, name: str, launches: Counter[str]) -> None:
        self.name, self.launches = name, launches

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self.launches[self.name] += 1


@contextlib.contextmanager
def tallied() -> Iterator[Counter[str]]:
    """Launch no Triton kernel, but count them by name."""
    launches: Counter[str] = Counter()
    kernels = {id(kernel.function) for kernel in all_kernels().values()}
    with contextlib.ExitStack() as stack:
        for file in (*OPERATIONS.values(), "cross_entropy"):
            module = import_module(f"fastgpt2.kernels.{file}")
            for name, value in list(vars(module).items()):
                if id(value) in kernels:
                    stack.enter_context(mock.patch.object(module, name, _Tally(name, launches)))
        # Whether a matrix begins at 16 bytes: what PyTorch allocates does.
        stack.enter_context(mock.patch.object(FakeTensor, "data_ptr", lambda self: 0, create=True))
        yield launches


def counted(work: Callable[[], object]) -> Counts:
    """What a piece of work on fake tensors asks for."""
    counter = OperatorCounter()
    with tallied() as launches, counter:
        kept = work()
    del kept
    return {
        "operators": counter.calls.total() - counter.views,
        "views": counter.views,
        "kernel launches": launches.total(),
        "host synchronisations": counter.synchronisations,
        "allocated bytes": counter.allocated,
        "peak bytes": counter.peak,
        "flops": counter.flops,
        "calls": dict(sorted(counter.calls.items())),
        "launches": dict(sorted(launches.items())),
    }
