"""What a run leaves in its folder: config.toml, starts.jsonl, metrics.jsonl, checkpoints.

A disk that is full for an hour must not end a run of a week: what can't be written is told and tried again, and only
what is still missing at the end counts.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt2 import checkpoint
from fastgpt2.durable import OutputError, write_text
from fastgpt2.metrics import JsonLines
from fastgpt2.record import record_start
from fastgpt2.run import Run


class Outputs:
    """The outputs of a run; of one without a folder, none.

    Args:
        warn: is told what can't be written, a line each.

    Raises:
        OutputError: the folder can't be written at the start, before anything was computed.
    """

    def __init__(self, run: Run, warn: Callable[[str], None]) -> None:
        self.run, self.warn, self.out = run, warn, run.config.out
        self.saves = self.out is not None and run.config.save_every > 0
        self.saved_step = run.start
        """The step of the newest checkpoint."""
        self.seconds_before = 0.0
        """Seconds that the run had taken before it was resumed."""
        self._save_error = self._record_error = ""
        self._log: JsonLines | None = None
        if self.out is not None:
            self._folder = _identity(self.out)
            write_text(self.out / "config.toml", run.config.to_toml())
            record_start(self.out, run)
            self._log = JsonLines(self.out / "metrics.jsonl", keep_up_to_step=run.start if run.config.resume else None)
            seconds = self._log.kept[-1].get("seconds") if self._log.kept else None
            self.seconds_before = float(seconds) if isinstance(seconds, (int, float)) else 0.0

    def record(self, record: dict[str, Any]) -> None:
        """Add a record to metrics.jsonl. One that can't be written is kept and written with the next."""
        if self._log is not None:
            self._try_to_log(lambda log: log.write(record))

    def _check_folder(self) -> None:
        """See that the folder is the one that the run began with: another would lack what was written before."""
        if self.out is not None and _identity(self.out) != self._folder:
            raise OutputError(f"{self.out} was moved or deleted while the run was under way: put it back")

    def save(self, step: int, progress: checkpoint.Progress, otherwise: str) -> bool:
        """Save a checkpoint, after the records up to it are on the disk; whether that worked.

        Args:
            otherwise: what happens if not, for the warning.
        """
        run = self.run
        assert self.out is not None
        self._try_to_log(JsonLines.sync)
        try:
            self._check_folder()
            checkpoint.save(self.out, step, run.config, run.state, progress)
        except (OutputError, OSError) as error:
            self._save_error = str(error)
            self.warn(f"{error}; {otherwise}")
            return False
        self.saved_step = step
        return True

    def close(self, step: int) -> list[str]:
        """End a run after a step: what is missing in its folder, a line each, and none where all is well."""
        missing = []
        if self.saves and self.saved_step != step:
            missing.append(f"the state after step {step} is not saved: {self._save_error}")
        if self._log is not None:
            try:
                self._log.close()
                self._check_folder()
            except OutputError as error:
                missing.append(f"the last records are missing: {error}")
        return missing

    def _try_to_log(self, action: Callable[[JsonLines], None]) -> None:
        assert self._log is not None
        try:
            action(self._log)
            self._record_error = ""
        except OutputError as error:
            # Said once, not with every record of a week.
            if str(error) != self._record_error:
                self.warn(f"{error}; going on, the records are kept and written with the next")
            self._record_error = str(error)


def _identity(folder: Path) -> tuple[int, int] | None:
    """What tells a folder from another of its name; None where there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino
