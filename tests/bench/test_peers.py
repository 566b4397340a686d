"""The peers of the benchmarks: right where they can run here, and plain about why not.

On a GPU the benchmarks themselves compare every peer with float64 before they time it.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.contest import Unavailable
from bench.ops import peers
from bench.ops.bench_attention import AttentionContest, AttentionShape
from bench.ops.bench_loss import HeadContest, HeadShape
from bench.ops.bench_norm import NormContest, NormShape
from bench.ops.op_contest import SlotContest
from fastgpt2.backends.attention import naive_attention
from fastgpt2.slots import SLOTS

ATTENTION: SlotContest = AttentionContest(AttentionShape(2, 19, 2, 16, torch.float32), "backward")
NORM: SlotContest = NormContest(NormShape(24, 32, torch.float32), "backward")
HEAD: SlotContest = HeadContest(HeadShape(24, 32, 96, torch.float32), "training")


@pytest.mark.parametrize(
    ("contest", "name"),
    [
        (ATTENTION, "sdpa"),
        (ATTENTION, "sdpa-flash"),
        (ATTENTION, "sdpa-flash-apart"),
        (HEAD, "torch-linear-cross-entropy"),
        (HEAD, "torch-linear-cross-entropy-chunks"),
        (HEAD, "liger"),
    ],
)
def test_those_that_run_here_are_within_budget(
    monkeypatch: pytest.MonkeyPatch, contest: SlotContest, name: str
) -> None:
    monkeypatch.setattr(peers, "CUDA", True)  # a CPU has the flash kernel, too
    try:
        function = contest.candidates[name].loaded()
    except Unavailable as reason:
        pytest.skip(str(reason))
    contest.check(name, function)


def test_what_is_compiled_is_the_plain_form_in_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CUDA", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function.func, options))
    compiled = ATTENTION.candidates["naive-compiled"].loaded()
    assert compiled == (naive_attention, {"fullgraph": True, "dynamic": False})


def test_the_slots_implementations_are_candidates_and_ours_are_ours() -> None:
    ours = {name for name, candidate in HEAD.candidates.items() if candidate.role == "ours"}
    assert ours == {"chunked", "triton"} and set(SLOTS["loss"]) <= HEAD.candidates.keys()
    assert [name for name, candidate in ATTENTION.candidates.items() if candidate.role == "floor"] == [
        "sdpa-cudnn-apart",
        "sdpa-flash-apart",
    ]


def test_every_candidate_loads_or_says_in_a_line_why_not() -> None:
    for candidate in (c for contest in (ATTENTION, NORM, HEAD) for c in contest.candidates.values()):
        try:
            assert callable(candidate.loaded())
        except Unavailable as error:
            assert "\n" not in str(error) and len(str(error)) < 120


def test_compiling_on_a_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CUDA", False)
    monkeypatch.setenv("CXX", "surely-no-compiler")
    expected = "torch.compile on a CPU needs a C\\+\\+ compiler and surely-no-compiler is not found"
    with pytest.raises(Unavailable, match=expected):
        HEAD.candidates["torch-compiled"].loaded()


def test_an_attention_kernel_that_cannot_take_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CUDA", True)

    def lacking(*_: Any, **__: Any) -> Any:
        backends = torch.backends.cuda
        assert backends.cudnn_sdp_enabled()
        assert not (backends.flash_sdp_enabled() or backends.mem_efficient_sdp_enabled() or backends.math_sdp_enabled())
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", lacking)
    with pytest.raises(Unavailable, match="PyTorch has no CUDNN_ATTENTION kernel for these inputs here"):
        ATTENTION.candidates["sdpa-cudnn-apart"].loaded()(*torch.randn(3, 1, 2, 5, 16))
