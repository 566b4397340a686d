"""Parameter groups, optimizers and learning-rate schedules."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastgpt2.config import TrainConfig
from fastgpt2.settings import Settled

_OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
FINAL_LR_FRACTION = 0.1
"""What the cosine and linear schedules fall to, as a fraction of the peak."""


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam (Kingma and Ba 2015) or AdamW (Loshchilov and Hutter 2019), one fused pass over all parameters.

    Matrices (embeddings too) are decayed, vectors (biases, LayerNorm) are not. For a CUDA graph the learning rate is
    a tensor on the device.
    """
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (config.beta1, config.beta2)
    make = _OPTIMIZERS[config.optimizer]
    optimizer = make(groups, lr=config.lr, betas=betas, fused=True, capturable=config.cuda_graph)
    if config.cuda_graph:
        # Only now: the optimizer checks what it is given, and would wait for the device.
        lr = torch.tensor(config.lr, device=parameters[0].device)
        for group in optimizer.param_groups:
            group["lr"] = lr
    return optimizer


def _constant(progress: float) -> float:
    return 1.0


def _linear(progress: float) -> float:
    return 1.0 - (1.0 - FINAL_LR_FRACTION) * progress


def _cosine(progress: float) -> float:
    return FINAL_LR_FRACTION + (1.0 - FINAL_LR_FRACTION) * 0.5 * (1.0 + math.cos(math.pi * progress))


_SCHEDULES = {"constant": _constant, "linear": _linear, "cosine": _cosine}


def learning_rate(step: int, config: Settled) -> float:
    """The learning rate of a step counted from 0: a linear warm-up, then the schedule.

    The warm-up's first step has lr / warmup_steps rather than 0; the last step of the run reaches
    FINAL_LR_FRACTION with the falling schedules.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return config.lr * _SCHEDULES[config.schedule](min(1.0, progress))
