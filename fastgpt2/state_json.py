"""state.json: what a checkpoint stores besides its tensors, and what may differ when a run resumes."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastgpt2.batch import with_global_batch
from fastgpt2.config import ConfigError, ModelConfig
from fastgpt2.renamed import with_current_names
from fastgpt2.settings import Settled

FORMAT = 3
"""Format 1 had no checksums. Formats 1 and 2 were written by one process, and had the states of random generators."""
STATE = "state.json"


@dataclass(frozen=True)
class Progress:
    """The progress of a run: what state.json stores under "progress"."""

    samples: int | None = None
    """Sequences that all steps so far have taken from the data; None in a checkpoint older than this field."""
    data: str | None = None
    """Identifies the data's contents: TokenSource.fingerprint of the training data, then "+" and that of the validation
    data if there is any; None if the data has no fingerprint."""
    loss: float | None = None
    """The training loss, mean over the last logged interval."""
    diverged: bool = False
    """Whether the loss has risen far (see fastgpt2.loop). The newest checkpoint before that is kept too."""


UNKNOWN = Progress()


def make_state(
    step: int,
    config: Settled,
    values: Mapping[str, Any],
    progress: Progress,
    device: torch.device,
    processes: int,
) -> dict[str, Any]:
    """The contents of state.json after `step` steps.

    Args:
        values: the parts of the run's state that are not tensors.
        device: where the last step ran.
        processes: how many wrote the tensors.
    """
    kept = dataclasses.asdict(progress)
    if progress.loss is not None and not math.isfinite(progress.loss):
        kept["loss"] = None  # JSON has no infinity
    return {
        "format": FORMAT,
        "step": step,
        "processes": processes,
        "config": config_as_json(config),
        "model": dataclasses.asdict(config.model_config()),
        **values,
        "progress": kept,
        "device": device.type,
        "versions": {"torch": torch.__version__},
    }


def config_as_json(config: Settled) -> dict[str, Any]:
    """A configuration as a JSON object by field name."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


# ------------------------------------------------------------------------------------------------- checking


class _Rule(NamedTuple):
    holds: Callable[[Any], bool]
    expected: str


def _integer(least: int, most: int = 2**63 - 1) -> _Rule:
    bounds = f"at least {least}" if most == 2**63 - 1 else f"from {least} to {most}"
    return _Rule(lambda x: type(x) is int and least <= x <= most, f"an integer {bounds}")


def _number(least: float, most: float = math.inf) -> _Rule:
    bounds = f"at least {least:g}" if most == math.inf else f"from {least:g} to {most:g}"

    def holds(x: Any) -> bool:  # false for NaN, infinity, and integers too large for a float
        return type(x) in (int, float) and least <= x <= most and abs(x) < 1e300

    return _Rule(holds, f"a number {bounds}")


def _or_null(rule: _Rule) -> _Rule:
    return _Rule(lambda x: x is None or rule.holds(x), f"null or {rule.expected}")


_SIZE = _integer(1, 2**31 - 1)
_TEXT = _Rule(lambda x: isinstance(x, str), "a string")
_FLAG = _Rule(lambda x: isinstance(x, bool), "true or false")
_OBJECT = _Rule(lambda x: isinstance(x, dict), "an object")

_TOP = {
    "step": _integer(0),
    "processes": _integer(1, 99999),
    **dict.fromkeys(("config", "model", "scaler"), _OBJECT),
}
_SHAPE = dict.fromkeys(("n_layer", "n_head", "n_embd", "block_size", "vocab_size"), _SIZE)
_MODEL = _SHAPE | {"dropout": _number(0, 1), "end_of_text": _or_null(_integer(0))}
_CONFIG = {
    **dict.fromkeys((*_SHAPE, "batch_size", "grad_accum", "global_batch", "steps"), _SIZE),
    "seed": _integer(0, 2**64 - 1),
    "data": _TEXT,
    "dtype": _TEXT,
}
_SCALER = {
    "scale": _number(1e-300),
    "growth_factor": _number(1),
    "backoff_factor": _number(0, 1),
    "growth_interval": _integer(1, 2**31 - 1),
    "_growth_tracker": _integer(0, 2**31 - 1),
}
_PROGRESS = {
    "samples": _or_null(_integer(0)),
    "data": _or_null(_TEXT),
    "loss": _or_null(_number(-math.inf)),
    "diverged": _FLAG,
}


def check_state(state: dict[str, Any], path: Path) -> None:
    """Check that each value read from a state.json is present, of the right type, and in bounds.

    Raises:
        ConfigError: a value isn't. The message names the first one.
    """
    if type(state.get("format")) is not int or not 1 <= state["format"] <= FORMAT:
        raise ConfigError(f"{path} is not a checkpoint of format 1 to {FORMAT}")
    if state["format"] < 3:
        state["processes"] = 1
    _check(state, _TOP, path)
    state["config"] = with_current_names(state["config"])
    _check({"end_of_text": None} | state["model"], _MODEL, path, "model.")
    _check({"global_batch": 1} | state["config"], _CONFIG, path, "config.")
    state["config"] = with_global_batch(state["config"])
    if state["scaler"]:  # empty if the run had none
        _check(state["scaler"], _SCALER, path, "scaler.")
    if not _OBJECT.holds(state.setdefault("progress", {})):
        raise ConfigError(f"{path}: progress must be {_OBJECT.expected}, got {reprlib.repr(state['progress'])}")
    _check(dataclasses.asdict(UNKNOWN) | state["progress"], _PROGRESS, path, "progress.")
    try:
        ModelConfig(**state["model"])
    except (ConfigError, TypeError) as error:
        raise ConfigError(
            f"{path} describes an invalid model: {str(error).removeprefix('ModelConfig.__init__() ')}"
        ) from None
    name = path.parent.name
    if re.fullmatch(r"step-[0-9]+", name) and int(name.removeprefix("step-")) != state["step"]:
        raise ConfigError(f"{path} has step {state['step']}, but its folder is named {name}")


def check_agreement(state: dict[str, Any], path: Path) -> None:
    """Check that the model in a checked state.json is the one that its configuration asked for.

    Raises:
        ConfigError: it isn't. The tensors might fit both and compute something else.
    """
    for name in _SHAPE:
        if state["model"][name] != state["config"][name]:
            raise ConfigError(f"{path} contradicts itself: model.{name} is not config.{name}")


def _check(values: dict[str, Any], rules: dict[str, _Rule], path: Path, prefix: str = "") -> None:
    for name, rule in rules.items():
        if name not in values:
            raise ConfigError(f"{path} lacks {prefix}{name}")
        if not rule.holds(values[name]):
            given = reprlib.repr(values[name])  # short, however long the value
            raise ConfigError(f"{path}: {prefix}{name} must be {rule.expected}, got {given}")


def read_progress(state: dict[str, Any]) -> Progress:
    """The progress in a checked state.json."""
    known = {field.name for field in dataclasses.fields(Progress)}
    return Progress(**{name: value for name, value in state["progress"].items() if name in known})


# ------------------------------------------------------------------------------------------------- resuming


def changed_settings(state: dict[str, Any], config: Settled) -> list[str]:
    """One line of the settings that differ from the checkpoint's, or none.

    Skips the model's name, since check_shape compares its shape, the device, which carried_over compares, and how the
    global batch is divided.
    """
    was, now = state["config"], config_as_json(config)
    left_out = ("out", "resume", "model", "device", "batch_size", "grad_accum")
    names = [name for name in now if name in was and name not in left_out and now[name] != was[name]]
    different = ", ".join(f"--{name.replace('_', '-')} {now[name]} (was {was[name]})" for name in names)
    return [f"changed since the checkpoint: {different}"] if different else []


def changed_data(was: str | None, now: str | None, data: str) -> list[str]:
    """One line if the data's fingerprints differ from the checkpoint's, or none.

    Args:
        was: Progress.data of the checkpoint.
        now: Progress.data of this run.
        data: the value of --data.
    """
    # Compare the validation data only if both have a fingerprint of it.
    names = ("training", "validation")
    pairs = zip(names, (was or "").split("+"), (now or "").split("+"), strict=False)
    other = [name for name, before, after in pairs if before and after and before != after]
    return [f"changed since the checkpoint: the {' and '.join(other)} data in {data}"] if other else []


def carried_over(state: dict[str, Any], config: Settled, device: torch.device, processes: int = 1) -> list[str]:
    """One line for each part of the state that only the checkpoint has, or only a run with these settings."""
    notes = []
    float16 = config.dtype == "float16"
    if float16 and not state["scaler"]:
        notes.append("the checkpoint has no gradient scaler, because it was not trained in float16: starting a new one")
    if not float16 and state["scaler"]:
        notes.append(f"the checkpoint's gradient scaler is dropped: --dtype {config.dtype} has none")
    changed = []
    # Older checkpoints have the device only among the settings.
    was = str(state.get("device") or state["config"].get("device") or device.type).partition(":")[0]
    if was != device.type:
        changed.append(f"--device {device.type} (was {was})")
    if state["processes"] != processes:
        changed.append(f"the number of processes, {processes} (was {state['processes']})")
    if changed:
        masks = "; dropout masks differ" if config.dropout else ""
        notes.append(f"changed since the checkpoint: {', '.join(changed)}: results agree up to rounding{masks}")
    elif config.dropout and state["format"] < 3:
        notes.append("an older version wrote the checkpoint: dropout masks differ from those it would have drawn")
    return notes
