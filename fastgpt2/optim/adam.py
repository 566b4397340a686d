"""Adam (Kingma and Ba 2015) and AdamW (Loshchilov and Hutter 2019), PyTorch's, in one fused pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from fastgpt2.config import TrainConfig


def adam(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.Adam(groups, **_options(config))


def adamw(groups: list[dict[str, Any]], config: TrainConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, **_options(config))


def _options(config: TrainConfig) -> dict[str, Any]:
    betas = (config.beta1, config.beta2)
    return {"lr": config.lr, "betas": betas, "fused": True, "capturable": config.cuda_graph}
