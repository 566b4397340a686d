"""The device, the attention's sizes (on a GPU those of GPT-2, on a CPU a small one), and how long is measured."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from bench.roofline import Work

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


if CUDA:
    # The same 65,536 tokens at every length, so that only the attention's T^2 grows.
    ATTENTION_SHAPES = [AttentionShape(65536 // T, T, 12, 64, torch.bfloat16) for T in (1024, 2048, 4096, 8192)]
    # The widths of the larger models, and few tokens, where launching takes longer than computing.
    ATTENTION_SHAPES += [AttentionShape(64, 1024, H, 64, torch.bfloat16) for H in (16, 20, 25)]
    ATTENTION_SHAPES += [AttentionShape(4, 1024, 12, 64, torch.bfloat16)]
else:
    ATTENTION_SHAPES = [AttentionShape(2, 256, 4, 64, torch.float32)]
SECONDS = 0.2 if CUDA else 0.1
"""About how long the rounds of a contest take for each candidate."""
