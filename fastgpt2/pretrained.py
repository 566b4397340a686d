"""Models that are already trained, ready for use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fastgpt2.checkpoint import load_model
from fastgpt2.model import GPT


def load_run(out: Path, device: torch.device) -> tuple[GPT, dict[str, Any]]:
    """The model of a run's newest checkpoint, in evaluation mode, and the checkpoint's state.json.

    Raises:
        ConfigError: no checkpoint, or one that can't be read.
    """
    tensors, shape, state = load_model(out)
    model = GPT(shape)
    model.load_state_dict(tensors)
    return model.to(device).eval(), state
