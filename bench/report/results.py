"""Stored measurements: reading them, which belongs beside which, and the table that a run ends with.

A record is a file bench/results/<device>/<date>-<commit>.json: where and when, the device's measured ceilings and
`results`, a list of plain dicts. Results with equal `contest` were timed in turn, round by round, so their ratio is
taken in each round and the drift of the clocks cancels. A ratio is one of speeds: 2 is twice as fast.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.timing import ROOT, percentile
from fastgpt2.config import ConfigError

FORMAT = 2
RESULTS = ROOT / "bench" / "results"

Record = dict[str, Any]
Result = dict[str, Any]
Key = tuple[str, ...]


class RecordError(ConfigError):
    """A file that is no record, or none that can be used for what was asked; the message is one line."""


# ----------------------------------------------------------------------------------------------- reading


def load(path: Path) -> Record:
    """A stored record, with `path` added.

    Raises:
        RecordError: it can't be read, or is of another format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    found = record.get("format") if isinstance(record, dict) else None
    if found != FORMAT:
        raise RecordError(f"{path} has format {found}, this reads {FORMAT}: measure again with python -m bench.gpu")
    missing = [key for key in ("started", "commit", "environment", "results") if key not in record]
    if missing:
        raise RecordError(f"{path} lacks {', '.join(missing)}: it is no record of bench.gpu or bench.cpu")
    return record | {"path": path}


def stored(folder: Path = RESULTS) -> list[Record]:
    """All stored records, oldest first; runs of the same commit on the same device with the same versions are one, as
    when `bench.gpu --only` was called for one part after the other."""
    parts: dict[Key, list[Record]] = {}
    for record in sorted((load(path) for path in folder.glob("*/*.json")), key=lambda record: record["started"]):
        same = (device_of(record), record["commit"]["id"], *versions(record).values())
        parts.setdefault(same, []).append(record)
    return sorted((_join(runs) for runs in parts.values()), key=lambda record: record["started"])


def _join(runs: Sequence[Record]) -> Record:
    """Runs, oldest first, as one record: what the newest says, and the results of all, the newest's first."""
    last_first = runs[::-1]
    return runs[-1] | {
        "results": [result for run in last_first for result in run["results"]],
        "ceilings": next((run["ceilings"] for run in last_first if run.get("ceilings")), None),
        "profiles": [profile for run in last_first for profile in run.get("profiles", ())],
    }


def device_of(record: Record) -> str:
    """What the device calls itself: "NVIDIA H100 80GB HBM3", or "cpu"."""
    return record["environment"]["device"]


def on_gpu(record: Record) -> bool:
    return record["environment"].get("compute_capability") is not None


def newest(records: Iterable[Record], results_of: Callable[[Record], Sequence[Any]]) -> dict[str, Record]:
    """The newest record of each device, oldest first, in which there is something of what is asked for."""
    in_time = sorted(records, key=lambda record: record["started"])
    return {device_of(record): record for record in in_time if results_of(record)}


def versions(record: Record) -> dict[str, str]:
    """The versions that a figure depends on: torch, triton, CUDA, cuDNN, Python and the peers' packages."""
    environment = record["environment"]
    found = {name: environment.get(name) for name in ("torch", "triton", "cuda", "cudnn", "python")}
    return {name: str(version) for name, version in (found | environment.get("packages", {})).items() if version}


def pick(record: Record, op: str) -> list[Result]:
    """A record's timed results of the operations that begin with `op`; of a contest that was repeated the first."""
    found: dict[Key, Result] = {}
    for result in record["results"]:
        if result["op"].startswith(op) and result.get("ms_median"):
            found.setdefault(key(result), result)
    return list(found.values())


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
    rounds = round_ratios(mine, theirs)
    if rounds is None:
        return Ratio(theirs["ms_median"] / mine["ms_median"], None, None)
    return Ratio(statistics.median(rounds), percentile(rounds, 20), percentile(rounds, 80))


def round_ratios(mine: Result, theirs: Result) -> list[float] | None:
    """The speed of a result over another's in each round; None where they were not timed in turn."""
    ours, other = mine.get("round_ms") or [], theirs.get("round_ms") or []
    in_turn = mine.get("contest") is not None and mine.get("contest") == theirs.get("contest")
    if not in_turn or not ours or len(ours) != len(other):
        return None
    return [b / a for a, b in zip(ours, other, strict=True)]


def work(result: Result) -> tuple[str, str, str, str]:
    """What is computed: the operation, its shape in words, the precision, and of a step whether it is compiled."""
    words = [str(v) if k == "model" else f"{k}={v}" for k, v in result["shape"].items() if v is not None]
    return result["op"], " ".join(words), result["dtype"], mode(result)


def mode(result: Result) -> str:
    """Of a whole step "compiled" or "eager": a user's choice, so that like stands beside like. Of an operation
    nothing: there a compiled form is one more candidate, and its name says so."""
    if result["op"] not in ("training step", "first step"):
        return ""
    return "compiled" if result["compiled"] else "eager"


def key(result: Result) -> Key:
    """What was timed, by which another run of it is found: the work and what computes it."""
    return (*work(result), result["backend"])


def best_peer(result: Result, results: Sequence[Result]) -> Result | None:
    """The fastest peer at the same work: of those timed in turn with the result, else of all; None without any."""
    peers = [r for r in results if r["role"] == "peer" and r.get("ms_median") and work(r) == work(result)]
    in_turn = [peer for peer in peers if peer.get("contest") == result.get("contest")]
    return min(in_turn or peers, key=lambda peer: peer["ms_median"], default=None)


# ----------------------------------------------------------------------------------------------- showing


def number(value: float | None, form: str) -> str:
    """A number in a format; nothing where there is none."""
    return "" if value is None else format(value, form)


def gib(count: float | None) -> str:
    """Bytes as GiB; nothing where unknown."""
    return number(count and count / 2**30, ".2f")


def limit(result: Result) -> str:
    """The measured ceiling that binds and how near to it the result is: "memory 87%", and whether launching takes
    longer than computing; nothing where unknown."""
    near = [f"{result['limit']} {result['limit_fraction']:.0%}"] if result.get("limit_fraction") else []
    slow_host = (result.get("host_ms") or 0.0) > result["ms_median"]
    return ", ".join(near + ["launch-bound"] * slow_host)


def mfu(result: Result, formula: str = "llm.c") -> str:
    """The model's FLOPs over the data sheet's peak, by a formula; nothing where either is unknown."""
    fraction = (result.get("mfu") or {}).get(formula)
    return f"{fraction:.1%}" if fraction else ""


def table(results: Sequence[Result]) -> str:
    """One line a timed result, the fastest of each work first, with its speed over that of the fastest peer."""
    timed = [result for result in results if result.get("ms_median")]
    order = list(dict.fromkeys(work(result) for result in timed))
    rows = []
    for result in sorted(timed, key=lambda r: (order.index(work(r)), r["ms_median"])):
        peer = best_peer(result, timed)
        rows.append(
            {
                "<work": " ".join(work(result)).rstrip(),
                "<backend": result["backend"],
                "<role": result["role"],
                ">ms": number(result["ms_median"], ".3f"),
                ">p20..p80": "..".join(number(result.get(key), ".3f") for key in ("ms_p20", "ms_p80")),
                ">tokens/s": number(result.get("tokens_per_s"), ",.0f"),
                ">TFLOP/s": number(result.get("tflops"), ".1f"),
                ">MFU llm.c": mfu(result),
                ">of the limit": limit(result),
                ">GiB": gib(result.get("peak_memory_bytes")),
                ">x best peer": "no peer" if peer is None else str(ratio(result, peer)),
            }
        )
    return align(rows) if rows else "no benchmark has a result"


def align(rows: Sequence[dict[str, str]]) -> str:
    """Rows as lines under a head, in columns: each key is the column's title after < or >, its side."""
    lines = [{key: key[1:] for key in rows[0]}, *rows]
    widths = {key: max(len(line[key]) for line in lines) for key in rows[0]}
    cells = ([f"{text:{key[0]}{widths[key]}}" for key, text in line.items()] for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in cells)


def first_step(result: Result) -> str:
    """Seconds from a fresh process to the first step done: "cold 45.1 s, cached 9.8 s"; nothing where not measured."""
    seconds = result.get("seconds_to_first") or {}
    return ", ".join(f"{name} {value:.1f} s" for name, value in seconds.items() if value is not None)


def ceilings(record: Record) -> str:
    """The measured ceilings in a line; nothing where there are none."""
    found = record.get("ceilings")
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
    lines = [f"{device_of(record)}, commit {record['commit']['id']}"]
    if text := ceilings(record):
        lines.append(f"measured ceilings: {text}")
    for stage in record.get("stages", ()):
        if stage["required"]:
            counts = f", {stage['tests']['run']} tests run" if stage["tests"] else ""
            lines.append(f"{stage['name']}: {stage['status']}{counts}")
    lines.append(table(record["results"]))
    for result in record["results"]:
        if result["op"] == "first step" and (text := first_step(result)):
            lines.append(f"to the first step: {work(result)[1]} {mode(result)}, {result['backend']}: {text}")
    lines += [f"not done: {missing['name']}: {missing['reason']}" for missing in record.get("not_done", ())]
    return "\n".join(lines)
