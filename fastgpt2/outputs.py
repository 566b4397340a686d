"""What a run leaves in its folder: config.toml, starts.jsonl, checkpoints.

A disk that is full for an hour must not end a run of a week: what can't be written is told and tried again, and only
what is still missing at the end counts.
"""

from __future__ import annotations

from collections.abc import Callable

from fastgpt2 import checkpoint
from fastgpt2.durable import OutputError, SameFolder, write_text
from fastgpt2.record import record_start
from fastgpt2.run import Run


class Outputs:
    """The outputs of a run; of one without a folder, none. The records are `reporters.metrics_file`'s.

    Args:
        warn: is told what can't be written, a line each.

    Raises:
        OutputError: the folder can't be written at the start, before anything was computed.
    """

    def __init__(self, run: Run, warn: Callable[[str], None]) -> None:
        self.run, self.warn = run, warn
        self.saved_step = run.start
        """The step of the newest checkpoint."""
        self._save_error = ""
        self.folder = SameFolder(run.config.out) if run.config.out is not None else None
        self.saves = self.folder is not None and run.config.save_every > 0
        if self.folder is not None:
            write_text(self.folder.path / "config.toml", run.config.to_toml())
            record_start(self.folder.path, run)

    def save(self, step: int, progress: checkpoint.Progress, otherwise: str) -> bool:
        """Save a checkpoint; whether that worked. The records up to it must be on the disk.

        Args:
            otherwise: what happens if not, for the warning.
        """
        run = self.run
        assert self.folder is not None
        try:
            self.folder.check()
            checkpoint.save(self.folder.path, step, run.config, run.state, progress)
        except (OutputError, OSError) as error:
            self._save_error = str(error)
            self.warn(f"{error}; {otherwise}")
            return False
        self.saved_step = step
        return True

    def missing(self, step: int) -> list[str]:
        """What is missing in the folder of a run that ends after a step, a line each."""
        if self.saves and self.saved_step != step:
            return [f"the state after step {step} is not saved: {self._save_error}"]
        return []
