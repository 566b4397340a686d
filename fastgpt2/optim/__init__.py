"""The optimizers that --optimizer offers. This file needs the standard library only: one is imported when chosen.

A new optimizer is a function in a file of this folder and a line in OPTIMIZERS.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

_ADAM = {"step": 0.0, "exp_avg": -math.inf, "exp_avg_sq": 0.0}


@dataclass(frozen=True)
class Implementation:
    """An optimizer."""

    function: str
    """"module:function" (parameter groups, config) -> torch.optim.Optimizer."""
    keeps: Mapping[str, float]
    """What it keeps of each parameter, with the least value that can be right: "step" is a count, anything else has the
    parameter's shape. Checkpoints hold these."""
    decays: bool = False
    """Whether it decays weights apart from the gradient, as --weight-decay asks."""


OPTIMIZERS = {
    "adam": Implementation("fastgpt2.optim.adam:adam", _ADAM),
    "adamw": Implementation("fastgpt2.optim.adam:adamw", _ADAM, decays=True),
}
