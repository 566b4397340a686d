"""`python -m bench.cpu`: the training step on a CPU, ours beside the peers, in speed and memory.

Four contests: float32 and bfloat16, eager and compiled. In each, ours by default (every slot at auto) against plain
PyTorch and transformers, each in a process of its own with as many threads, timed in turn. The table shows the speed
over the fastest peer's, the median over the rounds, and the peak memory. The record is written after each contest.
Tokens a second depend on this machine and its other work; the ratios much less.

Exit status: 0, or 1 if a candidate crashed, hung or is wrong. One that can't run here is listed.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench.contest import Missing, hold
from bench.record import Record
from bench.report.results import table
from bench.step.lockstep import Limits
from bench.step.steps import STEPS, StepContest, StepShape
from bench.timing import ROOT, commit, environment
from fastgpt2.config import PRESETS
from fastgpt2.flags import Parser

CANDIDATES = ("ours-auto", "plain", "transformers")
ROUND_S = 0.5
"""A round has one step, or as many as are done in this."""
CELLS = [f"{dtype}-{how}" for dtype in ("float32", "bfloat16") for how in ("eager", "compiled")]


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(prog="python -m bench.cpu", description="Time the training step on a CPU.")
    parser.add_argument("--minutes", type=float, default=45.0, help="no round starts later (default: 45)")
    parser.add_argument("--rounds", type=int, default=10, help="of each contest (default: 10)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    parser.add_argument("--commit", help="what is measured, where there is no git repository to ask")
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS, metavar="CELL", help=f"of {CELLS}")
    parser.add_argument("--candidates", nargs="+", default=CANDIDATES, choices=list(STEPS), metavar="NAME")
    parser.add_argument("--model", default="small", choices=list(PRESETS), help="default: small")
    parser.add_argument("--n-layer", type=int, help="blocks (default: the model's)")
    parser.add_argument("--batch-size", type=int, default=64, help="sequences in a step (default: 64)")
    parser.add_argument("--block-size", type=int, help="tokens in a sequence (default: the model's)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each candidate (default: every core's)")
    given = parser.parse_args(arguments)
    ends = time.monotonic() + 60 * given.minutes
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # this is about the CPU, whatever else is here
    record = Record(
        minutes=given.minutes,
        commit=commit(given.commit),
        environment={**environment(), "cpu_threads": given.threads},
    )
    file = record.file(given.out)
    failed = False
    for done, cell in enumerate(given.cells):
        share = (ends - time.monotonic()) / (len(given.cells) - done)
        dtype, how = cell.split("-")
        shape = StepShape(given.model, given.batch_size, dtype, given.block_size, given.n_layer)
        failed |= _run_cell(record, shape, how == "compiled", given, time.monotonic() + share)
        record.write(file)
    print(f"\n{file}\n{table(record.results)}")
    for name, reason in record.not_done.items():
        print(f"not done: {name}: {reason}")
    return int(failed)


def _run_cell(record: Record, shape: StepShape, compiled: bool, given: Any, until: float) -> bool:
    """Run one contest into the record; returns whether a candidate failed."""
    contest = StepContest(
        "cpu",
        shape,
        compiled,
        tuple(given.candidates),
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
    from fastgpt2.console import run_command

    run_command(main)
