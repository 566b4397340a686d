"""Tensors that may be sharded: fsdp and hsdp turn parameters and their averages into PyTorch's DTensors.

Each function takes plain tensors too. PyTorch's module is imported where it is needed: that takes a second.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def is_sharded(tensor: Tensor) -> TypeGuard[DTensor]:
    """Whether a tensor is a DTensor."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole value of a tensor. If it is sharded, all ranks must call this: each sends its part to the others."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def copy_part(target: Tensor, value: Tensor) -> Tensor:
    """Copy this process's part of a whole value into a tensor, and return that tensor. Sends nothing.

    Args:
        target: decides the part, the type and the device. It has no gradient.
        value: the same in each process.
    """
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return target.copy_(value)
