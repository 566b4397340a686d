"""One model in several processes, on PyTorch's own engines: DistributedDataParallel and FSDP2 (fully_shard).

    mode   a process holds                         traffic of a step, for N parameters in W processes
    ddp    weights, gradients, optimizer whole     all-reduces the gradients
    fsdp   1/W of each, and one block gathered     gathers each block twice a micro-step, reduce-scatters the gradients
    hsdp   1/S of each, S = --shard-size           as fsdp within S processes, all-reduces the shards between W/S groups

The gradients of a step are averaged over the processes once, in its last micro-step. The loss of a micro-step is a
mean over equally many tokens everywhere, so the mean over the processes is the mean over the global batch.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.fields import ConfigError
from fastgpt2.model import GPT
from fastgpt2.parallel import Ranks
from fastgpt2.settings import Settled


def is_sharded(config: Settled, ranks: Ranks) -> bool:
    """Whether no process holds the whole model."""
    return ranks.world > 1 and config.parallel != "ddp"


def shard_count(config: Settled, ranks: Ranks) -> int:
    """How many processes share one copy of the model.

    Raises:
        ConfigError: the processes can't be divided so.
    """
    if not is_sharded(config, ranks):
        return 1
    if config.parallel == "fsdp":
        return ranks.world
    size = config.shard_size or ranks.local_world
    if ranks.world % size:
        possible = [str(n) for n in range(1, ranks.world + 1) if ranks.world % n == 0]
        raise ConfigError(
            f"--shard-size {size} does not divide the {ranks.world} processes: give one of {', '.join(possible)}"
        )
    return size


def spread(model: GPT, config: Settled, ranks: Ranks, device: torch.device) -> nn.Module:
    """Put a model, made on the CPU, on the device, spread over the processes. Returns what training calls.

    The model's own parameters become those that this process holds. With fsdp and hsdp they are DTensors.
    """
    if is_sharded(config, ranks):
        _shard(model, config, ranks, device)
        return model
    model.to(device)
    if ranks.world == 1:
        return model
    # No static_graph: with no_sync it fails an internal assertion, and behind that the gradients of some parameters
    # silently stop being reduced.
    return nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def _shard(model: GPT, config: Settled, ranks: Ranks, device: torch.device) -> None:
    """Shard each block and the rest: embeddings and last norm, where the tied head reads the embedding."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # A block returns a view; nothing writes into it.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor", category=UserWarning)
    shards = shard_count(config, ranks)
    sizes, names = ((ranks.world,), ("shard",))
    if config.parallel == "hsdp":
        sizes, names = (ranks.world // shards, shards), ("replicate", "shard")  # type: ignore[assignment]
    mesh = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    exact = MixedPrecisionPolicy(cast_forward_inputs=False)
    low = exact
    if config.torch_dtype.itemsize == 2:
        # Autocast would cast the gathered weights to 16 bits before each product. Gathering them in 16 bits gives the
        # same bits with half the traffic, and leaves no unsharded 16-bit copies in the graph. Norms compute in float32.
        low = MixedPrecisionPolicy(config.torch_dtype, torch.float32, cast_forward_inputs=False)
    block: Any  # a ModuleList's items are Modules to mypy
    for block in model.h:
        if low is not exact:
            fully_shard([block.ln_1, block.ln_2], mesh=mesh, mp_policy=exact, reshard_after_forward=config.reshard)
        fully_shard(block, mesh=mesh, mp_policy=low, reshard_after_forward=config.reshard)
    fully_shard(model, mesh=mesh, mp_policy=exact)


def compile_model(model: GPT, config: Settled, ranks: Ranks, backend: str | Callable[..., Any]) -> None:
    """Compile a model in place: whole, or in the parts between FSDP's hooks, which torch.compile can't take in."""
    if not is_sharded(config, ranks):
        model.compile(dynamic=False, fullgraph=True, backend=backend)
        return
    split = config.torch_dtype.itemsize == 2  # the norms are sharded apart
    block: Any
    for block in model.h:
        for part in (block.ln_1, block.attn, block.ln_2, block.mlp) if split else (block,):
            # The forward function alone: the hooks stay outside.
            part.forward = torch.compile(part.forward, dynamic=False, fullgraph=True, backend=backend)


@contextlib.contextmanager
def micro_step(forward: nn.Module, *, last: bool) -> Iterator[None]:
    """Let the gradients of a micro-step stay in this process, except in the last one of a step."""
    if isinstance(forward, nn.parallel.DistributedDataParallel):
        with contextlib.nullcontext() if last else forward.no_sync():
            yield
        return
    sharded: Any = forward
    if hasattr(sharded, "set_requires_gradient_sync"):  # fully_shard adds it
        sharded.set_requires_gradient_sync(last)
        sharded.set_is_last_backward(last)
    yield


def whole(x: Tensor) -> Tensor:
    """A tensor's full value: gathered from the processes if it is sharded, which all of them must do together."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def own_part(x: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return x.to_local() if hasattr(x, "to_local") else x


def copy_part(target: Tensor, value: Tensor) -> Tensor:
    """Copy this process's part of a full value into a tensor, and return that tensor. Sends nothing.

    Args:
        target: decides the part, the type and the device. It has no gradient.
        value: the same in each process.
    """
    sharded: Any = target
    if hasattr(sharded, "device_mesh"):
        from torch.distributed.tensor import distribute_tensor

        value = distribute_tensor(value, sharded.device_mesh, sharded.placements, src_data_rank=None)
    return target.copy_(value)
