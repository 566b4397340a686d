"""Read untrusted safetensors files: check names, shapes and types first."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fastgpt2.config import ConfigError
from fastgpt2.durable import open_regular


def read_shapes(path: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and type ("F32") of each tensor in a file, by name. Reads no tensor.

    Raises:
        ConfigError: the file can't be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # refuses a pipe, which would block
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in slices.items()}
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def check_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check that a file holds exactly these names and shapes, in float32 or float64.

    Raises:
        ConfigError: it doesn't, or it can't be read. The message names the first difference.
    """
    stored = read_shapes(path)
    problems = [f"it lacks {name}" for name in expected if name not in stored]
    for name, (shape, kind) in stored.items():
        if name not in expected:
            problems.append(f"it has {name}, which this model lacks")
        elif shape != tuple(expected[name]):
            problems.append(f"{name} is {list(shape)}, not {list(expected[name])}")
        elif kind not in ("F32", "F64"):
            problems.append(f"{name} is of type {kind}, not F32 or F64")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{path} doesn't fit: {problems[0]}{more}")


def read_tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    """All tensors of a file, by name.

    Raises:
        ConfigError: it can't be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        open_regular(path).close()  # refuses a pipe, which would block
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"can't read {path}: {getattr(error, 'strerror', None) or error}")
