"""A record: what one run measured, as it is kept in bench/results/<device>/<date>-<commit>.json and read again."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.result import Result
from fastgpt2.config import ConfigError

FORMAT = 2


class RecordError(ConfigError):
    """A file is not a usable record; the message is one line."""


@dataclass(kw_only=True)
class Tested:
    """What pytest said: how many tests ran, and the names of those that did not pass."""

    run: int
    failure: list[str]
    error: list[str]
    skipped: list[str]


@dataclass(kw_only=True)
class Outcome:
    """How a stage went: its status is "passed", "failed" or "timed out"."""

    name: str
    argv: list[str]
    required: bool
    status: str
    returncode: int
    seconds: float
    seconds_limit: float
    device_state: dict[str, Any]
    tests: Tested | None
    output_tail: str


@dataclass(kw_only=True)
class Smoke:
    """How a slot's kernel compares with float64.

    Args:
        status: "ok", "wrong", "failed", "out of memory", "timed out" or "died"; "skipped": not a form for this GPU.
        worst, error, budget: of the tensor that is furthest off, where the kernel returned.
        right_with: the first change that makes the slot right; None without any.
        changes: what came of each change that was tried.
    """

    slot: str
    status: str
    reason: str | None = None
    worst: str | None = None
    error: float | None = None
    budget: float | None = None
    seconds: float | None = None
    right_with: str | None = None
    changes: dict[str, Smoke] = field(default_factory=dict)


@dataclass(kw_only=True)
class StepKernels:
    """Where a step's time goes: milliseconds of all kernels, and of the longest: (name, launches a step, ms a step)."""

    step: str
    shape: dict[str, Any]
    compiled: bool
    table: bool
    slots: dict[str, str] | None
    ms: float
    kernels: list[tuple[str, float, float]]


@dataclass(kw_only=True)
class TrainingRun:
    """A training run as a picture shows it.

    Args:
        losses, val_losses: (step, nats a token), as in metrics.jsonl.
        loss, unigram: over the whole validation split, the model's and the entropy of its token frequencies.
        seconds: that the run took, its validations included.
        screen: the lines of a terminal on which the run has begun, in pieces: text, colour, whether bold.
    """

    command: str
    losses: list[tuple[int, float]]
    val_losses: list[tuple[int, float]]
    loss: float
    unigram: float
    seconds: float
    sample_command: str
    sample: str
    screen: list[list[tuple[str, str, bool]]]


@dataclass(kw_only=True)
class Trajectory:
    """A backend's losses minus the float64 reference's, step by step, and how far from 0 they may be; nats a token."""

    backend: str
    dtype: str
    differences: list[float]
    budget: float


@dataclass(kw_only=True)
class Record:
    """What one run measured.

    Args:
        minutes: that the run was given.
        commit: the commit's `id`, and whether the tree was `dirty`.
        ceilings: the device's measured speeds.
        not_done: the stages that were not run or not finished, with the reason.
    """

    format: int = FORMAT
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    minutes: float = 0.0
    commit: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    nvidia_smi: dict[str, str] = field(default_factory=dict)
    device_state_at_start: dict[str, str] = field(default_factory=dict)
    ceilings: dict[str, Any] | None = None
    stages: list[Outcome] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    profiles: list[dict[str, Any]] = field(default_factory=list)
    smokes: list[Smoke] = field(default_factory=list)
    step_kernels: list[StepKernels] = field(default_factory=list)
    training_runs: list[TrainingRun] = field(default_factory=list)
    trajectories: list[Trajectory] = field(default_factory=list)
    not_done: dict[str, str] = field(default_factory=dict)

    @property
    def commit_id(self) -> str:
        return self.commit["id"]

    @property
    def date(self) -> str:
        return self.started[:10]

    @property
    def device(self) -> str:
        """What the device calls itself: "NVIDIA H100 80GB HBM3", or "cpu"."""
        return self.environment["device"]

    @property
    def on_gpu(self) -> bool:
        return self.environment.get("compute_capability") is not None

    @property
    def versions(self) -> dict[str, str]:
        """The versions that a figure depends on: torch, triton, CUDA, cuDNN, Python and the peers' packages."""
        found = {name: self.environment.get(name) for name in ("torch", "triton", "cuda", "cudnn", "python")}
        found |= self.environment.get("packages", {})
        return {name: str(version) for name, version in found.items() if version}

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line that a stage wrote; its `kind` is "ceilings" or one of KINDS."""
        kind, rest = line["kind"], {name: value for name, value in line.items() if name != "kind"}
        if kind == "ceilings":
            self.ceilings = rest
        else:
            place, read = KINDS[kind]
            getattr(self, place).append(read(rest))

    def file(self, out: Path) -> Path:
        """Where it is kept below OUT; makes the folder."""
        folder = out.resolve() / re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"can't write to --out {out}: {error.strerror}") from None
        commit = re.sub(r"[^A-Za-z0-9]+", "-", self.commit_id)[:12]
        return folder / f"{datetime.fromisoformat(self.started):%Y-%m-%d-%H%M%S}-{commit}.json"

    def write(self, path: Path) -> None:
        """Write it aside and rename it, so that the file is whole whenever the machine goes away."""
        aside = path.with_suffix(".writing")
        aside.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        os.replace(aside, path)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Record:
        read = {place: [make(item) for item in stored.get(place, [])] for place, make in KINDS.values()}
        read["stages"] = [_outcome(stage) for stage in stored.get("stages", [])]
        return _make(cls, {**stored, **read, "not_done": dict(stored.get("not_done", {}))})


def load(path: Path) -> Record:
    """Read a stored record.

    Raises:
        RecordError: the file can't be read or has another format.
    """
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"can't read {path}: {getattr(error, 'strerror', None) or error}") from None
    found = stored.get("format") if isinstance(stored, dict) else None
    if found != FORMAT:
        raise RecordError(f"{path} has format {found}, this reads {FORMAT}: measure again with python -m bench.gpu")
    missing = [key for key in ("started", "commit", "environment", "results") if key not in stored]
    if missing:
        raise RecordError(f"{path} lacks {', '.join(missing)}: it is no record of bench.gpu or bench.cpu")
    return Record.from_json(stored)


def smoke_from_json(stored: Mapping[str, Any]) -> Smoke:
    changes = {name: smoke_from_json(change) for name, change in stored.get("changes", {}).items()}
    return _make(Smoke, {**stored, "changes": changes})


def _outcome(stored: Mapping[str, Any]) -> Outcome:
    tests = stored["tests"]
    return _make(Outcome, {**stored, "tests": tests and _make(Tested, tests)})


def _make(kind: type, stored: Mapping[str, Any]) -> Any:
    """A dataclass from its fields; other keys are ignored."""
    return kind(**{f.name: stored[f.name] for f in fields(kind) if f.name in stored})


KINDS: dict[str, tuple[str, Callable[[Mapping[str, Any]], Any]]] = {
    "benchmark": ("results", Result.from_json),
    "smoke": ("smokes", smoke_from_json),
    "kernels": ("step_kernels", lambda stored: _make(StepKernels, stored)),
    "profile": ("profiles", dict),
    "training run": ("training_runs", lambda stored: _make(TrainingRun, stored)),
    "trajectory": ("trajectories", lambda stored: _make(Trajectory, stored)),
}
"""By a line's `kind`: the record's list that keeps it, and what reads it."""
