"""`python -m bench.roofline`: measure a device's ceilings: bytes, FLOPs, exponentials.

Three ceilings, each measured where the work is, in one contest of bench.timing: bytes a second of a large copy, FLOPs
a second of a large product in each precision, and exponentials a second of a loop that does nothing else (CUDA only).
A piece of work that counts its bytes, FLOPs and exponentials can take no less time than each of them takes at its
ceiling; the longest of these times is its limit, as if the others were hidden under it.

The command prints them as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.timing import Call, append_json_line, contest
from fastgpt2.console import run_command
from fastgpt2.device import device_name, peak_flops, pick_device
from fastgpt2.fields import OutputFile
from fastgpt2.flags import read_arguments

COPIED_BYTES = {"cuda": 1 << 30, "cpu": 1 << 26}
PRODUCT_SIZE = {"cuda": 8192, "cpu": 512}
PRECISIONS = {
    "cuda": {"bfloat16": "highest", "float16": "highest", "tf32": "high", "float32": "highest"},
    # A CPU's half-precision products are seconds long where it has no unit for them.
    "cpu": {"bfloat16": "highest", "float32": "highest"},
}
"""The products that are measured, with PyTorch's setting for those of float32."""


@dataclass(frozen=True)
class Work:
    """What a call has to do at the least.

    Args:
        tokens: that it takes in; None where it takes none.
        flops: additions and multiplications, counted against the matrix units.
        bytes: read and written once; None where nobody has counted them, as `special`.
        special: exponentials, hyperbolic tangents and the like.
        flops_formula, bytes_formula: what is counted, in words.
    """

    tokens: int | None
    flops: float
    bytes: float | None
    special: float | None
    flops_formula: str
    bytes_formula: str


def figures(
    work: Work,
    ms_median: float,
    dtype: str,
    device: torch.device,
    ceilings: Mapping[str, Any] | None,
    more_flops: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """A result's fields from `tokens` to `limit_fraction`.

    Args:
        ms_median: milliseconds of a call.
        dtype: a key of the ceilings' products and of fastgpt2.device's peaks.
        ceilings: what `ceilings` returned; None leaves the limit unknown.
        more_flops: FLOPs of a call by other formulas, for MFU by each.
    """
    per_second = 1e3 / ms_median
    peak = peak_flops(device_name(device), dtype)
    formulas = {work.flops_formula: work.flops, **(more_flops or {})}
    limits = least_ms(work, dtype, ceilings) if ceilings else {}
    limit = max(limits, key=lambda name: limits[name], default=None)
    return {
        "tokens": work.tokens,
        "flops": work.flops,
        "bytes": work.bytes,
        "special": work.special,
        "flops_formula": work.flops_formula,
        "bytes_formula": work.bytes_formula,
        "tokens_per_s": None if work.tokens is None else work.tokens * per_second,
        "tflops": work.flops * per_second / 1e12,
        "bytes_per_s": None if work.bytes is None else work.bytes * per_second,
        "mfu": {formula: peak and flops * per_second / peak for formula, flops in formulas.items()},
        "peak_flops": peak,
        "limit": limit,
        "limit_ms": limit and limits[limit],
        "limit_fraction": limit and limits[limit] / ms_median,
    }


def least_ms(work: Work, dtype: str, ceilings: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds that the work takes at each ceiling: "matrix", "special", "memory", where both are known."""
    counted_and_rate = {
        "matrix": (work.flops, ceilings["matrix_flops_per_s"].get(dtype)),
        "special": (work.special, ceilings["special_per_s"]),
        "memory": (work.bytes, ceilings["memory_bytes_per_s"]),
    }
    return {name: 1e3 * n / rate for name, (n, rate) in counted_and_rate.items() if n is not None and rate}


def ceilings(device: torch.device, *, seconds: float = 0.2) -> dict[str, Any]:
    """Measure the device's ceilings.

    Args:
        seconds: about how long each may take.

    Returns:
        {"memory_bytes_per_s", "matrix_flops_per_s": {precision: FLOP/s}, "special_per_s"}: medians over
        interleaved rounds. On a CPU special_per_s is None and there are fewer precisions.
    """
    calls = {"memory": _copy(device), **{p: _product(device, p) for p in PRECISIONS[device.type]}}
    copied, n = COPIED_BYTES[device.type], PRODUCT_SIZE[device.type]
    counts: dict[str, float] = {"memory": 2.0 * copied, **dict.fromkeys(PRECISIONS[device.type], 2.0 * n**3)}
    if device.type == "cuda":
        from bench import special

        calls["special"], counts["special"] = special.make_launch(device), special.exponentials(device)
    rates: dict[str, float] = {}
    for name, timed in contest(calls, device, seconds=seconds).items():
        if isinstance(timed, Exception):
            raise timed
        rates[name] = 1e3 * counts[name] / timed.ms_median
    return {
        "memory_bytes_per_s": rates["memory"],
        "matrix_flops_per_s": {precision: rates[precision] for precision in PRECISIONS[device.type]},
        "special_per_s": rates.get("special"),
    }


def _copy(device: torch.device) -> Call:
    sources = [torch.ones(COPIED_BYTES[device.type], dtype=torch.uint8, device=device) for _ in range(2)]
    target = torch.empty_like(sources[0])
    return lambda i: target.copy_(sources[i % 2])


def _product(device: torch.device, precision: str) -> Call:
    n, setting = PRODUCT_SIZE[device.type], PRECISIONS[device.type][precision]
    dtype = torch.float32 if precision == "tf32" else getattr(torch, precision)
    matrices = [torch.randn(n, n, device=device).to(dtype) for _ in range(3)]
    out = torch.empty_like(matrices[0])

    def product(i: int) -> None:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(setting)
        torch.mm(matrices[i % 3], matrices[(i + 1) % 3], out=out)
        torch.set_float32_matmul_precision(before)

    return product


def read_or_measure(path: Path | None, device: torch.device) -> dict[str, Any]:
    """The ceilings in a file. Without one they are measured, and written to it if it has a name."""
    if path is not None and path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    measured = ceilings(device)
    if path is not None:
        path.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    return measured


@dataclass(frozen=True)
class RooflineConfig:
    """Where to keep the ceilings."""

    out: OutputFile | None = None
    """JSON file to write them to, for pytest's --bench-ceilings."""
    jsonl: OutputFile | None = None
    """File of JSON lines to append them to."""


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    given = read_arguments(RooflineConfig, "bench.roofline", arguments)
    measured = ceilings(pick_device(None))
    if given.out is not None:
        given.out.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    if given.jsonl is not None:
        append_json_line(given.jsonl, {"kind": "ceilings", **measured})
    print(json.dumps(measured, indent=1))


if __name__ == "__main__":
    run_command(main)
