"""`python -m bench.pictures`: redraw the pictures in docs/pictures from the stored records."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.pictures import diagrams, plots
from bench.timing import ROOT
from fastgpt2.console import run_command
from fastgpt2.flags import read_arguments

FOLDER = ROOT / "docs" / "pictures"
PICTURES: dict[str, Callable[[], str]] = {
    "cpu-step.svg": plots.cpu_step,
    "slots.svg": diagrams.slots,
}


@dataclass(frozen=True)
class PicturesConfig:
    """No flags."""


def main(arguments: list[str] | None = None, folder: Path = FOLDER) -> int:
    """The command; writes below folder."""
    read_arguments(PicturesConfig, "bench.pictures", arguments)
    folder.mkdir(parents=True, exist_ok=True)
    for name, draw in PICTURES.items():
        (folder / name).write_text(draw(), encoding="utf-8")
        print(f"wrote {folder / name}")
    return 0


if __name__ == "__main__":
    run_command(main)
