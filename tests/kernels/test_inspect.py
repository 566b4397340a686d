"""Shipped configurations compile for their GPUs, here without one: no spill, every product on the matrix units, and
no bound on a kernel's time worse than the one checked in.

GPT-2 124M's own sizes in full, a few others on one architecture. `python -m fastgpt2.kernels.tools.inspect` does all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux")

import triton

from fastgpt2.console import run_command
from fastgpt2.kernels import tuning
from fastgpt2.kernels.attention import HEAD_DIMS, HOPPER_HEAD_DIMS
from fastgpt2.kernels.specs.attention import KERNELS
from fastgpt2.kernels.tools.bounds import allowed
from fastgpt2.kernels.tools.inspect import main
from fastgpt2.kernels.tools.profile import SIZES
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configurations, lookup, nearest, precision_name

COMPILING = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


def inspect(*arguments: str) -> list[dict]:
    """The command's report; it must find nothing that can't ship."""
    command = [sys.executable, "-m", "fastgpt2.kernels.tools.inspect", "--json", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


def python(code: str) -> Any:
    """What a program that compiles, and so can't interpret, prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], env=COMPILING, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


PRECISIONS = ("bfloat16", "float16", "tf32")
EXACT = ("attention_forward", "gelu_mlp_forward_tma")
GROUPS = f"""
import json
from dataclasses import asdict, replace
from fastgpt2.kernels.tools import inspect
from fastgpt2.kernels.tools.inspect import Case, LaunchConfig, shipped

limited = LaunchConfig(128, 64, num_warps=8, num_stages=3, max_registers=128)
others = ['gelu_mlp', 'layer_norm', 'cross_entropy']
groups = {{
    'exact': shipped(['sm_90'], ['float32'], [64, 768], {EXACT}),
    'other head sizes': shipped(['sm_90'], ['bfloat16'], [16, 96], ['attention']),
    'other sizes': shipped(['sm_90'], ['bfloat16'], [1600, 2048], others),
    'variants': shipped(['sm_90'], ['bfloat16'], {sorted(set(SIZES.values()))}, variants=True),
    'one token': [replace(c, constants={{'T': 1}}) for c in shipped(['sm_90'], ['bfloat16'], [64], ['attention'])],
    'spills': [Case('attention_forward', 'bfloat16', 64, 'sm_90', LaunchConfig(128, 128, num_warps=4, num_stages=2))],
    'misses': [Case('attention_forward', 'float32', 16, 'sm_90', LaunchConfig(16, 16))],
    'limited': [Case('attention_backward_dq', 'bfloat16', 64, 'sm_90', limited)],
    'bound': shipped(['sm_90'], ['bfloat16'], [768], ['layer_norm_forward']),
}}
made = iter(inspect.inspect_all([case for cases in groups.values() for case in cases]))
reports = {{name: [next(made) for _ in cases] for name, cases in groups.items()}}
found = {{name: [asdict(r) | {{'faults': r.faults}} for r in of_group] for name, of_group in reports.items()}}
(report,) = reports['bound']
for factor in (1.0, 0.9):
    inspect.allowed = lambda *_: factor * report.at_least.seconds
    found[f'bound of {{factor}}'] = report.faults
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled() -> dict[str, list]:
    """The reports of every group, from one process."""
    return python(GROUPS)


@pytest.mark.parametrize("arch", architectures())
def test_gpt2s_kernels_compile_well_everywhere(arch) -> None:
    cases = {
        (entry["op"], precision)
        for entry in tuning.read_table(arch)["entries"]
        for precision in PRECISIONS
        if precision in entry["precisions"]
        and any(entry["op"].startswith(op) and size in entry["sizes"] for op, size in SIZES.items())
    }
    reports = inspect("--arch", arch, "--precision", *PRECISIONS, "--size", *(str(n) for n in set(SIZES.values())))
    assert {(report["case"]["op"], report["case"]["precision"]) for report in reports} == cases
    assert {op for op, _ in cases} >= {*KERNELS, "layer_norm_backward", "cross_entropy", "gelu_mlp_backward"}
    unit = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05"}[arch]
    for report in reports:
        case = report["case"]
        assert (report["spilled"], report["missed"], report["serialised"], report["faults"]) == (0, 0, False, [])
        assert report["blocks"] >= 1
        if report["expected"]:
            assert unit in report["instructions"] and report["products"] >= 1
            assert report["copies"] == (["TMA"] if case["op"].endswith(("_tma", "_hopper")) else ["cp.async"]) or (
                case["config"]["num_stages"] == 1
            )
        assert allowed(arch, case["op"], case["precision"], triton.__version__) is not None
        assert 0.15 < report["at_least"]["fraction"] <= 1.0


def test_exact_float32_is_never_multiplied_in_tf32(compiled) -> None:
    """Triton's own default is TF32, on the matrix units, which have nothing more exact."""
    assert {report["case"]["op"] for report in compiled["exact"]} == set(EXACT)
    for report in compiled["exact"]:
        assert report["instructions"] == report["faults"] == [], report["case"]
        assert report["missed"] == report["expected"] > 0, report["case"]


def test_other_sizes_compile_well(compiled) -> None:
    assert len(compiled["other head sizes"]) == 2 * len(KERNELS) + 1  # Hopper's forward has no 16 channels
    assert len(compiled["other sizes"]) >= 5
    for report in compiled["other head sizes"] + compiled["other sizes"]:
        assert report["faults"] == [], report["case"]


LONGEST = {"attention_forward": 700, "attention_backward_dq": 700, "attention_backward_dkdv": 1000}
"""Instructions of a loop with dropout and documents. With a Philox call a weight, not for 8: 1134, 1079 and 1369."""


def test_what_else_the_tiles_are_compiled_to_compiles_well(compiled) -> None:
    """Dropout, documents, evaluation, LayerNorm by itself: the same tiles, other code. Only dk, dv with dropout, which
    leaves no register free, may spill two of them, as it does with Triton 3.7.1. Attention without the causal mask or
    with documents is serialised, as its file says; GPT-2's own form is not."""
    for report in compiled["variants"]:
        case = report["case"]
        tight = case["op"] == "attention_backward_dkdv" and case["variant"] == "dropout"
        assert report["missed"] == 0 and report["spilled"] <= (8 if tight else 0), case
        serialised = case["op"].startswith("attention") and case["variant"] in ("full", "documents", "both")
        faults = [fault for fault in report["faults"] if not (serialised and "serialised" in fault)]
        assert tight or faults == [], case
        if case["variant"] == "both":
            assert 400 < min(report["loops"]) < LONGEST[case["op"]], case
    found = {(report["case"]["op"], report["case"]["variant"]) for report in compiled["variants"]}
    attention = {(op, variant) for op in KERNELS for variant in ("", "full", "dropout", "documents", "both")}
    assert found >= attention | {("cross_entropy", "evaluation"), ("layer_norm_forward", "alone")}
    assert {op for op, variant in found if variant == "both"} == LONGEST.keys()


def test_a_bound_worse_than_the_one_checked_in_is_found(compiled) -> None:
    assert compiled["bound of 1.0"] == [] and "is checked in" in compiled["bound of 0.9"][0]


def test_a_spill_and_a_missed_product_are_found(compiled) -> None:
    (spills,), (misses,) = compiled["spills"], compiled["misses"]
    assert spills["spilled"] > 0 and any("spills" in fault for fault in spills["faults"])
    assert misses["missed"] == misses["products"] > 0 and misses["faults"] == []


def test_a_limit_on_registers_makes_room_for_a_block(compiled) -> None:
    (limited,) = compiled["limited"]
    assert (limited["registers"], limited["blocks"]) == (128, 2)
    assert str(LaunchConfig(**limited["case"]["config"])) == "128x64, 8 warps, 3 stages, 128 registers"


def test_one_token_compiles(compiled) -> None:
    """T = 1 reaches the compiler as a constant; so short, it may spill."""
    assert [report["missed"] for report in compiled["one token"]] == [0, 0, 0, 0, 0, 0]


SKETCH = """
import json, sys
import triton
import triton.language as tl
from fastgpt2.kernels.tools import inspect
from fastgpt2.kernels.specs.records import Kernel
from fastgpt2.kernels.tuning import LaunchConfig

@triton.jit
def product(a_ptr, b_ptr, o_ptr, K, PRINTS: tl.constexpr, BLOCK_M: tl.constexpr):
    row, column = tl.arange(0, BLOCK_M)[:, None], tl.arange(0, BLOCK_M)[None, :]
    z = tl.zeros((BLOCK_M, BLOCK_M), tl.float32)
    for k in range(0, K, BLOCK_M):
        a = tl.load(a_ptr + row * K + k + column)
        b = tl.load(b_ptr + row * K + k + column)
        z = tl.dot(a, tl.trans(b), z)
        if PRINTS:
            tl.device_print("k", k)
    tl.store(o_ptr + row * BLOCK_M + column, z)

kernel = Kernel(product, lambda *_: {"PRINTS": False}, {"o_ptr": "*fp32"}, ("K",), 1, {"calls": {"PRINTS": True}})
inspect.all_kernels = lambda: {"product": kernel}
config = LaunchConfig(64, num_warps=4, num_stages=3)
cases = [inspect.Case("product", "bfloat16", 64, "sm_90", config, variant=variant) for variant in ("", "calls")]
reports = [inspect.inspect_one(case) for case in cases]
print(json.dumps([[r.serialised, r.faults, inspect.table([r])] for r in reports]))
"""


def test_serialised_products_are_found(tmp_path) -> None:
    """A call between the products, here to print, has the assembler wait for each."""
    (tmp_path / "sketch.py").write_text(SKETCH)  # Triton reads a kernel's source from its file
    right, calls = python(f"import runpy; runpy.run_path({str(tmp_path / 'sketch.py')!r})")
    assert right[:2] == [False, []] and calls[0] is True
    (fault,) = (fault for fault in calls[1] if "waits for the one before" in fault)
    assert fault in calls[2]


@pytest.mark.parametrize("selection", [("--op", "nosuch"), ("--size", "7"), ("--op", "nosuch", "--check-in-bounds")])
def test_inspecting_nothing_is_an_error(selection, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: main(list(selection)))
    shown, error = capsys.readouterr()
    assert shown == "" and f"error: {selection[0]} {selection[1]}: no " in error.splitlines()[-1]


@pytest.mark.parametrize("arch", architectures())
def test_tables_cover_every_kernel_precision_and_head_size(arch) -> None:
    entries = [
        (entry["op"], precision, size)
        for entry in tuning.read_table(arch)["entries"]
        for precision in entry["precisions"]
        for size in entry["sizes"]
        if entry["op"].startswith("attention")
    ]
    precisions = ("bfloat16", "float16", "float32", "tf32")
    everywhere = [(op, p, D) for op in KERNELS for p in precisions for D in HEAD_DIMS]
    hopper = [("attention_forward_hopper", p, D) for p in precisions[:2] for D in HOPPER_HEAD_DIMS]
    hopper += [(f"attention_backward_{name}_hopper", p, 64) for name in ("dq", "dkdv") for p in precisions[:2]]
    assert sorted(entries) == sorted([*everywhere, *(hopper if arch == "sm_90" else [])])


def test_lookup_takes_the_nearest_table_that_fits_and_says_so_once(monkeypatch, caplog) -> None:
    class Consumer:  # an RTX 5090: newer than every table, with less shared memory than the newest assume
        name, major, minor, shared_memory_per_block_optin = "a consumer card", 12, 0, 101376

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Consumer)
    tuning._table_for.cache_clear()
    args = ("attention_forward", precision_name(torch.float32, allow_tf32=True), 64, torch.device("cuda", 0))
    assert lookup(*args) == lookup(*args) == configurations("sm_80")["attention_forward", "tf32", 64]
    assert [record.message for record in caplog.records] == [
        "no launch configurations for a consumer card (sm_120): using those of sm_80"
    ]
    tuning._table_for.cache_clear()
    assert nearest("sm_90", 232448) == "sm_90" and nearest("sm_103", 232448) == "sm_100"
    assert nearest("sm_89", 101376) == "sm_80"
    with pytest.raises(ValueError, match="no launch configurations fit"):
        nearest("sm_75", 65536)
    assert lookup(*args[:3], torch.device("cpu")) == LaunchConfig(16, 16)
