"""A lower bound on a run's memory in closed form, checked before anything is allocated.

A run over the bound can't fit with any implementation. A run under it may still run out of memory.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from fastgpt2.config import ConfigError, ModelConfig
from fastgpt2.model import parameter_count
from fastgpt2.settings import Settled

TOKEN_BYTES = 8
ADDRESSABLE_BYTES = 2**56
"""The most a process on a 64-bit processor can address: the limit if nothing tighter is known."""
PROC, CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
CGROUP_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}
"""The file with the limit in bytes, by the controller named in /proc/self/cgroup ("" in version 2)."""


def check_memory(config: Settled, device: torch.device, shards: int = 1) -> None:
    """Check that a run can fit on the device and on the host, which draws the weights whole.

    Args:
        shards: how many processes share one copy of the model.

    Raises:
        ConfigError: the lower bound is over the memory; the message names the settings that need most of it.
    """
    model = config.model_config()
    for place, whole_step in ((device, True), (torch.device("cpu"), False)):
        needed, takers = least_bytes(config, model, whole_step=whole_step, shards=shards)
        there = memory_bytes(place)
        if needed > there:
            name = place.type.replace("cuda", "gpu").upper()
            raise ConfigError(
                f"training needs at least {_gib(needed)} of memory and the {name} has "
                f"{_gib(there)}: make {takers} smaller"
            )


def least_bytes(config: Settled, model: ModelConfig, *, whole_step: bool, shards: int = 1) -> tuple[int, str]:
    """The least bytes that a process needs, and the flags that set the largest part of them.

    The optimizer step holds weights, gradients and Adam's two averages together. The backward pass starts with the
    weights and the inputs of all blocks, which even --recompute blocks stores. The tokens are held throughout.

    Args:
        whole_step: count for the device that steps; else for the host, which draws the weights and tokens.
        shards: how many processes share one copy of weights, gradients and averages.
    """
    B, T, C = config.batch_size, model.block_size, model.n_embd
    per_weight = 8 if config.dtype == "float64" and whole_step else 4
    per_activation = {"float64": 8, "bfloat16": 2, "float16": 2}.get(config.dtype, 4)
    weights = per_weight * parameter_count(model, padded=True)
    embeddings = {
        "--vocab-size or --n-embd": per_weight * model.padded_vocab_size * C,
        "--block-size or --n-embd": per_weight * T * C,
    }
    parts = embeddings | {"--model, --n-layer or --n-embd": weights - sum(embeddings.values())}
    tokens = config.grad_accum * B * (T + 1) * TOKEN_BYTES
    activations = 0
    if whole_step:
        activations = model.n_layer * B * T * C * per_activation
        weights //= shards
        parts = {flags: 4 * size // shards for flags, size in parts.items()}
    parts |= {"--batch-size or --block-size": activations, "--grad-accum, --batch-size or --block-size": tokens}
    needed = tokens + weights + max(3 * weights, activations) if whole_step else max(weights, tokens)
    return needed, max(parts, key=parts.__getitem__)


def memory_bytes(device: torch.device) -> int:
    """The most memory that this process can use on a device.

    For a GPU, all of its memory. On Linux, the machine's memory or a tighter control group limit (of a container or a
    job), plus all swap. Other systems create swap as needed.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu" or sys.platform != "linux":
        return ADDRESSABLE_BYTES
    found = dict(re.findall(r"^(MemTotal|SwapTotal): +(\d+) kB$", _read(PROC / "meminfo"), re.MULTILINE))
    total = int(found["MemTotal"]) * 1024 if "MemTotal" in found else ADDRESSABLE_BYTES
    return min(total, *_cgroup_limits(), ADDRESSABLE_BYTES) + int(found.get("SwapTotal", 0)) * 1024


def _cgroup_limits() -> Iterator[int]:
    """The limits of this process's control groups and of their parents."""
    for line in _read(PROC / "self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        for controller in set(controllers.split(",")) & CGROUP_LIMITS.keys():
            # In a container the path may be the host's; the top folder is then the container's own group.
            folder = CGROUPS / controller / group.lstrip("/")
            for parent in (folder, *folder.parents):
                limit = _read(parent / CGROUP_LIMITS[controller]).strip()
                if limit.isdecimal():
                    yield int(limit)


def _read(path: Path) -> str:
    """Read a file of /proc or /sys; empty if there is none."""
    try:
        return path.read_text()
    except OSError:
        return ""


def _gib(size: int) -> str:
    number = size / 2**30
    return f"{number:,.1f} GiB" if number < 1e6 else f"{number:.1e} GiB"
