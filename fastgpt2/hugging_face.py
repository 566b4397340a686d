"""Parameters as Hugging Face's GPT2LMHeadModel stores them, and back.

The names are the same, under "transformer." there. Two things differ: their Conv1D stores a product's weight as
[in, out] where our nn.Linear has [out, in], and they don't pad the vocabulary.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from fastgpt2.config import ModelConfig


def to_hugging_face(name: str, ours: Tensor, config: ModelConfig) -> Tensor:
    """Our parameter, or its gradient, as theirs of that name: a view."""
    if name == "wte.weight":
        return ours[: config.vocab_size]
    return ours.T if _transposed(name) else ours


def from_hugging_face(name: str, theirs: Tensor, config: ModelConfig) -> Tensor:
    """Their parameter, or its gradient, as ours of that name; the rows of the padding are zero."""
    if name == "wte.weight":
        return F.pad(theirs, (0, 0, 0, config.padded_vocab_size - config.vocab_size))
    return theirs.T if _transposed(name) else theirs


def _transposed(name: str) -> bool:
    return ".c_" in name and name.endswith(".weight")
