"""`python -m bench.gpu`: everything that needs a GPU, in one command, for a machine that is had for minutes.

Run from the root of a checkout: torch, triton, numpy, pytest and pytest-benchmark are enough, nothing of ours
need be installed. The device's state is read and never changed. Stages run by importance, each in a process of
its own with a limit, so that one that hangs or crashes costs only itself; after each, what is known is in
OUT/<gpu>/<date>-<commit>.json, and what the stages printed in the .log beside it. No stage starts once the
minutes are used; what was not done is listed.

Exit status: 0; 1 where a stage failed, or the tests or the verification did not end; 2 without a GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.device_state import FIXED_FIELDS, make_state_query, query_gpu
from bench.stages import Files, Stage, exit_status, read_environment, run_stages
from bench.timing import ROOT, commit


def all_stages(scratch: Path, results: Path, commit_id: str) -> list[Stage]:
    """By importance: is it right, how fast is the step, what is each kernel worth, and then the rest."""

    def bench(name: str, file: str, keyword: str, seconds_limit: float) -> Stage:
        options = ["--bench-jsonl", str(results), "--bench-commit", commit_id, "--tb=short"]
        options += ["--bench-ceilings", str(ceilings)]
        return Stage(name, [*_PYTEST, f"bench/{file}", "-k", keyword, *options], seconds_limit)

    roofline, ceilings = [sys.executable, "-m", "bench.roofline"], scratch / "ceilings.json"
    attention, step = "bench_attention.py", "bench_train_step.py"
    return [
        Stage("ceilings", [*roofline, "--out", str(ceilings), "--jsonl", str(results)], 60),
        *(_tests(file, scratch) for file in gpu_test_files()),
        bench("attention T=1024", attention, "T1024", 90),
        bench("step, ours and peers", step, "gpt2-B32-compiled-peers", 300),
        bench("linear cross-entropy", "bench_linear_cross_entropy.py", "test", 120),
        bench("gelu_mlp", "bench_gelu_mlp.py", "test", 120),
        bench("layer norm", "bench_layer_norm.py", "test", 90),
        bench("step, one slot changed", step, "gpt2-B32-compiled-ablation", 300),
        # Its checks are among the tests; this is their table.
        Stage("verify", [sys.executable, "-m", "fastgpt2.verify"], 240, required=True),
        bench("step, CUDA graphs", step, "gpt2 and compiled-graph", 300),
        bench("step, recomputed", step, "gpt2-B32-compiled-recompute", 150),
        bench("step, other batches", step, "(gpt2-B16 or gpt2-B64) and compiled-peers", 300),
        bench("attention T=2048 and up", attention, "T2048 or T4096 or T8192", 120),
        bench("step, eager", step, "gpt2-B32-eager-peers", 180),
        # The same again: differences between candidates that are smaller than these are noise.
        bench("attention T=1024, repeated", attention, "T1024", 90),
    ]


def _tests(file: Path, scratch: Path) -> Stage:
    """A file's tests marked gpu. Hundreds of kernels are compiled for them, at one or two seconds each: with
    pytest-xdist, which need not be there, by several processes."""
    junit = scratch / f"{file.stem}.xml"
    parallel = ["-n", "8"] if importlib.util.find_spec("xdist") else []
    # Every test of the trajectories computes on the GPU where there is one.
    marked = [] if file.stem == "test_trajectory" else ["-m", "gpu"]
    options = ["-v", *marked, "--continue-on-collection-errors", f"--junitxml={junit}", *parallel]
    name = f"gpu tests: {file.stem.removeprefix('test_')}"
    return Stage(name, [*_PYTEST, *options, str(file.relative_to(ROOT))], 300, required=True, junit=junit)


_PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]


def gpu_test_files() -> list[Path]:
    """The test files with tests marked gpu; the others may import what isn't installed here."""
    return sorted(p for p in (ROOT / "tests").glob("test_*.py") if "mark.gpu" in p.read_text(encoding="utf-8"))


def table(results: list[dict[str, Any]]) -> str:
    """One line a result, with its speed over that of the fastest result of the same work that isn't ours."""

    def work(result: dict[str, Any]) -> tuple[str, str, str]:
        shape = " ".join(str(v) if k == "model" else f"{k}={v}" for k, v in result["shape"].items())
        return result["op"], shape, result["dtype"]

    timed = [r for r in results if r.get("tokens_per_s")]
    best: dict[Any, float] = {}
    for result in timed:
        if _is_peer(result["backend"]):
            best[work(result)] = max(best.get(work(result), 0.0), result["tokens_per_s"])
    columns = "{:<66} {:<33} {:>9} {:>17} {:>8} {:>12} {:>11}"
    lines = [columns.format("work", "backend", "ms", "p20..p80", "TFLOP/s", "tokens/s", "x best peer")]
    for result in sorted(timed, key=lambda r: (work(r), -r["tokens_per_s"])):
        op, shape, _ = work(result)
        mode = {True: " compiled", False: " eager", None: ""}[result.get("compiled")]
        spread = f"{result['event_ms_p20']:.3f}..{result['event_ms_p80']:.3f}" if result.get("event_ms_p20") else ""
        cells = [f"{op} {shape}", result["backend"] + mode, f"{result['ms_median']:.3f}", spread]
        cells += [f"{result['tflops']:.1f}", f"{result['tokens_per_s']:,.0f}"]
        cells += [f"{result['tokens_per_s'] / best[work(result)]:.2f}" if work(result) in best else ""]
        lines.append(columns.format(*cells))
    return "\n".join(lines)


def _is_peer(backend: str) -> bool:
    """PyTorch's: nothing of ours in it, and not a part of the work alone, which is a floor."""
    words = set(backend.split("-"))
    return "torch" in words or words.isdisjoint({"triton", "chunked", "alone"})


def summary(record: dict[str, Any]) -> str:
    """The table, the ceilings beside it, and what was not done."""
    lines = [f"{record['environment']['device']}, commit {record['commit']['id']}"]
    if record["ceilings"]:
        text = "ceilings: copy {copy_tb_per_s:.2f} TB/s, bf16 matmul {matmul_bf16_tflops:.0f} TFLOP/s"
        lines.append(text.format(**record["ceilings"]))
    for stage in record["stages"]:
        if stage["required"]:
            counts = f", {stage['tests']['run']} tests run" if stage["tests"] else ""
            lines.append(f"{stage['name']}: {stage['status']}{counts}")
    lines.append(table(record["results"]) if record["results"] else "no benchmark has a result")
    lines += [f"not done: {missing['name']}: {missing['reason']}" for missing in record["not_done"]]
    return "\n".join(lines)


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
    where, source, state = read_environment(), commit(given.commit), make_state_query()
    folder = given.out.resolve() / re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    started = datetime.now(UTC)
    name = f"{started:%Y-%m-%d-%H%M%S}-{re.sub(r'[^A-Za-z0-9]+', '-', source['id'])[:12]}"
    record = {
        "format": 1,
        "started": started.isoformat(timespec="seconds"),
        "minutes": given.minutes,
        "commit": source,
        "environment": where,
        "nvidia_smi": query_gpu(FIXED_FIELDS),
        "device_state_at_start": state(),
    }
    with tempfile.TemporaryDirectory() as scratch:
        files = Files(folder / f"{name}.json", folder / f"{name}.log", Path(scratch) / "results.jsonl")
        stages = all_stages(Path(scratch), files.results, source["id"])
        stages = [stage for stage in stages if any(text in stage.name for text in given.only or [""])]
        run_stages(stages, record, files, seconds=60 * given.minutes - (time.monotonic() - began), state=state)
    print(f"\n{files.record}\n{summary(record)}")
    return exit_status(record, [stage.name for stage in stages if stage.required])


if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
