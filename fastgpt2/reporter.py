"""How a run reports events and is asked to stop, and the result that it returns."""

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
    """Receives a run's events, and can ask it to stop. This base class shows warnings and nothing else.

    An exception in a method drops the reporter from the run, with a warning to the others. The run goes on.
    """

    stop_requested = False
    """Set it to end the run after the current step, with a checkpoint. Of several processes any may ask."""
    every_rank = False
    """Whether it is told of events in each of several processes. Otherwise only rank 0's is."""

    def started(self, run: Run) -> None:
        """The run is built; nothing has been computed."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stepped(self, done: int) -> None:
        """Step `done` has been launched, not necessarily computed."""

    def warn(self, text: str) -> None:
        """A problem that doesn't end the run. The user must see it."""
        warnings.warn(text, RuntimeWarning, stacklevel=2)

    def logged(self, record: dict[str, Any]) -> None:
        """A logging step has made this record for metrics.jsonl."""

    def validating(self) -> None:
        """A validation begins."""

    def validated(self, record: dict[str, Any]) -> None:
        """A validation has made this record for metrics.jsonl."""

    def saving(self) -> None:
        """A checkpoint is about to be saved: sync what must be on disk before it."""

    def close(self) -> list[str]:
        """The run has ended, with or without an error: write what is left. Returns one line for each thing missing."""
        return []

    def finished(self, result: TrainResult) -> None:
        """The run has ended without an error. Called after close."""

    def failed(self, error: BaseException) -> None:
        """The run, once started, has ended with an error, KeyboardInterrupt included. Called after close."""


class Reporters:
    """Passes each event to any number of reporters in turn. Drops a reporter that raises."""

    def __init__(self, reporters: Iterable[Reporter] = (), *, first: bool = True) -> None:
        # Somebody must show the warnings.
        self._asked = list(reporters) or [Reporter()]
        self._told = [reporter for reporter in self._asked if first or reporter.every_rank]

    @property
    def stop_requested(self) -> bool:
        """Whether a reporter asks to stop, dropped ones included."""
        return any(self._asks_to_stop(reporter) for reporter in [*self._asked])

    def add_first(self, reporter: Reporter) -> None:
        """Add a reporter that hears events first: records must be written before anything that may fail."""
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
        self._tell(lambda reporter: reporter.logged({**record}))

    def validating(self) -> None:
        self._tell(lambda reporter: reporter.validating())

    def validated(self, record: dict[str, Any]) -> None:
        self._tell(lambda reporter: reporter.validated({**record}))

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

    def _asks_to_stop(self, reporter: Reporter) -> bool:
        try:
            return bool(reporter.stop_requested)
        except Exception as error:
            self._asked.remove(reporter)
            self._drop(reporter, error)
            return False

    def _tell(self, event: Callable[[Reporter], None]) -> None:
        for reporter in [*self._told]:
            try:
                event(reporter)
            except Exception as error:  # no reporter may end the run
                self._drop(reporter, error)

    def _drop(self, reporter: Reporter, error: Exception) -> None:
        if reporter not in self._told:
            return
        self._told.remove(reporter)
        if not any(other in self._told for other in self._asked):
            self._told.append(Reporter())
        reason = " ".join(str(error).split()) or "no reason given"
        self.warn(f"{type(reporter).__name__} is dropped: it raised {type(error).__name__}: {reason}")


@dataclass(repr=False)
class TrainResult:
    """The result of a run."""

    losses: list[float]
    """The training loss of each step of this call, in nats a token: the mean over its micro-steps."""
    val_losses: list[tuple[int, float]]
    """(step, validation loss)."""
    config: Settled
    """The settled configuration."""
    model: GPT
    steps_done: int
    tokens_per_s: float
    """Excludes the first logged interval (warm-up, compilation)."""
    mfu: float | None
    peak_memory_bytes: int | None
    seconds: float
    skipped_steps: int
    """Steps that the float16 gradient scaler skipped because a gradient was not finite."""
    out: Path | None = None
    missing: list[str] = field(default_factory=list)
    """What could not be written to `out` (the newest state, the last records), one line each."""

    def __repr__(self) -> str:
        """One line: the losses and the model would fill a screen."""
        parts = [
            f"{self.steps_done} of {self.config.steps} steps",
            f"loss {self.losses[-1]:.4f}" if self.losses else "no step was made",
            f"val {self.val_losses[-1][1]:.4f}" if self.val_losses else "",
            f"{self.tokens_per_s:,.0f} tokens/s",
            f"{self.seconds:.1f} s",
            f"out={str(self.out)!r}" if self.out else "",
            *self.missing,
        ]
        return f"TrainResult({', '.join(filter(None, parts))})"
