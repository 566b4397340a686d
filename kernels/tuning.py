"""Look up launch configurations in the tables that are checked in.

Nothing is tuned at run time: ranks would disagree, a compiled graph keeps one configuration for every shape, and CUDA
graphs can't capture a search. tables/<architecture>.json has the tile sizes for each kernel, precision and size;
`measured` says where and how an entry was timed, or is null. A size is the one number that a kernel's tiles depend on,
such as attention's head size or LayerNorm's channels. A lookup takes the smallest listed size that is at least as
large, or else the largest. The interpreter uses tables/interpreter.json.
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
    """A kernel's tile sizes, and the compiler's options.

    max_registers: registers a thread that the assembler may use, so that more blocks fit on a multiprocessor.
    """

    block_m: int | None = None
    block_n: int | None = None
    block_k: int | None = None
    num_warps: int = 4
    num_stages: int = 1
    max_registers: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a kernel's launch. enable_fp_fusion is explicit: Triton 3.10 changes its default."""
        tiles = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}
        given = {name: size for name, size in tiles.items() if size is not None}
        if self.max_registers is not None:
            given["maxnreg"] = self.max_registers
        return given | {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}

    def __str__(self) -> str:
        """128x64, 8 warps, 3 stages; and ", 128 registers" if they are limited."""
        tiles = "x".join(str(n) for n in (self.block_m, self.block_n, self.block_k) if n is not None)
        limit = "" if self.max_registers is None else f", {self.max_registers} registers"
        return f"{tiles}, {self.num_warps} warps, {self.num_stages} stages{limit}"


def precision_name(dtype: torch.dtype, allow_tf32: bool = False) -> str:
    """bfloat16, float16, float32, tf32 or float64, as the tables name precisions."""
    return "tf32" if allow_tf32 and dtype == torch.float32 else str(dtype).removeprefix("torch.")


def lookup(op: str, precision: str, size: int, device: torch.device) -> LaunchConfig:
    """The configuration for a kernel on a device; `precision` is a precision_name."""
    table = _table_for(device.index) if device.type == "cuda" else "interpreter"
    return configuration(table, op, precision, size)


@cache
def configuration(table: str, op: str, precision: str, size: int) -> LaunchConfig:
    """A table's configuration for a kernel. Takes the smallest listed size that is at least `size`, or the largest."""
    sizes = sorted(n for o, p, n in configurations(table) if (o, p) == (op, precision))
    if not sizes:
        raise ValueError(f"the table {table} has no launch configuration for {op} in {precision}")
    bucket = next((n for n in sizes if n >= size), sizes[-1])
    return configurations(table)[op, precision, bucket]


def architectures() -> list[str]:
    """The architectures that have a table, oldest first."""
    return sorted((p.stem for p in TABLES.glob("sm_*.json")), key=_number)


def check_table(path: Path) -> None:
    """Raise a one-line ValueError unless the file is named after an architecture and holds a table."""
    if path.stem not in architectures():
        raise ValueError(f"{path} is not named after an architecture: {', '.join(architectures())}")
    try:
        table = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} can't be read as a table: {error}") from None
    missing = [name for name in ("entries", "shared_memory") if not isinstance(table, dict) or name not in table]
    if missing:
        raise ValueError(f"{path} is not a table: it has no {' and no '.join(missing)}")


_instead: dict[str, Path] = {}


def use_table(path: Path) -> None:
    """Use this file, named <architecture>.json, instead of the shipped table until the process ends.

    Raises ValueError as check_table does.
    """
    check_table(path)
    _instead[path.stem] = path
    for looked_up in (read_table, configurations, configuration):
        looked_up.cache_clear()


@cache
def read_table(name: str) -> dict[str, Any]:
    return json.loads(_instead.get(name, TABLES / f"{name}.json").read_text())


@cache
def configurations(table: str) -> dict[tuple[str, str, int], LaunchConfig]:
    """A table as {(op, precision, size): configuration}."""
    return {
        (entry["op"], precision, size): LaunchConfig(**entry["config"])
        for entry in read_table(table)["entries"]
        for precision in entry["precisions"]
        for size in entry["sizes"]
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
    """The newest table that is not newer than `arch` and whose tiles fit in `shared_memory` bytes a block."""
    fitting = [
        name
        for name in architectures()
        if _number(name) <= _number(arch) and read_table(name)["shared_memory"] <= shared_memory
    ]
    if not fitting:
        raise ValueError(f"no launch configurations fit {arch} with {shared_memory} bytes of shared memory")
    return fitting[-1]


def major(arch: str) -> int:
    """The major compute capability of an architecture."""
    return _number(arch) // 10


def _number(arch: str) -> int:
    return int(arch.removeprefix("sm_"))
