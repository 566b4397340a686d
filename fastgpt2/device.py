"""Choose the device of a run, and what is known about it."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path

import torch

from fastgpt2.config import ConfigError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]


def pick_device(name: str | None) -> torch.device:
    """The device of a --device flag; None means CUDA if available, else the CPU: MPS is untested.

    Raises:
        ConfigError: no such device here.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|mps|cuda(:[0-9]{1,3})?", name):
        raise ConfigError(f"--device {name!r} is not cpu, cuda, cuda:N or mps")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: torch {torch.__version__} sees no CUDA GPU here; use --device cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {name}: torch {torch.__version__} sees no Apple GPU here; use --device cpu")
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} CUDA GPUs, numbered from 0")
    return device


def notes_on(device: torch.device) -> list[str]:
    """What a user should know about a run on this device."""
    if device.type != "mps":
        return []
    return [
        "--device mps is untested. PyTorch doesn't list which of its MPS operators are deterministic: two runs may "
        "differ in their last digits. If PyTorch refuses an operator, give --no-deterministic"
    ]


_PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # Dense peaks from NVIDIA's data sheets, without sparsity; float32 is that of the CUDA cores.
    "B200": {"bfloat16": 2250.0, "float16": 2250.0, "tf32": 1125.0, "float32": 75.0},
    "H200 NVL": {"bfloat16": 835.5, "float16": 835.5, "tf32": 417.5, "float32": 60.0},
    "H200": {"bfloat16": 989.4, "float16": 989.4, "tf32": 494.7, "float32": 66.9},
    "H100 PCIe": {"bfloat16": 756.0, "float16": 756.0, "tf32": 378.0, "float32": 51.2},
    "H100 80GB HBM3": {"bfloat16": 989.4, "float16": 989.4, "tf32": 494.7, "float32": 66.9},
    "A100": {"bfloat16": 312.0, "float16": 312.0, "tf32": 156.0, "float32": 19.5},
    "L40S": {"bfloat16": 362.05, "float16": 362.05, "tf32": 183.0, "float32": 91.6},
    "L4": {"bfloat16": 121.0, "float16": 121.0, "tf32": 60.0, "float32": 30.3},
    "RTX 4090": {"bfloat16": 165.2, "float16": 165.2, "tf32": 82.6, "float32": 82.6},
}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """The device's dense peak in FLOP/s at a precision, None if unknown."""
    for name, peaks in _PEAK_TFLOPS.items():
        # Match whole words: an L40 is not an L4. A slice of a GPU (MIG) has only part of the peak.
        if re.search(rf"\b{name}\b(?!.* MIG\b)", device_name):
            return peaks[dtype] * 1e12 if dtype in peaks else None
    return None


def device_name(device: torch.device) -> str:
    """The device's own name, such as "NVIDIA H100 80GB HBM3", or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def copy_async(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Start copying a batch to the device without waiting. PyTorch keeps the pinned buffer until the copy is done."""
    return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens.to(device)


def seed_generators(device: torch.device, seed: int) -> None:
    """Seed the global generators that a step on a device draws from. torch.manual_seed takes a millisecond for that."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        number = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[number].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory held at once: allocated by torch on a GPU, resident in the process on a CPU.

    None where nothing tells: MPS keeps no peak, and Windows has no getrusage.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu":
        return None
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts from the parent's peak
        peak = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(peak.split()[1]) * 1024
    if resource is None:
        return None
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else resident * 1024


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's mallopt, numbered as in malloc.h."""
_LARGE_BLOCK = 2**25
"""Bytes from which glibc maps a block by itself: the most that it accepts."""


def keep_freed_memory() -> bool:
    """Keep memory freed by one CPU step for the next, in large pages; False if the C library can't do it.

    By default glibc returns the freed top of its heap to the system, and every 4 KB of it is a page fault in the next
    step. Blocks of 32 MB and more are still mapped and returned one by one: in the heap, what lies between two of them
    can keep the next from fitting. PyTorch asks the kernel for 2 MB pages if THP_MEM_ALLOC_ENABLE is set before its
    first tensor; a user's value stands. The variable stays set for the process; give_back_freed_memory undoes the rest.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    return _mallopt({_M_MMAP_THRESHOLD: _LARGE_BLOCK, _M_TRIM_THRESHOLD: 2**31 - 1})


def give_back_freed_memory() -> None:
    """Undo keep_freed_memory: return freed memory to the system.

    glibc stops adapting its thresholds once a program sets one. These are the highest it would reach by itself.
    """
    if _mallopt({_M_MMAP_THRESHOLD: _LARGE_BLOCK, _M_TRIM_THRESHOLD: 2 * _LARGE_BLOCK}):
        ctypes.CDLL(None).malloc_trim(0)


def _mallopt(values: dict[int, int]) -> bool:
    """Set glibc's parameters; False if the C library isn't glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    return mallopt is not None and all(mallopt(parameter, value) == 1 for parameter, value in values.items())
