"""What docs/benchmarks.md and README say of measurements: of each device the newest record with what a section shows.

A section has its own heading and is empty where nothing was measured: a reader meets no heading without figures.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from bench.record import Record
from bench.report import auto, targets
from bench.report.results import (
    best_peer,
    ceilings,
    fastest,
    gib,
    limit,
    mfu,
    milliseconds,
    newest,
    number,
    pick,
    ratio,
    work,
)
from bench.result import Result
from fastgpt2.slots import SLOTS

Row = dict[str, str]

MFU_IN_WORDS = (
    "MFU is the FLOPs that the model asks for over the time and over the data sheet's dense peak, a token's FLOPs by "
    "two formulas: llm.c's counts 6 for each parameter (all of them, the vocabulary padded) and 6 L C T for the "
    "attention (the causal half); nanoGPT's counts 6 for each parameter without the positions and 12 L C T (no mask)."
)
RATIO_IN_WORDS = (
    "Ratios are of speeds, taken in each of the interleaved rounds: the median, and the 20th and the 80th percentile; "
    "after a ~ the two were not timed in turn."
)
LIMIT_IN_WORDS = (
    "The limit is the longest of the times that the operation's bytes, FLOPs and exponentials take at the ceilings "
    "measured in the same run."
)

# ---------------------------------------------------------------------------------------------------- their parts


def markdown(rows: Sequence[Row]) -> str:
    """A table without the columns that no row fills; each key is the column's title after < or >, its side."""
    filled = [key for key in rows[0] if any(row[key] for row in rows)]
    head = [key[1:] for key in filled]
    rules = [":--" if key[0] == "<" else "--:" for key in filled]
    cells = [head, rules, *([row[key] for key in filled] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def prose(text: str) -> str:
    """Wrap to the width of the page."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def provenance(record: Record) -> str:
    """Where and when a table was measured, in a line."""
    changed = " with uncommitted changes" if record.commit["dirty"] else ""
    on = "" if record.on_gpu else f", {threads(record)}"
    known = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    return prose(f"*{record.device}{on}; {record.date}; commit {record.commit_id[:12]}{changed}; {known}.*")


def threads(record: Record) -> str:
    """How many threads a measurement on a CPU had."""
    count = record.environment["cpu_threads"]
    return f"{count} thread{'s' * (count > 1)}"


def each_device(
    title: str,
    records: Iterable[Record],
    results_of: Callable[[Record], Sequence[Any]],
    show: Callable[[Record, Any], Iterable[str]],
    words: str,
    *,
    gpu: bool = True,
) -> str:
    """A section: its title, what `show` makes of each device's newest results, then what the words mean. Empty where
    nothing was measured."""
    found = newest((record for record in records if record.on_gpu is gpu), results_of).values()
    parts = [part for record in found for part in (provenance(record), *show(record, results_of(record)))]
    return "\n\n".join([f"## {title}", *parts, prose(words)]) if parts else ""


def by_work(results: Iterable[Result]) -> list[list[Result]]:
    """Results of the same work together, the fastest first, in the order in which they were measured."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(work(result), []).append(result)
    return [sorted(group, key=milliseconds) for group in groups.values()]


def ours(results: Iterable[Result]) -> Result | None:
    """The fastest of ours."""
    return fastest(result for result in results if result.role == "ours")


def beside_peer(mine: Result, peer: Result | None) -> Row:
    """The cells about the fastest peer."""
    if peer is None or peer is mine:
        return {"<fastest peer": "itself" if peer is mine else "none", ">x its speed": "", ">x its memory": ""}
    held, theirs = mine.peak_memory_bytes, peer.peak_memory_bytes
    return {
        "<fastest peer": peer.backend,
        ">x its speed": str(ratio(mine, peer)),
        ">x its memory": f"{held / theirs:.2f}" if held and theirs else "",
    }


def size(result: Result) -> str:
    """The shape, precision and mode of a work, without the operation."""
    return " ".join(word for word in work(result)[1:] if word)


steps_of = partial(pick, op="training step")


def step_row(result: Result, results: Sequence[Result]) -> Row:
    """A training step beside its fastest peer."""
    return {
        "<step": size(result),
        "<computed by": result.backend,
        ">tokens/s": number(result.tokens_per_s, ",.0f"),
        ">MFU llm.c": mfu(result, "llm.c"),
        ">MFU nanoGPT": mfu(result, "nanogpt"),
        ">ms": number(result.ms_median, ",.1f"),
        ">peak GiB": gib(result.peak_memory_bytes),
        **beside_peer(result, best_peer(result, results)),
    }


# ------------------------------------------------------------------------------------------------------ sections


def status_section(records: Sequence[Record]) -> str:
    if any(record.on_gpu for record in records):
        return ""
    return prose(
        "**Not measured on a GPU yet.** No speed on one is claimed. Our kernels are compared with float64 in Triton's "
        "interpreter, those in Gluon (`--attn triton-hopper`) in a player of the tests. Their machine code is "
        "inspected. `auto` chooses PyTorch's own forms on a GPU until a record shows "
        "that ours are faster. To measure yours: `python -m bench.gpu`."
    )


def targets_section(records: Sequence[Record]) -> str:
    def show(_: Record, rows: list[Row]) -> Iterable[str]:
        yield markdown(rows)

    words = (
        "GPT-2 124M, bfloat16, T = 1024 where nothing else is said; asked of one H100 SXM. An attention's ratio is "
        "over the fastest of SDPA's flash and cuDNN kernels and FlexAttention."
    )
    title = "What was to be reached on an H100, and what was"
    return each_device(title, records, targets.rows, show, f"{words} {RATIO_IN_WORDS}")


def step_section(records: Sequence[Record]) -> str:
    def show(record: Record, results: list[Result]) -> Iterable[str]:
        groups = by_work(results)
        best = [mine for group in groups if (mine := ours(group)) is not None]
        if best:
            yield "The fastest of ours at each size:"
            yield markdown([step_row(mine, results) for mine in best])
        if compiled := [group for group in groups if group[0].compiled and ours(group)]:
            group = max(compiled, key=lambda group: group[0].tokens or 0)
            yield f"Every candidate at {size(group[0])}:"
            yield markdown([step_row(result, results) | {"<step": ""} for result in group])

    return each_device("A training step", records, steps_of, show, f"{RATIO_IN_WORDS} {MFU_IN_WORDS}")


def ops_section(records: Sequence[Record]) -> str:
    def results_of(record: Record) -> list[list[Result]]:
        groups = by_work(pick(record, ""))
        return [group for group in groups if group[0].op != "training step" and ours(group) is not None]

    def row(group: list[Result]) -> Row:
        mine = ours(group) or group[0]
        peer = best_peer(mine, group)
        return {
            "<operation": mine.op,
            "<size": size(mine),
            "<ours": mine.backend,
            ">ms": number(mine.ms_median, ".3f"),
            "<of the measured limit": limit(mine),
            **beside_peer(mine, peer),
            ">its ms": "" if peer is None else number(peer.ms_median, ".3f"),
        }

    def show(record: Record, groups: list[list[Result]]) -> Iterable[str]:
        yield markdown([row(group) for group in groups])
        yield prose(f"Measured ceilings: {ceilings(record) or 'none'}.")

    title = "Each operation beside the fastest peer"
    return each_device(title, records, results_of, show, f"{RATIO_IN_WORDS} {LIMIT_IN_WORDS}")


def ablation_section(records: Sequence[Record]) -> str:
    def show(record: Record, contests: list[dict[str, Result]]) -> Iterable[str]:
        for contest in contests:
            plain = contest[auto.PLAIN]
            changed = {r.backend: f"{slot} by {n}" for slot in SLOTS for n, r in auto.changed(slot, contest).items()}
            every = {auto.ALL: "every slot by triton", auto.ANY_ORDER: "the same with --no-deterministic"}
            plainly = {auto.PLAIN: "nothing: PyTorch's forms", auto.PLAIN_ANY_ORDER: "nothing, --no-deterministic"}
            shown = {**plainly, **changed, **every}
            yield f"{size(plain)}:"
            yield markdown(
                [
                    {
                        "<changed": words,
                        ">ms": number(contest[name].ms_median, ",.2f"),
                        ">x the speed of PyTorch's forms": str(ratio(contest[name], plain)),
                        ">peak GiB": gib(contest[name].peak_memory_bytes),
                    }
                    for name, words in shown.items()
                    if name in contest
                ]
            )

    words = (
        "`auto` takes what is faster than its own choice without a table where the ratio's 20th percentile is over 1, "
        "and of the losses one that never holds all logits: `fastgpt2/auto.json`."
    )
    title = "What each kernel is worth in the step"
    return each_device(title, records, auto.ablations, show, f"{RATIO_IN_WORDS} {words}")


def cpu_section(records: Sequence[Record]) -> str:
    """Each precision by the newest record that has it: a processor may lack one."""
    parts: dict[str, list[Result]] = {}
    for dtype in ("float32", "bfloat16"):
        results_of = partial(_steps_in, dtype=dtype)
        for record in newest((record for record in records if not record.on_gpu), results_of).values():
            parts.setdefault(provenance(record), []).extend(results_of(record))
    shown = []
    for place, results in parts.items():
        rows = [step_row(result, results) for group in by_work(results) for result in group]
        meaning = "; ".join(dict.fromkeys(str(r.peak_memory_meaning) for r in results))
        shown += [place, markdown(rows), f"Peak memory: {meaning}."]
    words = "`products` is the time of the matrix products alone, which no step can undercut."
    return "\n\n".join(["## A training step on a CPU", *shown, prose(f"{words} {RATIO_IN_WORDS}")]) if shown else ""


def _steps_in(record: Record, dtype: str) -> list[Result]:
    return [result for result in steps_of(record) if result.dtype == dtype]


def cpu_summary(records: Sequence[Record]) -> str:
    """What the table of the CPU says of float32, its default precision there, in a sentence."""
    parts = []
    for record in newest((record for record in records if not record.on_gpu), steps_of).values():
        groups = by_work(steps_of(record))
        found = [(mine, group) for group in groups if (mine := ours(group)) is not None and mine.dtype == "float32"]
        pairs = [(mine, best_peer(mine, group)) for mine, group in found]
        speeds = [ratio(mine, peer).median for mine, peer in pairs if peer is not None]
        shares = [
            mine.peak_memory_bytes / peer.peak_memory_bytes
            for mine, peer in pairs
            if peer is not None and mine.peak_memory_bytes and peer.peak_memory_bytes
        ]
        if not speeds or not shares:
            continue
        parts.append(
            f"On {threads(record)} of a CPU a training step in float32 runs at {_span(speeds)} times the speed of its "
            f"fastest peer, in {_span(shares)} of that peer's memory "
            f"([the table](docs/benchmarks.md#a-training-step-on-a-cpu), {record.date})."
        )
    return prose(" ".join(parts))


def runs_summary(records: Sequence[Record]) -> str:
    """What the stored training runs reach, the shortest first; each is drawn in docs/pictures."""
    runs = [(run, record) for record in records for run in record.training_runs]
    return prose(
        " ".join(
            f"{run.losses[-1][0]:,} steps take {_time(run.seconds)} on {threads(record)} of a CPU and reach "
            f"{run.loss:.2f} nats a byte on the validation text, where the frequencies of the bytes alone give "
            f"{run.unigram:.2f}."
            for run, record in sorted(runs, key=lambda pair: pair[0].seconds)
        )
    )


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min"


def _span(values: Sequence[float]) -> str:
    least, most = f"{min(values):.2f}", f"{max(values):.2f}"
    return least if least == most else f"{least} to {most}"


Sections = dict[str, Callable[[Sequence[Record]], str]]

SECTIONS: Sections = {
    "targets": targets_section,
    "step": step_section,
    "ablation": ablation_section,
    "ops": ops_section,
    "cpu": cpu_section,
}
"""By the names of the page's markers, in its order."""
README: Sections = {"runs": runs_summary, "cpu-summary": cpu_summary, "status": status_section}
