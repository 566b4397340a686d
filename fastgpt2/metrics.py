"""Meters: where a run waits for the device, apart from evaluation, checkpoints and a logged gradient norm.

Losses stay on the device as they are computed; `Meter.read` fetches all of them at once at a logging
step. Between two reads the host only launches work.
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt2.device import synchronize
from fastgpt2.durable import OutputError, write_text


class NonFiniteLossError(RuntimeError):
    """The loss became infinite or NaN. `step` is the first such step, counted from 1."""

    def __init__(self, step: int, loss: float, advice: str = "") -> None:
        super().__init__(f"the loss of step {step} is {loss}" + (f": {advice}" if advice else ""))
        self.step, self.loss = step, loss


class Meter:
    """Losses and the clock of a run.

    Time spent outside steps (evaluation, checkpoints) is left out: stop the clock around it.
    """

    def __init__(self, device: torch.device, start_step: int, tokens_per_step: int) -> None:
        self.device, self.tokens_per_step = device, tokens_per_step
        self.losses: list[float] = []
        self._start_step = start_step
        self._waiting: list[Tensor] = []
        self._skipped = 0.0
        self._mark = time.perf_counter()
        self.seconds: list[tuple[int, float]] = []
        """(steps, seconds) of each interval between two reads."""

    def add(self, loss: Tensor) -> None:
        """Keep a step's loss, a scalar on the device, without waiting for it."""
        self._waiting.append(loss)

    def read(self) -> float:
        """Wait for the device, move the waiting losses into `losses`, return the mean ms a step since the last read.

        Raises:
            NonFiniteLossError: with the first step whose loss is not finite; `losses` holds those before it.
        """
        values = torch.stack(self._waiting).tolist() if self._waiting else []
        synchronize(self.device)
        now = time.perf_counter()
        seconds, self._mark, self._skipped = now - self._mark - self._skipped, now, 0.0
        if values:
            self.seconds.append((len(values), seconds))
        self._waiting.clear()
        for value in values:
            if value - value != 0.0:  # inf - inf and nan - nan are nan
                raise NonFiniteLossError(self._start_step + len(self.losses) + 1, value)
            self.losses.append(value)
        return 1e3 * seconds / max(1, len(values))

    def pause(self) -> None:
        """Stop the clock."""
        synchronize(self.device)
        self._paused = time.perf_counter()

    def go_on(self) -> None:
        """Start the clock again."""
        synchronize(self.device)
        self._skipped += time.perf_counter() - self._paused

    def tokens_per_s(self) -> float:
        """Over the run without its first interval, which holds warm-up and compilation; over all if that is all."""
        intervals = self.seconds[1:] or self.seconds
        steps, seconds = (sum(column) for column in zip(*intervals, strict=True)) if intervals else (0, 0.0)
        return steps * self.tokens_per_step / seconds if seconds else 0.0


class JsonLines:
    """A file of one JSON object a line, flushed as it is written."""

    def __init__(self, path: Path, *, keep_up_to_step: int | None = None) -> None:
        """Start the file anew, or keep the records up to a step, where a resumed run goes on."""
        kept = [] if keep_up_to_step is None else [r for r in read_json_lines(path) if r["step"] <= keep_up_to_step]
        write_text(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: dict[str, Any]) -> None:
        """Add a record.

        Raises:
            OutputError: the disk is full, or gone.
        """
        try:
            self._file.write(_line(record))
            self._file.flush()
        except OSError as error:
            raise OutputError(f"can't write {self._file.name}: {error.strerror}") from None

    def close(self) -> None:
        # What could not be written, which `write` has said, is tried once more.
        with contextlib.suppress(OSError):
            self._file.close()


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, none if there is no file. What is no record of a step, as a last line cut off by a
    crash, is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records
