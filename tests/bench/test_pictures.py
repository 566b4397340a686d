"""The pictures in docs/pictures: they follow from the records and from slots.py, and are small."""

from __future__ import annotations

import re
import sys
from html import unescape
from pathlib import Path

import matplotlib
import pytest

from bench.pictures.__main__ import FOLDER, PICTURES, main
from bench.pictures.diagrams import BLOCK, STEPS
from bench.pictures.measure import FOLDER as RECORDED
from bench.pictures.measure import ROWS, watch
from bench.pictures.plots import SAMPLE_COLUMNS, largest_model
from bench.record import load
from bench.report.results import newest, pick, stored
from fastgpt2.config import ConfigError
from fastgpt2.slots import SLOTS, implementation
from fastgpt2.verify import backends


def texts(name: str) -> list[str]:
    """The pieces of text of a stored picture, in order."""
    svg = (FOLDER / name).read_text(encoding="utf-8").replace("\u00a0", " ")
    return [unescape(text) for text in re.findall(r"<text[^>]*>([^<]*)</text>", svg)]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the command has drawn all pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    main([], folder)
    return folder


@pytest.mark.parametrize("name", PICTURES)
def test_redrawing_gives_the_stored_picture(name: str, drawn: Path) -> None:
    kept = (FOLDER / name).read_text(encoding="utf-8")
    drawn_by = re.search(r"<dc:title>Matplotlib v([^,]*),", kept)
    if drawn_by and drawn_by[1] != matplotlib.__version__:
        pytest.skip(f"drawn by matplotlib {drawn_by[1]}, this is {matplotlib.__version__}")
    assert (drawn / name).read_text(encoding="utf-8") == kept, f"{name} is out of date: run python -m bench.pictures"


def test_every_picture_is_stored_and_small() -> None:
    kept = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert kept.keys() == PICTURES.keys()
    assert max(kept.values()) < 100_000


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_needs_nothing_from_elsewhere(name: str) -> None:
    svg = (FOLDER / name).read_text(encoding="utf-8")
    assert not re.search(r"<image|<script|@font-face|@import|url\((?!#)|href=\"(?!#)", svg)


def test_the_cpu_step_shows_every_number_of_its_record() -> None:
    record = newest(stored(), lambda record: pick(record, "training step"))["cpu"]
    results, shown = largest_model(pick(record, "training step")), texts("cpu-step.svg")
    assert any(record.commit_id[:12] in text for text in shown)
    for result in results:
        assert result.tokens_per_s and result.peak_memory_bytes
        assert f"{result.tokens_per_s:,.0f}" in shown
        assert f"{result.peak_memory_bytes / 2**30:.2f}" in shown


@pytest.mark.parametrize("name", ["first-run", "ten-minutes"])
def test_a_run_shows_its_record_and_learns(name: str) -> None:
    record = load(RECORDED / f"{name}.json")
    (run,) = record.training_runs
    shown = texts(f"{name}.svg")
    assert any(f"from {run.losses[0][1]:.2f} to {run.losses[-1][1]:.2f} nats" in text for text in shown)
    assert run.command in shown and f"unigram entropy {run.unigram:.2f}" in shown
    assert any(record.commit_id[:12] in text for text in shown)
    assert run.losses[-1][1] < run.unigram and run.val_losses[-1][1] < run.unigram
    assert all(line[:SAMPLE_COLUMNS] in shown for line in run.sample.splitlines()[:5] if line)


def test_the_terminal_shows_the_recorded_screen() -> None:
    (run,) = load(RECORDED / "first-run.json").training_runs
    pieces = [piece for line in run.screen for piece, _, _ in line if piece.strip()]
    assert "".join(texts("terminal.svg")) == "".join([f"$ {run.command}", *pieces])
    assert any("loss" in piece for piece in pieces), "no step is seen"


def test_the_backends_are_all_there_and_within_budget() -> None:
    record, shown = load(RECORDED / "backends.json"), texts("backends.svg")
    assert any(record.commit_id[:12] in text for text in shown)
    on_a_cpu = {name for name, backend in backends().items() if not any(map(needs_cuda, backend.choices.items()))}
    for dtype in ("float32", "bfloat16"):
        found = [trajectory for trajectory in record.trajectories if trajectory.dtype == dtype]
        assert {trajectory.backend for trajectory in found} == on_a_cpu <= {*shown}
        assert all(len(t.differences) == 100 and max(map(abs, t.differences)) <= t.budget for t in found)
        budgets = " or ".join(f"{budget:.1e}" for budget in sorted({t.budget for t in found})).replace("e-0", "e-")
        assert f"budget: {budgets} nats" in shown


def needs_cuda(choice: tuple[str, str]) -> bool:
    return implementation(*choice).cuda


def test_a_screen_is_read_as_it_was_before_its_first_line_left() -> None:
    pytest.importorskip("pyte", reason="needs pyte, which reads a terminal's screen")
    writes = """
import time
print("\\x1b[2mdim\\x1b[0m and \\x1b[1;31mbold red\\x1b[0m")
for i in range(ROWS + 5):
    print(f"\\r\\x1b[2Kline {i}\\n", end=f"bar {i}", flush=True)  # a bar below the lines
    time.sleep(1.0 if i == ROWS - 3 else 0.0)  # the screen is full
"""
    screen = watch([sys.executable, "-c", writes.replace("ROWS", str(ROWS))], ".")
    assert screen[0] == [
        ("dim", "brightblack", False), (" and ", "default", False), ("bold red", "red", True), ("", "default", False),
    ]  # fmt: skip
    lines = ["".join(text for text, _, _ in line) for line in screen[1:]]
    assert lines == [*(f"line {i}" for i in range(ROWS - 2)), f"bar {ROWS - 3}"]
    with pytest.raises(ConfigError, match="no such thing"):
        watch([sys.executable, "-c", "raise SystemExit('no such thing')"], ".")


def test_the_slots_are_those_of_the_table() -> None:
    shown = texts("slots.svg")
    for slot, table in SLOTS.items():
        times = sum(step == slot for _, step in STEPS)
        assert times and shown.count(f"--{slot}") == times
        where = shown.index(f"--{slot}") + 1
        assert shown[where : where + len(table)] == list(table)
    assert [slot for _, slot in STEPS[BLOCK]] == ["norm", "attn", "norm", "mlp"]
