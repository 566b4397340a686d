"""`python -m bench.cpu`: time the training step on a CPU, ours beside its peers.

Four contests at each shape: float32 and bfloat16, eager and compiled. In each, ours by default (every slot at auto)
against plain PyTorch, a nanoGPT-like step and transformers, each in a process of its own with as many threads, timed in
turn. The table shows the speed over the fastest peer's, the median over the rounds, and the peak memory. `products` is
the time of the matrix products alone: no step can be faster unless it multiplies faster. The record is written after
each contest. Tokens a second depend on this machine and its other work; the ratios much less.

Exit status: 0, or 1 if a candidate crashed, hung or is wrong. One that can't run here is listed.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import torch

from bench.contest import Missing, hold
from bench.record import Record
from bench.report.results import table
from bench.step.lockstep import Limits
from bench.step.steps import STEPS, StepContest, StepShape
from bench.timing import ROOT, commit, environment
from fastgpt2.config import PRESETS
from fastgpt2.console import run_command
from fastgpt2.fields import Choice, ConfigError, Count, Name, Positive
from fastgpt2.flags import read_arguments

CANDIDATES = ("ours-auto", "plain", "nanogpt", "transformers", "products")
SHAPES = {
    "gpt2": partial(StepShape, "gpt2", 4, T=256),
    "small": partial(StepShape, "small", 4, T=256),
    "character": partial(StepShape, "mini", 12, T=64, vocab_size=65),
}
"""By name, without the precision. `character` is nanoGPT's recipe for a CPU, Shakespeare by characters."""
ROUND_S = 0.5
"""A round has one step, or as many as are done in this."""
CELLS = [f"{dtype}-{how}" for dtype in ("float32", "bfloat16") for how in ("eager", "compiled")]


@dataclass(frozen=True)
class CpuConfig:
    """What to time, and for how long."""

    minutes: Positive = field(default=45.0, metadata={"group": "contests"})
    """Start no round later than this. Building counts: a compiled step of GPT-2 124M can take minutes."""
    rounds: Count = 10
    """Rounds of each contest."""
    cells: tuple[Annotated[str, Choice(tuple(CELLS))], ...] = tuple(CELLS)
    """Contests to hold at each shape."""
    shapes: tuple[Annotated[str, Choice(tuple(SHAPES))], ...] = ()
    """GPT-2 124M with 4 x 256 tokens, small with 4 x 256, nanoGPT's character recipe with 12 x 64 (default: all)."""
    candidates: tuple[Annotated[str, Choice(tuple(STEPS))], ...] = CANDIDATES
    """Steps to time."""
    threads: Count = os.cpu_count() or 1
    """Threads of each candidate (default: one a core)."""

    model: Annotated[str, Choice(tuple(PRESETS))] | None = field(default=None, metadata={"group": "another shape"})
    """Preset, instead of --shapes; the flags below need it."""
    n_layer: Count | None = None
    """Transformer blocks (default: the preset's)."""
    batch_size: Count | None = None
    """Sequences in a step (default: 16)."""
    block_size: Count | None = None
    """Tokens in a sequence (default: the preset's)."""

    out: Path = field(default=ROOT / "bench" / "results", metadata={"group": "record"})
    """Folder for the record (default: bench/results)."""
    commit: Name | None = None
    """What is measured, if there is no git repository to ask."""

    def __post_init__(self) -> None:
        given = [name for name in ("n_layer", "batch_size", "block_size") if getattr(self, name) is not None]
        if self.model is None and given:
            raise ConfigError(f"--{given[0].replace('_', '-')} needs --model")
        if self.model is not None and self.shapes:
            raise ConfigError("--model is another shape: leave it or --shapes out")
        if self.model is not None and (self.block_size or 0) > (positions := PRESETS[self.model].block_size):
            raise ConfigError(f"--block-size {self.block_size} is over the {positions} positions of {self.model}")


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 1 if a candidate crashed, hung or is wrong."""
    given = read_arguments(CpuConfig, "bench.cpu", arguments)
    ends = time.monotonic() + 60 * given.minutes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this is about the CPU, whatever else is here
    record = Record(
        minutes=given.minutes,
        commit=commit(given.commit),
        environment={**environment(), "cpu_threads": given.threads},
    )
    file = record.file(given.out)
    failed = False
    contests = list(itertools.product(_shapes(given), given.cells))
    for done, (make_shape, cell) in enumerate(contests):
        share = (ends - time.monotonic()) / (len(contests) - done)
        dtype, how = cell.split("-")
        shape = make_shape(dtype=dtype)
        failed |= _run_cell(record, shape, how == "compiled", given, time.monotonic() + share)
        record.write(file)
    print(f"\n{file}\n{table(record.results)}")
    for name, reason in record.not_done.items():
        print(f"not done: {name}: {reason}")
    return int(failed)


def _shapes(given: CpuConfig) -> list[Callable[..., StepShape]]:
    """What makes each shape, given a precision."""
    if given.model is None:
        return [SHAPES[name] for name in given.shapes or SHAPES]
    return [partial(StepShape, given.model, given.batch_size or 16, T=given.block_size, n_layer=given.n_layer)]


def _run_cell(record: Record, shape: StepShape, compiled: bool, given: CpuConfig, until: float) -> bool:
    """Run one contest into the record; returns whether a candidate failed."""
    contest = StepContest(
        "cpu",
        shape,
        compiled,
        given.candidates,
        rounds=given.rounds,
        round_s=ROUND_S,
        at_once=1,
        eager=False,
        threads=given.threads,
        limits=Limits(build=900.0, round=300.0),
        until=until,
        device=torch.device("cpu"),
    )
    print(f"{contest.group} ...", flush=True)
    outcomes, shared = hold(contest, given.candidates)
    done = []
    for name, outcome in outcomes.items():
        title = f"{contest.group}, {name}"
        if isinstance(outcome, Missing):
            record.not_done[title] = outcome.reason
            print(f"{title}: {outcome.reason}\n{outcome.output if outcome.failed else ''}".rstrip(), file=sys.stderr)
            continue
        record.environment = {**outcome.versions, "cpu_threads": given.threads}
        done.append(replace(contest.result(name, outcome, **shared), name=title))
    record.results += done
    print(table(done), flush=True)
    return any(isinstance(outcome, Missing) and outcome.failed for outcome in outcomes.values())


if __name__ == "__main__":
    run_command(main)
