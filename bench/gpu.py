"""`python -m bench.gpu`: test, verify and measure on a GPU that is there for minutes.

    python -m bench.gpu --part 1 --minutes 9.3 --out OUT
    python -m bench.gpu --part 2 --minutes 3 --out OUT

Run from the root of a checkout: torch, triton, numpy, pytest and pytest-benchmark are enough, nothing of ours need be
installed. The device's state is read and never changed. Stages run by importance, each in a process of its own with a
limit, so that one that hangs or crashes costs only itself; none starts that can't end in time.

Part 1 begins with a smoke of each kernel against float64: a slot that is not right is PyTorch's from then on. It times
the step, says where its time goes, runs the tests, tunes, times again with the table, and measures what `auto` chooses
by. Part 2 has the rest, and a smoke of its own: it needs nothing of part 1's. Without --part both run.

In OUT are a record for each run, <gpu>/<date>-<commit>.json, whole at any time, what the stages printed in the .log
beside it, and the tuned table, <architecture>.json. A table that is there already is used.

Exit status: 0; 1 where a stage failed, or the smoke, the tests or the verification did not end well; 2 without a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch

from bench import kernel_profile, smoke
from bench.device_state import FIXED_FIELDS, make_state_query, query_gpu
from bench.record import Record
from bench.report import targets
from bench.report.results import summary
from bench.stages import Files, NotNow, Stage, exit_status, read_environment, run_stages
from bench.step.steps import TUNED, Kernels
from bench.timing import ROOT, commit
from fastgpt2.console import run_command
from fastgpt2.fields import ConfigError, Name, Positive, Range
from fastgpt2.flags import read_arguments
from fastgpt2.kernels.tools.toolkit import align, find_tool
from fastgpt2.kernels.tuning import check_table

PARTS = {1: 9.3, 2: 3.0}
"""The minutes that each part is made for."""
SESSIONS = {
    "operations": (
        *(
            f"kernels/test_{name}.py"
            for name in ("attention", *(f"attention_{part}" for part in ("bias", "documents", "hopper", "operator")))
        ),
        *(f"kernels/test_{name}{part}.py" for name in ("mlp", "norm", "loss") for part in ("", "_operator")),
        "kernels/test_dropout.py",
        *(f"trainer/test_{name}.py" for name in ("embedding", "attention")),
    ),
    "trajectories": ("trainer/test_trajectory.py",),
    "graphs and equal bits": tuple(
        f"trainer/test_{name}.py" for name in ("compile", "cuda_graph", "step", "training", "equal", "checkpoint_files")
    ),
}
"""The test files under tests/ that run together, in several processes. The others measure: they run last, in one."""
ALONE = "measuring"
LARGE = "that fill the card"
"""Tests of the operations that are marked so, one after the other."""
PROCESSES = 12
"""At the most: hundreds of kernels are compiled for the tests, at a second each, and each process holds a context."""
TUNING_S = 60.0
"""After which no further kernel is tuned."""
TUNED_OPS = {"attn": ("attention", 64), "mlp": ("gelu_mlp", 768), "loss": ("cross_entropy", 50304)}
"""By slot: how the names of the kernels begin that are worth tuning on the day, and their size in GPT-2 124M."""


@dataclass(frozen=True)
class Run:
    """What the stages of a run share: where they write, and what they find out for those after them.

    Args:
        scratch: a folder.
        results: JSON lines that stages append to.
        table: the tuned table, used from when it is there.
    """

    scratch: Path
    results: Path
    commit: str
    table: Path

    @property
    def ceilings(self) -> Path:
        return self.scratch / "ceilings.json"

    @property
    def failed(self) -> Path:
        return self.scratch / "failed.json"

    def kernels(self) -> Kernels:
        """What is known of the kernels so far."""
        return Kernels(smoke.read_failed(self.failed), self.table if self.table.exists() else None)

    def options(self, prefix: str) -> list[str]:
        """What is known of the kernels, as options of a command."""
        known = self.kernels()
        table = [] if known.table is None else [f"{prefix}table={known.table}"]
        return [*(f"{prefix}without={slot}" for slot in known.without), *table]


def part_1(run: Run) -> list[Stage]:
    """In the order in which a cut leaves most: after 4 minutes what planning needs, after 8 the tuned step."""
    attention, large = "C768-T1024-B64", "N65536-C768"
    return [
        _ceilings(run),
        _smoke(run, 60, "--warm", "ours-triton", "plain"),
        _step(run, "step, B=64", "gpt2-B64-compiled-first", 120, seconds_needed=45),
        _kernels(run, "the step's kernels: ours", "ours-triton", 40),
        _kernels(run, "the step's kernels: plain", "plain", 40),
        _bench(run, "ops/bench_attention", "attention T=1024", f"{attention} and ({_FAST})", 30, seconds_needed=12),
        _bench(run, "ops/bench_mlp", "gelu_mlp, 64k tokens", _MLP, 30, seconds_needed=12),
        _bench(run, "ops/bench_loss", "loss, 64k tokens", f"{large} and {_LOSS}", 30, seconds_needed=12),
        # Minute 4.
        _tests("operations", 80, seconds_needed=40),
        _tests("trajectories", 30, seconds_needed=20),
        Stage("tune", lambda: _tune(run), TUNING_S + 15, seconds_needed=30),
        _step(run, "step, B=64, tuned", "gpt2-B64-compiled-tuned", 90, seconds_needed=40, tuned=True),
        _kernels(run, "the step's kernels: ours, tuned", TUNED, 40, tuned=True),
        # Minute 8.
        _step(run, "step, one slot changed", f"{_ABLATION} and not ({_RARE})", 110, seconds_needed=80),
        _tests("graphs and equal bits", 40, seconds_needed=20),
        _tests(LARGE, 40, seconds_needed=20),
    ]


def part_2(run: Run) -> list[Stage]:
    """What is left, by importance."""
    attention, large = "C768-T1024-B64", "C768 and (N65536 or B64)"

    def bench(name: str, file: str, keyword: str, seconds_limit: float) -> Stage:
        return _bench(run, file, name, keyword, seconds_limit, seconds_needed=min(20.0, seconds_limit))

    def step(name: str, keyword: str, seconds_limit: float = 300) -> Stage:
        return _step(run, name, keyword, seconds_limit, seconds_needed=40)

    attn, mlp, norm, loss = (f"ops/bench_{op}" for op in ("attention", "mlp", "norm", "loss"))
    return [
        _ceilings(run),
        _smoke(run, 40),
        step("step, CUDA graphs, B=1, eager", "gpt2-B1-eager-graph", 60),
        step("step, CUDA graphs, B=1", "gpt2-B1-compiled-graph", 90),
        bench("attention T=2048 and up", attn, "T2048 or T4096 or T8192", 60),
        # Its checks are among the tests; this is their table.
        Stage("verify", [*_PYTHON, "fastgpt2.verify"], 240, seconds_needed=40, required=True),
        _tool("gpu tests: memory and races", "sanitize", "compute-sanitizer", 300),
        _tests(ALONE, 120, seconds_needed=30),
        step("step, B=64, the stream in bfloat16", "gpt2-B64-compiled-stream"),
        step("step, B=64, all peers", "gpt2-B64-compiled-peers"),
        step("step, one slot changed, the others", f"{_ABLATION} and (ours-torch or {_RARE})"),
        *(step(f"step, CUDA graphs, B={B}", f"gpt2-B{B}- and graph and not tuned") for B in (4, 64)),
        step("step, B=32", "gpt2-B32-compiled-peers"),
        _tool("attention's counters", "profile", "ncu", 150, "--jsonl", str(run.results)),
        bench("attention T=1024, the others", attn, f"{attention} and not ({_FAST})", 150),
        bench("gelu_mlp, 64k tokens, the others", mlp, f"{large} and not ({_MLP})", 150),
        bench("loss, 64k tokens, the others", loss, f"{large} and not {_LOSS}", 150),
        bench("layer norm, 64k tokens", norm, large, 120),
        step("step, eager", "gpt2-B32-eager-peers", 180),
        step("step, recomputed", "gpt2-B32-compiled-recompute"),
        bench("optimizer step", "ops/bench_optimizer", "test", 120),
        *(step(f"step, {model}", f"gpt2-{model}") for model in ("medium", "large", "xl")),
        bench("attention, other sizes", attn, f"T1024 and not {attention}", 240),
        bench("loss, other sizes", loss, f"not ({large})", 120),
        bench("gelu_mlp, other sizes", mlp, f"not ({large})", 120),
        bench("layer norm, other sizes", norm, f"not ({large})", 120),
        step("step, few tokens", "(gpt2-B16 or gpt2-B8 or gpt2-B4 or gpt2-B1) and compiled-peers"),
        bench("first step", "step/bench_first_step", "compiled", 300),
        bench("first step, eager", "step/bench_first_step", "eager", 120),
        # The same again: differences between candidates that are smaller than these are noise.
        bench("attention T=1024, repeated", attn, attention, 90),
    ]


_PYTHON = [sys.executable, "-m"]
_PYTEST = [*_PYTHON, "pytest", "-p", "no:cacheprovider"]
_FAST = "triton or sdpa-flash or cudnn"
_MLP = "C768-B64 and forward+backward and (triton or torch)"
_LOSS = "(training and (triton or matmuls or torch))"
"""The candidates that the targets compare."""
_ABLATION = "gpt2-B32-compiled-ablation"
_RARE = "flex or chunked"
"""Forms that `auto` rarely picks on a GPU. Part 2 times them; part 1 times the others, which compile together."""


def _ceilings(run: Run) -> Stage:
    argv = [*_PYTHON, "bench.roofline", "--out", str(run.ceilings), "--jsonl", str(run.results)]
    return Stage("ceilings", argv, 30, seconds_needed=5)


def _smoke(run: Run, seconds_limit: float, *options: str) -> Stage:
    argv = [*_PYTHON, "bench.smoke", "--failed", str(run.failed), "--jsonl", str(run.results), *options]
    return Stage("smoke", argv, seconds_limit, seconds_needed=15, required=True)


def _bench(run: Run, file: str, name: str, keyword: str, seconds_limit: float, seconds_needed: float) -> Stage:
    """The benchmarks of a file that are selected, without kernels that failed."""

    def argv() -> list[str]:
        options = ["--bench-jsonl", str(run.results), "--bench-commit", run.commit, *run.options("--bench-")]
        options += ["--bench-ceilings", str(run.ceilings), "--tb=short"]
        return [*_PYTEST, f"bench/{file}.py", "-k", keyword, *options]

    return Stage(name, argv, seconds_limit, seconds_needed)


def _step(
    run: Run, name: str, keyword: str, seconds_limit: float, seconds_needed: float, *, tuned: bool = False
) -> Stage:
    stage = _bench(run, "step/bench_train_step", name, keyword, seconds_limit, seconds_needed=seconds_needed)
    return _after_tuning(run, stage) if tuned else stage


def _kernels(run: Run, name: str, step: str, seconds_limit: float, *, tuned: bool = False) -> Stage:
    """torch.profiler's table of a step of 65,536 tokens."""

    def argv() -> list[str]:
        return [*_PYTHON, "bench.kernel_profile", step, "--jsonl", str(run.results), *run.options("--")]

    stage = Stage(name, argv, seconds_limit, seconds_needed=15)
    return _after_tuning(run, stage) if tuned else stage


def _after_tuning(run: Run, stage: Stage) -> Stage:
    """The stage, if there is a table to use."""

    def argv() -> list[str]:
        if run.kernels().table is None:
            raise NotNow("nothing was tuned")
        return stage.argv() if callable(stage.argv) else stage.argv

    return replace(stage, argv=argv)


def _tune(run: Run) -> list[str]:
    """fastgpt2.kernels.tools.tune of the slots that are right, at GPT-2's sizes."""
    right = [kernels for slot, kernels in TUNED_OPS.items() if slot not in run.kernels().without]
    if not right:
        raise NotNow("no kernel that is worth tuning is right")
    ops, sizes = zip(*right, strict=True)
    options = ["--op", *ops, "--precision", "bfloat16", "--size", *map(str, sizes)]
    options += ["--seconds", "3", "--minutes", str(TUNING_S / 60), "--out", str(run.table)]
    return [*_PYTHON, "fastgpt2.kernels.tools.tune", *options]


def _tool(name: str, module: str, tool: str, seconds_limit: float, *options: str) -> Stage:
    """A tool of the kernels that runs a program of the CUDA toolkit, which may be missing."""

    def argv() -> list[str]:
        if not find_tool(tool):
            raise NotNow(f"{tool} is not installed; it comes with the CUDA toolkit")
        return [*_PYTHON, f"fastgpt2.kernels.tools.{module}", *options]

    return Stage(name, argv, seconds_limit, seconds_needed=40)


def _tests(name: str, seconds_limit: float, seconds_needed: float) -> Stage:
    """A session's tests marked gpu; with pytest-xdist, which need not be there, by several processes. One that crashes
    is replaced, and one that hangs leaves the tests to the others."""
    files = gpu_test_sessions()[name]
    in_parallel = importlib.util.find_spec("xdist") and name not in (ALONE, LARGE)
    # Every test of the trajectories computes on the GPU where there is one.
    marks = {"trajectories": [], LARGE: ["-m", "gpu and xdist_group"]}.get(name, ["-m", "gpu and not xdist_group"])
    options = ["-v", *marks, "--continue-on-collection-errors"]
    options += processes(min(PROCESSES, os.cpu_count() or 1)) if in_parallel else []
    argv = [*_PYTEST, *options, *(str(file.relative_to(ROOT)) for file in files)]
    return Stage(f"gpu tests: {name}", argv, seconds_limit, seconds_needed, required=True, tests=True)


def processes(count: int) -> list[str]:
    """pytest-xdist's options; by --dist loadgroup (3.8) two processes that crash at once end the session."""
    return ["-n", str(count), "--dist", "load"]


def gpu_test_sessions() -> dict[str, list[Path]]:
    """The test files with tests marked gpu, by session; the others may import what isn't installed here."""
    sessions: dict[str, list[Path]] = {name: [] for name in (*SESSIONS, ALONE, LARGE)}
    tests = ROOT / "tests"
    for path in sorted(tests.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.xdist_group" in text:
            sessions[LARGE].append(path)
        if "mark.gpu" in text:
            file = path.relative_to(tests).as_posix()
            sessions[next((name for name, files in SESSIONS.items() if file in files), ALONE)].append(path)
    return sessions


def programme(run: Run, part: int | None, only: Sequence[str] | None = None) -> list[Stage]:
    """A part's stages, or both parts', whose name contains one of the texts; what both have is done once."""
    parts: dict[int, Callable[[Run], list[Stage]]] = {1: part_1, 2: part_2}
    stages: dict[str, Stage] = {}
    for number in PARTS if part is None else (part,):
        for stage in parts[number](run):
            stages.setdefault(stage.name, stage)
    return [stage for name, stage in stages.items() if any(text in name for text in only or [""])]


def findings(record: Record) -> str:
    """What a run prints beside the results: the smoke, and the kernels that a step spends its time in."""
    smokes = [f"smoke: {smoke.words(found)}" for found in record.smokes]
    return "\n".join([*smokes, *(kernel_profile.table(found) for found in record.step_kernels)])


@dataclass(frozen=True)
class GpuConfig:
    """What to run, for how long."""

    part: Annotated[int, Range(1, 1 + len(PARTS))] | None = None
    """1 or 2 (default: both, in order)."""
    minutes: Positive | None = None
    """Time for all stages (default: 9.3 for part 1, 3 for part 2)."""
    out: Path = ROOT / "bench" / "results"
    """Folder for the record (default: bench/results)."""
    commit: Name | None = None
    """What is measured, if there is no git repository to ask."""
    only: tuple[str, ...] = ()
    """Run only the stages whose name contains one of these."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    given = read_arguments(GpuConfig, "bench.gpu", arguments)
    names = [stage.name for stage in programme(Run(given.out, given.out, "", given.out), given.part)]
    if unknown := [repr(text) for text in given.only if not (text and any(text in name for name in names))]:
        raise ConfigError(f"--only: no stage's name contains {' or '.join(unknown)}; there are {', '.join(names)}")
    if not torch.cuda.is_available():
        raise ConfigError(f"python -m bench.gpu needs a CUDA GPU, torch {torch.__version__} sees none here")
    began = time.monotonic()
    minutes = given.minutes or (PARTS[given.part] if given.part else sum(PARTS.values()))
    environment = read_environment()
    architecture = f"sm_{environment['compute_capability'].replace('.', '')}"
    table = (given.out / f"{architecture}.json").resolve()
    if table.exists():
        try:
            check_table(table)
        except ValueError as error:
            raise ConfigError(str(error)) from None
    state = make_state_query()
    record = Record(
        minutes=minutes,
        commit=commit(given.commit),
        environment=environment,
        nvidia_smi=query_gpu(FIXED_FIELDS),
        device_state_at_start=state(),
    )
    file = record.file(given.out)
    with tempfile.TemporaryDirectory() as scratch:
        files = Files(file, file.with_suffix(".log"), Path(scratch) / "results.jsonl")
        run = Run(Path(scratch), files.results, record.commit_id, table)
        stages = programme(run, given.part, given.only)
        run_stages(stages, record, files, seconds=60 * minutes - (time.monotonic() - began), state=state)
    print(f"\n{file}\n{summary(record)}\n{findings(record)}")
    if rows := targets.rows(record):
        print(align(rows))
    return exit_status(record, [stage.name for stage in stages if stage.required])


if __name__ == "__main__":
    run_command(main)
