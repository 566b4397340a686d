"""Small runs for the tests: configurations, a reporter that keeps what it is told, and changes to checkpoints."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2 import TrainConfig, checkpoint
from fastgpt2.durable import sha256
from fastgpt2.reporter import Reporter
from fastgpt2.run import Run, build
from fastgpt2.state_json import Progress

TINY = TrainConfig(
    n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=65, batch_size=3, steps=6, lr=1e-2, device="cpu",
    dtype="float32",
)  # fmt: skip
SMALL = TrainConfig(
    n_layer=1, n_head=1, n_embd=16, block_size=8, vocab_size=33, batch_size=2, steps=6, lr=1e-2, device="cpu",
    dtype="float32", save_every=2, log_every=1,
)  # fmt: skip
"""A run that logs every step and saves every other one."""


def tiny(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TINY, **changes)


def tiny_on_gpu(**changes: Any) -> TrainConfig:
    """In the precision that the GPU settles."""
    shape = {"block_size": 24, "vocab_size": 128, "batch_size": 2, "lr": 1e-3}
    return tiny(**{**shape, "device": "cuda", "dtype": None, "save_every": 0, **changes})


class Watch(Reporter):
    """Keeps the run and what it told."""

    run: Run

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def started(self, run: Run) -> None:
        self.run = run

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def logged(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    validated = logged


# ---------------------------------------------------------------------------------------------- checkpoints

MODEL, OPTIMIZER, STATE, SUMS = "model.safetensors", "optimizer.safetensors", "state.json", "SHA256SUMS"
FILES = (MODEL, OPTIMIZER, STATE)
"""The files of a checkpoint that one process wrote, without their sums."""


def step(out: Path, number: int) -> Path:
    """The checkpoint of a step."""
    return out / "checkpoints" / f"step-{number:08d}"


def names(out: Path) -> list[str]:
    """Everything in the folder of the checkpoints."""
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def saved_steps(out: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint.checkpoints(out)]


def progress_of(out: Path) -> dict[int, dict[str, Any]]:
    """What each checkpoint keeps of where the run was."""
    return {int(path.name[5:]): checkpoint.read_state(path)["progress"] for path in checkpoint.checkpoints(out)}


def save(
    out: Path,
    number: int,
    progress: Progress = Progress(),  # noqa: B008
    scaler: torch.amp.GradScaler | None = None,
) -> Path:
    """Save a run of SMALL after its first step as the checkpoint of step `number`."""
    run = build(SMALL)
    run.step(0, run.next_tokens(0))
    state = run.state if scaler is None else dataclasses.replace(run.state, scaler=scaler)
    return checkpoint.save(out, number, run.config, state, progress)


def seal(folder: Path) -> None:
    """Recompute the sums of a checkpoint that a test has changed."""
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.iterdir()) if path.name != SUMS]
    (folder / SUMS).write_text("".join(lines))


def edit_state(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    state = json.loads((folder / "state.json").read_text())
    edit(state)
    (folder / "state.json").write_text(json.dumps(state))
    seal(folder)


def edit_tensors(folder: Path, name: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / name)
    edit(tensors)
    save_file(tensors, folder / name)
    seal(folder)
