"""Read untrusted safetensors files: check names, shapes and types first."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import ConfigError
from fastgpt2.durable import open_regular


class StoredTensors(Mapping[str, Tensor]):
    """The tensors of one or several safetensors files, by name. Each is read when it is asked for.

    Args:
        paths: the files. They have no name in common.
        device: where tensors are read to.

    Raises:
        ConfigError: a file can't be read, or two files hold the same name.
    """

    def __init__(self, paths: Sequence[Path], device: torch.device | str = "cpu") -> None:
        self.paths = paths
        self._files: dict[str, tuple[Path, Any]] = {}
        for path in paths:
            file = _open(path, device)
            for name in file.keys():  # noqa: SIM118 (not a dict)
                if name in self._files:
                    raise ConfigError(f"{path} holds {name}, which {self.path(name).name} holds too")
                self._files[name] = path, file

    def __getitem__(self, name: str) -> Tensor:
        from safetensors import SafetensorError

        path, file = self._files[name]
        try:
            return file.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise _unreadable(path, error) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def path(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._files[name][0]

    def numbers(self) -> int:
        """How many numbers all tensors hold. Reads no tensor."""
        return sum(math.prod(shape) for shape, _ in map(self._header, self))

    def check(self, expected: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the files hold exactly these names and shapes, in float32 or float64. Reads no tensor.

        Raises:
            ConfigError: they don't. The message names the first difference.
        """
        problems = [f"it lacks {name}" for name in expected if name not in self._files]
        for name in self:
            shape, kind = self._header(name)
            if name not in expected:
                problems.append(f"it has {name}, which this model lacks")
            elif shape != tuple(expected[name]):
                problems.append(f"{name} is {list(shape)}, not {list(expected[name])}")
            elif kind not in ("F32", "F64"):
                problems.append(f"{name} is of type {kind}, not F32 or F64")
        if problems:
            more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
            fit = "doesn't fit" if len(self.paths) == 1 else f"and {len(self.paths) - 1} more don't fit"
            raise ConfigError(f"{self.paths[0]} {fit}: {problems[0]}{more}")

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        """A tensor's shape and type ("F32")."""
        part = self._files[name][1].get_slice(name)
        return tuple(part.get_shape()), part.get_dtype()


def _open(path: Path, device: torch.device | str) -> Any:
    from safetensors import SafetensorError, safe_open

    try:
        open_regular(path).close()  # refuses a pipe, which would block
        return safe_open(path, framework="pt", device=str(device))
    except (OSError, SafetensorError) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"can't read {path}: {getattr(error, 'strerror', None) or error}")
