"""Save and resume: safetensors for tensors, JSON for the rest.

    OUT/checkpoints/step-00000200/
        model.safetensors      parameters by name, float32
        optimizer.safetensors  "<parameter>/<state>": both averages and the step count
        state.json             step, configuration, model shape, gradient scaler, progress, device, versions
        SHA256SUMS             of the others, as `sha256sum -c SHA256SUMS` reads it

Several processes write a file each: model-00001-of-00004.safetensors. Every tensor is whole in one of them, so that any
number of processes can resume, in any mode.

The position in the data is a number of samples: a batch is a function of (seed, samples before it, rank).

A checkpoint is written under a temporary name, synced, and then renamed: a checkpoint with its final name is complete,
whenever a process is killed. Checksums are verified before tensors are read. A run resumes from the newest intact
checkpoint and sets damaged ones aside without asking: it may be unattended, and an older checkpoint leads to the same
bits.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastgpt2.checkpoint_files import (
    PASS_OVER,
    SUMS,
    damage,
    own_tensors,
    stored,
    tensor_files,
    write_sums,
    write_tensors,
)
from fastgpt2.config import ConfigError, ModelConfig
from fastgpt2.durable import OutputError, read_json, sync
from fastgpt2.model import parameter_count
from fastgpt2.parallel import ALONE, Ranks
from fastgpt2.settings import Settled
from fastgpt2.state import TENSORS, VALUES, RunState, StateError
from fastgpt2.state_json import STATE, UNKNOWN, Progress, check_agreement, check_state, make_state, read_progress

_WRITING, _REMOVING, _DAMAGED = ".writing-", ".removing-", "damaged-"
"""Name prefixes: being written, being deleted, set aside as damaged."""
_TENSORS = re.compile(rf"({'|'.join(TENSORS)})(-[0-9]+-of-[0-9]+)?\.safetensors")
"""The names of files with tensors."""

T = TypeVar("T")


def checkpoints(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first: the folders named step-<digits>. Other folders are the user's.

    Raises:
        ConfigError: the folder exists but can't be read.
    """
    folder = out / "checkpoints"
    try:
        with os.scandir(folder) as entries:
            # A dangling link is a checkpoint that can't be read, not a missing one.
            names = [e.name for e in entries if re.fullmatch(r"step-[0-9]+", e.name) and (e.is_symlink() or e.is_dir())]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise ConfigError(f"can't read {folder}: {getattr(error, 'strerror', None) or error}") from None
    return [folder / name for name in sorted(names, key=lambda name: (int(name.removeprefix("step-")), name))]


def save(
    out: Path,
    step: int,
    config: Settled,
    state: RunState,
    progress: Progress = UNKNOWN,
    ranks: Ranks = ALONE,
) -> Path:
    """Write the checkpoint of a run after `step` steps and delete those beyond `config.keep_checkpoints`.

    All ranks call it together. None returns before the checkpoint is complete.

    Raises:
        OutputError: a rank can't write its part, for example to a full disk. Earlier checkpoints are unchanged.
    """
    folder = out / "checkpoints"
    final, aside = folder / f"step-{step:08d}", folder / f"{_WRITING}step-{step:08d}"
    parts = state.state_dict()
    try:
        _on_first(ranks, lambda: _begin(aside))
        own = own_tensors(parts, ranks)
        sums = ranks.gather(_on_all(ranks, lambda: write_tensors(aside, own, ranks)))
        values = make_state(step, config, {name: parts[name] for name in VALUES}, progress, state.device, ranks.world)
        _on_first(ranks, lambda: _commit(aside, final, values, sums))
    except OutputError as error:
        if ranks.first:
            shutil.rmtree(aside, ignore_errors=True)
        saved = []
        with contextlib.suppress(ConfigError):
            saved = checkpoints(out)
        last = f"the last good one is {saved[-1]}" if saved else "none had been saved"
        raise OutputError(f"can't save the checkpoint of step {step} in {folder}: {error}; {last}") from None
    if ranks.first and config.keep_checkpoints:
        _remove_old(out, config.keep_checkpoints)
    return final


def _on_all(ranks: Ranks, write: Callable[[], T]) -> T:
    """Write something on each rank. If it fails on one, raise that rank's OutputError on all."""
    from safetensors import SafetensorError

    def told() -> T:
        try:
            return write()
        except (OSError, SafetensorError) as error:
            raise OutputError(str(getattr(error, "strerror", None) or error)) from None

    return ranks.together(told, OutputError)


def _on_first(ranks: Ranks, write: Callable[[], None]) -> None:
    """Write something on rank 0. If it fails, raise its OutputError on all."""
    _on_all(ranks, write if ranks.first else lambda: None)


def _begin(aside: Path) -> None:
    _remove_leftovers(aside.parent)
    aside.mkdir(parents=True)


def _commit(aside: Path, final: Path, values: dict[str, Any], sums: Sequence[dict[str, str]]) -> None:
    """Complete a checkpoint when each rank has written its tensors, and give it its final name."""
    (aside / STATE).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sync(aside / STATE)
    write_sums(aside, {name: digest for of_rank in sums for name, digest in of_rank.items()})
    sync(aside)
    if os.path.lexists(final):
        _remove(final)
    os.replace(aside, final)
    sync(final.parent)
    sync(final.parent.parent)


def _remove_old(out: Path, keep: int) -> None:
    """Delete all checkpoints except the newest `keep` and the newest one that had not diverged."""
    with contextlib.suppress(ConfigError):  # the new checkpoint is saved even if an old one can't be deleted
        saved, good = checkpoints(out), newest_good(out)
        for old in saved[:-keep]:
            if old != good:
                _remove(old)


def newest_good(out: Path) -> Path | None:
    """The newest checkpoint saved while the run had not diverged, or None. Doesn't verify checksums.

    Raises:
        ConfigError: the folder of checkpoints exists but can't be read.
    """
    return next((c for c in reversed(checkpoints(out)) if (p := progress_of(c)) is not None and not p.diverged), None)


def progress_of(checkpoint: Path) -> Progress | None:
    """The progress in a checkpoint, or None if state.json is unusable. Doesn't verify checksums."""
    try:
        state = read_json(checkpoint / STATE)
        check_state(state, checkpoint / STATE)
    except ConfigError:
        return None
    return read_progress(state)


def _remove(checkpoint: Path) -> None:
    """Delete a checkpoint. Rename it first: if the process is killed, no incomplete checkpoint remains."""
    doomed = checkpoint.with_name(f"{_REMOVING}{checkpoint.name}")
    with contextlib.suppress(OSError):
        os.replace(checkpoint, doomed)
        _delete(doomed)


def _remove_leftovers(folder: Path) -> None:
    """Delete what a killed process was writing or deleting."""
    for prefix in (_WRITING, _REMOVING):
        for leftover in folder.glob(f"{prefix}*"):
            with contextlib.suppress(OSError):
                _delete(leftover)


def _delete(folder: Path) -> None:
    """Delete a folder and its contents, or only the link if it is a link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)


def newest(out: Path) -> Path:
    """The newest checkpoint of a run, intact or not.

    Raises:
        ConfigError: there is none.
    """
    found = checkpoints(out)
    if not found:
        raise ConfigError(f"no checkpoint under {out}: a run saves them in its --out folder every --save-every steps")
    return found[-1]


def to_resume(out: Path) -> tuple[Path, list[str]]:
    """Find the newest intact checkpoint of a run and set damaged ones aside. Returns it and notes for the user.

    Raises:
        ConfigError: there is no checkpoint, none is intact, or a newer one can't be read or is invalid.
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
    try:
        state = read_state(checkpoint)
    except ConfigError as error:
        raise ConfigError(f"{error}; {PASS_OVER.format(checkpoint)}") from None
    notes = [f"{problem}; {_set_aside(path)}" for path, problem in damaged]
    if not (checkpoint / SUMS).exists():
        notes.append(f"{checkpoint} has no {SUMS} and was not checked: an older version wrote it")
    if read_progress(state).diverged:
        good = newest_good(out)
        back = f"the last good one is {good}: move newer ones away to go back" if good else "none before it was good"
        notes.append(f"the loss had diverged when {checkpoint} was saved; {back}")
    return checkpoint, notes


def _set_aside(checkpoint: Path) -> str:
    """Rename a damaged checkpoint to make the run skip it. Returns what was done."""
    name = f"{_DAMAGED}{checkpoint.name}"
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    place = next(p for name in names if not os.path.lexists(p := checkpoint.with_name(name)))
    try:
        os.replace(checkpoint, place)
    except OSError as error:
        return f"can't set it aside as {place.name}: {error.strerror}"
    return f"set aside as {place.name}"


def read_state(checkpoint: Path) -> dict[str, Any]:
    """Read and check state.json of a checkpoint: types, bounds, and that it describes the saved model.

    Raises:
        ConfigError: it can't be read, has another format, or is invalid.
    """
    path = checkpoint / STATE
    state = read_json(path)
    check_state(state, path)
    # Check the sizes before allocating anything by them.
    shape, weights = ModelConfig(**state["model"]), stored(checkpoint, "model", state)
    numbers, expected = weights.numbers(), parameter_count(shape, padded=True)
    if shape.n_layer > len(weights) or numbers != expected:
        raise ConfigError(
            f"{path} describes a model of {expected:,} parameters, but the weights beside it are {numbers:,}"
        )
    check_agreement(state, path)
    return state


def check_shape(checkpoint: Path, model: ModelConfig) -> dict[str, Any]:
    """Check that a checkpoint fits a model and return its state.json. Fields that no tensor depends on may differ.

    Raises:
        ConfigError: the checkpoint has another shape. The message names each difference.
    """
    state = read_state(checkpoint)
    wanted = {k: v for k, v in dataclasses.asdict(model).items() if k not in ("dropout", "end_of_text")}
    different = [f"{k} {state['model'][k]}, not {v}" for k, v in wanted.items() if state["model"][k] != v]
    if different:
        raise ConfigError(f"{checkpoint} has another shape: {'; '.join(different)}")
    return state


def saved_config(out: Path) -> dict[str, Any] | None:
    """The configuration, by field name, in a run's newest intact state.json; None if there is none."""
    with contextlib.suppress(ConfigError):
        for checkpoint in reversed(checkpoints(out)):
            with contextlib.suppress(ConfigError):
                if damage(checkpoint, ()) is None:
                    return read_state(checkpoint)["config"]
    return None


def find(source: Path | str, step: int | None = None) -> Path:
    """Find the checkpoint to read: a run's newest, a run's checkpoint of one step, or the given checkpoint.

    Args:
        source: a run's --out folder, or the folder of a checkpoint under any name (a copy, one set aside).
        step: the step of the checkpoint, if source is a run's folder.

    Raises:
        ConfigError: there is none. The message lists those that exist.
    """
    source = Path(os.path.expanduser(source))
    try:
        is_folder = stat.S_ISDIR(source.stat().st_mode)
        names = os.listdir(source) if is_folder else []
    except (OSError, ValueError) as error:
        raise ConfigError(f"can't read {source}: {getattr(error, 'strerror', None) or error}") from None
    if not is_folder:
        raise ConfigError(f"{source} is a file: give a run's --out folder or the folder of a checkpoint")
    parts = {match[1] for match in map(_TENSORS.fullmatch, names) if match}
    # A run's folder may hold an export of its weights.
    if (parts or STATE in names or SUMS in names) and "checkpoints" not in names:
        missing = [] if "model" in parts else tensor_files("model")
        if missing := [*missing, *([] if STATE in names else [STATE])]:
            raise ConfigError(f"{source} is a checkpoint that lacks {' and '.join(missing)}")
        if step is not None:
            raise ConfigError(f"{source} is one checkpoint: leave --step out, or give the run's --out folder")
        return source
    if step is None:
        return newest(source)
    found = {int(path.name.removeprefix("step-")): path for path in checkpoints(source)}
    if step not in found:
        steps = [*(["..."] if len(found) > 20 else []), *map(str, [*found][-20:])]
        there = f"there are {', '.join(steps)}" if found else "it has none"
        raise ConfigError(f"{source} has no checkpoint of step {step}: {there}")
    return found[step]


def load_model(
    source: Path | str, device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], ModelConfig, dict[str, Any]]:
    """Load the checkpoint that `find` returns for source: parameters by name, the model's shape, and state.json.

    Raises:
        ConfigError: there is no checkpoint, or it is damaged or can't be read. The message names an intact one.
    """
    checkpoint = find(source)
    if problem := damage(checkpoint, ("model",)):
        run = checkpoint.parent.parent
        others = (c for c in reversed(checkpoints(run)) if c != checkpoint and damage(c) is None)
        intact = next(others, None)
        instead = f"{intact} is intact: use that one" if intact else f"no other checkpoint of {run} is intact"
        raise ConfigError(f"{problem}; {instead}")
    state = read_state(checkpoint)
    return dict(stored(checkpoint, "model", state, device)), ModelConfig(**state["model"]), state


def restore(checkpoint: Path, state: RunState) -> int:
    """Load everything that `save` wrote, each rank its part. Returns the number of steps done. Verifies no checksums.

    Raises:
        ConfigError: a file can't be read, or its tensors don't fit this model and optimizer.
    """
    saved = read_state(checkpoint)
    step = saved["step"]
    parts = {name: stored(checkpoint, name, saved, state.device) for name in TENSORS}
    for name, shapes in state.shapes(step).items():
        parts[name].check(shapes)
    try:
        state.load_state_dict({**parts, **{name: saved[name] for name in VALUES}}, step)
    except StateError as error:
        path = parts[error.part].path(error.name)
        raise ConfigError(f"{path}: {error}; {PASS_OVER.format(checkpoint)}") from None
    return step
