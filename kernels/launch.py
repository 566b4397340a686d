"""What every launcher needs on the host: the current device, autocast, operator registration, and which inputs can run.

Triton is imported inside the functions that need it: an operation's plain form works without Triton.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KernelFunction = TypeVar("KernelFunction")


def hash_callees_first(kernel: KernelFunction) -> KernelFunction:
    """Decorate a kernel so that Triton computes its cache key after those of the functions it calls.

    Triton 3.6 leaves a callee's constants out of the caller's key unless the callee was hashed before. The key then
    depends on what else the process compiled, and a kernel compiled in one process is compiled again in another.
    """
    from triton.runtime import JITFunction

    if isinstance(kernel, JITFunction) and kernel.hash is None:  # not interpreted, and not done yet
        for instruction in dis.get_instructions(kernel.fn):
            if instruction.opname == "LOAD_GLOBAL":
                hash_callees_first(kernel.__globals__.get(instruction.argval))
        kernel.cache_key  # noqa: B018 - reading it computes and stores it
    return kernel


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, without importing the compiler, which takes a second or more."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.library.register_fake for an operator that Inductor should call as it is, however deep in a model."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def traced(*args: Any, **kwargs: Any) -> Any:
            register_inductor_fallback(name)
            return fake(*args, **kwargs)

        return torch.library.register_fake(name, traced)

    return register


def register_inductor_fallback(name: str) -> None:
    """Tell Inductor, if it is imported, to call this operator as it is.

    PyTorch 2.11 finds that out by itself, but first formats the operator's arguments for a debug log. Each text holds
    those of all operators before it: the loss after 4 layers of ours took most of a minute, after 12 it never ended.
    From 2.13 on the text is formatted only if it is read.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    namespace, operator = name.split("::")
    overload = getattr(getattr(torch.ops, namespace), operator).default
    if lowering is not None and overload not in lowering.lowerings:
        tag = lowering.get_layout_constraint_tag(overload, with_default=True)
        lowering.make_fallback(overload, layout_constraint=lowering.tag_to_layout_constraint(tag))


def on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def statistics(dtype: torch.dtype) -> torch.dtype:
    """What sums, statistics and losses are kept in: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


def autocast_dtype(x: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """The dtype in which autocast would hand x, or x in `dtype`, to a matmul; its own where autocast is off, or passes
    it by."""
    device, own = x.device.type, dtype or x.dtype
    if not torch.is_autocast_enabled(device) or not own.is_floating_point or own == torch.float64:
        return own
    return torch.get_autocast_dtype(device)


def autocast(*inputs: Tensor) -> tuple[Tensor, ...]:
    """The inputs as autocast would hand them to a matmul."""
    return tuple(x.to(autocast_dtype(x)) for x in inputs)


def refuse_second_derivative(what: str, instead: str) -> None:
    """To be called in a backward: under create_graph=True autograd would take its result for a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{what} has no second derivative: drop create_graph=True, or use {instead}")


def frees_graph() -> bool:
    """To be called in a backward: whether autograd frees what was saved for it, so that it may be overwritten.

    False with retain_graph=True, and under torch.compile, which reuses memory by itself.
    """
    return not torch.compiler.is_compiling() and not torch._C._autograd._get_current_graph_task_keep_graph()


def refuse_transforms(what: str, instead: str) -> None:
    """To be called before an autograd Function without setup_context: what PyTorch says under torch.func names none."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{what} doesn't work under torch.func (grad, vmap, jacrev, ...): use {instead}")


def why_unsupported(what: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a Triton kernel can't run on a device in a dtype, in a line; None if it can.

    Args:
        what: the kernel, as a message begins ("Triton attention").
    """
    interpreted = interpreting()
    if half_interpreted():
        return "TRITON_INTERPRET changed after triton was imported: set it before triton is imported"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return (
            f"{what} needs a CUDA GPU, got {device.type} "
            "(TRITON_INTERPRET=1, set before triton is imported, runs it slowly on the CPU)"
        )
    if device.type == "cpu" and (clash := interpreter_clash(*_versions())):
        return clash
    if device.type == "cuda" and capability(device) < (8, 0):
        return f"{what} needs compute capability 8.0, {device} has {capability(device)}"
    if dtype not in DTYPES and not (dtype == torch.float64 and interpreted):
        return f"{what} computes in bfloat16, float16 or float32, got {dtype}"
    return None


@constant_in_graphs
def interpreting() -> bool:
    """Whether Triton interprets its kernels on the CPU."""
    from fastgpt2.kernels.tiles import INTERPRETED

    return INTERPRETED.value


@constant_in_graphs
def half_interpreted() -> bool:
    """Whether of Triton's own functions and the kernels one is interpreted and the other compiled, which can't work."""
    import triton.language

    from fastgpt2.kernels.tiles import dot

    return type(triton.language.softmax) is not type(dot)


@constant_in_graphs
def _versions() -> tuple[str, str]:
    import numpy
    import triton

    return triton.__version__, numpy.__version__


@constant_in_graphs
def interpreter_clash(triton_version: str, numpy_version: str) -> str | None:
    """Triton 3.6 takes a loop's bounds for scalars, which NumPy 2.4 no longer does with arrays of one element."""
    old, new = (tuple(int(n) for n in v.split(".")[:2]) for v in (triton_version, numpy_version))
    if old >= (3, 7) or new < (2, 4):
        return None
    return (
        f"the interpreter of Triton {triton_version} fails with NumPy {numpy_version}; "
        "pip install 'numpy<2.4', take Triton 3.7 or newer"
    )


@constant_in_graphs
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
