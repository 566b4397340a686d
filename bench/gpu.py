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
import contextlib
import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from bench.timing import ROOT, commit

LOG_BYTES = 200_000
"""The end of a stage's output that is kept in the log; it bounds the log's size."""
TAIL_CHARACTERS = 8_000
"""The end of it that is kept in the JSON."""
STATE_EVERY_S = 5.0
"""Between two looks at the device's clocks, power and temperature while a stage runs."""
GRACE_S = 3.0
"""For a stage that is stopped to print where it stands."""


@dataclass(frozen=True)
class Stage:
    """One process."""

    name: str
    argv: list[str]
    seconds_limit: float
    required: bool = False
    """Whether the run counts as failed unless this stage passes."""
    junit: Path | None = None
    """Where it writes its tests' results."""


@dataclass(frozen=True)
class Files:
    """Where a run writes, and where its stages do."""

    record: Path
    log: Path
    results: Path
    """JSON lines that the stages append to: `kind` is "ceilings" or "benchmark"."""


def all_stages(scratch: Path, results: Path, commit_id: str) -> list[Stage]:
    """By importance: is it right, how fast is the step, what is each kernel worth, and then the rest."""

    def bench(name: str, file: str, keyword: str, seconds_limit: float) -> Stage:
        options = ["--bench-jsonl", str(results), "--bench-commit", commit_id, "--tb=short"]
        return Stage(name, [*_PYTEST, f"bench/{file}", "-k", keyword, *options], seconds_limit)

    attention, step = "bench_attention.py", "bench_train_step.py"
    whole = "compiled and not recompute and not graph"
    peers = "(all-triton or plain or sdpa)"
    return [
        Stage("ceilings", [sys.executable, "-m", "bench.timing", "--jsonl", str(results)], 60),
        *(_tests(file, scratch) for file in gpu_test_files()),
        bench("attention T=1024", attention, "T1024", 90),
        bench("step, ours and peers", step, f"B32 and {whole} and {peers}", 300),
        bench("linear cross-entropy", "bench_linear_cross_entropy.py", "test", 120),
        bench("gelu_mlp", "bench_gelu_mlp.py", "test", 120),
        bench("layer norm", "bench_layer_norm.py", "test", 90),
        bench("step, one slot changed", step, f"B32 and {whole} and (mlp or norm or loss or attention)", 300),
        # Its checks are among the tests; this is their table.
        Stage("verify", [sys.executable, "-m", "fastgpt2.verify"], 240, required=True),
        bench("step, CUDA graphs", step, "(B1- or B4-) and (plain or all-triton) and not recompute", 300),
        bench("step, recomputed", step, "B32 and compiled and recompute", 150),
        bench("step, other batches", step, f"(B16 or B64) and {whole} and {peers}", 300),
        bench("attention T=2048 and up", attention, "T2048 or T4096 or T8192", 120),
        bench("step, eager", step, "B32 and eager and not recompute and not graph", 180),
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


# ------------------------------------------------------------------------------------------ running stages


def run_stages(
    stages: Iterable[Stage],
    record: dict[str, Any],
    files: Files,
    *,
    seconds: float,
    state: Callable[[], dict[str, str]] | None = None,
) -> dict[str, Any]:
    """Run stages in order until the time is used up; the record is on disk before the first and after each.

    Args:
        record: what is known so far; gains `stages`, `results`, `ceilings` and `not_done`, a list of {name, reason}.
        seconds: for all stages together; one that is running when they end is stopped.
        state: reads the device's state, every few seconds while a stage runs.

    Returns:
        The record.
    """
    # A stage that is stopped with SIGABRT, so that it prints where it hung, is not to leave gigabytes behind.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    ends = time.monotonic() + seconds
    stages = list(stages)
    waiting = {stage.name: "not reached" for stage in stages}
    record.update(stages=[], results=[], ceilings=None)
    _write_record(files.record, record, waiting)
    for stage in stages:
        left = ends - time.monotonic()
        if left <= 0:
            waiting[stage.name] = "the minutes were used up"
            continue
        print(f"{stage.name} ...", flush=True)
        outcome = run_stage(stage, min(stage.seconds_limit, left), files.log, state)
        record["stages"].append(outcome)
        _collect(files.results, stage.name, record)
        if outcome["status"] == "timed out":
            waiting[stage.name] = f"stopped after {outcome['seconds']:.0f} s; results it had made are kept"
        else:
            del waiting[stage.name]
        _write_record(files.record, record, waiting)
        print(f"{stage.name}: {outcome['status']} in {outcome['seconds']:.0f} s", flush=True)
        if outcome["status"] != "passed":
            print(outcome["output_tail"][-1500:], flush=True)
    _write_record(files.record, record, waiting)
    return record


def run_stage(
    stage: Stage, seconds_limit: float, log: Path, state: Callable[[], dict[str, str]] | None = None
) -> dict[str, Any]:
    """Run one process to its end or its limit, and say how it went; its output goes to the log."""
    began, states = time.monotonic(), _States(state)
    # A Triton that interprets would be neither the kernels nor their time.
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            stage.argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=ROOT,
            # nvidia-smi counts the devices by their place on the bus: let torch do the same.
            env={**inherited, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"},
            start_new_session=True,
        )
        try:
            while process.poll() is None and time.monotonic() - began < seconds_limit:
                states.look()
                time.sleep(0.05)
        finally:
            timed_out = _stop(process)
        size = output.seek(0, os.SEEK_END)
        output.seek(max(0, size - LOG_BYTES))
        text = output.read().decode(errors="replace")
    tests = _junit_counts(stage.junit)
    nothing_ran = tests is not None and tests["run"] == 0
    status = "timed out" if timed_out else "failed" if process.returncode or nothing_ran else "passed"
    outcome = {
        "name": stage.name,
        "argv": ["python" if part == sys.executable else part for part in stage.argv],
        "required": stage.required,
        "status": status,
        "returncode": process.returncode,
        "seconds": round(time.monotonic() - began, 2),
        "seconds_limit": round(seconds_limit, 2),
        "device_state": states.summary(),
        "tests": tests,
        "output_tail": text[-TAIL_CHARACTERS:],
    }
    with log.open("a", encoding="utf-8") as file:
        cut = f" (the last {LOG_BYTES} of {size} bytes)" if size > LOG_BYTES else ""
        file.write(f"==== {stage.name}: {status}, exit status {process.returncode}{cut}\n{text}\n")
    return outcome


def _stop(process: subprocess.Popen) -> bool:
    """End a process that still runs, and all it started; whether there was one."""
    running = process.poll() is None
    if running:
        process.send_signal(signal.SIGABRT)  # Python's fault handler prints every thread's stack
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its session, made for it alone
        process.wait()
    return running


def _collect(results: Path, stage: str, record: dict[str, Any]) -> None:
    """Move the lines that a stage wrote into the record; the last one may be cut off."""
    if not results.exists():
        return
    for line in results.read_text(encoding="utf-8").splitlines():
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        if result.pop("kind") == "ceilings":
            record["ceilings"] = result
        else:
            record["results"].append({"stage": stage, **result})
    results.unlink()


def _write_record(path: Path, record: dict[str, Any], waiting: dict[str, str]) -> None:
    """Written aside and renamed, so that the file is whole whenever the machine goes away."""
    record["not_done"] = [{"name": name, "reason": reason} for name, reason in waiting.items()]
    aside = path.with_suffix(".writing")
    aside.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)


def _junit_counts(path: Path | None) -> dict[str, Any] | None:
    """How many tests ran, and the names of those that did not pass or did not run."""
    if path is None or not path.exists():
        return None
    cases = list(ElementTree.parse(path).iter("testcase"))
    by_outcome: dict[str, list[str]] = {"failure": [], "error": [], "skipped": []}
    for case in cases:
        for outcome, names in by_outcome.items():
            if case.find(outcome) is not None:
                names.append(f"{case.get('classname')}::{case.get('name')}")
    return {"run": len(cases) - len(by_outcome["skipped"]), **by_outcome}


# --------------------------------------------------------------------------------------- the device's state

_STATE_FIELDS = ["pstate", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu"]
_FIXED_FIELDS = [
    *("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "memory.total"),
    *("ecc.mode.current", "persistence_mode", "compute_mode", "mig.mode.current"),
]
_THROTTLE_FIELDS = ["clocks_event_reasons.active", "clocks_throttle_reasons.active"]
"""The reasons for lower clocks, a bit mask, under the name of newer drivers and that of older ones."""


def query_gpu(fields: list[str]) -> dict[str, str]:
    """What nvidia-smi reports of the first visible GPU, {field: value with unit}, or nothing; it changes nothing."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=False))


def make_state_query() -> Callable[[], dict[str, str]]:
    """query_gpu of what changes, with the name for the throttle reasons that this driver knows."""
    known = next((field for field in _THROTTLE_FIELDS if query_gpu([field])), None)
    fields = [*_STATE_FIELDS, *([known] if known else [])]
    return lambda: query_gpu(fields)


class _States:
    """Looks at the device's state every few seconds and remembers the extremes."""

    def __init__(self, state: Callable[[], dict[str, str]] | None) -> None:
        self._state, self._next = state, time.monotonic()
        self._seen: list[dict[str, str]] = []

    def look(self) -> None:
        if self._state is not None and time.monotonic() >= self._next:
            self._seen.append(self._state())
            self._next = time.monotonic() + STATE_EVERY_S

    def summary(self) -> dict[str, Any]:
        """{field: {"min", "max", "last"}} of numbers, with their unit in `last`; the distinct values of all else."""
        fields: dict[str, Any] = {"looks": len(self._seen)}
        for field in {name: None for seen in self._seen for name in seen}:
            values = [seen[field] for seen in self._seen if field in seen]
            numbers = [float(m[1]) for value in values if (m := re.fullmatch(r"([\d.]+)(?: [A-Za-z%]+)?", value))]
            if len(numbers) == len(values):
                fields[field] = {"min": min(numbers), "max": max(numbers), "last": values[-1]}
            else:
                fields[field] = sorted(set(values))
        return fields


# ------------------------------------------------------------------------------------------------- command


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


def exit_status(record: dict[str, Any], required: Iterable[str]) -> int:
    """1 where a stage failed or a required one did not pass; else 0, also where a benchmark ran out of time."""
    status = {stage["name"]: stage["status"] for stage in record["stages"]}
    failed = "failed" in status.values()
    return int(failed or any(status.get(name) != "passed" for name in required))


def read_environment() -> dict[str, Any]:
    """bench.timing.environment from a process that then ends: this one is to hold no memory of the device."""
    program = "import json; from bench.timing import environment; print(json.dumps(environment()))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout)


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
        "nvidia_smi": query_gpu(_FIXED_FIELDS),
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
