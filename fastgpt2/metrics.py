"""Losses and timing of a run, read without stalling the device, and the file of its records.

Losses stay on the device as they are computed; `Meter.read` fetches all of them at once at a logging
step. Between two reads the host only launches work.
"""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.device import synchronize
from fastgpt2.durable import OutputError, write_text
from fastgpt2.parallel import ALONE, Ranks


class NonFiniteLossError(RuntimeError):
    """The loss, a weight or the optimizer's state became infinite or NaN. `step` is the first such step, counted from
    1, and `loss` its loss. `what` describes the problem, by default the loss; `advice` says what to try."""

    def __init__(self, step: int, loss: float, advice: str = "", what: str = "") -> None:
        self.step, self.loss, self.what = step, loss, what or f"the loss of step {step} is {loss}"
        super().__init__(self.what + (f": {advice}" if advice else ""))


class Meter:
    """Collects the losses of a run and times its steps.

    Pause the clock during work outside steps, such as evaluation and checkpoints.
    """

    def __init__(self, device: torch.device, start_step: int, tokens_per_step: int, ranks: Ranks = ALONE) -> None:
        self.device, self.tokens_per_step, self.ranks = device, tokens_per_step, ranks
        self.losses: list[float] = []
        self.interval: list[float] = []
        """Losses of the steps between the last two reads."""
        self._start_step = start_step
        self._waiting: list[Tensor] = []
        self._skipped = 0.0
        self._mark = time.perf_counter()
        self.seconds: list[tuple[int, float]] = []
        """(steps, seconds) of each interval between two reads."""

    def add(self, loss: Tensor) -> None:
        """Store a step's loss, a scalar on the device, without waiting for it."""
        self._waiting.append(loss)

    @property
    def unread(self) -> int:
        """Steps since the last read."""
        return len(self._waiting)

    def read(self) -> float:
        """Wait for the device and move the losses, each the mean over the processes, into `losses`. Returns the mean ms
        a step since the last read.

        Raises:
            NonFiniteLossError: a loss is not finite. It names the first such step; `losses` holds those before it.
        """
        values = self.ranks.mean(torch.stack(self._waiting)).tolist() if self._waiting else []
        synchronize(self.device)
        now = time.perf_counter()
        seconds, self._mark, self._skipped = now - self._mark - self._skipped, now, 0.0
        if values:
            self.seconds.append((len(values), seconds))
        self._waiting.clear()
        for value in values:
            if not math.isfinite(value):
                raise NonFiniteLossError(self._start_step + len(self.losses) + 1, value)
            self.losses.append(value)
        self.interval = values
        return 1e3 * seconds / max(1, len(values))

    def pause(self) -> None:
        """Stop the clock."""
        synchronize(self.device)
        self._paused = time.perf_counter()

    def resume(self) -> None:
        """Start the clock again."""
        synchronize(self.device)
        self._skipped += time.perf_counter() - self._paused

    def tokens_per_s(self) -> float:
        """Mean throughput without the first interval (warm-up and compilation), unless there is no other."""
        intervals = self.seconds[1:] or self.seconds
        steps, seconds = (sum(column) for column in zip(*intervals, strict=True)) if intervals else (0, 0.0)
        return steps * self.tokens_per_step / seconds if seconds else 0.0


class JsonLines:
    """A file with one JSON object a line. A line is written immediately, and is on disk after `sync`."""

    def __init__(self, path: Path, *, keep_up_to_step: int | None = None) -> None:
        """Start a new file, or keep the records up to the step at which a run resumes.

        Raises:
            OutputError: the file can't be read or written.
        """
        self.kept: list[dict[str, Any]] = []
        """The records that were kept."""
        if keep_up_to_step is not None:
            try:
                self.kept = [r for r in read_json_lines(path) if r["step"] <= keep_up_to_step]
            except OSError as error:
                raise OutputError(f"can't read {path}: {error.strerror}") from None
        write_text(path, "".join(map(_line, self.kept)))
        self._path = path
        self._file = path.open("ab", buffering=0)
        self._unwritten = b""

    def write(self, record: dict[str, Any]) -> None:
        """Append a record.

        Raises:
            OutputError: the disk is full or gone. The record is kept and written with the next one.
        """
        self._unwritten += _line(record).encode()
        self.flush()

    def flush(self) -> None:
        """Write the records that could not be written before.

        Raises:
            OutputError: they still can't be written.
        """
        try:
            while self._unwritten:
                # A disk that fills up takes part of a line. The next attempt continues in the middle of it.
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
        except OSError as error:
            raise OutputError(f"can't write {self._path}: {error.strerror}") from None

    def sync(self) -> None:
        """Wait until all records are on the disk.

        Raises:
            OutputError: they can't be written.
        """
        self.flush()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise OutputError(f"can't write {self._path}: {error.strerror}") from None

    def close(self) -> None:
        """Close the file.

        Raises:
            OutputError: some records could not be written.
        """
        try:
            self.sync()
        finally:
            self._file.close()


def _line(record: dict[str, Any]) -> str:
    """A record as strict JSON: infinity and NaN, which JSON lacks, become null."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    return json.dumps(finite) + "\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, or an empty list if it doesn't exist. Lines that are not step records, such as one
    truncated by a crash, are skipped. NaN and infinity, which are not valid JSON, are read as None.

    Raises:
        OSError: the file can't be read.
    """
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line, parse_constant=lambda _: None)
        except (ValueError, RecursionError):  # ValueError: not JSON, or a number of thousands of digits
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            records.append(record)
    return records


def curve(records: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the records that have a finite number under `name`."""
    points = [(r["step"], r[name]) for r in records if type(r.get(name)) in (int, float) and abs(r[name]) < 1e300]
    return [step for step, _ in points], [float(value) for _, value in points]
