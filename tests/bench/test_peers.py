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
from bench.ops.op_contest import SlotContest
from bench.ops.peers import PEERS, torch_add_layer_norm
from fastgpt2.backends.attention import naive_attention
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.kernels.loss import linear_cross_entropy_reference

ATTENTION: SlotContest = AttentionContest(AttentionShape(2, 19, 2, 16, torch.float32), "backward")
HEAD: SlotContest = HeadContest(HeadShape(24, 32, 96, torch.float32), "training")
PLAIN = {
    "attention": naive_attention,
    "mlp": torch_mlp,
    "add_layer_norm": torch_add_layer_norm,
    "linear_cross_entropy": linear_cross_entropy_reference,
}


@pytest.mark.parametrize(
    ("contest", "name"),
    [
        (ATTENTION, "sdpa"),
        (ATTENTION, "sdpa-flash"),
        (ATTENTION, "sdpa-flash-apart"),
        (HEAD, "torch-linear-cross-entropy"),
        (HEAD, "torch-linear-cross-entropy-chunks"),
    ],
)
def test_pytorchs_own_are_within_budget(monkeypatch: pytest.MonkeyPatch, contest: SlotContest, name: str) -> None:
    monkeypatch.setattr(peers, "CUDA", True)  # a CPU has the flash kernel, too
    try:
        function = contest.candidates[name].loaded()
    except Unavailable as reason:
        pytest.skip(str(reason))
    contest.check(name, function)


@pytest.mark.parametrize("op", PEERS)
def test_what_is_compiled_is_the_plain_form_in_one_graph(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    monkeypatch.setattr(peers, "CUDA", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function, options))
    name = "naive-compiled" if op == "attention" else "torch-compiled"
    assert PEERS[op][name].loaded() == (PLAIN[op], {"fullgraph": True, "dynamic": False})


def test_every_peer_loads_or_says_in_a_line_why_not() -> None:
    for name, peer in ((name, peer) for table in PEERS.values() for name, peer in table.items()):
        assert peer.role == ("floor" if name.endswith("-apart") else "peer")
        try:
            assert callable(peer.loaded())
        except Unavailable as error:
            assert "\n" not in str(error) and len(str(error)) < 120


def test_compiling_on_a_cpu_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CUDA", False)
    monkeypatch.setenv("CXX", "surely-no-compiler")
    expected = "torch.compile on a CPU needs a C\\+\\+ compiler and surely-no-compiler is not found"
    with pytest.raises(Unavailable, match=expected):
        PEERS["mlp"]["torch-compiled"].loaded()


def test_an_attention_kernel_that_cannot_take_the_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "CUDA", True)

    def lacking(*_: Any, **__: Any) -> Any:
        backends = torch.backends.cuda
        assert backends.cudnn_sdp_enabled()
        assert not (backends.flash_sdp_enabled() or backends.mem_efficient_sdp_enabled() or backends.math_sdp_enabled())
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", lacking)
    with pytest.raises(Unavailable, match="PyTorch has no CUDNN_ATTENTION kernel for these inputs here"):
        PEERS["attention"]["sdpa-cudnn"].loaded()(torch.randn(1, 5, 3, 2, 16))
