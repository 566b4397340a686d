"""`python -m bench.report`: rewrite everything that follows from the stored results.

That is what stands between <!-- bench:NAME --> and <!-- /bench:NAME --> in docs/benchmarks.md, docs/performance.md and
README.md, and what `auto` becomes (fastgpt2/auto.json). `--check` writes nothing, names what is out of step and then
exits with 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.record import Record, RecordError
from bench.report import auto, budget
from bench.report.results import stored
from bench.report.sections import README, SECTIONS, Sections
from bench.timing import ROOT
from fastgpt2.console import run_command
from fastgpt2.flags import read_arguments

PAGES: dict[str, Sections] = {
    "docs/benchmarks.md": SECTIONS,
    "docs/performance.md": budget.SECTIONS,
    "README.md": README,
}
"""By the page that has them."""


def fill(page: str, text: str, records: Sequence[Record]) -> str:
    """A page's text with every section written anew.

    Raises:
        RecordError: a section's markers are not there once each.
    """
    for name, section in PAGES[page].items():
        opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if text.count(opening) != 1 or text.count(closing) != 1:
            raise RecordError(f"{page} must have {opening} and {closing} once each: the report goes between them")
        before, rest = text.split(opening)
        _, after = rest.split(closing)
        text = before + "\n".join(filter(None, [opening, section(records), closing])) + after
    return text


def derive(root: Path) -> dict[Path, str]:
    """The text of every file that follows from the results stored below root."""
    records = stored(root / "bench" / "results")
    pages = {root / page: fill(page, (root / page).read_text(encoding="utf-8"), records) for page in PAGES}
    return {**pages, root / "fastgpt2" / "auto.json": auto.as_text(records)}


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
