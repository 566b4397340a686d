"""What the tools know of a kernel: how it is compiled, what it computes, and what to try when it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch


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
            type written {} is that of the precision ("tensordesc<{}[128, 64]>"). A tuple has a tuple of them.
        multiples_of_16: integers that divide by 16 at the shapes that matter.
        products: tl.dot calls in the source; 0 for a kernel without.
        variants: by name, what else the launchers have it compiled to with the same tiles, as constants in place of
            those above; ... for an argument that is passed then.
        work: (precision, size, configuration) -> what it does at GPT-2 124M's shape.
    """

    function: Any
    constants: Callable[[str, int], dict[str, Any]]
    types: dict[str, Any] = field(default_factory=dict)
    multiples_of_16: tuple[str, ...] = ()
    products: int = 0
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    work: Callable[[str, int, Any], Work] | None = None


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
