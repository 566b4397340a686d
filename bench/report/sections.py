"""README's sections about measurements: the newest record of each device that has what a section shows."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

from bench.report import auto, plots, targets
from bench.report.plots import fastest_of_ours, headline, slug
from bench.report.results import (
    Record,
    Result,
    best_peer,
    ceilings,
    device_of,
    gib,
    limit,
    mfu,
    newest,
    number,
    on_gpu,
    pick,
    ratio,
    versions,
    work,
)
from fastgpt2.kernels.tools import profile
from fastgpt2.ops import SLOTS

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
    """Wrapped as the rest of the README is."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def provenance(record: Record) -> str:
    """Where and when a table was measured, in a line."""
    commit = record["commit"]
    changed = " with uncommitted changes" if commit["dirty"] else ""
    count = record["environment"]["cpu_threads"]
    threads = "" if on_gpu(record) else f", {count} thread{'s' * (count > 1)}"
    known = ", ".join(f"{name} {version}" for name, version in versions(record).items())
    day, which = record["started"][:10], f"commit {commit['id'][:12]}{changed}"
    return prose(f"*{device_of(record)}{threads}; {day}; {which}; {known}.*")


def each_device(
    records: Iterable[Record],
    results_of: Callable[[Record], Sequence[Any]],
    show: Callable[[Record, Any], Iterable[str]],
    words: str,
    *,
    gpu: bool = True,
) -> str:
    """A section: what `show` makes of each device's newest results, then what the words mean; or that there is none."""
    found = newest((record for record in records if on_gpu(record) is gpu), results_of).values()
    parts = [part for record in found for part in (provenance(record), *show(record, results_of(record)))]
    return "\n\n".join([*parts, prose(words)]) if parts else f"Not measured on a {'GPU' if gpu else 'CPU'} yet."


def by_work(results: Iterable[Result]) -> list[list[Result]]:
    """Results of the same work together, the fastest first, in the order in which they were measured."""
    groups: dict[tuple[str, ...], list[Result]] = {}
    for result in results:
        groups.setdefault(work(result), []).append(result)
    return [sorted(group, key=lambda result: result["ms_median"]) for group in groups.values()]


def least(results: Iterable[Result], role: str, figure: str = "ms_median") -> Result | None:
    """The result of a role with the least of a figure, where it is known."""
    return min((r for r in results if r["role"] == role and r.get(figure)), key=lambda r: r[figure], default=None)


def beside_peer(mine: Result, peer: Result | None) -> Row:
    """The cells about the fastest peer."""
    if peer is None or peer is mine:
        return {"<fastest peer": "itself" if peer is mine else "none", ">x its speed": "", ">x its memory": ""}
    held, theirs = mine.get("peak_memory_bytes"), peer.get("peak_memory_bytes")
    return {
        "<fastest peer": peer["backend"],
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
        "<computed by": result["backend"],
        ">tokens/s": number(result["tokens_per_s"], ",.0f"),
        ">MFU llm.c": mfu(result, "llm.c"),
        ">MFU nanoGPT": mfu(result, "nanogpt"),
        ">ms": number(result["ms_median"], ",.1f"),
        ">peak GiB": gib(result["peak_memory_bytes"]),
        **beside_peer(result, best_peer(result, results)),
    }


# ------------------------------------------------------------------------------------------------------ sections


def headline_section(records: Sequence[Record]) -> str:
    lines = []
    for device, record in newest(filter(on_gpu, records), steps_of).items():
        pair = fastest_of_ours(record, headline([record]))
        if pair is None:
            continue
        mine, peer = pair
        line = f"On {device}: {mine['tokens_per_s']:,.0f} tokens/s"
        if mfu(mine):
            line += f", {mfu(mine)} MFU by llm.c's formula"
        if peer is not None:
            line += f", {ratio(mine, peer)} times the fastest peer ({peer['backend']})"
        lines.append(prose(f"{line}; {size(mine)}, by {mine['backend']}; {plots.stamp(record)}."))
    return "\n\n".join(lines) or "Not measured on a GPU yet."


def targets_section(records: Sequence[Record]) -> str:
    def show(_: Record, rows: list[Row]) -> Iterable[str]:
        yield markdown(rows)

    words = (
        "GPT-2 124M, bfloat16, T = 1024 where nothing else is said; asked of one H100 SXM. An attention's ratio is "
        "over the fastest of SDPA's flash and cuDNN kernels and FlexAttention."
    )
    return each_device(records, targets.rows, show, f"{words} {RATIO_IN_WORDS}")


def step_section(records: Sequence[Record]) -> str:
    def show(record: Record, results: list[Result]) -> Iterable[str]:
        groups = by_work(results)
        best = [mine for group in groups if (mine := least(group, "ours")) is not None]
        if best:
            yield "The fastest of ours at each size:"
            yield markdown([step_row(mine, results) for mine in best])
        if (key := headline([record])) is not None:
            group = next(group for group in groups if work(group[0]) == key)
            yield f"Every candidate at {size(group[0])}:"
            yield markdown([step_row(result, results) | {"<step": ""} for result in group])
        if (name := f"step-{slug(device_of(record))}") in plots.figures([record]):
            yield plots.image(name, "tokens/s and peak memory against the batch size")

    return each_device(records, steps_of, show, f"{RATIO_IN_WORDS} {MFU_IN_WORDS}")


def attention_section(records: Sequence[Record]) -> str:
    def show(record: Record, _: list[Result]) -> Iterable[str]:
        figure = plots.attention(record)
        yield plots.image(f"attention-{slug(device_of(record))}", "TFLOP/s of the attention against T")
        for panel in figure["panels"]:
            lengths = sorted({T for line in panel["lines"] for T in line["x"]})
            rows = []
            for line in sorted(panel["lines"], key=lambda line: (line["role"] == "limit", -line["y"][-1])):
                speed = dict(zip(line["x"], line["y"], strict=True))
                by_length = {f">T={T}": number(speed.get(T), ".0f") for T in lengths}
                rows.append({f"<{panel['title']}: TFLOP/s": line["label"], "<role": line["role"], **by_length})
            yield markdown(rows)
        yield prose(f"Measured ceilings: {ceilings(record) or 'none'}.")

    words = "FLOPs of the causal half alone: 4 B H T^2 D / 2 forward, 2.5 times as many backward."
    return each_device(records, partial(pick, op="attention"), show, words)


def ops_section(records: Sequence[Record]) -> str:
    def results_of(record: Record) -> list[list[Result]]:
        groups = by_work(pick(record, ""))
        return [group for group in groups if group[0]["op"] != "training step" and least(group, "ours") is not None]

    def row(group: list[Result]) -> Row:
        mine = least(group, "ours") or group[0]
        peer = best_peer(mine, group)
        return {
            "<operation": mine["op"],
            "<size": size(mine),
            "<ours": mine["backend"],
            ">ms": number(mine["ms_median"], ".3f"),
            "<of the measured limit": limit(mine),
            **beside_peer(mine, peer),
            ">its ms": "" if peer is None else number(peer["ms_median"], ".3f"),
        }

    def show(record: Record, groups: list[list[Result]]) -> Iterable[str]:
        yield markdown([row(group) for group in groups])
        yield prose(f"Measured ceilings: {ceilings(record) or 'none'}.")

    return each_device(records, results_of, show, f"{RATIO_IN_WORDS} {LIMIT_IN_WORDS}")


def ablation_section(records: Sequence[Record]) -> str:
    def show(record: Record, contests: list[dict[str, Result]]) -> Iterable[str]:
        for contest in contests:
            plain = contest[auto.PLAIN]
            changed = {r["backend"]: f"{slot} by {n}" for slot in SLOTS for n, r in auto.changed(slot, contest).items()}
            every = {auto.ALL: "every slot by triton", auto.ANY_ORDER: "the same with --no-deterministic"}
            plainly = {auto.PLAIN: "nothing: PyTorch's forms", auto.PLAIN_ANY_ORDER: "nothing, --no-deterministic"}
            shown = {**plainly, **changed, **every}
            yield f"{size(plain)}:"
            yield markdown(
                [
                    {
                        "<changed": words,
                        ">ms": number(contest[name]["ms_median"], ",.2f"),
                        ">x the speed of PyTorch's forms": str(ratio(contest[name], plain)),
                        ">peak GiB": gib(contest[name]["peak_memory_bytes"]),
                    }
                    for name, words in shown.items()
                    if name in contest
                ]
            )

    words = (
        "`auto` takes what is faster than its own choice without a table where the ratio's 20th percentile is over 1, "
        "and of the losses one that never holds all logits: `fastgpt2/auto.json`."
    )
    return each_device(records, auto.ablations, show, f"{RATIO_IN_WORDS} {words}")


def counters_section(records: Sequence[Record]) -> str:
    def show(_: Record, profiles: list[dict[str, Any]]) -> Iterable[str]:
        # Of a kernel that was read again the newest.
        yield markdown(list({(p["op"], p["precision"]): profile.row(p) for p in reversed(profiles)}.values())[::-1])

    words = (
        "By `python -m fastgpt2.kernels.tools.profile`, which does not lock the clocks: a kernel's third launch at GPT-2 124M's "
        "shape. "
        "A scheduler issues an instruction a clock at most; what warps stall for is in warps an instruction issued."
    )
    return each_device(records, lambda record: record.get("profiles", ()), show, words)


def memory_section(records: Sequence[Record]) -> str:
    def cell(result: Result | None) -> str:
        return "" if result is None else f"{gib(result['peak_memory_bytes'])} ({result['backend']})"

    def show(_: Record, results: list[Result]) -> Iterable[str]:
        known = [result for result in results if result["peak_memory_bytes"]]
        yield markdown(
            [
                {
                    "<step, peak GiB": size(group[0]),
                    "<fastest of ours": cell(least(group, "ours")),
                    "<least of ours": cell(least(group, "ours", "peak_memory_bytes")),
                    "<fastest peer": cell(least(group, "peer")),
                    "<least of the peers": cell(least(group, "peer", "peak_memory_bytes")),
                }
                for group in by_work(known)
            ]
        )
        yield f"Peak memory is {'; '.join(dict.fromkeys(result['peak_memory_meaning'] for result in known))}."

    def results_of(record: Record) -> list[Result]:
        return [result for result in steps_of(record) if result["peak_memory_bytes"]]

    return each_device(records, results_of, show, "In parentheses what computed it.")


def first_step_section(records: Sequence[Record]) -> str:
    def results_of(record: Record) -> list[Result]:
        return [r for r in record["results"] if r["op"] == "first step" and r.get("seconds_to_first")]

    def show(_: Record, results: list[Result]) -> Iterable[str]:
        yield markdown(
            [
                {
                    "<step": size(result),
                    "<computed by": result["backend"],
                    ">cold, s": number(result["seconds_to_first"].get("cold"), ".1f"),
                    ">cached, s": number(result["seconds_to_first"].get("cached"), ".1f"),
                }
                for result in results
            ]
        )

    words = (
        "Seconds from a fresh process's making of the model to the end of the first step; cold: nothing is compiled."
    )
    return each_device(records, results_of, show, words)


def cpu_section(records: Sequence[Record]) -> str:
    def show(_: Record, results: list[Result]) -> Iterable[str]:
        yield markdown([step_row(result, results) for group in by_work(results) for result in group])
        yield f"Peak memory is {'; '.join(dict.fromkeys(str(r['peak_memory_meaning']) for r in results))}."

    return each_device(records, steps_of, show, RATIO_IN_WORDS, gpu=False)


def history_section(records: Sequence[Record]) -> str:
    parts = []
    for device in dict.fromkeys(device_of(record) for record in records):
        mine = [record for record in records if device_of(record) == device]
        key = headline(mine)
        if key is None:
            continue
        rows = [
            {
                "<date": record["started"][:10],
                "<commit": record["commit"]["id"][:12],
                "<torch": record["environment"]["torch"],
                "<ours": pair[0]["backend"],
                ">tokens/s": number(pair[0]["tokens_per_s"], ",.0f"),
                **beside_peer(*pair),
            }
            for record in mine
            if (pair := fastest_of_ours(record, key)) is not None
        ]
        parts += [f"{device}, {' '.join(key)}, the fastest of ours:", markdown(rows)]
        if (name := f"history-{slug(device)}") in plots.figures(mine):
            parts.append(plots.image(name, "tokens/s by commit"))
    return "\n\n".join(parts) or "No run is stored yet."


SECTIONS: dict[str, Callable[[Sequence[Record]], str]] = {
    "headline": headline_section,
    "targets": targets_section,
    "step": step_section,
    "attention": attention_section,
    "counters": counters_section,
    "ops": ops_section,
    "ablation": ablation_section,
    "memory": memory_section,
    "first-step": first_step_section,
    "cpu": cpu_section,
    "history": history_section,
}
"""By the names of README's markers."""
