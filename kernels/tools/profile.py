"""`python -m fastgpt2.kernels.tools.profile`: read from the GPU's counters what limits a kernel.

Each kernel is launched at GPT-2 124M's shape with its table's configuration, as `fastgpt2.kernels.tools.tune` times it.
Nsight Compute reads the third launch: how busy the matrix units, the issue slots and the memory were, and what its
warps waited for. The clocks are not locked: the time is the one that users see.

    python -m fastgpt2.kernels.tools.profile
    python -m fastgpt2.kernels.tools.profile --op gelu_mlp --precision tf32

It needs a CUDA GPU and Nsight Compute. Some machines require a permission to read counters
(NVreg_RestrictProfilingToAdminUsers); the tool then says so.
Exit status: 0; 1 if a kernel could not be read; 2 if the tool can't run.
"""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from fastgpt2.console import run_command
from fastgpt2.fields import ConfigError, OutputFile
from fastgpt2.flags import read_arguments
from fastgpt2.kernels.specs import all_kernels, tunings
from fastgpt2.kernels.tools.toolkit import align, find_tool
from fastgpt2.kernels.tuning import LaunchConfig, lookup

NAME = "ncu"
SECTIONS = (
    *("SpeedOfLight", "LaunchStats", "Occupancy", "SchedulerStats", "WarpStateStats"),
    *("ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis"),
)
SIZES = {"attention": 64, "cross_entropy": 50304, "layer_norm": 768, "gelu_mlp": 768}
"""A kernel's size at GPT-2 124M, by the beginning of the kernel's name."""
UNTIMED = 2
"""Launches before the one that is read."""
SECONDS = 120.0
"""Time limit of reading a kernel."""

SHOWN = {
    ">ms": "gpu__time_duration.sum",
    ">registers": "launch__registers_per_thread",
    ">warps active, %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    ">issued a clock": "smsp__issue_active.avg.per_cycle_active",
    ">memory, %": "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed",
    ">DRAM, %": "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
}
"""The counter of each column that shows one. A scheduler issues at most one instruction a clock."""
_FORMS = {">ms": ".3f", ">issued a clock": ".2f"}
_PIPE = re.compile(r"sm__(?:inst_executed_)?pipe_(\w+?)(?:_cycles_active)?\.avg\.pct_of_peak_sustained_active")
_STALL = re.compile(r"smsp__average_warps_issue_stalled_(\w+?)_per_issue_active\.ratio")
_MILLISECONDS = {
    unit: factor
    for prefix, factor in {"n": 1e-6, "u": 1e-3, "m": 1.0, "": 1e3}.items()
    for unit in (f"{prefix}s", f"{prefix}second")
}


def size_of(op: str) -> int:
    """A kernel's size at GPT-2 124M."""
    return next(size for prefix, size in SIZES.items() if op.startswith(prefix))


def launch(op: str, precision: str) -> None:
    """Launch a kernel. Called under the tool."""
    device = torch.device("cuda", torch.cuda.current_device())
    call = tunings()[op].example(precision, size_of(op), device, 0)
    config = lookup(op, precision, size_of(op), device)
    for _ in range(UNTIMED + 1):
        call(config)
    torch.cuda.synchronize()


def command(program: str, op: str, precision: str, log: Path) -> list[str]:
    """The command line that profiles one kernel. Its report goes to a CSV file with a column a counter."""
    sections = [option for section in SECTIONS for option in ("--section", section)]
    kernel = all_kernels()[op].function.__name__
    which = ["--kernel-name", kernel, "--launch-skip", str(UNTIMED), "--launch-count", "1"]
    form = ["--clock-control", "none", "--csv", "--page", "raw", "--log-file", str(log)]
    inner = [sys.executable, "-m", "fastgpt2.kernels.tools.profile", "--launch", op, "--precision", precision]
    return [program, *sections, *which, *form, *inner]


def parse(report: str) -> dict[str, float]:
    """The counters of the tool's CSV. The duration is converted to milliseconds, all others are as printed.

    Raises:
        ValueError: the report holds no kernel; the message quotes it.
    """
    start = report.find('"ID"')
    rows = list(csv.reader(io.StringIO(report[start:]))) if start >= 0 else []
    if len(rows) < 3:
        said = [line for line in report.splitlines() if line.startswith("==ERROR==")] or report.splitlines()[-3:]
        raise ValueError(" ".join(said) or "the tool wrote no report")
    names, units, values = rows[:3]
    counters: dict[str, float] = {}
    for name, unit, value in zip(names, units, values, strict=True):
        try:
            counters[name] = float(value.replace(",", ""))
        except ValueError:
            continue
        if name == SHOWN[">ms"]:
            counters[name] *= _MILLISECONDS[unit]
    return counters


def read(program: str, op: str, precision: str) -> dict[str, float]:
    """The counters of a kernel.

    Raises:
        ValueError: the tool could not read it; the message quotes the tool.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "report.csv"
        try:
            done = subprocess.run(
                command(program, op, precision, log), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, errors="replace", timeout=SECONDS,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ValueError(f"stopped after {SECONDS:.0f} s") from None
        report = log.read_text(errors="replace") if log.exists() else ""
    try:
        return parse(report)
    except ValueError as error:
        said = "".join(done.stdout.strip().splitlines()[-1:])
        raise ValueError(f"{error} (exit status {done.returncode}: {said})") from None


def largest(counters: dict[str, float], which: re.Pattern[str], form: str, count: int = 3) -> str:
    """The highest counters of a kind, by the pattern's group: "long_scoreboard 3.1, ...".

    Of counters with the same group, the highest one is shown.
    """
    found: dict[str, float] = {}
    for name, value in counters.items():
        if match := which.fullmatch(name):
            found[match[1]] = max(value, found.get(match[1], value))
    ranked = sorted(found.items(), key=lambda pair: -pair[1])
    return ", ".join(f"{name} {value:{form}}" for name, value in ranked[:count])


def row(profile: dict[str, Any]) -> dict[str, str]:
    """A profile as a row of the table."""
    counters = profile["counters"]
    cells = {"<kernel": profile["op"], "<precision": profile["precision"], "<tile": profile["tile"]}
    for title, name in SHOWN.items():
        cells[title] = format(counters[name], _FORMS.get(title, ".0f")) if name in counters else ""
    # Stalled warps for each issued instruction: the latency that a scheduler has to hide.
    cells["<busiest pipes, %"] = largest(counters, _PIPE, ".0f")
    cells["<warps stalled for"] = largest(counters, _STALL, ".1f")
    return cells


def profile(op: str, precision: str, config: LaunchConfig, counters: dict[str, float]) -> dict[str, Any]:
    """The record of a kernel, as --jsonl stores it."""
    return {
        "op": op,
        "precision": precision,
        "size": size_of(op),
        "tile": str(config),
        "config": asdict(config),
        "counters": counters,
    }


@dataclass(frozen=True)
class ProfileConfig:
    """Which kernels to profile."""

    op: tuple[str, ...] = ("attention",)
    """Kernels whose name begins so."""
    precision: Literal["bfloat16", "float16", "tf32", "float32"] = "bfloat16"
    """Precision of the kernels."""
    jsonl: OutputFile | None = None
    """File of JSON lines to append the counters to."""
    launch: str | None = None

    def __post_init__(self) -> None:
        if unknown := [repr(text) for text in self.op if not (text and any(op.startswith(text) for op in tunings()))]:
            there = ", ".join(tunings())
            raise ConfigError(f"--op: no kernel's name begins with {' or '.join(unknown)}; there are {there}")


def main(arguments: list[str] | None = None) -> int:
    """The command. read() starts it with --launch for one kernel, in a process that Nsight Compute watches."""
    given = read_arguments(ProfileConfig, "fastgpt2.kernels.tools.profile", arguments)
    if given.launch:
        launch(given.launch, given.precision)
        return 0
    program = find_tool(NAME)
    if not torch.cuda.is_available():
        raise ConfigError(f"no CUDA GPU here: {NAME} (Nsight Compute) reads the counters of one")
    if program is None:
        raise ConfigError(f"{NAME} (Nsight Compute) is not installed")
    major, _ = torch.cuda.get_device_capability()
    launched = [op for op in tunings() if tunings()[op].launched(major)]
    ops = [op for op in launched if op.startswith(given.op)]
    if not ops:
        raise ConfigError(f"this GPU launches none of {' and '.join(given.op)}; it launches {', '.join(launched)}")
    return report(program, ops, given.precision, given.jsonl, torch.device("cuda", 0))


def report(program: str, ops: list[str], precision: str, jsonl: Path | None, device: torch.device) -> int:
    """Read the kernels one by one, store each at once, and print the table. Returns the exit status."""
    rows, failed = [], False
    for op in ops:
        try:
            found = profile(op, precision, lookup(op, precision, size_of(op), device), read(program, op, precision))
        except ValueError as error:
            print(f"{op}: {error}")
            failed = True
            continue
        if jsonl is not None:
            with jsonl.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"kind": "profile", **found}) + "\n")
        rows.append(row(found))
    if rows:
        print(align(rows))
    return int(failed)


if __name__ == "__main__":
    run_command(main)
