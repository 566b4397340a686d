"""What the user sees of a run: its steps as they pass, notes, a summary and the loss curve."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import wrap
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task
from rich.text import Text

from fastgpt2 import signals
from fastgpt2.config import preset_name
from fastgpt2.console import discard_unwritten, printable, shell_word, unfailing
from fastgpt2.corpus import DUMMY, val_unigram_entropy
from fastgpt2.device import device_name
from fastgpt2.metrics import curve, read_json_lines
from fastgpt2.model import parameter_count
from fastgpt2.reporter import Reporter, TrainResult

if TYPE_CHECKING:
    from fastgpt2.run import Run

ROOM_FOR_MFU = 100
"""Columns of a terminal on which a step's line shows mfu as well: without it a line needs at most 80."""


class TrainDisplay(Reporter):
    """Prints a line for each logged step, and on a terminal a bar below. Drops output that can't be written.

    As a context manager it handles the signals that ask to stop: the first ends the run after the current step with a
    checkpoint, a second Ctrl-C ends it immediately. Before a run has started, the first ends the process.
    """

    every_rank = True  # each process gets the signals; rank 0 alone prints

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _console(sys.stdout)
        self.live = self.console.is_terminal
        self.bar = Progress(
            _Words(self._phase_words),
            BarColumn(),
            MofNCompleteColumn(),
            _Words(self._left_words),
            console=self.console,
            disable=not self.live,
            transient=True,
        )
        self.stopped_by: signal.Signals | None = None
        """The first signal that asked to stop."""
        self._can_save = False
        self._alone = True
        """Whether the run has no other process. One that ended now would take the save of the others down."""
        self._shows = True
        """Whether this process prints what is told of a run of several."""
        self._interrupts = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._enter("starting")
        self._first: dict[str, Any] | None = None
        """The first record of this start: how fast the run is, is measured from there."""
        self._ends: float | None = None
        """When the run is expected to end, on the monotonic clock."""

    def __enter__(self) -> TrainDisplay:
        self._handlers = signals.handle(self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.stop()
        discard_unwritten(sys.stdout)
        signals.put_back(self._handlers)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._can_save:
            signals.end_at_once(number)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 and self._alone:
            raise KeyboardInterrupt
        if not self.stop_requested:
            self.stop_requested, self.stopped_by = True, signal.Signals(number)
            again = " (press Ctrl-C again to stop now)" if number == signal.SIGINT and self._alone else ""
            line = "\n" if self.live else ""  # the bar's line has not ended
            if self._shows:
                signals.say(f"{line}{self.stopped_by.name}: stopping after this step{again}")

    def started(self, run: Run) -> None:
        self._can_save = True
        self._alone, self._shows = run.ranks.world == 1, run.ranks.first
        self.bar.disable = self.bar.disable or not self._shows
        config, shape = run.config, run.model.config
        self._print(
            f"{preset_name(shape)}: {parameter_count(shape):,} parameters "
            f"(L={shape.n_layer} H={shape.n_head} C={shape.n_embd} T={shape.block_size} V={shape.vocab_size}) "
            f"on {device_name(run.device)}, {config.dtype}"
        )
        parts = [f"{slot} {name}" for slot, name in run.chosen.items()]
        if run.ranks.world > 1:
            parts.append(f"{config.parallel} over {run.ranks.world} processes")
        switches = {
            "compiled": config.compile,
            "blocks recomputed": config.recompute == "blocks",
            "one CUDA graph": config.cuda_graph,
        }
        self._print(", ".join(parts + [name for name, on in switches.items() if on]))
        tokens = run.samples_per_step * shape.block_size
        writes = "" if config.out is None else f"; writing to {config.out}"
        self._print(f"{config.steps} steps of {tokens:,} tokens from {config.data}{writes}")
        self._compiles = config.compile
        self._enter("compiling" if config.compile else "starting")
        if config.compile and not self.live:
            self._print("compiling until the first step is done")
        self._steps = config.steps
        self._task = self.bar.add_task("", total=config.steps, completed=run.start)
        self.bar.start()

    def note(self, text: str) -> None:
        self._print(text, "dim")

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", "yellow")

    def error(self, text: str) -> None:
        """Print one line that says why the run ended."""
        self.bar.stop()
        _print(_console(sys.stderr), f"error: {text}", "red")

    def stepped(self, done: int) -> None:
        self._enter("training")
        self.bar.update(self._task, completed=done)

    def logged(self, record: dict[str, Any]) -> None:
        self._first = first = self._first or record
        columns = [
            self._step(record),
            f"loss {record['loss']:7.4f}",
            f"lr {_scientific(record['lr']):>7}",
            f"{record['tokens_per_s']:>9,.0f} tok/s",
            f"{_memory(record['memory_bytes']):>8}",
        ]
        if record["mfu"] is not None and self.console.width >= ROOM_FOR_MFU:
            columns.append(f"mfu {record['mfu']:.1%}")
        steps, to_go = record["step"] - first["step"], self._steps - record["step"]
        if steps and to_go:
            left = (record["seconds"] - first["seconds"]) / steps * to_go
            self._ends = time.monotonic() + left
            columns.append(f"{_clock(left):>8} left")
        self._print("  ".join(columns))

    def validating(self) -> None:
        # The evaluation mode is another graph.
        self._enter("validating (compiling)" if self._compiles else "validating")
        self._compiles = False

    def validated(self, record: dict[str, Any]) -> None:
        self._print(f"{self._step(record)}  val  {record['val_loss']:7.4f}", "bold")

    def saving(self) -> None:
        self._enter("saving")

    def close(self) -> list[str]:
        self.bar.stop()
        return []

    def finished(self, result: TrainResult) -> None:
        if not self._shows:
            return
        out = result.out
        rows = {
            "steps": f"{result.steps_done} of {result.config.steps}",
            "final loss": f"{result.losses[-1]:.4f} nats" if result.losses else "no step was made",
            "validation loss": f"{result.val_losses[-1][1]:.4f} nats" if result.val_losses else None,
            "tokens/s": f"{result.tokens_per_s:,.0f}" if result.losses else None,
            "MFU (llm.c's formula)": None if result.mfu is None else f"{result.mfu:.1%}",
            "skipped steps": str(result.skipped_steps) if result.config.dtype == "float16" else None,
            "peak memory": _peak_memory(result),
            "time": _clock(result.seconds),
        }
        if out is not None:
            rows["metrics"] = str(out / "metrics.jsonl")
            rows["loss curve"] = self._plot(out, result)
            if result.config.save_every:
                rows["checkpoints"] = str(out / "checkpoints")
        shown = {name: value for name, value in rows.items() if value is not None}
        for name, value in shown.items():
            # A path is printed whole, however long, so that it can be copied.
            self.console.print(f"{name:<{max(map(len, shown))}}  {printable(value)}", soft_wrap=True)
        stopped = self.stop_requested and result.steps_done < result.config.steps
        if stopped and out is not None and result.config.save_every and result.steps_done and not result.missing:
            self.console.print(f"stopped early; continue with --resume --out {shell_word(out)}", soft_wrap=True)

    def _print(self, text: str, style: str = "") -> None:
        if self._shows:
            _print(self.console, text, style)

    def _step(self, record: dict[str, Any]) -> str:
        return f"step {record['step']:>{len(str(self._steps))}}"

    def _enter(self, phase: str) -> None:
        """Name what the run does from now on."""
        self._phase, self._since = phase, time.monotonic()

    def _phase_words(self) -> str:
        """What the run does now, and since when, if that isn't to make steps: "compiling 0:12"."""
        phase = "stopping" if self.stop_requested else self._phase
        return phase if phase == "training" else f"{phase} {_clock(time.monotonic() - self._since)}"

    def _left_words(self) -> str:
        return "" if self._ends is None else f"{_clock(max(0.0, self._ends - time.monotonic()))} left"

    def _plot(self, out: Path, result: TrainResult) -> str | None:
        """Draw the loss curve. Returns its path, or None if that fails: the run doesn't."""
        try:
            return str(plot_losses(out, result))
        except Exception as error:  # a full disk, a missing package, strange records in the file
            self.note(f"can't draw {out / 'loss.png'}: {' '.join(str(error).split()) or type(error).__name__}")
            return None


class _Words(ProgressColumn):
    """Words beside the bar, asked for at each refresh."""

    def __init__(self, words: Callable[[], str]) -> None:
        super().__init__()
        self._words = words

    def render(self, task: Task) -> Text:
        return Text(self._words())


def _console(stream: TextIO | None) -> Console:
    """A console that prints the user's text as it is: in a path, [lr=0.1] is not a style and :x: not an emoji."""
    file = unfailing(stream)
    terminal = file.isatty()
    # In a pipe or a log file an event is a line, however long.
    width = None if terminal else 120
    return Console(file=file, width=width, soft_wrap=not terminal, markup=False, emoji=False, highlight=False)


def _print(console: Console, text: str, style: str = "") -> None:
    """Print a user's text, wrapped at the ends of words. A longer word, such as a path, is left whole."""
    lines = [printable(text)]
    if not console.soft_wrap:
        lines = wrap(lines[0], console.width, break_long_words=False, break_on_hyphens=False)
    console.print(Text("\n".join(lines), style), soft_wrap=True)


def _scientific(value: float) -> str:
    """3e-4 as 3.00e-4: "%e" writes e-04."""
    digits, exponent = f"{value:.2e}".split("e")
    return f"{digits}e{int(exponent)}"


def _memory(size: float | None) -> str:
    """79.1 GiB; empty on a system that tells none."""
    if size is None:
        return ""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"


def _clock(seconds: float) -> str:
    """1:02:03, and below an hour 2:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _peak_memory(result: TrainResult) -> str | None:
    """The peak of memory and what it counts; None if this system tells none."""
    if result.peak_memory_bytes is None:
        return None
    kind = "allocated on the GPU" if result.model.wte.weight.is_cuda else "resident in the process"
    return f"{_memory(result.peak_memory_bytes)} {kind}"


def plot_losses(out: Path, result: TrainResult) -> Path:
    """Draw a run's metrics.jsonl as loss.png beside it. Returns its path."""
    from matplotlib.figure import Figure  # not pyplot: its backend belongs to the caller, such as a notebook

    records = read_json_lines(out / "metrics.jsonl")
    config = result.config
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps, losses = curve(records, "loss")
    # Mark the points if there are few.
    axes.plot(steps, losses, label="training", marker="o" if len(steps) < 30 else None, markersize=3)
    validated = curve(records, "val_loss")
    if validated[0]:
        axes.plot(*validated, "o-", label="validation", markersize=4)
    if config.data in DUMMY:
        floor = math.log(config.vocab_size)
        label = "floor" if config.data == "dummy" else "uniform guess"
        axes.axhline(floor, color="gray", linestyle="--", label=f"{label}: ln {config.vocab_size} = {floor:.3f}")
        if config.data == "dummy":  # a scale on which noise around the floor doesn't look like a trend
            axes.set_ylim(floor - 0.5, max([floor + 0.5, *(loss + 0.1 for loss in losses)]))
    if (entropy := val_unigram_entropy(config.data)) is not None:
        label = f"unigram entropy of the val split: {entropy:.3f}"
        axes.axhline(entropy, color="gray", linestyle="--", label=label)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    title = f"{preset_name(result.model.config)} on {config.data}"
    axes.set_title(printable(title), parse_math=False)  # $ is part of the name
    axes.grid(alpha=0.3)
    axes.legend()
    path = out / "loss.png"
    figure.savefig(path, dpi=120)
    return path
