"""What every launcher needs on the host: the right device, autocast, who can run, and how inspect compiles it.

Triton is imported when first asked about, so that an operation's plain form works where Triton is not installed.
"""

from __future__ import annotations

import contextlib
import dis
import functools
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Loop:
    """How often one of a kernel's loops runs, all programs together.

    Args:
        runs: of its body.
        special: of a run's elements those that a program takes through the special-function unit; from them the
            assembler's unrolling is told. 0 where there are none.
        conditional: how often the part runs that an `if` guards, an epilogue in a flattened loop; None: every time.
    """

    runs: float
    special: int = 0
    conditional: float | None = None


@dataclass(frozen=True)
class Work:
    """What a kernel does at GPT-2 124M's shape, for `fastgpt2.kernels.tools.bounds`.

    Args:
        size: the kernel's size there: 64 channels a head, 768 channels, 50304 rows of the head.
        flops: of the operation, as credited by its formula.
        executed_flops: of the products that the kernel forms, masked elements and all.
        bytes: read and written at least.
        programs: in the grid.
        loops: the kernel's loops in the order of the code.
    """

    size: int
    flops: float
    executed_flops: float
    bytes: float
    programs: int
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and how its launcher has it compiled, for `fastgpt2.kernels.tools.inspect` and `fastgpt2.kernels.tools.tune`.

    An argument's type follows from its name: *_ptr points to elements of the precision, *_strides are three
    integers, the rest are integers. Pointers and strides divide by 16.

    Args:
        function: the @triton.jit function.
        constants: (precision, size) -> its compile-time arguments beside the configuration's.
        types: Triton's type of an argument that isn't what its name says ("*fp32", "fp32", "i64"); an element
            type written {} is that of the precision ("tensordesc<{}[128, 64]>").
        multiples_of_16: integers that divide by 16 at the shapes that matter.
        products: tl.dot calls in the source; 0 for a kernel without.
        variants: by name, what else the launchers have it compiled to with the same tiles, as constants in place of
            those above; ... for an argument that is passed then.
        work: (precision, size, configuration) -> what it does at GPT-2 124M's shape.
    """

    function: Any
    constants: Callable[[str, int], dict[str, Any]]
    types: dict[str, str] = field(default_factory=dict)
    multiples_of_16: tuple[str, ...] = ()
    products: int = 0
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    work: Callable[[str, int, Any], Work] | None = None

    def __post_init__(self) -> None:
        hash_callees_first(self.function)


def hash_callees_first(function: Any) -> None:
    """Have Triton compute the cache key of a kernel's callees before its own, which then is the same in every process.

    Triton 3.6 leaves a callee's constants out of the caller's key unless the callee was hashed before, by whatever else
    the process had compiled. A kernel compiled in one process was compiled again in another.
    """
    from triton.runtime import JITFunction

    if not isinstance(function, JITFunction) or function.hash is not None:  # interpreted, none of Triton's, or done
        return
    for instruction in dis.get_instructions(function.fn):
        if instruction.opname == "LOAD_GLOBAL":
            hash_callees_first(function.__globals__.get(instruction.argval))
    function.cache_key  # noqa: B018 - computed when it is read, and kept


@dataclass(frozen=True)
class Tuning:
    """What `fastgpt2.kernels.tools.tune` tries for a kernel, and what it times: the kernel at GPT-2 124M's shape.

    A module's TUNING holds one for each of its KERNELS that can be tuned, by the same name.

    Args:
        candidates: (precision, size) -> the configurations to try beside the table's.
        example: (precision, size, device, seed) -> a function of a configuration that launches the kernel, by its
            launcher, on inputs of its own; the tensors that it returns must not depend on the configuration.
        launched: major compute capability -> whether GPUs of it launch this kernel at the sizes of the tables.
    """

    candidates: Callable[[str, int], Iterable[Any]]
    example: Callable[[str, int, torch.device, int], Callable[[Any], Any]]
    launched: Callable[[int], bool] = lambda major: True


def constant_in_graphs(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compiler.assume_constant_result, which imports the whole compiler first: a second or more of a process that
    compiles nothing. This is all that it does then."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register_fake(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """torch.library.register_fake, for operators that Inductor is to take as they are, however deep in a model."""

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(fake)
        def traced(*args: Any, **kwargs: Any) -> Any:
            take_as_it_is(name)
            return fake(*args, **kwargs)

        return torch.library.register_fake(name, traced)

    return register


def take_as_it_is(name: str) -> None:
    """Tell Inductor, once it is there, to call an operator as it would any that it doesn't know.

    Left to find that out, PyTorch 2.11 first makes a text of the arguments, for a log that nobody reads. Each holds the
    texts of all operators before it, some of them twice: for the loss at the end of 4 layers of ours that took most
    of a minute, and of 12 it did not end. From 2.13 on the text is made only if it is read.
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


def refuse_transforms(what: str, instead: str) -> None:
    """To be called before an autograd Function without setup_context: what PyTorch says under torch.func names none."""
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError(f"{what} doesn't work under torch.func (grad, vmap, jacrev, ...): use {instead}")


def why_unsupported(what: str, device: torch.device, dtype: torch.dtype, instead: str) -> str | None:
    """Why a Triton kernel can't run on a device in a dtype, in a line that says what would work; None if it can.

    Args:
        what: the kernel, as a message begins ("Triton attention").
        instead: what to use, as a message ends ("--attn sdpa").
    """
    interpreted = interpreting()
    if half_interpreted():
        return f"TRITON_INTERPRET changed after triton was imported: set it before triton is imported, or use {instead}"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted):
        return (
            f"{what} needs a CUDA GPU, got {device.type}; use {instead}, "
            "or set TRITON_INTERPRET=1 before triton is imported to run it (slowly) on the CPU"
        )
    if device.type == "cpu" and (clash := interpreter_clash(*_versions())):
        return f"{clash}, or use {instead}"
    if device.type == "cuda" and capability(device) < (8, 0):
        return f"{what} needs compute capability 8.0, {device} has {capability(device)}; use {instead}"
    if dtype not in DTYPES and not (dtype == torch.float64 and interpreted):
        return f"{what} computes in bfloat16, float16 or float32, got {dtype}; cast, or use {instead}"
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
