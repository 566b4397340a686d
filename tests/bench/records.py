"""Records of measurements that nobody made: for the tests of what reads records. The device says so in its name."""

from __future__ import annotations

import json
import random
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.record import Record
from bench.timing import percentile

GPU = "Synthetic GPU 80GB"
ROUNDS = 9
CEILINGS = {
    "memory_bytes_per_s": 3.0e12,
    "matrix_flops_per_s": {"bfloat16": 7.0e14, "float16": 7.0e14, "tf32": 4.0e14, "float32": 5.0e13},
    "special_per_s": 4.0e12,
}
PLAIN = {"attn": "sdpa", "mlp": "torch", "norm": "torch", "loss": "torch"}
STEPS: dict[str, tuple[str, dict[str, str] | None, float, float]] = {
    # backend: role, slots, milliseconds at B = 32, GiB
    "ours-torch": ("ours", PLAIN, 90.0, 30.0),
    "ours-triton": ("ours", dict.fromkeys(PLAIN, "triton"), 75.0, 20.0),
    "ours-triton-any-order": ("ours", dict.fromkeys(PLAIN, "triton"), 75.5, 20.0),
    "ours-attn-triton": ("ours", PLAIN | {"attn": "triton"}, 82.0, 29.0),
    "ours-mlp-triton": ("ours", PLAIN | {"mlp": "triton"}, 91.0, 28.0),
    "ours-norm-triton": ("ours", PLAIN | {"norm": "triton"}, 89.9, 29.5),
    "ours-loss-triton": ("ours", PLAIN | {"loss": "triton"}, 93.0, 22.0),
    "ours-loss-chunked": ("ours", PLAIN | {"loss": "chunked"}, 97.0, 22.0),
    "plain": ("peer", None, 88.0, 31.0),
    "transformers": ("peer", None, 120.0, 45.0),
}
OPS: dict[str, tuple[dict[str, Any], dict[str, tuple[str, float]], float, str, float]] = {
    # op: shape, {backend: (role, ms)}, FLOPs, the ceiling that binds, its milliseconds
    "mlp forward+backward": (
        {"B": 64, "T": 1024, "C": 768},
        {"triton": ("ours", 4.5), "torch": ("peer", 5.1), "torch-compiled": ("peer", 4.86)},
        1.8e12, "matrix", 2.7,
    ),
    "mlp forward": (
        {"B": 64, "T": 1024, "C": 768},
        {"triton": ("ours", 1.5), "torch": ("peer", 1.7)},
        6e11, "matrix", 0.9,
    ),
    "add_layer_norm forward": (
        {"N": 65536, "C": 768},
        {"triton": ("ours", 0.25), "torch": ("peer", 0.6), "torch-compiled": ("peer", 0.3)},
        4e8, "memory", 0.2,
    ),
    "linear_cross_entropy training": (
        {"N": 32768, "C": 768, "V": 50257},
        {"triton": ("ours", 14.0), "liger": ("peer", 15.0), "matmuls-alone": ("floor", 11.0)},
        7.6e12, "matrix", 10.9,
    ),
    "optimizer step": ({"model": "gpt2"}, {"fused-adamw": ("ours", 1.1)}, 1e9, "memory", 0.9),
}  # fmt: skip


def make_record(
    *,
    device: str = GPU,
    commit: str = "a" * 40,
    started: str = "2030-01-01T00:00:00+00:00",
    slower: Mapping[str, float] | None = None,
    machine: float = 1.0,
    seed: int = 0,
) -> dict[str, Any]:
    """A record of format 2, of a GPU with ceilings, or of the CPU where device is "cpu".

    Args:
        slower: by a result's name, by what factor it is slower.
        machine: by what factor everything is, as where the clocks are lower.
    """
    gpu, random_numbers, results = device != "cpu", random.Random(seed), []
    dtypes, peak = ("bfloat16",) if gpu else ("float32", "bfloat16"), 9.0e14 if gpu else None

    def contest(op: str, shape: dict[str, Any], dtype: str, rows: dict[str, dict[str, Any]]) -> None:
        drift = [random_numbers.gauss(1.0, 0.02) for _ in range(ROUNDS)]
        for backend, row in rows.items():
            mode = {True: "-compiled", False: "-eager"}.get(row.get("compiled"), "")  # type: ignore[arg-type]
            sizes = "-".join(f"{k}{v}" for k, v in shape.items())
            name = f"{op}[{sizes}-{dtype}{mode}-{backend}]".replace(" ", "_")
            ms = row.pop("ms") * machine * (slower or {}).get(name, 1.0)
            round_ms = [ms * d * random_numbers.gauss(1.0, 0.004) for d in drift]
            median = statistics.median(round_ms)
            tokens, flops = row.pop("tokens"), row.pop("flops")
            held = row.pop("gib", 1.0)
            results.append(
                {
                    "name": name, "group": f"{op} {sizes}", "contest": f"{op} {sizes} {dtype}", "op": op,
                    "backend": backend, "compiled": None, "dtype": dtype, "shape": shape, "deterministic": True,
                    "ms_median": median, "ms_p20": percentile(round_ms, 20), "ms_p80": percentile(round_ms, 80),
                    "ms_clock": "made up", "rounds": ROUNDS, "samples": 5 * ROUNDS, "round_ms": round_ms,
                    "host_ms": 0.1 if gpu else None, "tokens": tokens, "flops": flops, "bytes": 1e9, "special": None,
                    "flops_formula": "made up", "bytes_formula": "made up", "tokens_per_s": 1e3 * tokens / median,
                    "tflops": flops / median / 1e9, "bytes_per_s": 1e12 / median, "peak_flops": peak,
                    "mfu": {"made up": peak and 1e3 * flops / median / peak}, "limit": None, "limit_ms": None,
                    "limit_fraction": None, "peak_memory_bytes": int(held * 2**30),
                    "peak_memory_meaning": "allocated by torch during a call, with all inputs" if gpu else "resident",
                    "device_state": {}, **row,
                }
            )  # fmt: skip
            if limit_ms := row.get("limit_ms"):
                results[-1]["limit_fraction"] = limit_ms / median

    def steps(model: str, B: int, dtype: str, compiled: bool) -> None:
        factor = (B / 32 if gpu else 10.0) * (1.0 if compiled else 1.4)
        tokens = B * 1024
        rows = {}
        for backend, (role, slots, ms, gib) in STEPS.items():
            if not gpu and backend not in ("ours-torch", "plain", "transformers"):
                continue
            ms *= factor
            row = {"role": role, "compiled": compiled, "ms": ms, "gib": gib * B / 32}
            row |= {"tokens": tokens, "flops": 8e8 * tokens}
            row["mfu"] = {"llm.c": peak and 8e11 * tokens / ms / peak, "nanogpt": peak and 8.5e11 * tokens / ms / peak}
            rows[backend] = row | ({"slots": slots} if slots else {})
        contest("training step", {"model": model, "n_layer": 12, "B": B, "T": 1024}, dtype, rows)

    for dtype in dtypes:
        for compiled in (True, False):
            for B in (32, 64) if gpu else (8,):
                steps("gpt2", B, dtype, compiled)
    if gpu:
        for T in (1024, 2048, 4096):
            for direction, work in (("forward", 1.0), ("backward", 2.5)):
                flops = work * 2 * 12 * 65536 * T * 64
                limit = {"limit": "matrix", "limit_ms": 1e3 * flops / 7e14, "tokens": 65536, "flops": flops}
                reached = {"triton": ("ours", 5e14), "sdpa-cudnn": ("peer", 4.8e14), "sdpa-flash": ("peer", 3.5e14)}
                rows = {b: {"role": role, "ms": 1e3 * flops / speed, **limit} for b, (role, speed) in reached.items()}
                contest(f"attention {direction}", {"B": 65536 // T, "T": T, "H": 12, "D": 64}, "bfloat16", rows)
        for op, (shape, backends, flops, limit_name, limit_ms) in OPS.items():
            bound = {"limit": limit_name, "limit_ms": limit_ms, "tokens": 65536, "flops": flops}
            contest(op, shape, "bfloat16", {b: {"role": role, "ms": ms, **bound} for b, (role, ms) in backends.items()})
    for backend, role, cold in (("ours-triton", "ours", 41.0), ("plain", "peer", 38.0)):
        shape = {"model": "gpt2", "n_layer": 12, "B": 32, "T": 1024}
        seconds = {"cold": cold * machine, "cached": cold / 4 * machine}
        results.append(
            {
                "name": f"first_step[{backend}]", "op": "first step", "backend": backend, "role": role,
                "compiled": True, "dtype": dtypes[0], "shape": shape, "contest": "first step", "ms_median": None,
                "seconds_to_first": seconds,
            }
        )  # fmt: skip
    return {
        "format": 2,
        "started": started,
        "minutes": 8.0,
        "commit": {"id": commit, "dirty": False},
        "environment": {
            "device": device, "compute_capability": "9.0" if gpu else None, "torch": "2.99.0", "triton": "3.99.0",
            "cuda": "13.9" if gpu else None, "cudnn": 99000 if gpu else None, "python": "3.99.0", "cpu_threads": 2,
            "packages": {"transformers": "9.9.9", "liger-kernel": None},
        },
        "ceilings": CEILINGS if gpu else None,
        "stages": [],
        "results": results,
        "not_done": {"verify": "the minutes were used up"},
    }  # fmt: skip


def recorded(**what: Any) -> Record:
    """make_record's, as it is read."""
    return Record.from_json(make_record(**what))


def write_record(folder: Path, **what: Any) -> Path:
    """make_record's, in its place below the folder."""
    record = make_record(**what)
    place = folder / record["environment"]["device"].lower().replace(" ", "-")
    place.mkdir(parents=True, exist_ok=True)
    path = place / f"{record['started'][:10]}-{record['commit']['id'][:12]}.json"
    path.write_text(json.dumps(record))
    return path
