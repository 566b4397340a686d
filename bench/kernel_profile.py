"""`python -m bench.kernel_profile`: show the time of a training step, kernel by kernel.

python -m bench.kernel_profile ours-triton
python -m bench.kernel_profile plain --B 8 --eager
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from bench.contest import DEVICE
from bench.record import StepKernels
from bench.smoke import FORMS
from bench.step.steps import STEPS, Kernels, StepShape
from bench.timing import append_json_line
from fastgpt2.config import PRESETS, ConfigError, Dtype
from fastgpt2.console import run_command
from fastgpt2.device import synchronize
from fastgpt2.fields import Choice, Count, OutputFile
from fastgpt2.flags import read_arguments
from fastgpt2.kernels.tools.toolkit import align
from fastgpt2.kernels.tuning import check_table

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


@dataclass(frozen=True)
class KernelProfileConfig:
    """Which step to profile, at which size."""

    step: Annotated[str, Choice(tuple(STEPS))] = field(metadata={"positional": True, "group": "step"})
    """Whose step, such as ours-auto, ours-triton, plain or transformers; an error lists all."""
    model: Annotated[str, Choice(tuple(PRESETS))] = "gpt2"
    """Preset."""
    B: Count = 64
    """Sequences in a batch."""
    T: Count | None = None
    """Tokens in a sequence (default: the preset's)."""
    n_layer: Count | None = None
    """Transformer blocks (default: the preset's)."""
    dtype: Dtype = "bfloat16"
    """Precision."""
    eager: bool = False
    """Don't compile the model."""

    warm: bool = field(default=False, metadata={"group": "profile"})
    """Take one step and make no profile: its compiled code is then in the caches."""
    without: tuple[Annotated[str, Choice(tuple(FORMS))], ...] = ()
    """Use PyTorch's form in place of ours in these slots, or of this other form."""
    table: Path | None = None
    """Launch configurations, named after the architecture (sm_90.json)."""
    jsonl: OutputFile | None = None
    """File of JSON lines to append the profile to."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    given = read_arguments(KernelProfileConfig, "bench.kernel_profile", arguments)
    if given.table is not None:
        try:
            check_table(given.table)
        except ValueError as error:
            raise ConfigError(f"--table: {error}") from None
    if DEVICE.type == "cpu" and STEPS[given.step].needs_gpu:
        raise ConfigError(f"{given.step}: {STEPS[given.step].needs_gpu}")
    shape = StepShape(given.model, given.B, given.dtype, given.T, given.n_layer)
    kernels = Kernels(given.without, given.table)
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
    run_command(main)
