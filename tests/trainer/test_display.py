"""What a run prints: the user's text unchanged, the live view, and the picture of its losses."""

from __future__ import annotations

import io
import os
import re
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fastgpt2 import TrainConfig, train
from fastgpt2.command import main
from fastgpt2.console import printable, shell_word
from fastgpt2.reporter import Reporter, TrainResult
from fastgpt2.reporters.display import TrainDisplay, plot_losses
from fastgpt2.run import build
from tests.trainer.runs import Watch, tiny

RUN = ["--model", "tiny", "--batch-size", "2", "--block-size", "8", "--device", "cpu", "--steps", "4"]
NAMES = ["[lr=0.1,wd=0]", "x[/dim]", "[bold]x[/bold]", "[/]", ":smile:", "a\\[b", "$x$ $", "a  b", "ü" * 90]


def without_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastgpt2.reporters.display.plot_losses", lambda out, result: out / "loss.png")


# ------------------------------------------------------------------------------------------- the user's text


@pytest.mark.parametrize("name", NAMES)
def test_paths_are_shown_as_they_are(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_picture(monkeypatch)
    monkeypatch.chdir(tmp_path)
    assert main([*RUN, "--out", name]) == 0
    output = capsys.readouterr().out
    assert f"writing to {name}\n" in output
    for part in ("metrics.jsonl", "loss.png", "checkpoints"):
        assert f"  {name}/{part}\n" in output


def test_notes_warnings_and_errors_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    display = TrainDisplay()
    for name in NAMES:
        display.note(name)
        display.warn(name)
        display.error(name)
    output, errors = capsys.readouterr()
    assert output == "".join(f"{name}\nwarning: {name}\n" for name in NAMES)
    assert errors == "".join(f"error: {name}\n" for name in NAMES)


EMBEDDINGS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
MARKS = "\u061c\u200e\u200f"


def test_what_steers_a_terminal_is_escaped_and_nothing_else() -> None:
    for character in map(chr, range(0x3000)):
        steers = unicodedata.category(character) in ("Cc", "Zl", "Zp") or character in MARKS
        steers = steers or unicodedata.bidirectional(character) in EMBEDDINGS
        shown = printable(f"a{character}b")
        assert (shown != f"a{character}b") == steers, hex(ord(character))
        assert not steers or (shown.isascii() and shown.isprintable())
    assert printable(Path("a\n\t\x1b\x7f\x9b\u202e\udcff")) == "a\\n\\t\\x1b\\u007f\\u009b\\u202e\\udcff"


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\x9bb", "a\u202eb"])
def test_no_name_steers_the_terminal(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_picture(monkeypatch)
    monkeypatch.chdir(tmp_path)
    stepped = TrainDisplay.stepped

    def stop(self: TrainDisplay, done: int) -> None:
        stepped(self, done)
        self.stop_requested = done == 2

    monkeypatch.setattr(TrainDisplay, "stepped", stop)
    assert main([*RUN, "--out", name]) == 0
    display = TrainDisplay()
    for say in (display.note, display.warn, display.error):
        say(f"in {name}")
    output, errors = capsys.readouterr()
    shown = printable(name)
    assert f"writing to {shown}\n" in output and f"{shown}/checkpoints" in output
    assert f"continue with --resume --out {shell_word(name)}\n" in output
    assert output.endswith(f"in {shown}\nwarning: in {shown}\n") and errors == f"error: in {shown}\n"
    assert not set(output + errors) & set("\x1b\x9b\u202e")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_what_an_encoding_does_not_have_is_escaped(
    encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_picture(monkeypatch)
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode("ł".encode() + b"\xff")  # a name that is not UTF-8
    display = TrainDisplay()
    train(TrainConfig(model="tiny", steps=2, batch_size=1, block_size=8, device="cpu"), reporters=[display])
    display.note(f"in {name}")
    sys.stdout.flush()
    text = raw.getvalue().decode(encoding)
    assert ("in ł\\udcff\n" if encoding == "utf-8" else "in \\u0142\\udcff\n") in text
    assert "final loss" in text


# ------------------------------------------------------------------------------------------------ the live view


class Screen:
    """A display on a terminal of `width` columns, and what it has printed there."""

    def __init__(self, width: int = 80, **changes: Any) -> None:
        self.file = io.StringIO()
        console = Console(file=self.file, width=width, force_terminal=True, color_system=None, highlight=False)
        self.display = TrainDisplay(console)
        self.display.started(build(tiny(**changes)))
        self.display.bar.stop()  # draw it only when asked

    def lines(self) -> list[str]:
        """The lines since the last call."""
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", self.file.getvalue())
        self.file.truncate(self.file.seek(0))
        return text.splitlines()

    def bar(self) -> list[str]:
        """What is left and right of the bar."""
        self.lines()
        self.display.console.print(self.display.bar)
        (line,) = self.lines()
        return re.split("[━╸╺ ]{30,}", line.strip())


def record(step: int, **changes: Any) -> dict[str, Any]:
    kept = {"loss": 10.9361, "lr": 3e-4, "tokens_per_s": 1_234_567.8, "memory_bytes": 79.1 * 2**30, "mfu": 0.451}
    return {"step": step, "seconds": 60.0 + 0.05 * step, **kept, **changes}


def test_the_columns_line_up_on_80_columns_from_step_1_to_a_million() -> None:
    screen = Screen(steps=10**6)
    screen.lines()
    screen.display.logged(record(1))
    screen.display.logged(record(10))
    screen.display.logged(record(20_000, loss=2.1, lr=1.5e-5, tokens_per_s=9.7, memory_bytes=441 * 2**20))
    screen.display.logged(record(999_999, lr=0.0, memory_bytes=None))
    screen.display.validated({"step": 999_999, "val_loss": 2.0712})
    assert screen.lines() == [
        "step       1  loss 10.9361  lr 3.00e-4  1,234,568 tok/s  79.1 GiB",
        "step      10  loss 10.9361  lr 3.00e-4  1,234,568 tok/s  79.1 GiB  13:53:20 left",
        "step   20000  loss  2.1000  lr 1.50e-5         10 tok/s   441 MiB  13:36:40 left",
        "step  999999  loss 10.9361  lr  0.00e0  1,234,568 tok/s                0:00 left",
        "step  999999  val   2.0712",
    ]
    wide = Screen(width=100, steps=100)
    wide.display.logged(record(1))
    wide.display.logged(record(2, seconds=62.0))
    assert wide.lines()[-1] == "step   2  loss 10.9361  lr 3.00e-4  1,234,568 tok/s  79.1 GiB  mfu 45.1%      3:11 left"


def test_a_terminal_and_a_log_file_show_the_same_steps_no_more_than_log_every_asks() -> None:
    outputs = []
    for terminal in (True, False):
        console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
        watch = Watch()
        train(tiny(steps=5, log_every=2, eval_every=5), reporters=[TrainDisplay(console), watch])
        text = console.file.getvalue()  # type: ignore[attr-defined]
        assert ("━" in text) == terminal
        outputs.append(re.findall(r"(step \d  (?:loss|val)  +[\d.]+)", text))
        assert len(outputs[-1]) == len(watch.records) == 5  # steps 1, 2, 4 and 5, and a validation
    assert outputs[0] == outputs[1]


def test_the_bar_says_what_the_run_does() -> None:
    screen = Screen(compile=True, steps=40)
    display = screen.display
    assert screen.bar() == ["compiling 0:00", "0/40"]
    display._since -= 83
    assert screen.bar() == ["compiling 1:23", "0/40"]
    display.stepped(1)
    display.logged(record(1))
    display.stepped(11)
    display.logged(record(11, seconds=160.05))
    assert screen.bar() == ["training", "11/40 4:50 left"]
    display.validating()
    assert screen.bar()[0] == "validating (compiling) 0:00"
    display.saving()
    assert screen.bar()[0] == "saving 0:00"
    display.validating()
    assert screen.bar()[0] == "validating 0:00"
    display.stop_requested = True
    assert screen.bar()[0] == "stopping 0:00"


def test_a_run_tells_the_bar() -> None:
    phases: list[str] = []

    class Phases(TrainDisplay):
        def _enter(self, phase: str) -> None:
            super()._enter(phase)
            if phases[-1:] != [phase]:
                phases.append(phase)

    display = Phases(Console(file=io.StringIO(), force_terminal=True))
    train(tiny(steps=4, eval_every=2), reporters=[display])
    assert phases == ["starting", "training", "validating", "training", "validating"]
    assert display.bar.live.is_started is False


def test_a_failed_run_takes_the_bar_away() -> None:
    display = TrainDisplay(Console(file=io.StringIO(), force_terminal=True))

    class Interrupts(Reporter):
        def logged(self, record: dict[str, Any]) -> None:
            assert display.bar.live.is_started
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), reporters=[Interrupts(), display])
    assert not display.bar.live.is_started


@pytest.mark.parametrize("width", [40, 80, 120])
def test_text_wraps_at_the_ends_of_words_and_a_path_stays_whole(width: int) -> None:
    screen = Screen(width)
    path = "/a/long/path/" + "x" * 150
    text = f"the quick brown fox jumps over the lazy dog and follows {path} until it is tired of --long-flags and-words"
    screen.lines()
    screen.display.note(text)
    lines = screen.lines()
    assert " ".join(lines) == text
    assert all(len(line) <= width or line == path for line in lines) and len(lines) > 2
    console = TrainDisplay().console  # not a terminal here
    with console.capture() as captured:
        TrainDisplay(console).note(text)
    assert captured.get() == f"{text}\n"


# ---------------------------------------------------------------------------------------------- the picture


def result_of(out: Path, **changes: Any) -> TrainResult:
    config = TrainConfig(model="tiny", steps=2, batch_size=1, block_size=8, device="cpu", out=out, **changes)
    return train(config)


STRANGE = ["", "7\n", '{"step": 1, "loss": "low"}\n', '{"step": 1, "loss": null}\n{"step": 2, "val_loss": 3.0}\n']


@pytest.mark.parametrize("text", [None, *STRANGE])
def test_a_picture_is_drawn_of_whatever_records_there_are(text: str | None, tmp_path: Path) -> None:
    result = result_of(tmp_path, save_every=0)
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    result.config = result.config.__class__(**{**vars(result.config), "data": "$x_{ \x1b\n $ data"})
    assert plot_losses(tmp_path, result).read_bytes().startswith(b"\x89PNG")


def no_matplotlib(out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    return "import of matplotlib.figure halted"


def a_folder_in_its_place(out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (out / "loss.png").mkdir()
    return "Is a directory"


def records_that_can_not_be_read(out: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").mkdir()
    return "Is a directory"


@pytest.mark.parametrize("spoil", [no_matplotlib, a_folder_in_its_place, records_that_can_not_be_read])
def test_a_picture_that_can_not_be_drawn_is_a_note(
    spoil: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finished = TrainDisplay.finished
    reasons = []

    def spoiled(self: TrainDisplay, result: TrainResult) -> None:
        reasons.append(spoil(tmp_path, monkeypatch))
        finished(self, result)

    monkeypatch.setattr(TrainDisplay, "finished", spoiled)
    assert main([*RUN, "--out", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert f"can't draw {tmp_path / 'loss.png'}: " in output and reasons[0] in output
    assert "final loss" in output and "loss curve" not in output


def test_drawing_leaves_the_callers_backend_alone(tmp_path: Path) -> None:
    import matplotlib

    before = matplotlib.rcParams._get("backend")  # type: ignore[attr-defined]
    plot_losses(tmp_path, result_of(tmp_path))
    assert matplotlib.rcParams._get("backend") is before  # type: ignore[attr-defined]
