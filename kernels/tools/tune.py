"""`python -m fastgpt2.kernels.tools.tune`: choose this GPU's launch configurations and write its table.

For each kernel, precision and size of the table:

1. Compile the candidates, in parallel, without the GPU.
2. Drop those that spill, don't fit, miss the matrix units or leave them idle.
3. Drop those whose results differ from the results of the table's own configuration.
4. Time the rest at GPT-2 124M's shape (timing.py says how), and keep the fastest.

The table is replaced after each, atomically: an interrupted run keeps what it has done. The kernels that take most of a
training step come first. Kernels that this GPU never launches are left out, such as the MLP's pointer forms if it has
descriptors.

Two runs choose the same table: configurations within TIE of the fastest count as equal, and the one with the fewest
warps and stages wins; the table's own configuration stays unless it is more than KEEP slower. A time is the launcher's.
If a launcher runs several kernels, the others have their table's configuration.

    python -m fastgpt2.kernels.tools.tune --op layer_norm --precision bfloat16
    python -m fastgpt2.kernels.tools.tune --minutes 1.4 --out OUT/sm_90.json
    # compile only, without a GPU
    python -m fastgpt2.kernels.tools.tune --dry-run --arch sm_90 --op attention
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from fastgpt2.console import run_command
from fastgpt2.fields import ConfigError, Positive
from fastgpt2.flags import read_arguments
from fastgpt2.kernels.specs import tunings
from fastgpt2.kernels.tools import inspect
from fastgpt2.kernels.tools.inspect import Architecture, Case, Precision, Report
from fastgpt2.kernels.tools.timing import checked, milliseconds, rotating
from fastgpt2.kernels.tools.toolkit import run_compiling
from fastgpt2.kernels.tuning import TABLES, LaunchConfig, architectures, check_table, major, nearest, read_table

TIE = 0.01
"""Medians this close, relative to the fastest, count as equal: the difference is noise."""
KEEP = 0.02
"""The table's own configuration stays unless it is slower by more than this: a second run then changes nothing."""
ORDER = {
    "precision": ("bfloat16", "float16", "tf32", "float32"),
    "op": (
        *("attention", "gelu_mlp", "cross_entropy", "layer_norm"),
        *(f"attention_{name}_hopper" for name in ("forward", "backward_dq", "backward_dkdv")),
    ),
}
"""What to tune first, as a run may be interrupted: by precision, then by the beginning of a kernel's name, the longest
that matches. Hopper's attention comes last: nothing uses it unasked."""


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
    """Which kernels to tune; `ops` are beginnings of names. None means all."""

    ops: tuple[str, ...] | None = None
    precisions: tuple[str, ...] | None = None
    sizes: tuple[int, ...] | None = None


def configurations(table: dict[str, Any]) -> dict[Key, LaunchConfig]:
    """The configurations of a table, which may be another file than the one that lookups read."""
    return {
        Key(entry["op"], precision, size): LaunchConfig(**entry["config"])
        for entry in table["entries"]
        for precision in entry["precisions"]
        for size in entry["sizes"]
    }


def keys(arch: str, table: dict[str, Any], options: Options) -> list[Key]:
    """The table's keys of kernels that can be tuned and that this architecture launches, in ORDER."""
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
    matching = [prefix for prefix in ORDER[what] if name.startswith(prefix)]
    return ORDER[what].index(max(matching, key=len)) if matching else len(ORDER[what])


# ------------------------------------------------------------------------------------------- compiling


Reports = dict[LaunchConfig, Report | str]
"""What the compiler made of a key's candidates, or why it failed."""


def candidates(table: dict[str, Any], key: Key) -> list[LaunchConfig]:
    """The table's configuration, then the spec's candidates."""
    return list(dict.fromkeys([configurations(table)[key], *tunings()[key.op].candidates(key.precision, key.size)]))


def compile_one(case: Case) -> Report | str:
    try:
        return inspect.inspect_one(case)
    except Exception as error:
        # Whatever the compiler or the assembler raises, a configuration that doesn't compile is only dropped.
        return f"does not compile: {type(error).__name__}: {str(error).strip().splitlines()[-1:]}"


def why_dropped(report: Report | str) -> str | None:
    """Why a candidate is not worth timing, or None. Exact float32 has no matrix unit to miss."""
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
    """Every candidate of every key, key by key. While one key is timed, the next are compiled.

    The processes are forked from one that has not touched the GPU. One processor is left to the process that times.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(["fastgpt2.kernels.tools.inspect", "triton"])
    pool = ProcessPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1), context)

    @functools.cache
    def submit(key: Key, config: LaunchConfig) -> Future[Report | str]:
        return pool.submit(compile_one, Case(key.op, key.precision, key.size, arch, config))

    try:
        # Compile every key's own configuration first: launchers of several kernels run the others with it.
        for key in wanted:
            submit(key, configurations(table)[key])
        submitted = {key: {config: submit(key, config) for config in candidates(table, key)} for key in wanted}
        for key, futures in submitted.items():
            yield key, {config: future.result() for config, future in futures.items()}
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------- timing


Measured = tuple[dict[LaunchConfig, float], dict[LaunchConfig, str]]


def measure(device: Any, seconds: float, key: Key, configs: list[LaunchConfig]) -> Measured:
    """Milliseconds of the configurations on a CUDA device, and why some were not timed."""
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
    """The fastest, up to noise: the table's own if within KEEP, else the plainest of those within TIE."""
    best = min(times.values())
    if present in times and times[present] <= best * (1 + KEEP):
        return present
    return min((config for config, ms in times.items() if ms <= best * (1 + TIE)), key=_plainness)


def _plainness(config: LaunchConfig) -> tuple[int, ...]:
    tiles = (config.block_m or 0, config.block_n or 0, config.block_k or 0)
    return config.num_warps, config.num_stages, *tiles


# ----------------------------------------------------------------------------------------------- table


def updated(table: dict[str, Any], key: Key, config: LaunchConfig, measured: dict[str, Any]) -> dict[str, Any]:
    """The table with one configuration replaced; the rest of its entry stays."""
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
    """Replace the file atomically."""
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
"""Flush each line: in a log file, too, it shows while the next kernel is timed."""


def tune(
    arch: str, made: Iterable[tuple[Key, Reports]], out: Path, measure: Measure, where: dict[str, Any],
    minutes: float = math.inf, say: Callable[[str], None] = say_now,
) -> int:  # fmt: skip
    """Time what compiled well, and write the choice to `out` after each key. Returns the number of keys done.

    Args:
        made: what `compiled` yields.
        measure: times a key's configurations, and says why some were not timed.
        where: what to record with the time: date, GPU, versions.
        minutes: start no key later than this.
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
        table = read(arch, out)  # read it again: it may have been edited meanwhile
        present = configurations(table)[key]
        config = choose(times, present)
        write(out, updated(table, key, config, where | figures(times, config)))
        done += 1
        say(f"{key}: {config}, {times[config]:.4g} ms; {'as before' if config == present else f'before {present}'}")
    return done


def figures(times: dict[LaunchConfig, float], chosen: LaunchConfig) -> dict[str, Any]:
    """What the table records of the times: the chosen, the next best, and how many were timed."""
    ranked = sorted((ms, str(config)) for config, ms in times.items() if config != chosen)
    next_best = {"next": ranked[0][1], "next_ms": float(f"{ranked[0][0]:.4g}")} if ranked else {}
    return {"ms": float(f"{times[chosen]:.4g}"), **next_best, "timed": len(times)}


def read(arch: str, out: Path) -> dict[str, Any]:
    """The table to write to, or the shipped one if there is none yet."""
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
    """The current GPU's architecture, or None."""
    import torch

    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@dataclass(frozen=True)
class TuneConfig:
    """What to tune, for how long and into which table."""

    op: tuple[str, ...] = ()
    """Only kernels whose name begins so."""
    precision: tuple[Precision, ...] = ()
    """Only these precisions (default: all)."""
    size: tuple[int, ...] = ()
    """Only these head sizes, channels or vocabularies."""
    seconds: Positive = 10.0
    """Time each kernel, precision and size this long; at least five rounds are made."""
    minutes: Positive = 60.0
    """Start no kernel later than this."""
    out: Path | None = None
    """The table to write (default: the shipped one of this GPU)."""
    dry_run: bool = False
    """Compile, say what would be timed, write nothing."""
    arch: Architecture | None = None
    """With --dry-run: compile for this architecture instead of the GPU present."""

    def __post_init__(self) -> None:
        if self.arch and not self.dry_run:
            raise ConfigError("--arch is for --dry-run: what is timed is the GPU present")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    given = read_arguments(TuneConfig, "fastgpt2.kernels.tools.tune", arguments)
    arch = _architecture(given)
    options = Options(given.op or None, given.precision or None, given.size or None)
    out = given.out or TABLES / f"{arch}.json"
    if not given.dry_run and out.name != f"{arch}.json":
        raise ConfigError(f"--out must be named {arch}.json, after this GPU's architecture, got {out}")
    if out.exists():
        try:
            check_table(out)
        except ValueError as error:
            raise ConfigError(f"--out: {error}") from None
    table = read(arch, out)
    known = [(key.op, key.precision, key.size) for key in keys(arch, table, Options())]
    if problem := inspect.why_nothing(known, options.ops, options.precisions, options.sizes):
        raise ConfigError(problem)
    wanted = keys(arch, table, options)
    with contextlib.closing(compiled(arch, table, wanted)) as made:
        if given.dry_run:
            dry_run(arch, made)
        else:
            device, where = _present()
            tune(arch, made, out, functools.partial(measure, device, given.seconds), where, given.minutes)
    return 0


def _architecture(given: TuneConfig) -> str:
    """The architecture to tune for. Raises ConfigError where there is no GPU, or none that has a table."""
    arch = given.arch or _this_arch()
    if arch is None:
        hint = "name an --arch to compile for" if given.dry_run else "--dry-run --arch ARCH compiles without one"
        raise ConfigError(f"no CUDA GPU here; {hint}")
    if arch not in architectures():
        copy = f"copy {_closest(arch)}.json to {arch}.json and add its shared memory to kernels/tools/inspect.py"
        raise ConfigError(f"{arch} has no table; {copy}")
    return arch


def _present() -> tuple[Any, dict[str, Any]]:
    """The current GPU, and what to record with its times."""
    import torch
    import triton

    device = torch.device("cuda", torch.cuda.current_device())
    date, gpu = datetime.date.today().isoformat(), torch.cuda.get_device_name(device)
    return device, {"date": date, "gpu": gpu, "torch": torch.__version__, "triton": triton.__version__}


def _closest(arch: str) -> str:
    import torch

    return nearest(arch, torch.cuda.get_device_properties().shared_memory_per_block_optin)  # type: ignore[attr-defined]


if __name__ == "__main__":
    run_command(lambda: run_compiling(main))
