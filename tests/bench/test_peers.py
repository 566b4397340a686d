"""The peers of the benchmarks: called with the right arguments, right where they can run here, and plain about why not.

Packages whose kernels Triton can interpret run here where they are installed. The others meet a stand-in of the same
interface that computes what its arguments ask for: another scale, mask, layout or reduction would be out of budget. On
a GPU the benchmarks themselves compare every peer with float64 before they time it.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.contest import Unavailable
from bench.ops import peers
from bench.ops.budget import Yardstick
from bench.ops.peers import PEERS, torch_add_layer_norm
from bench.timing import PEER_PACKAGES
from fastgpt2.backends.attention import naive_attention
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.kernels.loss import linear_cross_entropy_reference
from tests.seeds import generator

pytestmark = pytest.mark.numeric
PLAIN = {
    "attention": naive_attention,
    "mlp": torch_mlp,
    "add_layer_norm": torch_add_layer_norm,
    "linear_cross_entropy": linear_cross_entropy_reference,
}


def load(op: str, name: str) -> Any:
    try:
        return PEERS[op][name].loaded()
    except Unavailable as reason:
        pytest.skip(str(reason))


def draw(op: str, dtype: torch.dtype, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    """What a peer is given, as in the benchmarks: the inputs with gradients and without."""
    rng = generator(seed)
    rows, C, V = 24, 32, 96

    def normal(*size: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (scale * torch.randn(size, generator=rng)).to(dtype)

    if op == "attention":
        return [normal(2, 19, 3, 2, 16)], []
    if op == "mlp":
        w_fc, w_proj = normal(4 * C, C, scale=C**-0.5), normal(C, 4 * C, scale=(4 * C) ** -0.5)
        return [normal(rows, C), w_fc, normal(4 * C), w_proj, normal(C)], []
    if op == "add_layer_norm":  # the stream and the parameters are float32 in training
        stream = [normal(rows, C, dtype=torch.float32), 1 + 0.3 * normal(C, dtype=torch.float32)]
        return [normal(rows, C), *stream, normal(C, dtype=torch.float32)], []
    targets = torch.randint(V, (rows,), generator=rng)
    return [normal(rows, C), normal(V, C, scale=3 * C**-0.5)], [targets]


def assert_right(op: str, function: Any, dtype: torch.dtype) -> None:
    """Outputs and gradients within budget of the plain form in float64."""

    def results(function: Any, seed: int, double: bool = False) -> list[Tensor]:
        inputs, rest = draw(op, dtype, seed)
        given = [(x.double() if double else x).requires_grad_() for x in inputs]
        outputs = function(*given, *rest)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        rng = generator(seed + 1)
        upstream = [torch.randn(y.shape, generator=rng).to(y) for y in outputs]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, given, upstream)]

    mine, plain = results(function, 0), results(PLAIN[op], 0)
    assert [(x.shape, x.dtype) for x in mine] == [(x.shape, x.dtype) for x in plain], op
    exact = functools.partial(results, PLAIN[op], double=True)
    names = [f"{op}, tensor {i}" for i in range(len(plain))]
    Yardstick(names, exact, functools.partial(results, PLAIN[op])).check(mine)


# ------------------------------------------------------------------------------------------------ what runs here


@pytest.mark.parametrize(
    ("op", "name"),
    [
        ("mlp", "torch"),
        ("add_layer_norm", "torch"),
        ("linear_cross_entropy", "torch"),
        ("linear_cross_entropy", "torch-linear-cross-entropy"),
        ("linear_cross_entropy", "torch-linear-cross-entropy-chunks"),
    ],
)
def test_pytorchs_own_are_within_budget(op: str, name: str) -> None:
    assert_right(op, load(op, name), torch.float32)


@pytest.mark.parametrize("op", PEERS)
def test_what_is_compiled_is_the_plain_form_in_one_graph(monkeypatch, op: str) -> None:
    monkeypatch.setattr(peers, "CUDA", True)
    monkeypatch.setattr(torch, "compile", lambda function, **options: (function, options))
    name = "naive-compiled" if op == "attention" else "torch-compiled"
    assert PEERS[op][name].loaded() == (PLAIN[op], {"fullgraph": True, "dynamic": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["liger", "liger-float32-sums"])
def test_liger_interpreted_is_within_budget(name: str, dtype: torch.dtype) -> None:
    assert_right("linear_cross_entropy", load("linear_cross_entropy", name), dtype)


@pytest.mark.parametrize("name", ["cut-cross-entropy", "cut-cross-entropy-unfiltered"])
def test_cut_cross_entropy_interpreted_is_within_budget(monkeypatch, name: str) -> None:
    """In float16: the interpreter multiplies bfloat16 elementwise as the integers that hold it."""
    head = load("linear_cross_entropy", name)
    import triton.language as tl
    from cut_cross_entropy import tl_utils

    # Functions of CUDA's library, which the interpreter takes for None.
    monkeypatch.setattr(tl_utils, "tl_libdevice", SimpleNamespace(log1p=lambda x: tl.log(1.0 + x)))
    # The order of its filter is compiled, which takes a C++ compiler longer than the rest of this file.
    monkeypatch.setattr("cut_cross_entropy.cce.sort_logit_avg", lambda x: torch.argsort(x).to(torch.int32))
    assert_right("linear_cross_entropy", head, torch.float16)


# ------------------------------------------------------------------------------------------------ stand-ins


def stand_in(monkeypatch: pytest.MonkeyPatch, path: str, **functions: Any) -> None:
    """A module of that path on an H100, and what it is in."""
    monkeypatch.setattr(peers, "_capability", lambda: (9, 0))
    parts = path.split(".")
    for i in range(1, len(parts) + 1):
        module = ModuleType(".".join(parts[:i]))
        module.__path__ = []  # type: ignore[attr-defined]
        if i == len(parts):
            vars(module).update(functions)
        monkeypatch.setitem(sys.modules, ".".join(parts[:i]), module)


def attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None, causal: bool) -> Tensor:
    """q, k, v and o (B, T, H, D), as all of Flash Attention's interfaces have them."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale).transpose(1, 2)


def packed_2(
    qkv, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    deterministic=False, return_attn_probs=False,
):  # fmt: skip
    assert dropout_p == 0.0 and not return_attn_probs
    return attend(*qkv.unbind(2), softmax_scale, causal)


def packed_3(
    qkv, softmax_scale=None, causal=False, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1),
    attention_chunk=0, softcap=0.0, deterministic=False, num_heads_q=None, sm_margin=0, return_softmax=False,
):  # fmt: skip
    out = attend(*qkv.unbind(2), softmax_scale, causal)
    return (out, out.detach().sum(-1)) if return_softmax else out


def separate_4(
    q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, window_size=(None, None),
):  # fmt: skip
    assert qv is None and gather_kv_indices is None
    return attend(q, k, v, softmax_scale, causal), None


@pytest.mark.parametrize(
    ("name", "path", "functions"),
    [
        ("flash-attn", "flash_attn.flash_attn_interface", {"flash_attn_qkvpacked_func": packed_2}),
        ("flash-attn-3", "flash_attn_interface", {"flash_attn_qkvpacked_func": packed_3}),
        ("flash-attn-4", "flash_attn.cute", {"flash_attn_func": separate_4}),
    ],
)
def test_flash_attention_is_asked_for_gpt2s_attention(monkeypatch, name: str, path: str, functions: dict) -> None:
    stand_in(monkeypatch, path, **functions)
    function = PEERS["attention"][name].loaded()
    assert_right("attention", function, torch.float32)
    qkv = torch.randn(1, 5, 3, 2, 16, requires_grad=True)
    function(qkv).sum().backward()
    assert qkv.grad is not None and qkv.grad.is_contiguous() and qkv.grad.shape == qkv.shape


def liger_fused_linear_cross_entropy(
    input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, label_smoothing=0.0,
    reduction="mean", softcap=None, return_z_loss=False, accum_dtype=None,
):  # fmt: skip
    return F.cross_entropy(F.linear(input, weight, bias), target, ignore_index=ignore_index, reduction=reduction)


def linear_cross_entropy(
    e, c, targets, ignore_index=-100, softcap=None, reduction="mean", shift=False, filter_eps="high", impl="cce"
):
    assert e.shape[:-1] == targets.shape and filter_eps in ("high", None)
    e, c = e.float(), c.float()  # its loss is float32
    return F.cross_entropy(F.linear(e, c), targets, ignore_index=ignore_index, reduction=reduction)


def chunked_linear_cross_entropy(
    x, weight, target, chunk_size=4096, ignore_index=-100, reduction="mean", tuned=True, use_scaled_exp=None
):
    assert chunk_size % 8 == 0 and x.numel() // x.size(-1) % 8 == 0
    return F.cross_entropy(F.linear(x, weight), target, ignore_index=ignore_index, reduction=reduction)


def mlp_func(x, weight1, weight2, activation, bias1=None, bias2=None, fuse_grad_accum=False, tuned=True):
    act = {"gelu_tanh_approx": lambda h: F.gelu(h, approximate="tanh"), "relu": F.relu}[activation]
    return F.linear(act(F.linear(x, weight1, bias1)), weight2, bias2)


class LigerLayerNormFunction:
    @staticmethod
    def apply(X, W, B, eps):
        assert X.dtype == W.dtype == B.dtype
        return F.layer_norm(X, W.shape, W, B, eps)


def layernorm_fwd(x, weight, bias=None, eps=1e-6, return_rstd=False, return_mean=False):
    assert x.dim() == 2 and weight.dtype == bias.dtype == torch.float32
    y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
    return (y, rstd.flatten(), mean.flatten()) if return_rstd and return_mean else y


def layernorm_bwd(x, weight, dout, rstd, mean, has_bias=True):
    assert dout.is_contiguous() and rstd.shape == mean.shape == x.shape[:1]
    zeros = torch.zeros_like(weight) if has_bias else None
    return torch.ops.aten.native_layer_norm_backward(
        dout, x, weight.shape, mean[:, None], rstd[:, None], weight, zeros, [True, True, has_bias]
    )


LIGER = "liger_kernel.transformers.functional"
LOSS = "linear_cross_entropy"


@pytest.mark.parametrize(
    ("op", "name", "path", "functions"),
    [
        (LOSS, "quack", "quack.linear_cross_entropy", [chunked_linear_cross_entropy]),
        (LOSS, "liger", LIGER, [liger_fused_linear_cross_entropy]),
        (LOSS, "liger-float32-sums", LIGER, [liger_fused_linear_cross_entropy]),
        (LOSS, "cut-cross-entropy", "cut_cross_entropy", [linear_cross_entropy]),
        (LOSS, "cut-cross-entropy-unfiltered", "cut_cross_entropy", [linear_cross_entropy]),
        ("mlp", "quack", "quack.mlp", [mlp_func]),
        ("add_layer_norm", "quack", "quack.rmsnorm", [layernorm_fwd, layernorm_bwd]),
        ("add_layer_norm", "liger", "liger_kernel.ops.layer_norm", [LigerLayerNormFunction]),
    ],
)
def test_packages_are_asked_for_gpt2s_operations(monkeypatch, op: str, name: str, path: str, functions: list) -> None:
    stand_in(monkeypatch, path, **{function.__name__: function for function in functions})
    assert_right(op, PEERS[op][name].loaded(), torch.bfloat16 if "cut" in name else torch.float32)


def test_settings_that_are_rows_of_their_own(monkeypatch) -> None:
    asked: list[Any] = []
    stand_in(monkeypatch, LIGER, liger_fused_linear_cross_entropy=lambda *_, **given: asked.append(given))
    stand_in(monkeypatch, "cut_cross_entropy", linear_cross_entropy=lambda *_, **given: asked.append(given))
    half = torch.zeros(8, 4, dtype=torch.float16)
    for name in ("liger", "liger-float32-sums", "cut-cross-entropy", "cut-cross-entropy-unfiltered"):
        PEERS[LOSS][name].loaded()(half, half, torch.zeros(8, dtype=torch.int64))
    assert [given.get("accum_dtype", given.get("filter_eps")) for given in asked] == [None, torch.float32, "high", None]
    with pytest.raises(Unavailable, match=r"a backward in bfloat16 and float16 only, got torch\.float32"):
        PEERS[LOSS]["cut-cross-entropy"].loaded()(half.float(), half.float(), torch.zeros(8, dtype=torch.int64))


@pytest.mark.parametrize("name", ["liger", "cut-cross-entropy"])
def test_without_gradients_none_are_made(monkeypatch, name: str) -> None:
    """Both decide by the tensors' requires_grad, which under torch.no_grad() is what it was."""
    needed: list[bool] = []

    def head(hidden: Tensor, weight: Tensor, *_: Any, **__: Any) -> None:
        needed.append(hidden.requires_grad or weight.requires_grad)

    stand_in(monkeypatch, LIGER, liger_fused_linear_cross_entropy=head)
    stand_in(monkeypatch, "cut_cross_entropy", linear_cross_entropy=head)
    inputs, rest = draw(LOSS, torch.bfloat16, 0)
    given = [x.requires_grad_() for x in inputs]
    PEERS[LOSS][name].loaded()(*given, *rest)
    with torch.no_grad():
        PEERS[LOSS][name].loaded()(*given, *rest)
    assert needed == [True, False]


def test_a_stand_in_called_wrongly_is_out_of_budget(monkeypatch) -> None:
    wrong = {"flash_attn_qkvpacked_func": lambda qkv, causal: packed_2(qkv, causal=False)}
    stand_in(monkeypatch, "flash_attn.flash_attn_interface", **wrong)
    with pytest.raises(AssertionError, match="not timed: attention, tensor 0 by maximum is off"):
        assert_right("attention", PEERS["attention"]["flash-attn"].loaded(), torch.float32)


# ------------------------------------------------------------------------------------------------ why not


def reason(op: str, name: str) -> str:
    with pytest.raises(Unavailable) as raised:
        PEERS[op][name].loaded()
    return str(raised.value)


@pytest.mark.parametrize("capability", [None, (9, 0)])
def test_every_peer_loads_or_says_in_a_line_why_not(monkeypatch, capability: tuple[int, int] | None) -> None:
    monkeypatch.setattr(peers, "_capability", lambda: capability)
    for name, peer in ((name, peer) for table in PEERS.values() for name, peer in table.items()):
        assert peer.role == ("floor" if name.endswith("-apart") else "peer")
        try:
            assert callable(peer.loaded())
        except Unavailable as error:
            assert "\n" not in str(error) and len(str(error)) < 120
            if "is not installed" in str(error):
                assert str(error).split()[0] in PEER_PACKAGES, "a record has its version"


@pytest.mark.skipif(importlib.util.find_spec("quack") is not None, reason="quack is installed")
def test_a_package_that_is_not_installed(monkeypatch) -> None:
    monkeypatch.setattr(peers, "_capability", lambda: (9, 0))
    assert reason("mlp", "quack") == "quack-kernels is not installed: pip install quack-kernels"
    stand_in(monkeypatch, "flash_attn")  # the name that version 2 and 4 share
    for name in ("flash-attn", "flash-attn-4"):
        assert reason("attention", name) == f"{name} is not installed: pip install {name}"


def test_a_package_that_does_not_fit(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(peers, "_capability", lambda: (9, 0))
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "quack").mkdir()
    (tmp_path / "quack" / "mlp.py").write_text("import surely_not_installed")
    (tmp_path / "quack" / "rmsnorm.py").write_text("raise AttributeError('no ThrMma\\nand more')")
    for name in [name for name in sys.modules if name.partition(".")[0] == "quack"]:
        monkeypatch.delitem(sys.modules, name)
    assert reason("mlp", "quack") == "quack-kernels can't be imported: No module named 'surely_not_installed'"
    expected = f"quack-kernels can't be imported with torch {torch.__version__}: no ThrMma"
    assert reason("add_layer_norm", "quack") == expected
    sys.modules.pop("quack", None)


def test_a_gpu_that_is_too_old_or_not_there(monkeypatch) -> None:
    monkeypatch.setattr(peers, "_capability", lambda: (8, 0))
    assert reason("mlp", "quack") == "quack-kernels needs compute capability 9.0, this GPU has 8.0"
    monkeypatch.setattr(peers, "_capability", lambda: None)
    assert reason("mlp", "quack") == "quack-kernels needs a CUDA GPU"
    monkeypatch.setattr(peers.launch, "interpreting", lambda: False)
    assert reason("add_layer_norm", "liger") == "liger-kernel needs a CUDA GPU"


def test_compiling_on_a_cpu_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setattr(peers, "CUDA", False)
    monkeypatch.setenv("CXX", "surely-no-compiler")
    assert reason("mlp", "torch-compiled") == (
        "torch.compile on a CPU needs a C++ compiler and surely-no-compiler is not found"
    )


def test_sdpa_is_held_to_a_kernel(monkeypatch) -> None:
    """A CPU has the flash kernel; where the GPU's has none PyTorch says so, in words that are repeated here."""
    monkeypatch.setattr(peers, "CUDA", True)
    assert_right("attention", PEERS["attention"]["sdpa-flash"].loaded(), torch.float32)
    apart = PEERS["attention"]["sdpa-flash-apart"].loaded()
    assert_right("attention", lambda qkv: apart(*qkv.permute(2, 0, 3, 1, 4).unbind(0)), torch.float32)

    def enabled(*_: Any, **__: Any) -> Any:
        backends = torch.backends.cuda
        assert backends.cudnn_sdp_enabled()
        assert not (backends.flash_sdp_enabled() or backends.mem_efficient_sdp_enabled() or backends.math_sdp_enabled())
        raise RuntimeError("No available kernel. Aborting execution.")

    monkeypatch.setattr(F, "scaled_dot_product_attention", enabled)
    with pytest.raises(Unavailable, match="PyTorch has no CUDNN_ATTENTION kernel for these inputs here"):
        PEERS["attention"]["sdpa-cudnn"].loaded()(torch.randn(1, 5, 3, 2, 16))
