"""OUT/starts.jsonl: a line for each start of a run: versions, commit, device, implementations, every setting."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastgpt2 import __version__
from fastgpt2.device import device_name
from fastgpt2.durable import JSON_BYTES, OutputError, open_regular
from fastgpt2.state_json import config_as_json

if TYPE_CHECKING:
    from fastgpt2.run import Run

NAME = "starts.jsonl"
ROOT = Path(__file__).resolve().parents[1]


def record_start(out: Path, run: Run) -> None:
    """Append a line about a run that is about to step. It is on disk when this returns.

    Raises:
        OutputError: the line can't be written.
    """
    device = run.device
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "step": run.start,
        "command": sys.orig_argv,
        "implementations": run.chosen,
        "device": device_name(device),
        "compute_capability": capability and f"{capability[0]}.{capability[1]}",
        "cpu_threads": torch.get_num_threads(),
        "world_size": run.ranks.world,
        "host": platform.node(),
        "fastgpt2": __version__,
        "commit": _commit_once(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": package_version("triton"),
        "python": platform.python_version(),
        "config": config_as_json(run.config),
    }
    _append(out / NAME, json.dumps(record))


def last_config(out: Path) -> dict[str, Any] | None:
    """The configuration of a run's last start as a JSON object by field name, or None if there is no record of it."""
    try:
        with open_regular(out / NAME) as file:
            lines = file.read(JSON_BYTES).splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):  # a line truncated by a crash
            config = json.loads(line)["config"]
            if isinstance(config, dict):
                return config
    return None


def _append(path: Path, line: str) -> None:
    try:
        with path.open("ab+") as file:
            if file.seek(0, os.SEEK_END):
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a crash truncated the last line
                    file.write(b"\n")
            file.write(line.encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"can't write {path}: {error.strerror}") from None


def package_version(package: str) -> str | None:
    """The version of an installed package, or None if it isn't installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit(seconds: float = 1.0) -> dict[str, Any]:
    """The commit of this code: {"id", "dirty"}.

    "id" is "unknown" outside a checkout, without git, or if git takes too long. "dirty" says whether tracked files have
    changes, or is None if git can't tell.

    Args:
        seconds: the time limit for git.
    """
    found: dict[str, Any] = {"id": "unknown", "dirty": None}
    if not (ROOT / ".git").exists():  # otherwise git would answer for an enclosing repository
        return found
    ends = time.monotonic() + seconds
    try:
        found["id"] = _git("rev-parse", "HEAD", ends=ends)
        found["dirty"] = bool(_git("status", "--porcelain", "--untracked-files=no", ends=ends))
    except (OSError, subprocess.SubprocessError):
        pass
    return found


_commit_once = functools.cache(commit)


def _git(*arguments: str, ends: float) -> str:
    # Without optional locks git writes nothing and doesn't disturb another git that the user is running.
    line = ["git", "--no-optional-locks", *arguments]
    left = max(0.0, ends - time.monotonic())
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=left, check=True)
    return done.stdout.strip()
