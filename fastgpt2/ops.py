"""The seam: which implementation computes each slot of the model.

Modules own parameters, ops own compute. An `Ops` is handed to the model's constructor; the state_dict is
the same whatever it holds, so "the backends agree" means: same weights, other ops, same loss. A new
implementation is one function and one line in a table. Values are "module:function", imported when
chosen, so that neither Triton nor a kernel is imported by a run that doesn't use it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.backends.attention import sdpa_attention, unsupported
from fastgpt2.backends.loss import torch_loss
from fastgpt2.backends.mlp import torch_mlp
from fastgpt2.backends.norm import torch_norm
from fastgpt2.config import ConfigError

ATTENTION: dict[str, str] = {
    "naive": "fastgpt2.backends.attention:naive_attention",
    "sdpa": "fastgpt2.backends.attention:sdpa_attention",
    "cudnn": "fastgpt2.backends.attention:cudnn_attention",
    "flex": "fastgpt2.backends.attention:flex_attention",
    "triton": "fastgpt2.kernels.attention:flash_attention_qkv",
}
MLP: dict[str, str] = {
    "torch": "fastgpt2.backends.mlp:torch_mlp",
    "triton": "fastgpt2.kernels.mlp:gelu_mlp",
}
NORM: dict[str, str] = {
    "torch": "fastgpt2.backends.norm:torch_norm",
    "triton": "fastgpt2.backends.norm:fused_norm",
}
LOSS: dict[str, str] = {
    "torch": "fastgpt2.backends.loss:torch_loss",
    "chunked": "fastgpt2.kernels.loss:linear_cross_entropy",
    "triton": "fastgpt2.kernels.loss:linear_cross_entropy",
}
SLOTS = {"attn": ATTENTION, "mlp": MLP, "norm": NORM, "loss": LOSS}
AUTO = {"attn": ("sdpa",), "mlp": ("torch",), "norm": ("torch",), "loss": ("triton", "chunked")}
"""What `auto` is where nothing was measured, the first that can run without being interpreted: PyTorch's own form. The
loss alone needs no measurement: only in chunks are the logits never whole, and of the two that do so Triton's passes
over a chunk twice, PyTorch's some ten times. On a GPU in auto.json what was faster there in the compiled step and in
this precision comes before."""
MEASURED = Path(__file__).with_name("auto.json")

AttentionOp = Callable[..., Tensor]
MlpOp = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
NormOp = Callable[..., tuple[Tensor, Tensor | None]]
LossOp = Callable[..., Tensor]


@dataclass(frozen=True)
class Ops:
    """One implementation a slot. The shapes are in the plain forms, fastgpt2.backends."""

    attn: AttentionOp = sdpa_attention
    mlp: MlpOp = torch_mlp
    norm: NormOp = torch_norm
    loss: LossOp = torch_loss


def make_ops(
    choices: Mapping[str, str] | None = None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    dropout: float = 0.0,
    tf32: bool = False,
) -> tuple[Ops, dict[str, str]]:
    """The ops asked for, and what each choice became: {"attn": "sdpa", "mlp": "torch", ...}.

    Args:
        choices: by slot, a key of its table or "auto", which is what slots left out are.
        device, dtype: where and in what the matmuls are.
        head_dim, dropout: what the attention will be called with.
        tf32: float32 products on the matrix units in TF32 (10 bits of mantissa) rather than exactly.

    Raises:
        ConfigError: an implementation named can't run here; the message says why and what would.
    """
    device = torch.device(device)
    why_not = partial(_why_not, device=device, dtype=dtype, head_dim=head_dim, dropout=dropout)
    order = _auto(device, "tf32" if tf32 else str(dtype).removeprefix("torch."))
    chosen, functions = {}, {}
    for slot, table in SLOTS.items():
        name = (choices or {}).get(slot, "auto")
        if name == "auto":
            name = next(n for n in order[slot] if (device.type == "cuda" or n != "triton") and not why_not(slot, n))
        if name not in table:
            raise ConfigError(f"no --{slot} {name!r}: there are auto, {', '.join(table)}")
        if reason := why_not(slot, name):
            raise ConfigError(f"--{slot} {name} can't run here: {reason}")
        chosen[slot] = name
        functions[slot] = partial(_load(SLOTS[slot][name]), **_options(slot, name, tf32))
    return Ops(**functions), chosen


def _auto(device: torch.device, precision: str) -> dict[str, tuple[str, ...]]:
    """What `auto` tries in turn, by slot: what was measured to be faster on this GPU in this precision, then AUTO."""
    faster = ablation(device, precision).get("slots", {})
    return {slot: (*faster.get(slot, ()), *names) for slot, names in AUTO.items()}


def ablation(device: torch.device, precision: str) -> dict[str, Any]:
    """auto.json's entry for this GPU in this precision; empty where nobody has measured it."""
    # A GPU that isn't there (its ops can be made and inspected) has no name.
    name = torch.cuda.get_device_name(device) if device.type == "cuda" and torch.cuda.is_available() else None
    return _measured().get(name, {}).get(precision, {})


@cache
def _measured() -> dict[str | None, dict[str, Any]]:
    """auto.json's devices, which `python -m bench.report` writes from what bench/results holds."""
    return json.loads(MEASURED.read_text(encoding="utf-8"))["devices"]


def _options(slot: str, name: str, tf32: bool) -> dict[str, Any]:
    """What an implementation is told beside its tensors."""
    if slot == "loss" and name != "torch":
        return {"implementation": name}
    if (slot, name) == ("norm", "triton"):
        return {
            "alone": _load("fastgpt2.kernels.norm:layer_norm"),
            "added": _load("fastgpt2.kernels.norm:add_layer_norm"),
        }
    return {"allow_tf32": tf32} if name == "triton" and slot in ("attn", "mlp") else {}


def _why_not(
    slot: str, name: str, device: torch.device, dtype: torch.dtype, head_dim: int, dropout: float
) -> str | None:
    """Why an implementation can't run, in a line that says what would work; None where it can."""
    if name != "triton":
        return unsupported(name, device, dtype, head_dim, dropout) if slot == "attn" else None
    try:
        launch = import_module("fastgpt2.kernels.launch")
        import_module("triton")
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        return f"the triton package is missing (it is published for Linux); use --{slot} {AUTO[slot][-1]}"
    if slot == "attn":
        return import_module("fastgpt2.kernels.attention").why_unsupported(device, dtype, head_dim, dropout)
    return launch.why_unsupported(f"Triton's {slot}", device, dtype, f"--{slot} {AUTO[slot][-1]}")


def _load(path: str) -> Callable[..., Any]:
    module, function = path.split(":")
    return getattr(import_module(module), function)
