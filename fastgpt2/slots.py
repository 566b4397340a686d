"""The slots of the model and what can compute each: one line an implementation, with all that is asked about it.

A slot's name is its flag: --attn, --mlp, --norm, --loss. From this table follow the flags' choices and errors, what
`auto` picks, verify's backends, the parity tests, the benchmarks and their counts. An implementation from outside needs
no line here: `--attn mypackage.module:function`, see docs/extending.md.

Functions are written "module:function" and imported when chosen, so that neither Triton nor a kernel is imported by a
run that doesn't use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Implementation:
    """What computes a slot.

    Args:
        function: "module:function"; the plain forms in fastgpt2.backends say how it is called.
        why_not: "module:function" that says why it can't run, or None where it can.
        asks: the fields of fastgpt2.ops.Site that why_not is called with.
        options: keyword arguments of every call.
        tf32: also takes allow_tf32: whether float32 products may be TF32.
        bias_gradient: also takes the bias that the product before it has already added, and returns its gradient: an
            attention as bias, a norm as branch_bias.
        stream_gradient: also takes stream_gradient, the dtype of the residual stream's gradient.
        package: what has to be installed for it, beside torch.
        interpreted: on a CPU it runs in Triton's interpreter: `auto` leaves it out there, and its time says nothing.
        cuda: trains on a CUDA GPU only.
        mps: may be chosen with --device mps.
        deterministic: adds in a fixed order.
        ours: its kernels or its loop are ours, not PyTorch's.
        picks_kernel: PyTorch picks its kernel; which one also depends on whether algorithms must be deterministic.
        fake: runs on fake tensors, on which activations are counted.
    """

    function: str
    why_not: str = ""
    asks: tuple[str, ...] = ("device", "dtype")
    options: Mapping[str, Any] = field(default_factory=dict)
    tf32: bool = False
    bias_gradient: bool = False
    stream_gradient: bool = False
    package: str = ""
    interpreted: bool = False
    cuda: bool = False
    mps: bool = False
    deterministic: bool = True
    ours: bool = False
    picks_kernel: bool = False
    fake: bool = True


_TRITON: dict[str, Any] = {"package": "triton", "interpreted": True, "ours": True}

SLOTS: dict[str, dict[str, Implementation]] = {
    "attn": {
        "naive": Implementation("fastgpt2.backends.attention:naive_attention"),
        "sdpa": Implementation("fastgpt2.backends.attention:sdpa_attention", mps=True, picks_kernel=True),
        "cudnn": Implementation(
            "fastgpt2.backends.attention:cudnn_attention",
            why_not="fastgpt2.backends.attention:cudnn_why_not",
            asks=("device", "dtype", "head_dim", "dropout"),
            cuda=True,
            deterministic=False,
        ),
        "flex": Implementation(
            "fastgpt2.backends.attention:flex_attention",
            why_not="fastgpt2.backends.attention:flex_why_not",
            asks=("device", "head_dim", "dropout"),
            cuda=True,
            fake=False,
        ),
        "triton-hopper": Implementation(
            "fastgpt2.kernels.attention:flash_attention_qkv",
            why_not="fastgpt2.kernels.attention:hopper_why_unsupported",
            asks=("device", "dtype", "head_dim", "dropout"),
            options={"hopper": True},
            package="triton",
            cuda=True,
            ours=True,
            bias_gradient=True,
        ),
        "triton": Implementation(
            "fastgpt2.kernels.attention:flash_attention_qkv",
            "fastgpt2.kernels.attention:why_unsupported",
            **_TRITON,
            asks=("device", "dtype", "head_dim", "dropout"),
            tf32=True,
            bias_gradient=True,
        ),
    },
    "mlp": {
        "torch": Implementation("fastgpt2.backends.mlp:torch_mlp", mps=True),
        "triton": Implementation(
            "fastgpt2.kernels.mlp:gelu_mlp", "fastgpt2.kernels.mlp:why_unsupported", **_TRITON, tf32=True
        ),
    },
    "norm": {
        "torch": Implementation("fastgpt2.backends.norm:torch_norm", mps=True),
        "triton": Implementation(
            "fastgpt2.kernels.norm:stream_norm",
            "fastgpt2.kernels.norm:why_unsupported",
            **_TRITON,
            asks=("device", "dtype", "n_embd"),
            bias_gradient=True,
            stream_gradient=True,
        ),
    },
    "loss": {
        "torch": Implementation("fastgpt2.backends.loss:torch_loss", mps=True),
        "chunked": Implementation(
            "fastgpt2.kernels.loss:linear_cross_entropy", mps=True, ours=True, options={"implementation": "chunked"}
        ),
        "triton": Implementation(
            "fastgpt2.kernels.loss:linear_cross_entropy",
            "fastgpt2.kernels.loss:why_unsupported",
            **_TRITON,
            options={"implementation": "triton"},
        ),
    },
}
REFERENCE = {slot: next(iter(table)) for slot, table in SLOTS.items()}
"""The first of each slot: the plain form, which in float64 the others are compared with."""
TORCH = {"attn": "sdpa", "mlp": "torch", "norm": "torch", "loss": "torch"}
"""PyTorch's own form of each, which an ablation begins with. They run everywhere."""
OURS = {slot: [name for name, known in table.items() if known.ours][-1] for slot, table in SLOTS.items()}
"""Our kernel for each."""
AUTO = {"attn": ("sdpa",), "mlp": ("torch",), "norm": ("torch",), "loss": ("triton", "chunked")}
"""What `auto` tries in turn if nothing was measured: PyTorch's own form. Only the loss needs no measurement. In chunks
the logits are never whole. Triton passes over each chunk twice, PyTorch about ten times. The last of a slot runs
everywhere: errors suggest it."""


def is_outside(name: str) -> bool:
    """Whether a choice is a "module:function" from outside."""
    return ":" in name


def implementation(slot: str, name: str) -> Implementation:
    """What is known of a choice: its line in the table; of one from outside nothing but its name."""
    return Implementation(name) if is_outside(name) else SLOTS[slot][name]
