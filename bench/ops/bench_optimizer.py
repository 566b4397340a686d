"""Benchmark of the optimizer's step over all parameters of a model: ours, one fused pass, beside PyTorch's AdamW.

All candidates step the same parameters, gradients and moments, so that the largest model's fit. Before that each steps
a small model of its own, which is compared with PyTorch's plain loop in float64.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.contest import CUDA, DEVICE, Candidate, Contest, Function, Unavailable
from bench.ops.budget import Yardstick
from bench.ops.op_contest import OpContest
from bench.roofline import Work
from bench.timing import REPLAY, Call
from fastgpt2.config import PRESETS, ModelConfig, TrainConfig
from fastgpt2.model import GPT
from fastgpt2.optim.groups import make_optimizer

Made = tuple[torch.optim.Optimizer, Callable[[], object]]
"""An optimizer and its step."""
Drawn = tuple[GPT, list[dict[str, Tensor]]]
"""A model with gradients, and each parameter's moments."""

ONE_BLOCK = dataclasses.replace(PRESETS["tiny"], n_layer=1)
SIZES = (
    {name: PRESETS[name] for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")} if CUDA else {"tiny": ONE_BLOCK}
)
CONFIG = TrainConfig(optimizer="adamw", weight_decay=0.1)
MOST_LAYERS_COMPILED = 12
CHECKED_STEPS = 3


def fused(model: GPT) -> Made:
    optimizer = make_optimizer(model, CONFIG)
    return optimizer, optimizer.step


def adamw(model: GPT, *, foreach: bool, compiled: bool = False) -> Made:
    """PyTorch's, with the groups and settings of ours. torch.compile fuses the foreach form into few kernels."""
    kept = ("params", "lr", "betas", "weight_decay")
    groups = [{name: group[name] for name in kept} for group in make_optimizer(model, CONFIG).param_groups]
    optimizer = torch.optim.AdamW(groups, foreach=foreach)
    return optimizer, torch.compile(lambda: optimizer.step()) if compiled else optimizer.step


foreach = functools.partial(adamw, foreach=True)
loop = functools.partial(adamw, foreach=False)
foreach_compiled = functools.partial(adamw, foreach=True, compiled=True)


def _too_many_layers() -> Function:
    raise Unavailable(f"torch.compile traces it tensor by tensor: timed up to {MOST_LAYERS_COMPILED} blocks")


def candidates(size: ModelConfig) -> dict[str, Candidate]:
    compiled = (lambda: foreach_compiled) if size.n_layer <= MOST_LAYERS_COMPILED else _too_many_layers
    return {
        "fused": Candidate("ours", lambda: fused),
        "foreach": Candidate("peer", lambda: foreach),
        "foreach-compiled": Candidate("peer", compiled),
    }


class OptimizerContest(OpContest):
    op, dtype = "optimizer step", "float32"

    def __init__(self, model: str, size: ModelConfig) -> None:
        self.model, self.size = model, size
        self.candidates = candidates(self.size)
        with torch.device("meta"):
            parameters = list(GPT(self.size).parameters())
        self.parameters = sum(p.numel() for p in parameters)
        counted = "p, g, m and v read, p, m and v written, in float32"
        # m and v: two products and a sum each, and g^2; the step: two corrections, root, sum, quotient, lr, decay.
        self.work = Work(None, 15.0 * self.parameters, 28.0 * self.parameters, 0, "15 a parameter", counted)

    def shape(self) -> dict[str, Any]:
        return {"model": self.model, "n_layer": self.size.n_layer, "parameters": self.parameters}

    def draw(self) -> list[Drawn]:
        return [draw(self.size)]

    def prepare(self, name: str, function: Function, sets: Sequence[Drawn]) -> Call:
        step = start(function, *sets[0])
        return lambda _: step()

    @functools.cached_property
    def _yardstick(self) -> Yardstick:
        with torch.device("meta"):
            names = [name for name, _ in GPT(ONE_BLOCK).named_parameters()]
        exact, plain = (functools.partial(stepped, loop, dtype) for dtype in (torch.float64, torch.float32))
        return Yardstick(names, exact, plain)

    def check(self, name: str, function: Function) -> None:
        self._yardstick.check(stepped(function, torch.float32))


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize("name", candidates(ONE_BLOCK))
@pytest.mark.parametrize("model", SIZES)
def test_optimizer(compete: Callable[[Contest, str], None], model: str, name: str) -> None:
    compete(OptimizerContest(model, SIZES[model]), name)


def draw(size: ModelConfig, dtype: torch.dtype = torch.float32, seed: int = 0) -> Drawn:
    """Parameters and gradients are normal numbers, the moments 0."""
    with torch.device("meta"):
        model = GPT(size)
    model.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02, generator=generator)
        parameter.grad = torch.randn(parameter.shape, device=DEVICE, generator=generator)
    model.to(dtype)  # the gradients, too
    return model, [{name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")} for p in model.parameters()]


def start(make: Callable[[GPT], Made], model: GPT, moments: list[dict[str, Tensor]]) -> Callable[[], object]:
    """The step of an optimizer of the model that has taken none yet, with the moments as its own."""
    optimizer, step = make(model)
    # As AdamW's first step would make it; the count is on the device in the fused form alone.
    device = DEVICE if optimizer.param_groups[0].get("fused") else torch.device("cpu")
    for parameter, own in zip(model.parameters(), moments, strict=True):
        optimizer.state[parameter] = {"step": torch.zeros((), device=device), **own}
    return step


def stepped(make: Callable[[GPT], Made], dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    """A small model's parameters after some steps."""
    model, moments = draw(ONE_BLOCK, dtype, seed)
    step = start(make, model, moments)
    for _ in range(CHECKED_STEPS):
        step()
    return [p.detach() for p in model.parameters()]
