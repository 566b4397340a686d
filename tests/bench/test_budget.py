"""The budget of a step: its counts are the operators' and the kernels', and a profile takes the arithmetic's place."""

from __future__ import annotations

import pytest

from bench.record import Record, StepKernels
from bench.report.budget import (
    LINES,
    PARAMETERS,
    RATES,
    SHAPE,
    B,
    Column,
    Part,
    budget_section,
    line_of,
    parts_section,
    rates_section,
)
from fastgpt2.config import PRESETS
from fastgpt2.kernels.specs import all_kernels
from fastgpt2.kernels.tuning import configuration
from fastgpt2.model import parameter_count
from tests import counts
from tests.bench.records import recorded

TITLES = [line.title for line in LINES]


def parts(title: str, column: Column) -> tuple[Part, ...]:
    return next(line.parts.get(column, ()) for line in LINES if line.title == title)


def amount(title: str, column: Column) -> float:
    return sum(part.times * part.amount for part in parts(title, column))


@pytest.mark.parametrize(("column", "case"), [("plain", "step plain bfloat16"), ("ours", "step all-triton bfloat16")])
def test_the_flops_are_those_that_were_counted(column: Column, case: str) -> None:
    """tests.counts counts attention without its mask: twice the causal half."""
    flops = amount("block products", column) + 2 * amount("attention", column)
    flops += sum(part.amount for part in parts("head", column) if RATES[part.rate].per_second > 1e14)
    assert flops == counts.checked_in()[case]["flops"] * B / counts.B
    assert parameter_count(PRESETS["gpt2"], padded=True) == PARAMETERS


def test_the_bytes_are_the_kernels() -> None:
    def work(op: str, size: int) -> float:
        known = all_kernels()[op].work
        assert known is not None
        return known("bfloat16", size, configuration("sm_90", op, "bfloat16", size)).bytes

    _, inner, _ = parts("LayerNorm, residual and its casts", "ours")
    assert inner.amount == work("layer_norm_forward", 768) + work("layer_norm_backward", 768)
    assert amount("cross-entropy rows", "ours") == work("cross_entropy", 50304)
    launches = counts.checked_in()["step all-triton bfloat16"]["launches"]
    norms = sum(part.times for part in parts("LayerNorm, residual and its casts", "ours"))
    assert norms == launches["layer_norm_forward_kernel"] == launches["layer_norm_backward_kernel"]


NAMES = {
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_TNT": "block products",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x256x64_warpgroupsize2x1x1": "block products",
    "gelu_mlp_forward_kernel": "block products",
    "void flash::flash_fwd_kernel<Flash_fwd_kernel_traits<64, 128, 128, 4, false, cutlass::bfloat16_t>>": "attention",
    "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_7_64x128x64": "attention",
    "attention_backward_dkdv_kernel": "attention",
    "cross_entropy_kernel": "cross-entropy rows",
    "triton_red_fused__log_softmax_prepare_softmax_online_15": "cross-entropy rows",
    "layer_norm_backward_kernel": "LayerNorm, residual and its casts",
    "triton_per_fused__to_copy_add_native_layer_norm_backward_view_10": "LayerNorm, residual and its casts",
    "triton_poi_fused__to_copy_view_2": "LayerNorm, residual and its casts",
    "triton_poi_fused_gelu_view_10": "GELU",
    "triton_poi_fused_gelu_gelu_backward_view_6": "GELU",
    "triton_red_fused_gelu_gelu_backward_sum_view_7": "bias gradients",
    "triton_red_fused_cat_sum_transpose_view_13": "bias gradients",
    "triton_red_fused_sum_view_5": "bias gradients",
    "triton_poi_fused_cat_transpose_view_12": "packing dqkv",
    "triton_poi_fused__to_copy_5": "casts of weights and gradients",
    "triton_poi_fused__to_copy_t_12": "casts of weights and gradients",
    "triton_per_fused_add_sum_11": "embeddings, Adam, launches",
    "void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor<float>>": "embeddings, Adam, launches",
}
"""As a profiler and Inductor's code name them."""


@pytest.mark.parametrize(("kernel", "title"), NAMES.items())
def test_a_kernel_belongs_to_one_line(kernel: str, title: str) -> None:
    assert line_of(kernel).title == title


def profiled(step: str, kernels: list[tuple[str, float, float]], ms: float) -> Record:
    """A record with a profile that nobody made; its steps of 65,536 tokens are timed, plain's in 176 ms."""
    record = recorded()
    record.step_kernels = [
        StepKernels(step=step, shape=SHAPE, compiled=True, table=False, slots=None, ms=ms, kernels=kernels)
    ]
    return record


def cells(page: str, title: str) -> list[str]:
    return next(
        [cell.strip() for cell in row.split("|")[2:-1]] for row in page.splitlines() if row.startswith(f"| {title} ")
    )


def test_a_profile_takes_the_arithmetics_place() -> None:
    kernels = [("nvjet_tst", 147.0, 70.5), ("cudnn_sdpa", 24.0, 20.25), ("multi_tensor_apply_kernel", 30.0, 1.5)]
    record = profiled("plain", kernels, ms=100.0)
    page = budget_section([record])
    assert page.splitlines()[0] == "| ms | plain compiled, measured | ours before | ours |"
    arithmetic = budget_section([])
    assert arithmetic.splitlines()[0] == "| ms | plain compiled | ours before | ours |"
    assert cells(page, "block products") == ["70.5", *cells(arithmetic, "block products")[1:]]
    assert cells(page, "head")[0] == "with the blocks'" and cells(page, "attention")[0] == "20.2"
    whole = next(r.ms_median for r in record.results if r.backend == "plain" and r.compiled and r.shape == SHAPE)
    assert whole is not None and whole > 100
    # What is not among the longest kernels, and what the step takes beside its kernels.
    assert cells(page, "embeddings, Adam, launches")[0] == f"{1.5 + whole - 92.25:.1f}"
    assert cells(page, "**sum**")[0] == f"**{whole:.1f}**"
    assert page.endswith(f"Measured on {record.device}, {record.date}, commit {record.commit_id[:12]}.")


def test_the_tuned_profile_counts_and_another_size_does_not() -> None:
    record = profiled("ours-triton-tuned", [("nvjet_tst", 1.0, 33.0)], ms=40.0)
    plain = profiled("ours-triton", [("nvjet_tst", 1.0, 44.0)], ms=50.0).step_kernels
    record.step_kernels += plain
    assert cells(budget_section([record]), "block products")[2] == "33.0"
    for found in record.step_kernels:
        found.shape = {**SHAPE, "B": 32}
    assert budget_section([record]) == budget_section([])


def test_every_part_has_a_rate_with_a_source() -> None:
    used = {part.rate for line in LINES for column in line.parts.values() for part in column}
    assert used == set(RATES) and all(rate.source for rate in RATES.values())
    assert all(f"| {name} |" in rates_section([]) for name in RATES)
    assert all(title in parts_section([]) for title in TITLES)
