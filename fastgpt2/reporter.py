"""What a run tells, how it is asked to stop, and what came of it."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.model import GPT
    from fastgpt2.run import Run
    from fastgpt2.settings import Settled


class Reporter:
    """What a run tells the world, and how it is asked to stop. This one says nothing."""

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

    def finished(self, result: TrainResult) -> None:
        """The run is over."""


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
