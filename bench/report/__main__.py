"""`python -m bench.report`: write everything anew that follows from the stored results.

README.md's sections between <!-- bench:NAME --> and <!-- /bench:NAME -->, the figures in bench/plots and what `auto`
becomes (fastgpt2/auto.json), from bench/results. `--check` writes nothing and exits with 1 where something is out of
step, saying what.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.report import auto, plots
from bench.report.results import Record, RecordError, stored
from bench.report.sections import SECTIONS
from bench.timing import ROOT
from fastgpt2.flags import Parser

FIGURES = Path("bench") / "plots"


def fill(readme: str, records: Sequence[Record]) -> str:
    """The README's text with every section written anew.

    Raises:
        RecordError: a section's markers are not there once each.
    """
    for name, section in SECTIONS.items():
        opening, closing = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
        if readme.count(opening) != 1 or readme.count(closing) != 1:
            raise RecordError(f"README.md must have {opening} and {closing} once each: the report goes between them")
        before, rest = readme.split(opening)
        _, after = rest.split(closing)
        readme = f"{before}{opening}\n{section(records)}\n{closing}{after}"
    return readme


def derive(root: Path) -> dict[Path, str]:
    """The text of every file that follows from the results stored below root; a figure's PNG stands beside its JSON."""
    records = stored(root / "bench" / "results")
    texts = {root / "README.md": fill((root / "README.md").read_text(encoding="utf-8"), records)}
    texts[root / "fastgpt2" / "auto.json"] = auto.as_text(records)
    for name, figure in plots.figures(records).items():
        texts[root / FIGURES / f"{name}.json"] = json.dumps(figure, indent=1) + "\n"
    return texts


def out_of_step(root: Path, texts: dict[Path, str]) -> list[Path]:
    """The files that are missing or say something else."""
    wrong = [path for path, text in texts.items() if not path.exists() or path.read_text(encoding="utf-8") != text]
    pictures = [path.with_suffix(".png") for path in texts if path.parent == root / FIGURES]
    return [*wrong, *(path for path in pictures if not path.exists()), *left_over(root, texts)]


def left_over(root: Path, texts: dict[Path, str]) -> list[Path]:
    """Figures that no stored result is behind."""
    return sorted(path for path in (root / FIGURES).glob("*.*") if path.with_suffix(".json") not in texts)


def write(root: Path, texts: dict[Path, str]) -> None:
    for path in left_over(root, texts):
        path.unlink()
    for path, text in texts.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        if path.parent == root / FIGURES:
            plots.draw(json.loads(text), path.with_suffix(".png"))


def main(arguments: list[str] | None = None, root: Path = ROOT) -> int:
    """The command; all that it reads and writes is below root."""
    parser = Parser(
        prog="python -m bench.report", description="README's tables, the figures and auto.json from bench/results."
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where one is out of step")
    given = parser.parse_args(arguments)
    texts = derive(root)
    names = [str(path.relative_to(root)) for path in out_of_step(root, texts)]
    if given.check:
        if names:
            print(f"out of step with bench/results: {', '.join(names)}; run python -m bench.report", file=sys.stderr)
        return int(bool(names))
    write(root, texts)
    print("\n".join(f"wrote {name}" for name in names) or "everything was in step")
    return 0


if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
