"""`python -m bench.report`: rewrite everything that follows from the stored results.

That is the sections of docs/benchmarks.md between <!-- bench:NAME --> and <!-- /bench:NAME -->, and what `auto` becomes
(fastgpt2/auto.json). `--check` writes nothing, names what is out of step and then exits with 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.record import Record, RecordError
from bench.report import auto
from bench.report.results import stored
from bench.report.sections import SECTIONS
from bench.timing import ROOT
from fastgpt2.console import run_command
from fastgpt2.flags import read_arguments

PAGE = "docs/benchmarks.md"


def fill(page: str, records: Sequence[Record]) -> str:
    """The page's text with every section written anew.

    Raises:
        RecordError: a section's markers are not there once each.
    """
    for name, section in SECTIONS.items():
        opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if page.count(opening) != 1 or page.count(closing) != 1:
            raise RecordError(f"{PAGE} must have {opening} and {closing} once each: the report goes between them")
        before, rest = page.split(opening)
        _, after = rest.split(closing)
        page = before + "\n".join(filter(None, [opening, section(records), closing])) + after
    return page


def derive(root: Path) -> dict[Path, str]:
    """The text of every file that follows from the results stored below root."""
    records = stored(root / "bench" / "results")
    return {
        root / PAGE: fill((root / PAGE).read_text(encoding="utf-8"), records),
        root / "fastgpt2" / "auto.json": auto.as_text(records),
    }


@dataclass(frozen=True)
class ReportConfig:
    """Whether to write."""

    check: bool = False
    """Write nothing; exit with status 1 if a file is out of date."""


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The command; all that it reads and writes is below root."""
    given = read_arguments(ReportConfig, "bench.report", arguments)
    texts = derive(root)
    wrong = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    names = [str(path.relative_to(root)) for path in wrong]
    if given.check:
        if names:
            print(f"out of step with bench/results: {', '.join(names)}; run python -m bench.report", file=sys.stderr)
        return int(bool(names))
    for path in wrong:
        path.write_text(texts[path], encoding="utf-8")
    print("\n".join(f"wrote {name}" for name in names) or "everything was in step")
    return 0


if __name__ == "__main__":
    run_command(main)
