"""`python -m bench.gpu`: everything that needs a GPU, in one command, for a machine that is had for minutes.

Run from the root of a checkout: torch, triton, numpy, pytest and pytest-benchmark are enough, nothing of ours
need be installed. The device's state is read and never changed. Stages run by importance, each in a process of
its own with a limit, so that one that hangs or crashes costs only itself; after each, what is known is in
OUT/<gpu>/<date>-<commit>.json, and what the stages printed in the .log beside it. The tests are first and may use
TESTS_SHARE of the minutes, so that something is measured, too. No stage starts once the minutes are used; what was
not done is listed.

Exit status: 0; 1 where a stage failed, or the tests or the verification did not end; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from bench import targets
from bench.device_state import FIXED_FIELDS, find_tool, make_state_query, query_gpu
from bench.results import align, summary
from bench.stages import Files, Stage, exit_status, new_record, read_environment, record_file, run_stages
from bench.timing import ROOT, commit

TESTS_SHARE = 0.6
SESSIONS = {
    "operations": (
        *("attention", "gelu_mlp", "layer_norm", "linear_cross_entropy", "embedding", "dropout", "attention_forms"),
    ),
    "trajectories": ("trajectory",),
    "training": ("step", "train"),
}
"""The test files that run together, in several processes; the others measure, and run after them, in one."""
ALONE = "measuring"
PROCESSES = 12
"""At the most: hundreds of kernels are compiled for the tests, at a second each, and each process holds a context."""


def all_stages(scratch: Path, results: Path, commit_id: str) -> list[Stage]:
    """By importance: is it right, how fast is the step, what is each kernel worth, and then the rest."""

    def bench(name: str, file: str, keyword: str, seconds_limit: float) -> Stage:
        options = ["--bench-jsonl", str(results), "--bench-commit", commit_id, "--tb=short"]
        options += ["--bench-ceilings", str(ceilings)]
        return Stage(name, [*_PYTEST, f"bench/{file}", "-k", keyword, *options], seconds_limit)

    roofline, ceilings = [sys.executable, "-m", "bench.roofline"], scratch / "ceilings.json"
    attention, step = "bench_attention.py", "bench_train_step.py"
    head, mlp, norm = "bench_linear_cross_entropy.py", "bench_gelu_mlp.py", "bench_layer_norm.py"
    large = "C768 and (N65536 or B64)"
    return [
        Stage("ceilings", [*roofline, "--out", str(ceilings), "--jsonl", str(results)], 60),
        *(_tests(name, files, scratch) for name, files in gpu_test_sessions().items()),
        replace(_tool("gpu tests: memory and races", "sanitize", "compute-sanitizer", 300), until=TESTS_SHARE),
        # What bench.targets judges.
        bench("attention T=1024", attention, "C768-T1024-B64", 150),
        bench("step, B=64", step, "gpt2-B64-compiled-peers", 300),
        bench("linear cross-entropy, 64k tokens", head, large, 150),
        bench("gelu_mlp, 64k tokens", mlp, large, 150),
        bench("step, CUDA graphs, eager", step, "eager-graph", 150),
        bench("step, CUDA graphs, B=1", step, "gpt2-B1-compiled-graph", 300),
        bench("attention T=2048 and up", attention, "T2048 or T4096 or T8192", 240),
        bench("step, CUDA graphs, B=4", step, "gpt2-B4-compiled-graph", 300),
        bench("step, B=32", step, "gpt2-B32-compiled-peers", 300),
        # What `auto` chooses by.
        bench("step, one slot changed", step, "gpt2-B32-compiled-ablation", 300),
        bench("layer norm, 64k tokens", norm, large, 120),
        # Its checks are among the tests; this is their table.
        Stage("verify", [sys.executable, "-m", "fastgpt2.verify"], 240, required=True),
        _tool("attention's counters", "profile", "ncu", 150, "--jsonl", str(results)),
        bench("step, eager", step, "gpt2-B32-eager-peers", 180),
        bench("step, recomputed", step, "gpt2-B32-compiled-recompute", 300),
        bench("optimizer step", "bench_optimizer.py", "test", 120),
        bench("data loading", "bench_data.py", "test", 60),
        *(bench(f"step, {model}", step, f"gpt2-{model}", 300) for model in ("medium", "large", "xl")),
        bench("attention, other sizes", attention, "T1024 and not C768-T1024-B64", 240),
        bench("linear cross-entropy, other sizes", head, f"not ({large})", 120),
        bench("gelu_mlp, other sizes", mlp, f"not ({large})", 120),
        bench("layer norm, other sizes", norm, f"not ({large})", 120),
        bench("step, few tokens", step, "(gpt2-B16 or gpt2-B8 or gpt2-B4 or gpt2-B1) and compiled-peers", 300),
        bench("first step", "bench_first_step.py", "compiled", 300),
        bench("first step, eager", "bench_first_step.py", "eager", 120),
        # The same again: differences between candidates that are smaller than these are noise.
        bench("attention T=1024, repeated", attention, "C768-T1024-B64", 90),
    ]


def _tool(name: str, module: str, tool: str, seconds_limit: float, *options: str) -> Stage:
    """A command of ours around a program of CUDA's toolkit, which need not be there."""
    missing = None if find_tool(tool) else f"{tool} is not installed: it comes with CUDA's toolkit"
    return Stage(name, [sys.executable, "-m", f"bench.{module}", *options], seconds_limit, missing=missing)


def _tests(name: str, files: Sequence[Path], scratch: Path) -> Stage:
    """The files' tests marked gpu, with pytest-xdist and pytest-timeout, which need not be there, by several processes
    of which one that hangs is replaced."""
    junit = scratch / f"{name}.xml"
    parallel: list[str] = []
    if importlib.util.find_spec("xdist") and name != ALONE:
        # What fills the card is of one group, and so runs one after the other.
        parallel = ["-n", str(min(PROCESSES, os.cpu_count() or 1)), "--dist", "loadgroup"]
        if importlib.util.find_spec("pytest_timeout"):
            parallel += ["--timeout", "150", "--timeout-method", "thread"]
    # Every test of the trajectories computes on the GPU where there is one.
    marked = [] if name == "trajectories" else ["-m", "gpu"]
    options = ["-v", *marked, "--continue-on-collection-errors", f"--junitxml={junit}", *parallel]
    argv = [*_PYTEST, *options, *(str(file.relative_to(ROOT)) for file in files)]
    return Stage(f"gpu tests: {name}", argv, 300, required=True, junit=junit, until=TESTS_SHARE)


_PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def gpu_test_sessions() -> dict[str, list[Path]]:
    """The test files with tests marked gpu, by session; the others may import what isn't installed here."""
    sessions: dict[str, list[Path]] = {name: [] for name in (*SESSIONS, ALONE)}
    for path in sorted((ROOT / "tests").glob("test_*.py")):
        if "mark.gpu" in path.read_text(encoding="utf-8"):
            stem = path.stem.removeprefix("test_")
            sessions[next((name for name, stems in SESSIONS.items() if stem in stems), ALONE)].append(path)
    return sessions


def chosen(stages: list[Stage], only: list[str] | None) -> list[Stage]:
    """Those whose name contains one of the texts; all without any. Tests that nothing follows may use all the time."""
    found = [stage for stage in stages if any(text in stage.name for text in only or [""])]
    nothing_follows = bool(found) and found[-1].until < 1.0
    return [replace(stage, until=1.0) for stage in found] if nothing_follows else found


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Test, verify and measure on a GPU.")
    parser.add_argument("--minutes", type=float, default=8.0, help="no stage runs for longer (default: 8)")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", help="default: bench/results")
    parser.add_argument("--commit", help="what is measured, where there is no git repository to ask")
    parser.add_argument("--only", nargs="+", metavar="TEXT", help="only the stages whose name contains one of these")
    given = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(f"error: python -m bench.gpu needs a CUDA GPU, torch {torch.__version__} sees none here", file=sys.stderr)
        return 2
    began = time.monotonic()
    source, state = commit(given.commit), make_state_query()
    record = new_record(given.minutes, source, read_environment())
    record |= {"nvidia_smi": query_gpu(FIXED_FIELDS), "device_state_at_start": state()}
    file = record_file(given.out, record)
    with tempfile.TemporaryDirectory() as scratch:
        files = Files(file, file.with_suffix(".log"), Path(scratch) / "results.jsonl")
        stages = all_stages(Path(scratch), files.results, source["id"])
        stages = chosen(stages, given.only)
        run_stages(stages, record, files, seconds=60 * given.minutes - (time.monotonic() - began), state=state)
    print(f"\n{file}\n{summary(record)}")
    if rows := targets.rows(record):
        print(align(rows))
    return exit_status(record, [stage.name for stage in stages if stage.required])


if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
