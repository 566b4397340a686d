"""What the tools know of a kernel: how it is compiled, what it computes, and what to try when it is tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

TOKENS, CHANNELS = 65536, 768
"""GPT-2 124M's, in a micro-step of 64 sequences on an 80 GB card."""
H100_MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Loop:
    """How often one of a kernel's loops runs, all programs together.

    Args:
        runs: how often the body runs.
        special: elements that a run passes through the special-function unit, from which `bounds` infers how far the
            assembler unrolled the loop; 0 if there are none.
        conditional: how often the part behind an `if` runs, such as the epilogue in a flattened loop; None if there
            is no such part.
    """

    runs: float
    special: int = 0
    conditional: float | None = None


@dataclass(frozen=True)
class Work:
    """What a kernel does at GPT-2 124M's shape, for `fastgpt2.kernels.tools.bounds`.

    Args:
        size: the kernel's size at that shape: 64 channels a head, 768 channels, or 50304 rows of the output head.
        flops: FLOPs of the operation, by its formula.
        executed_flops: FLOPs that the kernel executes, masked elements included.
        bytes: the least that must be read and written.
        programs: programs in the grid.
        loops: the kernel's loops, in the order of the code.
    """

    size: int
    flops: float
    executed_flops: float
    bytes: float
    programs: int
    loops: tuple[Loop, ...] = ()


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel and how its launcher compiles it, for `fastgpt2.kernels.tools.inspect` and `tune`.

    An argument's type follows from its name: *_ptr is a pointer to elements of the precision, *_strides are three
    integers, every other argument is an integer. Pointers and strides are multiples of 16.

    Args:
        function: the @triton.jit function.
        constants: (precision, size) -> the compile-time arguments, without those of the configuration.
        types: Triton's types of arguments that the names don't tell ("*fp32", "fp32", "i64"). {} stands for the
            precision's element type. A tuple argument has a tuple of types.
        multiples_of_16: integer arguments that are multiples of 16 at the shapes that matter.
        products: the number of tl.dot calls in the source.
        variants: other forms that the launchers compile with the same tiles, by name. Each is a dict of constants
            that replace those above; ... makes an argument a runtime argument, and "*{}" one of that type.
        work: (precision, size, configuration) -> what the kernel does at GPT-2 124M's shape.
        descriptors: (precision, size, configuration) -> more types: of tensor descriptors, which hold a tile's shape.
    """

    function: Any
    constants: Callable[[str, int], dict[str, Any]]
    types: dict[str, Any] = field(default_factory=dict)
    multiples_of_16: tuple[str, ...] = ()
    products: int = 0
    variants: dict[str, dict[str, Any]] = field(default_factory=dict)
    work: Callable[[str, int, Any], Work] | None = None
    descriptors: Callable[[str, int, Any], dict[str, str]] = lambda precision, size, config: {}


@dataclass(frozen=True)
class Tuning:
    """How `fastgpt2.kernels.tools.tune` tunes a kernel: what it tries and what it times.

    A spec's TUNING holds one for each of its KERNELS that can be tuned, by the same name.

    Args:
        candidates: (precision, size) -> the configurations to try beside the table's.
        example: (precision, size, device, seed) -> a function of a configuration. It calls the kernel's launcher on
            inputs at GPT-2 124M's shape. The tensors that it returns must not depend on the configuration.
        launched: major compute capability -> whether such GPUs launch this kernel at the sizes of the tables.
    """

    candidates: Callable[[str, int], Iterable[Any]]
    example: Callable[[str, int, torch.device, int], Callable[[Any], Any]]
    launched: Callable[[int], bool] = lambda major: True
