"""What a run tells, how it is asked to stop, and what came of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.model import GPT
    from fastgpt2.run import Run
    from fastgpt2.settings import Settled


class Reporter:
    """What a run tells the world, and how it is asked to stop. This one says nothing but warnings.

    An exception in a method drops the reporter from the run, with a warning to the others. The run goes on.
    """

    stop_requested = False
    """Set it to end the run after the step at hand, with a checkpoint."""

    def started(self, run: Run) -> None:
        """The run is built; nothing has been computed."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stepped(self, done: int) -> None:
        """Step `done` has been launched, not necessarily computed."""

    def warn(self, text: str) -> None:
        """Something went wrong that doesn't end the run: nobody may be silent about it."""
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def logged(self, record: dict[str, Any]) -> None:
        """A logging step: the record that goes to metrics.jsonl."""

    def validated(self, record: dict[str, Any]) -> None:
        """A validation: the record that goes to metrics.jsonl."""

    def saving(self) -> None:
        """A checkpoint is about to be saved: write to the disk what belongs before it."""

    def close(self) -> list[str]:
        """The run has ended, well or not: write what is left. Returns what is missing, a line each."""
        return []

    def finished(self, result: TrainResult) -> None:
        """The run has ended well. Called after close."""

    def failed(self, error: BaseException) -> None:
        """The run has ended with an error, KeyboardInterrupt included. Called after close."""


class Reporters:
    """Any number of reporters, each told in turn. One that raises is dropped."""

    def __init__(self, reporters: Iterable[Reporter] = ()) -> None:
        # Somebody must hear the warnings.
        self._asked = list(reporters) or [Reporter()]
        self._told = [*self._asked]

    @property
    def stop_requested(self) -> bool:
        """Whether one of them asks to stop. One that was dropped may still ask."""
        return any(reporter.stop_requested for reporter in self._asked)

    def add_first(self, reporter: Reporter) -> None:
        """Tell this one before the others, as a record has to be written before what may fail."""
        self._told.insert(0, reporter)

    def started(self, run: Run) -> None:
        self._tell(lambda reporter: reporter.started(run))

    def note(self, text: str) -> None:
        self._tell(lambda reporter: reporter.note(text))

    def warn(self, text: str) -> None:
        self._tell(lambda reporter: reporter.warn(text))

    def stepped(self, done: int) -> None:
        self._tell(lambda reporter: reporter.stepped(done))

    def logged(self, record: dict[str, Any]) -> None:
        self._tell(lambda reporter: reporter.logged(record))

    def validated(self, record: dict[str, Any]) -> None:
        self._tell(lambda reporter: reporter.validated(record))

    def saving(self) -> None:
        self._tell(lambda reporter: reporter.saving())

    def close(self) -> list[str]:
        missing: list[str] = []
        self._tell(lambda reporter: missing.extend(reporter.close()))
        return missing

    def finished(self, result: TrainResult) -> None:
        self._tell(lambda reporter: reporter.finished(result))

    def failed(self, error: BaseException) -> None:
        self._tell(lambda reporter: reporter.failed(error))

    def _tell(self, event: Callable[[Reporter], None]) -> None:
        for reporter in [*self._told]:
            try:
                event(reporter)
            except Exception as error:  # whatever a reporter does, the run is worth more
                self._drop(reporter, error)

    def _drop(self, reporter: Reporter, error: Exception) -> None:
        if reporter not in self._told:
            return
        self._told.remove(reporter)
        if not any(other in self._told for other in self._asked):
            self._told.append(Reporter())
        reason = " ".join(str(error).split()) or "no reason given"
        self.warn(f"{type(reporter).__name__} is told no more, it raised {type(error).__name__}: {reason}")


@dataclass
class TrainResult:
    """What came of a run."""

    losses: list[float]
    """The training loss of each step that this call made, in nats a token, mean over its micro-steps."""
    val_losses: list[tuple[int, float]]
    """(step, validation loss)."""
    config: Settled
    """The settled configuration."""
    model: GPT
    steps_done: int
    tokens_per_s: float
    """Without the first logged interval (warm-up, compilation)."""
    mfu: float | None
    peak_memory_bytes: int
    seconds: float
    skipped_steps: int
    """Steps that the float16 gradient scaler left out because a gradient was not finite."""
    out: Path | None = None
    missing: list[str] = field(default_factory=list)
    """What could not be written to `out`, the newest state or the last records, a line each."""
