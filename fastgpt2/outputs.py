"""The outputs in a run's folder: config.toml, starts.jsonl, checkpoints.

A disk that is full for an hour must not end a week-long run: a failed write is reported and retried, and only what is
still missing at the end is an error.
"""

from __future__ import annotations

from collections.abc import Callable

from fastgpt2 import checkpoint
from fastgpt2.durable import OutputError, SameFolder, write_text
from fastgpt2.record import record_start
from fastgpt2.run import Run


class Outputs:
    """Writes the outputs of a run, or nothing if it has no folder. `reporters.metrics_file` writes the records.

    Of several processes rank 0 writes, and each its part of the checkpoints.

    Args:
        warn: called with one line for each failed write.

    Raises:
        OutputError: the folder can't be written at the start, before anything is computed.
    """

    def __init__(self, run: Run, warn: Callable[[str], None]) -> None:
        self.run, self.warn = run, warn
        self.saved_step = run.start
        """The step of the newest checkpoint."""
        self._save_error = ""
        out = run.config.out
        self.saves = out is not None and run.config.save_every > 0
        self.folder = SameFolder(out) if out is not None and run.ranks.first else None
        run.ranks.together(self._begin, OutputError)

    def _begin(self) -> None:
        if self.folder is not None:
            write_text(self.folder.path / "config.toml", self.run.config.to_toml())
            record_start(self.folder.path, self.run)

    def save(self, step: int, progress: checkpoint.Progress, otherwise: str) -> bool:
        """Save a checkpoint and return whether that worked. The records up to it must already be on disk.

        Args:
            otherwise: what happens if it fails, for the warning.
        """
        run = self.run
        assert run.config.out is not None
        try:
            run.ranks.together(self._check_folder, OutputError)
            checkpoint.save(run.config.out, step, run.config, run.state, progress, run.ranks)
        except (OutputError, OSError) as error:
            self._save_error = str(error)
            self.warn(f"{error}; {otherwise}")
            return False
        self.saved_step = step
        return True

    def _check_folder(self) -> None:
        if self.folder is not None:
            self.folder.check()

    def missing(self, step: int) -> list[str]:
        """What is missing from the folder if the run ends after `step`, one line each."""
        if self.saves and self.saved_step != step:
            return [f"the state after step {step} is not saved: {self._save_error}"]
        return []
