"""What is measured: sizes and candidates, on a GPU those of GPT-2 124M, on a CPU small ones.

The rows are the table `fastgpt2.ops.ATTENTION`; beside them stand peers, PyTorch's own kernels picked by name,
because `sdpa` alone misleads: on Hopper it takes FlashAttention-2 where cuDNN is faster.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.roofline import Work
from fastgpt2.config import ConfigError
from fastgpt2.ops import ATTENTION, make_ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")


@dataclass(frozen=True)
class AttentionShape:
    """B sequences of T tokens, H heads of D channels."""

    B: int
    T: int
    H: int
    D: int
    dtype: torch.dtype

    def work(self, direction: str) -> Work:
        """Forward 4 B H T^2 D FLOPs (two matmuls), halved because half the pairs are masked; backward 2.5 times it.

        An exponential for every pair that is not masked, in each direction. Bytes: forward qkv, o and the log-sum-exp
        of each row (float32); backward these, do and dqkv.
        """
        pairs, rows = self.B * self.H * self.T**2 / 2, self.B * self.H * self.T
        flops = {"forward": 4.0, "backward": 10.0}[direction] * pairs * self.D
        moved = {"forward": 4, "backward": 8}[direction] * rows * self.D * self.dtype.itemsize + 4 * rows
        counted = "what it is given, gives and keeps, once"
        return Work(self.B * self.T, flops, moved, pairs, ATTENTION_FLOPS[direction], counted)


ATTENTION_FLOPS = {"forward": "4 B H T^2 D / 2 (causal)", "backward": "2.5 * 4 B H T^2 D / 2 (causal)"}
"""AttentionShape.work's FLOPs in words, recorded beside every figure that they enter."""


@dataclass(frozen=True)
class StepShape:
    """A training step of a preset at its full context, with fewer blocks where n_layer says so."""

    model: str
    batch_size: int
    dtype: str
    n_layer: int | None = None


if CUDA:
    # The same 65,536 tokens at every length, so that only the attention's T^2 grows.
    ATTENTION_SHAPES = [AttentionShape(65536 // T, T, 12, 64, torch.bfloat16) for T in (1024, 2048, 4096, 8192)]
    # The widths of the larger models, and few tokens, where launching takes longer than computing.
    ATTENTION_SHAPES += [AttentionShape(64, 1024, H, 64, torch.bfloat16) for H in (16, 20, 25)]
    ATTENTION_SHAPES += [AttentionShape(4, 1024, 12, 64, torch.bfloat16)]
    # By importance: a run that is cut short has the middle size of every candidate first.
    # 1 and 4 are where launching takes longer than computing.
    STEP_SHAPES = [StepShape("gpt2", B, "bfloat16") for B in (32, 64, 16, 4, 1)]
else:
    ATTENTION_SHAPES = [AttentionShape(2, 256, 4, 64, torch.float32)]
    # One block: most of a CPU's time goes into compiling.
    STEP_SHAPES = [StepShape("tiny", 8, "float32", n_layer=1)]
SECONDS = 0.2 if CUDA else 0.1
"""About how long the rounds of a contest take for each candidate."""


@dataclass(frozen=True)
class Candidate:
    """One way to compute the attention."""

    attention: str
    """A key of ATTENTION."""
    kernel: SDPBackend | None = None
    """The kernel SDPA is held to; None leaves the choice to PyTorch."""
    packed: bool = True
    """Input and gradient are the packed projection (B, T, 3, H, D), as the model needs them. Otherwise q, k, v
    and their gradients are apart: the kernel alone, without the copy that packs the gradient."""

    @property
    def peer(self) -> bool:
        """PyTorch's, at its fastest: also without the deterministic algorithms that the trainer asks for."""
        return self.kernel is not None

    def op(self, device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor]:
        """The function of qkv (B, T, 3, H, D); skips the benchmark where it can't run or its time means nothing."""
        if device.type == "cpu" and self.attention == "triton":
            pytest.skip("Triton on a CPU is interpreted: its time would say nothing about the kernel")
        if device.type == "cpu" and self.peer:
            pytest.skip("PyTorch's attention kernels are told apart on a CUDA GPU only")
        try:
            ops, _ = make_ops({"attention": self.attention}, device=device, dtype=dtype, head_dim=head_dim)
        except ConfigError as error:
            pytest.skip(str(error))
        return ops.attention

    @contextlib.contextmanager
    def selected(self) -> Iterator[None]:
        """Hold SDPA to the kernel. Skips the benchmark where PyTorch says that it has none, or memory is too small."""
        choice = contextlib.nullcontext() if self.kernel is None else sdpa_kernel(self.kernel)
        try:
            with choice:
                yield
        except torch.cuda.OutOfMemoryError:
            pytest.skip(f"out of memory on {torch.cuda.get_device_name()}")
        except RuntimeError as error:
            if self.kernel is None or "No available kernel" not in str(error):
                raise
            pytest.skip(f"PyTorch has no {self.kernel.name} kernel for these inputs here")


_SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS: dict[str, Candidate] = {name: Candidate(name) for name in ATTENTION}
"""The trainer's backends, by the name of their flag."""
PEERS: dict[str, Candidate] = {f"sdpa-{name}": Candidate("sdpa", kernel) for name, kernel in _SDPA.items()}
APART: dict[str, Candidate] = {
    f"sdpa-{name}-apart": Candidate("sdpa", _SDPA[name], packed=False) for name in ("cudnn", "flash")
}
