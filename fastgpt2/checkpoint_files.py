"""The files of one checkpoint: how processes share the writing, and how damage is found.

Each tensor is written whole, by one process. `deal` decides which, balancing bytes. A process writes, syncs and hashes
its own files.

torch.distributed.checkpoint is less safe: it unpickles its metadata, which can run code, and it has no checksums.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import ConfigError
from fastgpt2.durable import open_regular, read_json, sha256, sync
from fastgpt2.parallel import Ranks
from fastgpt2.sharding import whole
from fastgpt2.state import TENSORS, Part
from fastgpt2.state_json import STATE, check_state
from fastgpt2.tensors import StoredTensors

SUMS = "SHA256SUMS"
PASS_OVER = "move {} away to use the one before it"


def tensor_files(part: str, processes: int = 1) -> tuple[str, ...]:
    """The names of the files with a part's tensors, by the rank that writes each."""
    if processes == 1:
        return (f"{part}.safetensors",)
    return tuple(f"{part}-{number:05d}-of-{processes:05d}.safetensors" for number in range(1, processes + 1))


def stored(checkpoint: Path, part: str, state: dict[str, Any], device: torch.device | str = "cpu") -> StoredTensors:
    """A part's tensors in a checkpoint.

    Args:
        state: the checkpoint's state.json, checked.

    Raises:
        ConfigError: a file can't be read.
    """
    return StoredTensors([checkpoint / name for name in tensor_files(part, state["processes"])], device)


# ------------------------------------------------------------------------------------------------- writing


def deal(sizes: Sequence[int], writers: int) -> list[int]:
    """The writer of each tensor: the largest first, always to the writer with the fewest bytes so far.

    Args:
        sizes: each tensor's bytes.
    """
    writer_of = [0] * len(sizes)
    loads = [(0, writer) for writer in range(writers)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        load, writer_of[index] = loads[0]
        heapq.heapreplace(loads, (load + sizes[index], writer_of[index]))
    return writer_of


def own_tensors(parts: Mapping[str, Part], ranks: Ranks) -> dict[str, dict[str, Tensor]]:
    """The tensors that this rank writes, by part and name, on the CPU.

    All ranks call it together. A sharded tensor is gathered on all of them, one at a time, and its writer keeps it.

    Args:
        parts: of RunState.state_dict.
    """
    tensors = [(part, name, tensor) for part in TENSORS for name, tensor in parts[part].items()]
    writers = deal([tensor.numel() * tensor.element_size() for *_, tensor in tensors], ranks.world)
    own: dict[str, dict[str, Tensor]] = {part: {} for part in TENSORS}
    for (part, name, tensor), writer in zip(tensors, writers, strict=True):
        value = whole(tensor)
        if writer == ranks.rank:
            own[part][name] = value.detach().cpu().contiguous()
    return own


def write_tensors(folder: Path, own: dict[str, dict[str, Tensor]], ranks: Ranks) -> dict[str, str]:
    """Write this rank's files of a checkpoint. They are on the disk when this returns. Returns their sums by name.

    Raises:
        OSError, SafetensorError: one can't be written.
    """
    from safetensors.torch import save_file

    sums = {}
    for part, tensors in own.items():
        path = folder / tensor_files(part, ranks.world)[ranks.rank]
        # safetensors makes files that only their owner can read: give them the mode of others, from the umask.
        path.touch()
        mode = stat.S_IMODE(path.stat().st_mode)
        save_file(tensors, path)
        path.chmod(mode)
        sync(path)
        sums[path.name] = sha256(path)
    return sums


def write_sums(folder: Path, sums: dict[str, str]) -> None:
    """Write SHA256SUMS, as `sha256sum -c SHA256SUMS` reads it: the given sums, and that of state.json."""
    sums = sums | {STATE: sha256(folder / STATE)}
    lines = (f"{_sum_line(name, sums[name])}\n" for name in sorted(sums))
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")
    sync(folder / SUMS)


def _sum_line(name: str, digest: str) -> str:
    return f"{digest}  {name}"


# ------------------------------------------------------------------------------------------------- damage


def damage(checkpoint: Path, parts: Sequence[str] = TENSORS) -> str | None:
    """Describe the damage to state.json and parts of a checkpoint, or return None if they are intact.

    A checkpoint of format 1 has no sums and counts as intact. So does one whose state.json is as it was written, but
    invalid: `checkpoint.read_state` says what is wrong with it.

    Raises:
        ConfigError: a file exists but can't be read, so its contents are unknown.
    """
    try:
        lines = _sums(checkpoint)
    except OSError as error:
        return _unreadable(checkpoint / SUMS, error)
    if lines is None:
        return None
    if problem := _difference(checkpoint / STATE, lines):
        return problem
    try:
        state = read_json(checkpoint / STATE)
        check_state(state, checkpoint / STATE)
    except ConfigError:
        return None
    names = (name for part in parts for name in tensor_files(part, state["processes"]))
    return next(filter(None, (_difference(checkpoint / name, lines) for name in names)), None)


def _sums(checkpoint: Path) -> list[bytes] | None:
    """The lines of SHA256SUMS, or None for a checkpoint of format 1, which has none."""
    try:
        with open_regular(checkpoint / SUMS) as file:
            return file.read(1 << 20).split(b"\n")
    except FileNotFoundError:
        sha256(checkpoint / STATE)  # raises OSError if it can't be read
        with contextlib.suppress(ConfigError):
            if read_json(checkpoint / STATE).get("format") == 1:
                return None
        raise


def _difference(path: Path, lines: list[bytes]) -> str | None:
    try:
        if _sum_line(path.name, sha256(path)).encode() in lines:
            return None
    except OSError as error:
        return _unreadable(path, error)
    return f"{path} is damaged: its SHA-256 is not the one in {SUMS}"


def _unreadable(path: Path, error: OSError) -> str:
    """What is wrong with a file that is missing or no file. Raises ConfigError if it is there but can't be read."""
    problem = f"can't read {error.filename or path}: {error.strerror}"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return problem
    raise ConfigError(f"{problem}; fix that, or {PASS_OVER.format(path.parent)}") from None
