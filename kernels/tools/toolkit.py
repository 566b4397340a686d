"""What the tools share: CUDA's programs, tables of text, and a process that compiles instead of interpreting."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence


def find_tool(name: str) -> str | None:
    """The path of a program of CUDA's toolkit, from PATH or CUDA_HOME; None if it isn't installed."""
    folders = [os.environ.get("PATH", ""), os.path.join(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin")]
    return shutil.which(name, path=os.pathsep.join(folders))


def align(rows: Sequence[dict[str, str]]) -> str:
    """A table of text. Each key is a column's title after < (align left) or > (align right)."""
    lines = [{key: key[1:] for key in rows[0]}, *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    cells = ([f"{text:{key[0]}{widths[key]}}" for key, text in line.items()] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def run_compiling(main: Callable[[], int]) -> int:
    """Run a command, in a new process if TRITON_INTERPRET is set: Triton reads it once, when it is imported."""
    if os.environ.get("TRITON_INTERPRET", "0") == "0":
        return main()
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *sys.orig_argv[1:]], env=compiling, check=False).returncode
