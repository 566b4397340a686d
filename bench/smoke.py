"""`python -m bench.smoke`: check in seconds which of our kernels are right on this GPU.

Each slot is compared with float64 at GPT-2's width in bfloat16, in a process of its own, all at once. A slot that is
wrong, fails or hangs is tried again with other launch configurations, again all at once: fewer stages, four warps,
pointers in place of descriptors. The first that is right is recorded, for whoever mends the kernel; until then
PyTorch's form takes its place. A slot that ran out of memory is tried again when the steps that compile beside it
have ended.

    # what bench.gpu runs
    python -m bench.smoke --failed FILE --warm ours-triton plain
    # one comparison, in this process
    python -m bench.smoke --slot mlp --change "1 stage"

Exit status: 0; 1 where a slot is not right; 2 without a GPU.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Annotated
from unittest import mock

import torch

from bench.record import Smoke, smoke_from_json
from bench.stages import run_tied
from bench.timing import append_json_line, stage_ends
from fastgpt2.console import run_command
from fastgpt2.fields import Choice, ConfigError, OutputFile
from fastgpt2.flags import read_arguments
from fastgpt2.slots import OURS, implementation

COMPARE = (sys.executable, "-m", "bench.smoke")
WARM = (sys.executable, "-m", "bench.kernel_profile")
"""The commands that it starts."""
SLOTS = ("attn", "mlp", "norm", "loss")
OTHERS = {"attn-hopper": ("attn", "triton-hopper")}
"""Our other implementations of a slot: compared too where they can run. One that is wrong isn't tried with changes:
the slot has another of ours."""
FORMS = {slot: (slot, OURS[slot]) for slot in SLOTS} | OTHERS
"""Slot and implementation of what is compared."""
SECONDS = 60.0
"""For everything, where nobody says when it must end."""
SHARE = 0.6
"""The share of the remaining time that the first comparison may take; the rest is for the changes."""
ENDING_S = 5.0
"""Before the stage is stopped, for the last comparison to be stopped and what was found to be written."""


@dataclass(frozen=True)
class Change:
    """Another way to launch a slot's kernels.

    Args:
        config: fields of every launch configuration.
        pointers: no descriptors, where the slot's kernels have both forms.
        slots: that it makes sense for.
    """

    config: dict[str, int] = field(default_factory=dict)
    pointers: bool = False
    slots: tuple[str, ...] = SLOTS


CHANGES = {
    "1 stage": Change({"num_stages": 1}),
    "2 stages": Change({"num_stages": 2}),
    "4 warps": Change({"num_warps": 4}),
    "pointers": Change(pointers=True, slots=("mlp",)),
}
"""By importance: the first that makes a slot right is its `right_with`."""

Try = Callable[[str, str | None], Smoke]
"""(slot, a key of CHANGES or None) -> what came of it."""


def compare(form: str, change: str | None = None, device: str = "cuda:0") -> Smoke:
    """One comparison, in this process; on a CPU at a size for Triton's interpreter.

    form: a key of FORMS.
    """
    from fastgpt2 import accuracy as problems
    from fastgpt2.ops import Site, make_ops, why_not

    slot, name = FORMS[form]
    site = Site(device=torch.device(device), dtype=torch.bfloat16)
    if form in OTHERS and (reason := why_not(slot, implementation(slot, name), site)):
        return Smoke(slot=form, status="skipped", reason=reason)
    sizes = {
        "attn": [
            problems.attention_problem((2, T, 768 // D, D))
            for T, D in (((1024, 64), (1000, 64), (1000, 96), (1000, 128)) if form in OTHERS else ((1024, 64),))
        ],
        "mlp": [problems.mlp_problem((2048, 768))],
        "norm": [problems.norm_problem((2048, 768), last=last) for last in (False, True)],
        "loss": [problems.loss_problem((2048, 768, 50257))],
    }
    on_cpu = [problem for problem in problems.problems(device).values() if problem.slot == slot]
    forms = sizes[slot] if device.startswith("cuda") else on_cpu
    try:
        with _changed(CHANGES[change] if change else Change()):
            op = getattr(make_ops({slot: name}, site)[0], slot)
            tables = [problems.error_and_budget(op, form, torch.bfloat16, device) for form in forms]
    except Exception as error:
        traceback.print_exc()
        status = "out of memory" if _out_of_memory(error) else "failed"
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return Smoke(slot=form, status=status, reason=reason)
    rows = [(tensor, off, budget) for table in tables for tensor, (off, budget) in table.items()]
    worst, off, budget = max(rows, key=lambda row: problems.excess(row[1], row[2]))
    return Smoke(slot=form, status="ok" if off <= budget else "wrong", worst=worst, error=off, budget=budget)


def _out_of_memory(error: Exception) -> bool:
    """Whether the device's memory was used up, as PyTorch, CUDA, Triton and cuBLAS say it."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError) or "out of memory" in said or "alloc_failed" in said


def _changed(change: Change) -> ExitStack:
    """Launch configurations and forms other than the table's, until it is closed."""
    from fastgpt2.kernels import tuning

    stack, configuration = ExitStack(), tuning.configuration
    if change.config:
        other = lambda *key: replace(configuration(*key), **change.config)  # noqa: E731
        stack.enter_context(mock.patch.object(tuning, "configuration", other))
    if change.pointers:
        never = lambda *matrices: False  # noqa: E731
        stack.enter_context(mock.patch.object(import_module("fastgpt2.kernels.mlp"), "_descriptors", never))
    return stack


# ------------------------------------------------------------------------------------------------- all of them


def examine(
    slots: Sequence[str],
    attempt: Try,
    report: Callable[[Smoke], None],
    make_room: Callable[[], None],
) -> None:
    """Try all slots at once, and the changes of one that isn't right at once; each is reported as soon as it is known.

    A slot that ran out of memory is tried once more after make_room. A slot that is not right is reported again, with
    `right_with` (None where no change helps) and `changes`.
    """

    def one(slot: str) -> None:
        found = attempt(slot, None)
        report(found)
        if found.status == "out of memory":
            make_room()
            found = attempt(slot, None)
            report(found)
        if found.status == "ok" or slot in OTHERS:
            return
        names = [name for name, change in CHANGES.items() if slot in change.slots]
        with ThreadPoolExecutor(len(names)) as pool:
            tried = dict(zip(names, pool.map(lambda name: attempt(slot, name), names), strict=True))
        right = next((name for name in names if tried[name].status == "ok"), None)
        report(replace(found, right_with=right, changes=tried))

    with ThreadPoolExecutor(len(slots)) as pool:
        list(pool.map(one, slots))


def in_a_process(slot: str, change: str | None) -> Smoke:
    """A comparison in a process of its own, for as long as this one may take; its errors go where this one's do."""
    limit = max(1.0, _left() * (SHARE if change is None else 1.0))
    argv = [*COMPARE, "--slot", slot, *(["--change", change] if change else [])]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:
        returncode, timed_out = run_tied(argv, output, limit)
        output.seek(0)
        said = output.read().splitlines()
    seconds = round(time.monotonic() - began, 1)
    if timed_out:
        return Smoke(slot=slot, status="timed out", reason=f"no result within {limit:.0f} s", seconds=seconds)
    try:
        return replace(smoke_from_json(json.loads(said[-1])), seconds=seconds)
    except (IndexError, ValueError):
        return Smoke(slot=slot, status="died", reason=f"exit status {returncode}", seconds=seconds)


def _left() -> float:
    """Seconds."""
    ends = stage_ends()
    return SECONDS if math.isinf(ends) else max(0.0, ends - ENDING_S - time.monotonic())


def write_failed(path: Path | None, failed: Sequence[str]) -> None:
    """The forms that are not known to be right, whole whenever it is read."""
    if path is not None:
        aside = path.with_suffix(".writing")
        aside.write_text(json.dumps(list(failed)), encoding="utf-8")
        os.replace(aside, path)


def read_failed(path: Path) -> tuple[str, ...]:
    """What write_failed wrote; nothing where no smoke was run."""
    return tuple(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else ()


@dataclass(frozen=True)
class SmokeConfig:
    """What to compare, and where to keep what was found."""

    failed: OutputFile | None = None
    """File for the slots and other forms that are not right."""
    jsonl: OutputFile | None = None
    """File of JSON lines to append what was found to."""
    warm: tuple[str, ...] = ()
    """Steps to compile meanwhile, for later."""
    slot: Annotated[str, Choice(tuple(FORMS))] | None = None
    """Compare this slot, or other form of one, alone in this process."""
    change: Annotated[str, Choice(tuple(CHANGES))] | None = None
    """With --slot: launch its kernels otherwise."""

    def __post_init__(self) -> None:
        if self.change and self.slot not in CHANGES[self.change].slots:
            raise ConfigError(f"--change {self.change!r} needs --slot {' or '.join(CHANGES[self.change].slots)}")
        if self.warm:
            from bench.step.steps import STEPS  # a slot's process need not wait for it

            if unknown := [repr(name) for name in self.warm if name not in STEPS]:
                raise ConfigError(f"--warm: no step {' or '.join(unknown)}; there are {', '.join(STEPS)}")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    given = read_arguments(SmokeConfig, "bench.smoke", arguments)
    if not torch.cuda.is_available():
        raise ConfigError(f"python -m bench.smoke needs a CUDA GPU, torch {torch.__version__} sees none")
    if given.slot:
        found = compare(given.slot, given.change)
        print(json.dumps(asdict(found)), flush=True)
        return int(found.status != "ok")
    failed, lock = dict.fromkeys(FORMS), threading.Lock()
    write_failed(given.failed, list(failed))
    warm = {name: subprocess.Popen([*WARM, name, "--warm"]) for name in given.warm}

    def report(found: Smoke) -> None:
        with lock:
            if found.status in ("ok", "skipped"):
                failed.pop(found.slot, None)
                write_failed(given.failed, list(failed))
            final = found.status == "ok" or found.changes or found.slot in OTHERS
            if final and given.jsonl is not None:
                append_json_line(given.jsonl, {"kind": "smoke", **asdict(found)})
            print(words(found), flush=True)

    examine(tuple(FORMS), in_a_process, report, make_room=lambda: _end(warm, share=SHARE))
    _end(warm, changed="ours" if any(slot in failed for slot in SLOTS) else None)
    return int(bool(failed))


def words(found: Smoke) -> str:
    """A line for the log and the summary."""
    error = f": {found.worst} off by {found.error:.2e} of {found.budget:.2e}" if found.worst else ""
    reason = f": {found.reason}" if found.reason else ""
    right = f"; right with {found.right_with or 'none of the changes'}" if found.changes else ""
    return f"{found.slot}: {found.status}{error}{reason}{right}"


def _end(warm: Mapping[str, subprocess.Popen], changed: str | None = None, share: float = 1.0) -> None:
    """Wait for the steps that still compile, for a share of the time that is left, and kill those that don't end; at
    once those whose name begins with `changed`: others will be timed."""
    ends = time.monotonic() + share * _left()
    for name, process in warm.items():
        useless = changed is not None and name.startswith(changed)
        try:
            process.wait(0.0 if useless else max(0.0, ends - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


if __name__ == "__main__":
    run_command(main)
