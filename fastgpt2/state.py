"""The state that a run needs to resume bit for bit: weights, optimizer, gradient scaler.

Generators are not part of it: each step seeds them. A checkpoint stores the parts that `RunState` names, whatever they
are. To store more, such as a second optimizer or an average of the weights, add it here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt2.config import TrainConfig
from fastgpt2.model import GPT
from fastgpt2.optim import OPTIMIZERS
from fastgpt2.optim.groups import make_optimizer, set_learning_rates
from fastgpt2.settings import Settled
from fastgpt2.sharding import copy_part

TENSORS = ("model", "optimizer")
"""The parts that hold tensors by name. A checkpoint has a file for each from each process."""
VALUES = ("scaler",)
"""The parts that hold plain values. state.json has one entry for each."""

Part = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


class StateError(ValueError):
    """A saved tensor is invalid. `part` and `name` say which."""

    def __init__(self, part: str, name: str, problem: str) -> None:
        self.part, self.name = part, name
        super().__init__(f"{name} {problem}")


@dataclass
class RunState:
    """The state of a run between two steps."""

    model: GPT
    optimizer: torch.optim.Optimizer
    keeps: Mapping[str, float]
    """What the optimizer stores for each parameter: Implementation.keeps."""
    scaler: torch.amp.GradScaler
    device: torch.device
    """Where the tensors are."""

    @classmethod
    def begin(cls, model: GPT, config: TrainConfig) -> RunState:
        """The state before the first step."""
        device = model.wte.weight.device
        return cls(
            model,
            make_optimizer(model, config),
            OPTIMIZERS[config.optimizer].keeps,
            torch.amp.GradScaler(device.type, enabled=config.dtype == "float16"),
            device,
        )

    def state_dict(self) -> dict[str, Part]:
        """The parts by name. Under fsdp and hsdp their tensors are sharded."""
        return {
            "model": self.model.state_dict(),
            "optimizer": dict(self._moments()),
            "scaler": self.scaler.state_dict(),
        }

    def shapes(self, step: int) -> dict[str, Shapes]:
        """The shapes of each part's tensors after `step` steps."""
        weights = {name: tuple(weight.shape) for name, weight in self.model.state_dict().items()}
        kept = self.keeps if step else {}  # the optimizer has no state before the first step
        moments = {
            f"{name}/{key}": () if key == "step" else weights[name] for name in self._parameter_names() for key in kept
        }
        return {"model": weights, "optimizer": moments}

    def load_state_dict(self, state: Mapping[str, Part], step: int) -> None:
        """Restore all parts. One tensor is read at a time, and a process keeps its own part of it.

        Args:
            state: as state_dict returned it after `step` steps, with whole tensors, each read on access. An empty
                scaler changes nothing.

        Raises:
            StateError: a tensor is invalid.
        """
        for name, weight in self.model.state_dict().items():
            copy_part(weight, _finite("model", name, state["model"]))
        self._load_moments(state["optimizer"], step)
        if state["scaler"]:
            self.scaler.load_state_dict(dict(state["scaler"]))

    def zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those of the parameters, scaled in float16."""
        self.scaler.scale(loss).backward()

    def unscale(self) -> None:
        """Undo the scaling of the gradients, before they are read."""
        self.scaler.unscale_(self.optimizer)

    def set_learning_rates(self, step: int, config: Settled) -> None:
        """Set the learning rates of a step counted from 0."""
        set_learning_rates(self.optimizer, step, config)

    def update(self) -> None:
        """Step the optimizer. The float16 scaler skips the step if a gradient is not finite."""
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that must stay finite, under the names that messages use."""
        yield from self.model.state_dict().items()
        for name, tensor in self._moments():
            parameter, _, key = name.rpartition("/")
            if key != "step":  # a count, which may be on another device
                yield f"the optimizer's {key} of {parameter}", tensor

    def updates(self) -> int | None:
        """How many optimizer steps changed the weights; None if it doesn't count them. Waits for the device."""
        first: dict[str, Tensor] = next(iter(self.optimizer.state.values()), {})
        return int(first["step"].item()) if "step" in first else None

    def _parameter_names(self) -> list[str]:
        """Parameter names in the optimizer's order."""
        # state_dict has the sharded parameters even after an evaluation, when FSDP leaves whole ones in the model.
        names = {id(p): name for name, p in self.model.state_dict(keep_vars=True).items()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        names = self._parameter_names()
        for index, entry in self.optimizer.state_dict()["state"].items():
            for key, tensor in entry.items():
                yield f"{names[index]}/{key}", tensor

    def _load_moments(self, tensors: Mapping[str, Tensor], step: int) -> None:
        weights = self.model.state_dict()

        def load(parameter: str, key: str) -> Tensor:
            name = f"{parameter}/{key}"
            tensor = _finite("optimizer", name, tensors)
            # An average of squares below 0, or more steps than the run made, would diverge.
            most = step if key == "step" else math.inf
            if not ((tensor >= self.keeps[key]) & (tensor <= most)).all():
                raise StateError("optimizer", name, "can't be right")
            return tensor.clone() if key == "step" else copy_part(torch.empty_like(weights[parameter]), tensor)

        packed = self.optimizer.state_dict()
        packed["state"] = {
            index: {key: load(name, key) for key in self.keeps if f"{name}/{key}" in tensors}
            for index, name in enumerate(self._parameter_names())
        }
        self.optimizer.load_state_dict(packed)


def _finite(part: str, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
    tensor = tensors[name]
    if not tensor.isfinite().all():
        raise StateError(part, name, "is not finite because the run diverged")
    return tensor
