"""Save and resume: safetensors for tensors, JSON for the rest.

    OUT/checkpoints/step-00000200/
        model.safetensors      parameters by name, float32
        optimizer.safetensors  "<parameter>/<state>": both averages and the step count
        rng.safetensors        the generators' states (dropout draws from them)
        state.json             step, configuration, model shape, gradient scaler, versions
        SHA256SUMS             of the four, as `sha256sum -c SHA256SUMS` reads it

The position in the data needs no state: a batch is a function of (seed, step, rank).

A checkpoint is written aside, brought to the disk, and only then renamed: one that has its name is complete, whenever
the process is killed. Every read is checked first. A run is resumed from the newest checkpoint that is intact, since
nobody may be there to be asked, and it computes the same bits from an older one; a damaged one is set aside.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastgpt2.config import ConfigError, ModelConfig, TrainConfig
from fastgpt2.durable import OutputError, sha256, sync

FORMAT = 2
"""1 had no checksums."""
MODEL, OPTIMIZER, RNG = "model.safetensors", "optimizer.safetensors", "rng.safetensors"
STATE = "state.json"
FILES = (MODEL, OPTIMIZER, RNG, STATE)
SUMS = "SHA256SUMS"
_WRITING, _REMOVING, _DAMAGED = ".writing-", ".removing-", "damaged-"
"""Before the name of a checkpoint that is not one yet, is none any more, or can't be used."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands, beside its tensors: what state.json keeps under "progress"."""

    samples: int | None = None
    """Sequences that all steps so far have taken from the data; None in a checkpoint older than this field."""
    data: str | None = None
    """What identifies the data's contents (TokenSource.fingerprint); None where nothing does."""
    loss: float | None = None
    """The training loss, mean over the last logged interval."""
    diverged: bool = False
    """The loss is far over a uniform guess's: this checkpoint is kept, and the one before it as well."""


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: the folders named step-<digits>; any other is the user's."""
    found = (p for p in (out / "checkpoints").glob("step-*") if re.fullmatch(r"step-[0-9]+", p.name) and p.is_dir())
    return sorted(found, key=lambda p: (int(p.name.removeprefix("step-")), p.name))


def save(
    out: Path,
    step: int,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress = Progress(),
) -> Path:
    """Write the checkpoint of a run after `step` steps and delete those that `config.keep` no longer covers.

    Raises:
        OutputError: it can't be written, as on a full disk; those before it are as they were.
    """
    from safetensors import SafetensorError

    folder = out / "checkpoints"
    final, aside = folder / f"step-{step:08d}", folder / f"{_WRITING}step-{step:08d}"
    _remove_leftovers(folder)
    try:
        aside.mkdir(parents=True)
        _write(aside, step, config, model, optimizer, scaler, progress)
        if final.exists():
            _remove(final)
        os.replace(aside, final)
        sync(folder)
        sync(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        saved = checkpoints(out)
        last = f"the last good one is {saved[-1]}" if saved else "none had been saved"
        raise OutputError(f"can't save the checkpoint of step {step} in {folder}: {reason}; {last}") from None
    if config.keep:
        for old in checkpoints(out)[: -config.keep]:
            _remove(old)
    return final


def _write(
    folder: Path,
    step: int,
    config: TrainConfig,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> None:
    """A checkpoint's files, on the disk when this returns."""
    from safetensors.torch import save_file

    save_file(_contiguous(model.state_dict()), folder / MODEL)
    save_file(_contiguous(_optimizer_tensors(model, optimizer)), folder / OPTIMIZER)
    save_file(_rng_states(next(model.parameters()).device), folder / RNG)
    state = {
        "format": FORMAT,
        "step": step,
        "config": _as_json(config),
        "model": dataclasses.asdict(config.model_config()),
        "scaler": scaler.state_dict(),
        "progress": dataclasses.asdict(progress),
        "versions": {"torch": torch.__version__},
    }
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    (folder / SUMS).write_text("".join(f"{_sum_line(folder / name)}\n" for name in FILES), encoding="utf-8")
    for path in (*(folder / name for name in (*FILES, SUMS)), folder):
        sync(path)


def _sum_line(path: Path) -> str:
    return f"{sha256(path)}  {path.name}"


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint; killed in the midst of it, it leaves none that lacks a file."""
    doomed = checkpoint.with_name(f"{_REMOVING}{checkpoint.name}")
    with contextlib.suppress(OSError):
        os.replace(checkpoint, doomed)
        shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    """What a killed process was writing or deleting."""
    for prefix in (_WRITING, _REMOVING):
        for leftover in folder.glob(f"{prefix}*"):
            shutil.rmtree(leftover, ignore_errors=True)


def newest(out: Path) -> Path:
    """The newest checkpoint of a run, intact or not.

    Raises:
        ConfigError: there is none.
    """
    found = checkpoints(out)
    if not found:
        raise ConfigError(f"no checkpoint under {out}: a run saves them in its --out folder every --save-every steps")
    return found[-1]


def damage(checkpoint: Path, files: tuple[str, ...] = FILES) -> str | None:
    """What is wrong with files of a checkpoint, None where nothing is or where it has no checksums to tell by."""
    try:
        if not (checkpoint / SUMS).exists() and read_state(checkpoint)["format"] == 1:
            return None
        lines = (checkpoint / SUMS).read_bytes().split(b"\n")
        for name in files:
            if _sum_line(checkpoint / name).encode() not in lines:
                return f"{checkpoint / name} is damaged: its SHA-256 is not the one in {SUMS}"
    except OSError as error:
        return f"can't read {error.filename or checkpoint}: {error.strerror}"
    except ConfigError as error:
        return str(error)
    return None


def to_resume(out: Path) -> tuple[Path, list[str]]:
    """The newest intact checkpoint of a run, and what the user should know; damaged ones are set aside.

    Raises:
        ConfigError: there is no checkpoint, or none that is intact.
    """
    newest(out)
    _remove_leftovers(out / "checkpoints")
    damaged: list[tuple[Path, str]] = []
    for checkpoint in reversed(checkpoints(out)):
        problem = damage(checkpoint)
        if problem is None:
            break
        damaged.append((checkpoint, problem))
    else:
        raise ConfigError(f"{damaged[0][1]}; no other checkpoint of {out} is intact")
    notes = [f"{problem}; set aside as {_set_aside(path).name}" for path, problem in damaged]
    if not (checkpoint / SUMS).exists():
        notes.append(f"{checkpoint} has no {SUMS} to check it by: it was written before there were any")
    return checkpoint, notes


def _set_aside(checkpoint: Path) -> Path:
    """Take a checkpoint out of the run's, and keep it for whoever wants to look."""
    place = checkpoint.with_name(f"{_DAMAGED}{checkpoint.name}")
    with contextlib.suppress(OSError):
        shutil.rmtree(place, ignore_errors=True)
        os.replace(checkpoint, place)
    return place


def read_state(checkpoint: Path) -> dict[str, Any]:
    """state.json of a checkpoint.

    Raises:
        ConfigError: it can't be read, or was written in another format.
    """
    try:
        state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {checkpoint / STATE}: {error}") from None
    if not isinstance(state, dict) or state.get("format") not in (1, FORMAT):
        raise ConfigError(f"{checkpoint / STATE} is not a checkpoint of format 1 or {FORMAT}")
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


def changed_settings(state: dict[str, Any], config: TrainConfig) -> list[str]:
    """What is resumed otherwise than it was saved, a line or none: it was asked for, or config.toml is damaged."""
    was, now = state["config"], _as_json(config)
    names = [name for name in now if name in was and name not in ("out", "resume") and now[name] != was[name]]
    different = ", ".join(f"--{name.replace('_', '-')} {now[name]} (was {was[name]})" for name in names)
    return [f"not as it was saved: {different}"] if different else []


def _as_json(config: TrainConfig) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


def load_model(
    out: Path | str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], ModelConfig, dict[str, Any]]:
    """Parameters by name, shape, and state.json of a run's newest checkpoint.

    Raises:
        ConfigError: no checkpoint, or the newest can't be read or is damaged; the message names one that is intact.
    """
    checkpoint = newest(Path(out))
    if problem := damage(checkpoint, (MODEL, STATE)):
        older = next((c for c in reversed(checkpoints(Path(out))[:-1]) if damage(c) is None), None)
        instead = f"move {checkpoint} away to use {older}, which is intact" if older else "no older one is intact"
        raise ConfigError(f"{problem}; {instead}")
    state = read_state(checkpoint)
    return _read_tensors(checkpoint / MODEL, device), ModelConfig(**state["model"]), state


def restore(
    checkpoint: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    device: torch.device,
) -> int:
    """Load everything that `save` wrote, unchecked; returns the number of steps done."""
    state = read_state(checkpoint)
    model.load_state_dict(_read_tensors(checkpoint / MODEL, device))
    tensors = _read_tensors(checkpoint / OPTIMIZER, device)
    names = _parameter_names(model, optimizer)
    packed = optimizer.state_dict()
    packed["state"] = {
        index: {key.removeprefix(f"{name}/"): t for key, t in tensors.items() if key.startswith(f"{name}/")}
        for index, name in enumerate(names)
    }
    optimizer.load_state_dict(packed)
    scaler.load_state_dict(state["scaler"])
    generators = _read_tensors(checkpoint / RNG, "cpu")
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
