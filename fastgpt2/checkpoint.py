"""Save and resume: safetensors for tensors, JSON for the rest, written aside and renamed.

    OUT/checkpoints/step-00000200/
        model.safetensors      parameters by name, float32
        optimizer.safetensors  "<parameter>/<state>": both averages and the step count
        rng.safetensors        the generators' states (dropout draws from them)
        state.json             step, configuration, model shape, gradient scaler, versions

The position in the data needs no state: a batch is a function of (seed, step, rank).
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.config import ConfigError, ModelConfig, TrainConfig

FORMAT = 1
_ASIDE = ".writing-"


def checkpoints(out: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (out / "checkpoints").glob("step-*") if (p / "state.json").is_file())


def save(
    out: Path,
    step: int,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> Path:
    """Write the checkpoint of a run after `step` steps and delete those that `config.keep` no longer covers."""
    from safetensors.torch import save_file

    folder = out / "checkpoints"
    final, aside = folder / f"step-{step:08d}", folder / f"{_ASIDE}step-{step:08d}"
    for leftover in folder.glob(f"{_ASIDE}*"):
        shutil.rmtree(leftover)
    aside.mkdir(parents=True)
    save_file(_contiguous(model.state_dict()), aside / "model.safetensors")
    save_file(_contiguous(_optimizer_tensors(model, optimizer)), aside / "optimizer.safetensors")
    save_file(_rng_states(next(model.parameters()).device), aside / "rng.safetensors")
    state = {
        "format": FORMAT,
        "step": step,
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "model": dataclasses.asdict(config.model_config()),
        "scaler": scaler.state_dict(),
        "versions": {"torch": torch.__version__},
    }
    (aside / "state.json").write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    if config.keep:
        for old in checkpoints(out)[: -config.keep]:
            shutil.rmtree(old)
    return final


def newest(out: Path) -> Path:
    """The newest complete checkpoint of a run.

    Raises:
        ConfigError: there is none.
    """
    found = checkpoints(out)
    if not found:
        raise ConfigError(f"no checkpoint under {out}: a run saves them in its --out folder every --save-every steps")
    return found[-1]


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        ConfigError: it can't be read, or was written in another format.
    """
    try:
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {checkpoint / 'state.json'}: {error}") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise ConfigError(f"{checkpoint / 'state.json'} is not a checkpoint of format {FORMAT}")
    return state


def check_shape(checkpoint: Path, model: ModelConfig) -> dict[str, Any]:
    """state.json of a checkpoint that fits a model; what no tensor depends on may differ.

    Raises:
        ConfigError: the checkpoint is of another shape; the message names each difference.
    """
    state = read_state(checkpoint)
    wanted = {k: v for k, v in dataclasses.asdict(model).items() if k not in ("dropout", "end_of_text")}
    different = [f"{k} {state['model'][k]} not {v}" for k, v in wanted.items() if state["model"][k] != v]
    if different:
        raise ConfigError(f"{checkpoint} is a checkpoint of another shape: it has {', '.join(different)}")
    return state


def load_model(
    out: Path | str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], ModelConfig, dict[str, Any]]:
    """Parameters by name, shape, and state.json of a run's newest checkpoint.

    Raises:
        ConfigError: no checkpoint, or one that can't be read.
    """
    checkpoint = newest(Path(out))
    state = read_state(checkpoint)
    return _read_tensors(checkpoint / "model.safetensors", device), ModelConfig(**state["model"]), state


def restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> int:
    """Load everything that `save` wrote; returns the number of steps done."""
    state = read_state(checkpoint)
    model.load_state_dict(_read_tensors(checkpoint / "model.safetensors", device))
    tensors = _read_tensors(checkpoint / "optimizer.safetensors", device)
    names = _parameter_names(model, optimizer)
    packed = optimizer.state_dict()
    packed["state"] = {
        index: {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        for index, name in enumerate(names)
    }
    optimizer.load_state_dict(packed)
    scaler.load_state_dict(state["scaler"])
    generators = _read_tensors(checkpoint / "rng.safetensors", "cpu")
    torch.set_rng_state(generators["cpu"])
    if device.type == "cuda" and "cuda" in generators:
        torch.cuda.set_rng_state(generators["cuda"], device)
    return state["step"]


def _read_tensors(path: Path, device: torch.device | str) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device=str(device))
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"can't read {path}: {error}") from None


def _parameter_names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The parameters' names in the order in which the optimizer numbers them."""
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    names = _parameter_names(model, optimizer)
    return {f"{names[index]}/{key}": tensor for index, entry in state.items() for key, tensor in entry.items()}


def _rng_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
