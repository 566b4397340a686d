"""`python -m fastgpt2.kernels.tools.tune`: choose the launch configurations of the GPU at hand, and write its table.

For each kernel, precision and size of the table: compile the candidates, in parallel, without the GPU; drop those that
spill, don't fit, miss the matrix units or leave them idle, and those whose results are not those of the table's own;
time the rest at GPT-2 124M's shape; keep the fastest. The table is written after each, at once or not at all: a run
that is cut short leaves what it has done. What a training step spends most time in comes first. Kernels that this GPU
never launches are left out: the MLP's pointer forms where it has descriptors.

Calls are timed by device events, on inputs that rotate, four times the L2 cache in all, so that none is found there.
Candidates take turns, a call each a round, so that clocks and temperature are the same for all; the median of the
rounds counts. The same run gives the same table: configurations within TIE of the fastest count as equal, of which
the one with the fewest warps and stages is taken, and the table's own stays unless it is more than KEEP slower.

A time is the launcher's: where that runs more than one kernel, all of it, the others as the table has them.

    python -m fastgpt2.kernels.tools.tune --op layer_norm --precision bfloat16 --size 768
    python -m fastgpt2.kernels.tools.tune --precision bfloat16 --size 64 768 50304 --seconds 3 --minutes 1.4 --out OUT/sm_90.json
    python -m fastgpt2.kernels.tools.tune --dry-run --arch sm_90 --op attention_forward --size 64     compiles only; needs no GPU
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastgpt2.kernels.specs import tunings
from fastgpt2.kernels.tools import inspect
from fastgpt2.kernels.tools.inspect import Case, Report
from fastgpt2.kernels.tools.toolkit import run_compiling
from fastgpt2.kernels.tuning import TABLES, LaunchConfig, architectures, check_table, major, nearest, read_table

TIE = 0.01
"""Medians this close, as a part of the fastest, count as equal: less than this is noise."""
KEEP = 0.02
"""The table's own configuration stays if it is no slower than this: a second run then finds no reason to change."""
AGREE = 0.02
"""Results of two configurations may differ by this part of their norm: ten times what bfloat16's rounding makes."""
WARM_UP, ROUNDS = 3, 50
SECONDS = 10.0
"""About how long the rounds of one kernel, precision and size may take, by default; five are made at least."""
ORDER = {
    "precision": ("bfloat16", "float16", "tf32", "float32"),
    "op": ("attention", "gelu_mlp", "cross_entropy", "layer_norm"),
}
"""What is tuned first, as a run may be cut short: by precision, then by how a kernel's name begins."""

Launch = Callable[[LaunchConfig], Any]


@dataclass(frozen=True)
class Key:
    """What a table has one configuration for."""

    op: str
    precision: str
    size: int

    def __str__(self) -> str:
        return f"{self.op} {self.precision} {self.size}"


@dataclass(frozen=True)
class Options:
    """Which kernels to tune, by how a name begins; None is all."""

    ops: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None


def configurations(table: dict[str, Any]) -> dict[Key, LaunchConfig]:
    """What a table holds; here it may be another file than the shipped one, which is all that lookups read."""
    return {
        Key(entry["op"], precision, size): LaunchConfig(**entry["config"])
        for entry in table["entries"]
        for precision in entry["precisions"]
        for size in entry["sizes"]
    }


def keys(arch: str, table: dict[str, Any], options: Options) -> list[Key]:
    """The table's, of kernels that can be tuned and that this architecture launches, in ORDER."""
    known = {op for op, tuning in tunings().items() if tuning.launched(major(arch))}
    found = [
        key
        for key in configurations(table)
        if key.op in known
        and (options.ops is None or key.op.startswith(options.ops))
        and (options.precisions is None or key.precision in options.precisions)
        and (options.sizes is None or key.size in options.sizes)
    ]
    return sorted(found, key=lambda key: (_rank("precision", key.precision), _rank("op", key.op)))


def _rank(what: str, name: str) -> int:
    return next((i for i, prefix in enumerate(ORDER[what]) if name.startswith(prefix)), len(ORDER[what]))


# ------------------------------------------------------------------------------------------- compiling


Reports = dict[LaunchConfig, Report | str]
"""What the compiler made of the candidates of a key, or why nothing."""


def candidates(table: dict[str, Any], key: Key) -> list[LaunchConfig]:
    """The table's configuration, then those declared beside the kernel."""
    return list(dict.fromkeys([configurations(table)[key], *tunings()[key.op].candidates(key.precision, key.size)]))


def compile_one(case: Case) -> Report | str:
    try:
        return inspect.inspect_one(case)
    except Exception as error:
        # Whatever the compiler or the assembler objects to, a configuration that doesn't compile is only dropped.
        return f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"


def why_dropped(report: Report | str) -> str | None:
    """Why a candidate is not worth timing; None if it is. Exact float32 has no matrix unit to miss."""
    if isinstance(report, str):
        return report
    most = read_table(report.case.arch)["shared_memory"]
    if report.spilled:
        return f"spills {report.spilled} bytes"
    if report.races:
        return f"races: {report.races[0]}"
    if report.serialised:
        return "has its products serialised"
    if report.shared > most:
        return f"needs {report.shared} bytes of shared memory, the table allows {most}"
    if report.blocks == 0:
        return "does not fit on a multiprocessor"
    if report.missed and report.case.precision != "float32":
        return f"{report.missed} of {report.products} products miss the matrix units"
    return None


def compiled(arch: str, table: dict[str, Any], wanted: list[Key]) -> Generator[tuple[Key, Reports]]:
    """Every candidate of every key, key after key: while one is timed, the next are compiled.

    The processes are forked from one that has not touched the GPU; one processor is left to the one that times.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["fastgpt2.kernels.tools.inspect", "triton"])
    pool = ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1), context)

    @functools.cache
    def submit(key: Key, config: LaunchConfig) -> Future[Report | str]:
        return pool.submit(compile_one, Case(key.op, key.precision, key.size, arch, config))

    try:
        # Compile every key's own configuration first: a launcher of several kernels runs the others with theirs.
        for key in wanted:
            submit(key, configurations(table)[key])
        submitted = {key: {config: submit(key, config) for config in candidates(table, key)} for key in wanted}
        for key, futures in submitted.items():
            yield key, {config: future.result() for config, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------- timing


def rotating(make: Callable[[int], Launch], cache: int, allocated: Callable[[], int]) -> list[Launch]:
    """make(0), make(1), ... until their inputs are four times the cache in bytes; 2 to 16 of them."""
    before = allocated()
    launches = [make(0)]
    each = max(1, allocated() - before)
    return launches + [make(seed) for seed in range(1, max(2, min(16, -(-4 * cache // each))))]


def disagreement(results: Any, reference: Any) -> float:
    """The largest difference of two calls' tensors by norm, as a part of the reference's; 0 where there are none."""
    import torch

    largest = 0.0
    for mine, theirs in zip(_tensors(results), _tensors(reference), strict=True):
        if theirs.numel():
            norm = torch.linalg.vector_norm(theirs.double()).item()
            error = torch.linalg.vector_norm(mine.double() - theirs.double()).item()
            largest = max(largest, error / max(norm, 1e-300) if error == error else float("inf"))
    return largest


def _tensors(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [] if results is None else [results]


def checked(launch: Launch, configs: Iterable[LaunchConfig]) -> Iterator[tuple[LaunchConfig, str | None]]:
    """Each configuration with why it isn't timed: it fails, or disagrees with the first; None if it agrees."""
    reference: Any = None
    first = True
    for config in configs:
        try:
            results = launch(config)
            error = 0.0 if first else disagreement(results, reference)
        except Exception as failure:
            if type(failure).__name__ == "OutOfMemoryError":
                raise
            yield config, f"fails: {type(failure).__name__}: {str(failure).strip().splitlines()[-1:]}"
            continue
        if first:
            reference, first = results, False
        yield config, None if error <= AGREE else f"disagrees with the first by {error:.1e} of its norm"


def milliseconds(
    launches: list[Launch], configs: list[LaunchConfig], seconds: float = SECONDS
) -> dict[LaunchConfig, float]:
    """The median of the rounds, in each of which every configuration is called once, on the next inputs.

    seconds: about how long all rounds may take.
    """
    import torch

    def call(i: int, config: LaunchConfig) -> tuple[Any, Any]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        launches[i % len(launches)](config)
        end.record()
        return start, end

    def rounds(count: int) -> list[dict[LaunchConfig, float]]:
        # Queued without waiting, so that launches hide behind the work. Inputs move on by a call, not by a round:
        # what ran last had others.
        events = [{c: call(r * len(configs) + j, c) for j, c in enumerate(configs)} for r in range(count)]
        torch.cuda.synchronize()
        return [{c: start.elapsed_time(end) for c, (start, end) in pairs.items()} for pairs in events]

    took = sum(rounds(WARM_UP)[-1].values())
    samples = rounds(max(5, min(ROUNDS, int(1e3 * seconds / max(took, 1e-3)))))
    return {c: statistics.median(sample[c] for sample in samples) for c in configs}


Measured = tuple[dict[LaunchConfig, float], dict[LaunchConfig, str]]


def measure(device: Any, seconds: float, key: Key, configs: list[LaunchConfig]) -> Measured:
    """Milliseconds of the configurations on a CUDA device, and why some were not timed; seconds as of milliseconds."""
    import torch

    make = functools.partial(tunings()[key.op].example, key.precision, key.size, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    try:
        launches = rotating(make, cache, lambda: torch.cuda.memory_allocated(device))
        faults = {config: fault for config, fault in checked(launches[0], configs) if fault}
        right = [config for config in configs if config not in faults]
        return milliseconds(launches, right, seconds) if right else {}, faults
    except torch.cuda.OutOfMemoryError:
        return {}, dict.fromkeys(configs, "needs more memory than there is, with its inputs")
    finally:
        torch.cuda.empty_cache()


def choose(times: dict[LaunchConfig, float], present: LaunchConfig) -> LaunchConfig:
    """The fastest, but for noise: the table's own within KEEP, else the plainest of those within TIE."""
    best = min(times.values())
    if present in times and times[present] <= best * (1 + KEEP):
        return present
    return min((config for config, ms in times.items() if ms <= best * (1 + TIE)), key=_plainness)


def _plainness(config: LaunchConfig) -> tuple[int, ...]:
    tiles = (config.block_m or 0, config.block_n or 0, config.block_k or 0)
    return config.num_warps, config.num_stages, *tiles


# ----------------------------------------------------------------------------------------------- table


def updated(table: dict[str, Any], key: Key, config: LaunchConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """The table with one configuration replaced: what an entry holds beside it stays there."""
    entries: list[dict[str, Any]] = []
    for entry in table["entries"]:
        if entry["op"] != key.op or key.precision not in entry["precisions"] or key.size not in entry["sizes"]:
            entries.append(entry)
            continue
        others = [p for p in entry["precisions"] if p != key.precision]
        sizes = [n for n in entry["sizes"] if n != key.size]
        if others:
            entries.append(entry | {"precisions": others})
        if sizes:
            entries.append(entry | {"precisions": [key.precision], "sizes": sizes})
        entries.append({
            "op": key.op, "precisions": [key.precision], "sizes": [key.size],
            "config": _plain(config), "measured": measured,
        })  # fmt: skip
    return table | {"entries": entries}


def _plain(config: LaunchConfig) -> dict[str, int]:
    return {name: value for name, value in asdict(config).items() if value is not None}


def serialize(table: dict[str, Any]) -> str:
    """JSON with an entry a line, as the tables are kept."""
    lines = [f" {json.dumps(name)}: {json.dumps(value)}," for name, value in table.items() if name != "entries"]
    entries = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    return "\n".join(["{", *lines, ' "entries": [', entries, " ]", "}", ""])


def write(path: Path, table: dict[str, Any]) -> None:
    """Replace the file whole, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
        file.write(serialize(table))
        file.flush()
        os.fsync(file.fileno())
    try:
        os.chmod(file.name, 0o644)
        os.replace(file.name, path)
    except OSError:
        os.unlink(file.name)
        raise


# ------------------------------------------------------------------------------------------- the command


Measure = Callable[[Key, list[LaunchConfig]], Measured]
say_now = functools.partial(print, flush=True)
"""Into a log file, too, each line is to be seen while the next kernel is timed."""


def tune(
    arch: str, made: Iterable[tuple[Key, Reports]], out: Path, measure: Measure, where: dict[str, Any],
    minutes: float = math.inf, say: Callable[[str], None] = say_now,
) -> int:  # fmt: skip
    """Time what compiled well, write what is chosen to `out` after each key; how many keys were done.

    Args:
        made: what `compiled` yields.
        measure: times the configurations of a key, and says why it didn't some.
        where: what to note beside the time: date, GPU, versions.
        minutes: begin no further key after so many.
    """
    began = time.monotonic()
    done = 0
    for key, reports in made:
        if time.monotonic() - began > 60 * minutes:
            say(f"{minutes:g} minutes are over: {key} and what comes after it are left as they were")
            break
        good = [config for config, report in reports.items() if not why_dropped(report)]
        say(f"{key}: {len(good)} of {len(reports)} candidates are timed (after {time.monotonic() - began:.0f} s)")
        times, faults = measure(key, good)
        for config, fault in faults.items():
            say(f"{key}: {config} not timed: it {fault}")
        if not times:
            say(f"{key}: left as it was, as no candidate could be timed")
            continue
        table = read(arch, out)  # anew: someone may have edited it meanwhile
        present = configurations(table)[key]
        config = choose(times, present)
        write(out, updated(table, key, config, where | figures(times, config)))
        done += 1
        say(f"{key}: {config}, {times[config]:.4g} ms; {'as before' if config == present else f'before {present}'}")
    return done


def figures(times: dict[LaunchConfig, float], chosen: LaunchConfig) -> dict[str, Any]:
    """What is kept of the times: the chosen one's, the next best's, and of how many."""
    ranked = sorted((ms, str(config)) for config, ms in times.items() if config != chosen)
    next_best = {"next": ranked[0][1], "next_ms": float(f"{ranked[0][0]:.4g}")} if ranked else {}
    return {"ms": float(f"{times[chosen]:.4g}"), **next_best, "timed": len(times)}


def read(arch: str, out: Path) -> dict[str, Any]:
    """The table that is being written; it begins as the shipped one."""
    table = json.loads((out if out.exists() else TABLES / f"{arch}.json").read_text())
    measured = "fastgpt2.kernels.tools.tune where `measured` says so; else "
    return table | {"chosen_by": measured + table["chosen_by"].removeprefix(measured)}


def dry_run(arch: str, made: Iterable[tuple[Key, Reports]], say: Callable[[str], None] = say_now) -> None:
    """Say which candidates would be timed."""
    for key, reports in made:
        reasons = {config: why_dropped(report) for config, report in reports.items()}
        say(f"{key} on {arch}: {list(reasons.values()).count(None)} of {len(reasons)} candidates would be timed")
        for config, reason in reasons.items():
            say(f"  {config!s:32s} {_facts(reports[config])}{f'; dropped: {reason}' if reason else ''}".rstrip())


def _facts(report: Report | str) -> str:
    if isinstance(report, str):
        return ""
    return f"{report.registers} registers, {report.shared} bytes shared, {report.blocks} blocks"


def _this_arch() -> str | None:
    """The architecture of the current GPU; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


def main(arguments: list[str] | None = None) -> int:
    about, usage = __doc__.split("\n")[0], "python -m fastgpt2.kernels.tools.tune [flags]"
    parser = argparse.ArgumentParser("fastgpt2.kernels.tools.tune", usage=usage, description=about, allow_abbrev=False)
    parser.add_argument("--op", nargs="+", metavar="PREFIX", help="kernels whose name begins so (default: all)")
    parser.add_argument("--precision", nargs="+", choices=list(inspect.ELEMENTS), help="default: all")
    parser.add_argument("--size", nargs="+", type=int, help="of the table: head size, channels, ... (default: all)")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help=f"time each kernel this long (default: {SECONDS:g})"
    )
    parser.add_argument("--minutes", type=float, default=60.0, help="start no kernel later than this (default: 60)")
    parser.add_argument("--out", type=Path, help="the table to write (default: the shipped one of this GPU)")
    parser.add_argument("--dry-run", action="store_true", help="compile, say what would be timed, write nothing")
    parser.add_argument("--arch", choices=architectures(), help="with --dry-run: for this instead of the GPU present")
    given = parser.parse_args(arguments)
    if given.arch and not given.dry_run:
        parser.error("--arch is for --dry-run: what is timed is the GPU present")
    for name in ("seconds", "minutes"):
        if not getattr(given, name) > 0:
            parser.error(f"--{name} must be positive, got {getattr(given, name):g}")

    arch = given.arch or _this_arch()
    if arch is None:
        hint = "name an --arch to compile for" if given.dry_run else "--dry-run --arch ARCH compiles without one"
        print(f"fastgpt2.kernels.tools.tune: no CUDA GPU here; {hint}", file=sys.stderr)
        return 2
    if arch not in architectures():
        print(f"fastgpt2.kernels.tools.tune: {arch} has no table; begin with a copy of {_closest(arch)}.json, named {arch}.json, and "
              f"its multiprocessor's shared memory in kernels/tools/inspect.py", file=sys.stderr)  # fmt: skip
        return 2
    options = Options(*(tuple(x) if x else None for x in (given.op, given.precision, given.size)))
    out = given.out or TABLES / f"{arch}.json"
    if not given.dry_run and out.name != f"{arch}.json":
        parser.error(f"--out must be named {arch}.json, after this GPU's architecture, got {out}")
    if out.exists():
        try:
            check_table(out)
        except ValueError as error:
            parser.error(f"--out: {error}")
    table = read(arch, out)
    known = [(key.op, key.precision, key.size) for key in keys(arch, table, Options())]
    if problem := inspect.why_nothing(known, options.ops, options.precisions, options.sizes):
        parser.error(problem)
    wanted = keys(arch, table, options)
    with contextlib.closing(compiled(arch, table, wanted)) as made:
        if given.dry_run:
            dry_run(arch, made)
        else:
            device, where = _present()
            tune(arch, made, out, functools.partial(measure, device, given.seconds), where, given.minutes)
    return 0


def _present() -> tuple[Any, dict[str, Any]]:
    """The current GPU, and what to note beside its times."""
    import torch
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    date, gpu = datetime.date.today().isoformat(), torch.cuda.get_device_name(device)
    return device, {"date": date, "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


def _closest(arch: str) -> str:
    import torch

    return nearest(arch, torch.cuda.get_device_properties().shared_memory_per_block_optin)  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.exit(run_compiling("fastgpt2.kernels.tools.tune", main))
