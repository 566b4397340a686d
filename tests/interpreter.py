"""Make Triton's interpreter several times as fast, with the same results.

- Every sum and product of integers is computed again in 64 bits, to find an overflow, and what is found is dropped:
  assertions are on in debug mode alone, which the interpreter never is in.
- The shape of every tensor is wrapped and unwrapped anew, and a table of dtypes built anew to look one up. Here what
  follows from a type is computed once.
- Each launch, and each call of a device function (a @triton.jit function called in a kernel), searches the modules of
  triton.language for the functions to replace. Here each finds them once, and a call in a launch replaces nothing.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def make_faster() -> None:
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    _compute_types_once()
    _patch_once_a_launch()


def _compute_types_once() -> None:
    """Keep what the constructors of block_type and tensor compute of a type, and the NumPy dtype of a scalar."""
    make_block, make_tensor, look_up = tl.block_type.__init__, tl.tensor.__init__, interpreter._get_np_dtype
    blocks: dict[tuple[Any, ...], tuple[Any, ...]] = {}
    tensors: dict[str, tuple[Any, ...]] = {}

    def block_type(self: tl.block_type, element_ty: tl.dtype, shape: Any) -> None:
        key = (str(element_ty), *(n.value if isinstance(n, tl.constexpr) else n for n in shape))
        if key not in blocks:
            make_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        self.element_ty = element_ty
        self.shape, self.numel, self.name = blocks[key]

    def tensor(self: tl.tensor, handle: Any, type: tl.dtype) -> None:
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = self.shape, self.numel
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = tensors[type.name]

    scalars: dict[str, np.dtype] = {}

    def np_dtype(type: tl.dtype) -> np.dtype:
        name = type.scalar.name
        if name not in scalars:
            scalars[name] = look_up(type.scalar)
        return scalars[name]

    tl.block_type.__init__ = block_type
    tl.tensor.__init__ = tensor
    interpreter._get_np_dtype = np_dtype


def _patch_once_a_launch() -> None:
    """Find once what a launch replaces; let a device function keep what the launch, or one before it, has replaced."""

    @cache
    def sees(function: Any) -> tuple[bool, ...]:
        """Which of Triton's modules are globals of the function."""
        return tuple(any(value is lang for value in function.__globals__.values()) for lang in (tl, tl.core))

    patch_lang, scope = interpreter._patch_lang, interpreter._LangPatchScope
    found: dict[tuple[Any, ...], list[tuple[Any, str, Any, Any]]] = {}
    active: list[tuple[bool, ...]] = []
    launch = scope()

    def patch(function: Any) -> Any:
        modules = sees(function)
        if modules in active:
            return scope()  # restores nothing: the launch will
        key = (*active, modules)
        if key in found:
            for owner, name, _, replacement in found[key]:
                setattr(owner, name, replacement)
        else:
            changes = patch_lang(function)._changes
            found[key] = [(owner, name, original, getattr(owner, name)) for owner, name, original in changes]
        active.append(modules)
        launch._changes.extend(change[:3] for change in found[key])
        return launch if len(active) == 1 else scope()

    def restore() -> None:
        scope.restore(launch)
        active.clear()

    launch.restore = restore
    interpreter._patch_lang = patch
