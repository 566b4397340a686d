"""The one door to launch configurations: tables that are checked in, and a lookup.

Nothing is tuned at run time: ranks would disagree, a compiled graph keeps one configuration for every
shape, and CUDA graphs can't capture a search. A table, tables/<architecture>.json, says for each kernel,
precision and head size how large its tiles are; `measured` holds where and how an entry was timed, or null.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

log = logging.getLogger(__name__)
TABLES = Path(__file__).parent / "tables"


@dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes and what the compiler is told; on the CPU, under the interpreter, the tiles alone count."""

    block_m: int
    block_n: int
    num_warps: int = 4
    num_stages: int = 1

    def arguments(self) -> dict[str, Any]:
        """As keyword arguments of a kernel's launch. Fusing a multiply and an add is said outright,
        as the default of Triton 3.10 will be not to."""
        return {
            "BLOCK_M": self.block_m, "BLOCK_N": self.block_n,
            "num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True,
        }  # fmt: skip


INTERPRETER = LaunchConfig(16, 16)
"""The smallest tiles: a few tokens already make several."""


def precision_name(dtype: torch.dtype, allow_tf32: bool = False) -> str:
    """bfloat16, float16, float32, tf32 or float64: what decides an entry beside the head size."""
    return "tf32" if allow_tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")


def lookup(op: str, precision: str, head_dim: int, device: torch.device) -> LaunchConfig:
    """The configuration for a kernel on a device; `precision` is a precision_name."""
    if device.type != "cuda":
        return INTERPRETER
    return configurations(_table_for(device.index))[op, precision, head_dim]


def architectures() -> list[str]:
    """The architectures that have a table, oldest first."""
    return sorted((p.stem for p in TABLES.glob("sm_*.json")), key=_number)


@cache
def read_table(arch: str) -> dict[str, Any]:
    return json.loads((TABLES / f"{arch}.json").read_text())


@cache
def configurations(arch: str) -> dict[tuple[str, str, int], LaunchConfig]:
    """A table as {(op, precision, head size): configuration}."""
    return {
        (entry["op"], precision, head_dim): LaunchConfig(**entry["config"])
        for entry in read_table(arch)["entries"]
        for precision in entry["precisions"]
        for head_dim in entry["head_dims"]
    }


@cache
def _table_for(index: int | None) -> str:
    gpu = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
    arch = f"sm_{gpu.major}{gpu.minor}"
    chosen = nearest(arch, gpu.shared_memory_per_block_optin)  # type: ignore[attr-defined]
    if chosen != arch:
        log.warning("no launch configurations for %s (%s): using those of %s", gpu.name, arch, chosen)
    return chosen


def nearest(arch: str, shared_memory: int) -> str:
    """The newest table no newer than `arch` whose tiles fit in a block's shared memory, in bytes."""
    fitting = [
        name
        for name in architectures()
        if _number(name) <= _number(arch) and read_table(name)["shared_memory"] <= shared_memory
    ]
    if not fitting:
        raise ValueError(f"no launch configurations fit {arch} with {shared_memory} bytes of shared memory")
    return fitting[-1]


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))
