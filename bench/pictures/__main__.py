"""`python -m bench.pictures`: redraw the pictures in docs/pictures from the stored records."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from bench.pictures import diagrams, plots
from bench.pictures.measure import RECORDS, record
from bench.record import RecordError
from bench.timing import ROOT
from fastgpt2.console import run_command
from fastgpt2.fields import Choice
from fastgpt2.flags import read_arguments

FOLDER = ROOT / "docs" / "pictures"
PICTURES: dict[str, Callable[[], str]] = {
    "first-run.svg": plots.first_run,
    "ten-minutes.svg": plots.ten_minutes,
    "terminal.svg": diagrams.terminal,
    "backends.svg": plots.backends,
    "cpu-step.svg": plots.cpu_step,
    "slots.svg": diagrams.slots,
}
"""What draws each file of docs/pictures."""


@dataclass(frozen=True)
class PicturesConfig:
    """What to measure first."""

    record: tuple[Annotated[str, Choice(tuple(RECORDS))], ...] = ()
    """Measure these records anew: first-run (2 minutes on two cores), ten-minutes or backends (5 minutes)."""


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """The command; writes the pictures below folder. Exit status 1 if a record is missing or damaged."""
    given = read_arguments(PicturesConfig, "bench.pictures", arguments)
    for name in given.record:
        print(f"wrote {record(name)}", flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name, draw in PICTURES.items():
        try:
            (folder / name).write_text(draw(), encoding="utf-8")
            print(f"wrote {folder / name}")
        except RecordError as error:
            print(f"{name} is not drawn: {error}", file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    run_command(main)
