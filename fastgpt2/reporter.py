"""What a run tells, and how it is asked to stop."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastgpt2.run import Run
    from fastgpt2.train import TrainResult


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
