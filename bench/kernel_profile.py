"""`python -m bench.kernel_profile STEP`: where the time of a training step goes, kernel by kernel, by torch.profiler.

python -m bench.kernel_profile ours-triton              GPT-2 124M at B = 64, compiled, in bfloat16
python -m bench.kernel_profile plain --B 8 --eager
python -m bench.kernel_profile plain --warm             takes one step, so that its compiled code is in the caches
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.contest import DEVICE
from bench.record import StepKernels
from bench.step.steps import STEPS, Kernels, StepShape
from bench.timing import append_json_line
from fastgpt2.config import PRESETS, ConfigError, Dtype
from fastgpt2.device import synchronize
from fastgpt2.flags import Parser
from fastgpt2.kernels.tools.toolkit import align
from fastgpt2.kernels.tuning import check_table
from fastgpt2.slots import SLOTS

STEPS_BEFORE, STEPS_SEEN = 4, 3
KEPT, SHOWN = 60, 15
"""Kernels in the record, and in the log: those that take longest."""


Seen = tuple[float, list[tuple[str, float, float]]]
"""StepKernels' ms and kernels; on a CPU of operators."""


def profile(step: Callable[[int], object], device: torch.device) -> Seen:
    """See where some steps' time goes.

    Args:
        step: launches the step of an index.
    """
    for index in range(STEPS_BEFORE):
        step(index)
    synchronize(device)
    cuda = device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
        for index in range(STEPS_BEFORE, STEPS_BEFORE + STEPS_SEEN):
            step(index)
        synchronize(device)
    return longest(seen.key_averages(), DeviceType.CUDA if cuda else DeviceType.CPU)


def longest(events: Iterable[Any], where: DeviceType) -> Seen:
    """The events of a device by their own time; an annotation covers kernels that are there themselves."""
    here = [event for event in events if event.device_type == where and not event.is_user_annotation]
    time = "self_device_time_total" if where == DeviceType.CUDA else "self_cpu_time_total"
    rows = [(event.key[:120], event.count / STEPS_SEEN, getattr(event, time) / STEPS_SEEN / 1e3) for event in here]
    rows.sort(key=lambda row: -row[2])
    return sum(row[2] for row in rows), rows[:KEPT]


def table(found: StepKernels) -> str:
    """The longest kernels, a line each."""
    rows = [
        {">ms": f"{ms:.3f}", ">of all": f"{ms / found.ms:.1%}", ">launches": f"{count:g}", "<kernel": name[:90]}
        for name, count, ms in found.kernels[:SHOWN]
        if ms
    ]
    return f"{found.step}: {found.ms:.2f} ms a step in kernels\n{align(rows) if rows else 'none was seen'}"


def count(text: str) -> int:
    """An argument of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = Parser(prog="python -m bench.kernel_profile", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--model", choices=list(PRESETS), default="gpt2", help="default: gpt2")
    parser.add_argument("--B", type=count, default=64, help="sequences in a batch (default: 64)")
    parser.add_argument("--T", type=count, help="tokens in a sequence (default: the model's)")
    parser.add_argument("--n-layer", type=count, help="blocks (default: the model's)")
    parser.add_argument("--dtype", choices=get_args(Dtype), default="bfloat16", help="default: bfloat16")
    parser.add_argument("--eager", action="store_true", help="don't compile the model")
    parser.add_argument("--warm", action="store_true", help="one step, and no profile")
    parser.add_argument("--without", action="append", choices=list(SLOTS), default=[], help="PyTorch's form there")
    parser.add_argument("--table", type=Path, help="launch configurations, named by the architecture (sm_90.json)")
    parser.add_argument("--jsonl", type=Path, help="file of JSON lines to append the profile to")
    given = parser.parse_args(arguments)
    if given.table is not None:
        try:
            check_table(given.table)
        except ValueError as error:
            parser.error(f"--table: {error}")
    if DEVICE.type == "cpu" and STEPS[given.step].needs_gpu:
        raise ConfigError(f"{given.step}: {STEPS[given.step].needs_gpu}")
    shape = StepShape(given.model, given.B, given.dtype, given.T, given.n_layer)
    kernels = Kernels(tuple(given.without), given.table)
    candidate = STEPS[given.step].on(shape, DEVICE, compiled=not given.eager, kernels=kernels)
    step = candidate.loaded()
    if given.warm:
        step(0)
        synchronize(DEVICE)
        return
    ms, rows = profile(step, DEVICE)
    found = StepKernels(
        step=given.step,
        shape=shape.info(),
        compiled=not given.eager,
        table=given.table is not None,
        slots=step.facts.get("slots"),
        ms=ms,
        kernels=rows,
    )
    if given.jsonl is not None:
        append_json_line(given.jsonl, {"kind": "kernels", **asdict(found)})
    print(table(found))


if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
