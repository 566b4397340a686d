"""Stored measurements: read them, compare what belongs together, and print the table that a run ends with.

A record is a file bench/results/<device>/<date>-<commit>.json. Results with equal `contest` were timed in turn, so
their ratio is taken in each round and the drift of the clocks cancels. A ratio is one of speeds: 2 is twice as fast.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.record import Record, load
from bench.result import Result
from bench.timing import ROOT, percentile
from fastgpt2.kernels.tools.toolkit import align

RESULTS = ROOT / "bench" / "results"

Key = tuple[str, ...]


def stored(folder: Path = RESULTS) -> list[Record]:
    """Read all stored records, oldest first. Runs of one commit on one device with the same versions become one record,
    as when `bench.gpu --only` was called for one part after the other."""
    parts: dict[Key, list[Record]] = {}
    for record in sorted((load(path) for path in folder.glob("*/*.json")), key=lambda record: record.started):
        parts.setdefault((record.device, record.commit_id, *record.versions.values()), []).append(record)
    return sorted((_join(runs) for runs in parts.values()), key=lambda record: record.started)


def _join(runs: Sequence[Record]) -> Record:
    """Join runs, oldest first: the newest's fields, with the results of all, the newest's first."""
    last_first = runs[::-1]
    return replace(
        runs[-1],
        results=[result for run in last_first for result in run.results],
        step_kernels=[found for run in last_first for found in run.step_kernels],
        training_runs=[trained for run in last_first for trained in run.training_runs],
        ceilings=next((run.ceilings for run in last_first if run.ceilings), None),
    )


def newest(records: Iterable[Record], results_of: Callable[[Record], Sequence[Any]]) -> dict[str, Record]:
    """The newest record of each device that has what is asked for, oldest first."""
    in_time = sorted(records, key=lambda record: record.started)
    return {record.device: record for record in in_time if results_of(record)}


def pick(record: Record, op: str) -> list[Result]:
    """A record's timed results of operations that begin with `op`; the first where a contest was repeated."""
    found: dict[Key, Result] = {}
    for result in timed(record, op):
        found.setdefault(key(result), result)
    return list(found.values())


def timed(record: Record, op: str) -> list[Result]:
    """A record's timed results of operations that begin with `op`, of repeated contests too."""
    return [result for result in record.results if result.op.startswith(op) and result.ms_median]


def milliseconds(result: Result) -> float:
    """The median of a result that was timed, as all of pick's were."""
    assert result.ms_median is not None, f"{result.backend} was not timed"
    return result.ms_median


def fastest(results: Iterable[Result]) -> Result | None:
    return min(results, key=milliseconds, default=None)


# --------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True)
class Ratio:
    """How many times as fast: over the rounds of a contest; of two medians, where they were not timed in turn."""

    median: float
    p20: float | None
    p80: float | None

    @property
    def paired(self) -> bool:
        return self.p20 is not None

    def __str__(self) -> str:
        """1.26 (1.25..1.27); ~1.26 where the two were not timed in turn."""
        return f"{self.median:.2f} ({self.p20:.2f}..{self.p80:.2f})" if self.paired else f"~{self.median:.2f}"


def ratio(mine: Result, theirs: Result) -> Ratio:
    """The speed of a result over another's: round by round where they were timed in turn, else of the medians."""
    ours, other = mine.round_ms, theirs.round_ms
    in_turn = mine.contest is not None and mine.contest == theirs.contest
    if not in_turn or not ours or len(ours) != len(other):
        return Ratio(milliseconds(theirs) / milliseconds(mine), None, None)
    rounds = [b / a for a, b in zip(ours, other, strict=True)]
    return Ratio(statistics.median(rounds), percentile(rounds, 20), percentile(rounds, 80))


def work(result: Result) -> tuple[str, str, str, str]:
    """What is computed: the operation, its shape in words, the precision, and of a step whether it is compiled."""
    words = [str(v) if k == "model" else f"{k}={v}" for k, v in result.shape.items() if v is not None]
    return result.op, " ".join(words), result.dtype, mode(result)


def mode(result: Result) -> str:
    """Whether a whole step was "compiled" or "eager": only like is compared with like. "" for an operation, where a
    compiled form is a candidate with a name of its own."""
    if result.op not in ("training step", "first step"):
        return ""
    return "compiled" if result.compiled else "eager"


def key(result: Result) -> Key:
    """What was timed, by which another run of it is found: the work and what computes it."""
    return (*work(result), result.backend)


def best_peer(result: Result, results: Sequence[Result]) -> Result | None:
    """The fastest peer at the same work: of those timed in turn with the result, else of all; None without any."""
    peers = [r for r in results if r.role == "peer" and r.ms_median and work(r) == work(result)]
    in_turn = [peer for peer in peers if peer.contest == result.contest]
    return fastest(in_turn or peers)


# ----------------------------------------------------------------------------------------------- showing


def number(value: float | None, form: str) -> str:
    """A number in a format; "" for None."""
    return "" if value is None else format(value, form)


def gib(count: float | None) -> str:
    """Bytes as GiB; nothing where unknown."""
    return number(count and count / 2**30, ".2f")


def limit(result: Result) -> str:
    """The measured ceiling that binds and how near to it the result is: "memory 87%", and whether launching takes
    longer than computing; nothing where unknown."""
    near = [f"{result.limit} {result.limit_fraction:.0%}"] if result.limit_fraction else []
    slow_host = (result.host_ms or 0.0) > milliseconds(result)
    return ", ".join(near + ["launch-bound"] * slow_host)


def mfu(result: Result, formula: str = "llm.c") -> str:
    """The model's FLOPs over the data sheet's peak, by a formula; nothing where either is unknown."""
    fraction = result.mfu.get(formula)
    return f"{fraction:.1%}" if fraction else ""


def table(results: Sequence[Result]) -> str:
    """One line a timed result, the fastest of each work first, with its speed over that of the fastest peer."""
    timed = [result for result in results if result.ms_median]
    order = list(dict.fromkeys(work(result) for result in timed))
    rows = []
    for result in sorted(timed, key=lambda r: (order.index(work(r)), milliseconds(r))):
        peer = best_peer(result, timed)
        rows.append(
            {
                "<work": " ".join(work(result)).rstrip(),
                "<backend": result.backend,
                "<role": result.role,
                ">ms": number(result.ms_median, ".3f"),
                ">p20..p80": "..".join(number(ms, ".3f") for ms in (result.ms_p20, result.ms_p80)),
                ">tokens/s": number(result.tokens_per_s, ",.0f"),
                ">TFLOP/s": number(result.tflops, ".1f"),
                ">MFU llm.c": mfu(result),
                ">of the limit": limit(result),
                ">GiB": gib(result.peak_memory_bytes),
                ">x best peer": "no peer" if peer is None else str(ratio(result, peer)),
            }
        )
    return align(rows) if rows else "no benchmark has a result"


def ceilings(record: Record) -> str:
    """The measured ceilings in a line; nothing where there are none."""
    found = record.ceilings
    if not found:
        return ""
    parts = [f"memory {found['memory_bytes_per_s'] / 1e12:.2f} TB/s"]
    products = (found.get("matrix_flops_per_s") or {}).items()
    parts += [f"{dtype} products {speed / 1e12:,.1f} TFLOP/s" for dtype, speed in products if speed]
    if found.get("special_per_s"):
        parts.append(f"exponentials {found['special_per_s'] / 1e12:.2f} T/s")
    return ", ".join(parts)


def summary(record: Record) -> str:
    """What a run prints last: the tests, the ceilings, the table, times to the first step and what was not done."""
    lines = [f"{record.device}, commit {record.commit_id}"]
    if text := ceilings(record):
        lines.append(f"measured ceilings: {text}")
    for stage in record.stages:
        if stage.required:
            counts = f", {stage.tests.run} tests run" if stage.tests else ""
            lines.append(f"{stage.name}: {stage.status}{counts}")
    lines.append(table(record.results))
    for result in record.results:
        if seconds := [f"{name} {value:.1f} s" for name, value in result.seconds_to_first.items() if value is not None]:
            text = ", ".join(seconds)
            lines.append(f"to the first step: {work(result)[1]} {mode(result)}, {result.backend}: {text}")
    lines += [f"not done: {name}: {reason}" for name, reason in record.not_done.items()]
    return "\n".join(lines)
