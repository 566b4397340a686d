"""Parameter groups: which parameters are decayed, and the learning rate of each group in each step."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from fastgpt2.optim import OPTIMIZERS
from fastgpt2.optim.schedules import learning_rate

if TYPE_CHECKING:
    from fastgpt2.config import TrainConfig
    from fastgpt2.settings import Settled


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer that --optimizer names, with a peak learning rate in each group.

    Matrices (embeddings too) are decayed, vectors (biases, LayerNorm) are not.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    module, function = OPTIMIZERS[config.optimizer].function.split(":")
    optimizer = getattr(import_module(module), function)(groups, config)
    for group in optimizer.param_groups:
        group["peak_lr"] = group["lr"]
        if config.cuda_graph:
            # A graph reads the rate from the device. Only now: the optimizer checks what it is given, and would wait.
            group["lr"] = torch.tensor(group["lr"], device=parameters[0].device)
    return optimizer


def set_learning_rates(optimizer: torch.optim.Optimizer, step: int, config: Settled) -> None:
    """Set each group's rate for a step counted from 0: the schedule times the group's own peak."""
    for group in optimizer.param_groups:
        # In float32, which is what the optimizer reads from a graph's memory: the same bits with a graph and without.
        rate = float(np.float32(learning_rate(group["peak_lr"], step, config)))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
