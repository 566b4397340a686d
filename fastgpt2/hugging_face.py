"""Parameters as Hugging Face's GPT2LMHeadModel stores them, and back.

Names are the same, after their prefix "transformer.". Two things differ: their Conv1D stores a weight as [in, out] and
our nn.Linear as [out, in], and they don't pad the vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgpt2.config import ModelConfig


def to_hugging_face(name: str, ours: Tensor, config: ModelConfig) -> Tensor:
    """Convert our parameter, or its gradient, to theirs of the same name. Returns a view."""
    if name == "wte.weight":
        return ours[: config.vocab_size]
    return ours.T if _transposed(name) else ours


def from_hugging_face(name: str, theirs: Tensor, config: ModelConfig) -> Tensor:
    """Convert their parameter, or its gradient, to ours of the same name. Rows of padding are zero."""
    if name == "wte.weight":
        return F.pad(theirs, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    return theirs.T if _transposed(name) else theirs


def _transposed(name: str) -> bool:
    return ".c_" in name and name.endswith(".weight")
