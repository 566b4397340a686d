"""OUT/metrics.jsonl: a record of each logging step and each validation.

A disk that is full for an hour must not end a week-long run: what can't be written is reported and written with the
next record, and only what is still missing at the end is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastgpt2.durable import OutputError, SameFolder
from fastgpt2.metrics import JsonLines
from fastgpt2.reporter import Reporter


class MetricsFile(Reporter):
    """Writes each record to a folder's metrics.jsonl. They are on disk before a checkpoint is saved.

    Args:
        folder: the run's folder.
        keep_up_to_step: keep the records up to this step, where a resumed run continues. None starts a new file.
        warn: called with one line for each new failure.

    Raises:
        OutputError: the file can't be written.
    """

    def __init__(self, folder: SameFolder, keep_up_to_step: int | None, warn: Callable[[str], None]) -> None:
        self._folder, self._warn, self._problem = folder, warn, ""
        self._file = JsonLines(folder.path / "metrics.jsonl", keep_up_to_step=keep_up_to_step)
        seconds = self._file.kept[-1].get("seconds") if self._file.kept else None
        self.seconds_before = float(seconds) if isinstance(seconds, (int, float)) else 0.0
        """Seconds that the run took before it was resumed."""

    def logged(self, record: dict[str, Any]) -> None:
        self._try(lambda: self._file.write(record))

    def validated(self, record: dict[str, Any]) -> None:
        self._try(lambda: self._file.write(record))

    def warn(self, text: str) -> None:
        """Do nothing: a warning is not a record."""

    def saving(self) -> None:
        self._try(self._file.sync)

    def close(self) -> list[str]:
        try:
            self._file.close()
            self._folder.check()
        except OutputError as error:
            return [f"the last records are missing: {error}"]
        return []

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
            self._problem = ""
        except OutputError as error:
            # Warn once, not with every record of a week.
            if str(error) != self._problem:
                self._warn(f"{error}; continuing, the records are kept and written with the next one")
            self._problem = str(error)
