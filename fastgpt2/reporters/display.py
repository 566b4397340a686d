"""What the user sees of a run: live progress, notes, the summary table and the loss curve."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fastgpt2 import signals
from fastgpt2.config import preset_name
from fastgpt2.console import discard_unwritten, printable, shell_word, unfailing
from fastgpt2.device import device_name
from fastgpt2.metrics import curve, read_json_lines
from fastgpt2.model import parameter_count
from fastgpt2.reporter import Reporter, TrainResult

if TYPE_CHECKING:
    from fastgpt2.run import Run


class TrainDisplay(Reporter):
    """Shows a progress bar on a terminal, elsewhere a line for each logged step. Drops output that can't be written.

    As a context manager it handles the signals that ask to stop: the first ends the run after the current step with a
    checkpoint, a second Ctrl-C ends it immediately. Before a run has started, the first ends the process.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or _console(sys.stdout)
        self.live = self.console.is_terminal
        self.stopped_by: signal.Signals | None = None
        """The first signal that asked to stop."""
        self._can_save = False
        self._interrupts = 0
        self._handlers: dict[signal.Signals, Any] = {}
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[status]}"),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.live,
        )

    def __enter__(self) -> TrainDisplay:
        self._handlers = signals.handle(self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        discard_unwritten(sys.stdout)
        signals.put_back(self._handlers)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if not self._can_save:
            signals.end_at_once(number)
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        if not self.stop_requested:
            self.stop_requested, self.stopped_by = True, signal.Signals(number)
            again = " (press Ctrl-C again to stop now)" if number == signal.SIGINT else ""
            line = "\n" if self.live else ""  # the bar's line has not ended
            signals.say(f"{line}{self.stopped_by.name}: stopping after this step{again}")

    def started(self, run: Run) -> None:
        self._can_save = True
        config, shape = run.config, run.model.config
        self.console.print(
            f"{preset_name(shape)}: {parameter_count(shape):,} parameters "
            f"(L={shape.n_layer} H={shape.n_head} C={shape.n_embd} T={shape.block_size} V={shape.vocab_size}) "
            f"on {device_name(run.device)}, {config.dtype}"
        )
        parts = [f"{slot} {name}" for slot, name in run.chosen.items()]
        switches = {
            "compiled": config.compile,
            "blocks recomputed": config.recompute == "blocks",
            "one CUDA graph": config.cuda_graph,
        }
        self.console.print(", ".join(parts + [name for name, on in switches.items() if on]))
        tokens = run.samples_per_step * shape.block_size
        data, out = printable(config.data), printable(config.out)
        self.console.print(f"{config.steps} steps of {tokens:,} tokens from {data}; writing to {out}")
        self._progress.start()
        self._task = self._progress.add_task("", total=config.steps, completed=run.start, status="starting")
        self._steps = config.steps
        self._status = ""

    def note(self, text: str) -> None:
        self.console.print(Text(printable(text), "dim"))

    def warn(self, text: str) -> None:
        self.console.print(Text(f"warning: {printable(text)}", "yellow"))

    def error(self, text: str) -> None:
        """Print one line that says why the run ended."""
        self._progress.stop()
        _console(sys.stderr).print(Text(f"error: {printable(text)}", "red"))

    def stepped(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def logged(self, record: dict[str, Any]) -> None:
        mfu = "" if record["mfu"] is None else f"  mfu {record['mfu']:.1%}"
        status = f"loss {record['loss']:.4f}  {record['tokens_per_s']:,.0f} tok/s{mfu}"
        self._progress.update(self._task, status=status)
        if not self.live:
            self.console.print(f"step {record['step']:>6}/{self._steps}  {status}  {record['step_ms']:.0f} ms")

    def validated(self, record: dict[str, Any]) -> None:
        self.console.print(f"step {record['step']:>6}/{self._steps}  val {record['val_loss']:.4f}")

    def finished(self, result: TrainResult) -> None:
        self._progress.stop()
        out = result.out
        rows = {
            "steps": f"{result.steps_done} of {result.config.steps}",
            "final loss": f"{result.losses[-1]:.4f} nats" if result.losses else "no step was made",
            "validation loss": f"{result.val_losses[-1][1]:.4f} nats" if result.val_losses else None,
            "tokens/s": f"{result.tokens_per_s:,.0f}" if result.losses else None,
            "MFU (llm.c's formula)": None if result.mfu is None else f"{result.mfu:.1%}",
            "skipped steps": str(result.skipped_steps) if result.config.dtype == "float16" else None,
            "peak memory": _memory(result),
            "time": f"{result.seconds:.1f} s",
        }
        if out is not None:
            rows["metrics"] = str(out / "metrics.jsonl")
            rows["loss curve"] = self._plot(out, result)
            if result.config.save_every:
                rows["checkpoints"] = str(out / "checkpoints")
        table = Table(title="fastgpt2", show_header=False, title_justify="left")
        table.add_column()
        table.add_column(overflow="fold")  # a truncated path is useless
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, printable(value))
        self.console.print(table)
        stopped = self.stop_requested and result.steps_done < result.config.steps
        if stopped and out is not None and result.config.save_every and result.steps_done and not result.missing:
            self.console.print(f"stopped early; continue with --resume --out {shell_word(out)}")

    def _plot(self, out: Path, result: TrainResult) -> str | None:
        """Draw the loss curve. Returns its path, or None if that fails: the run doesn't."""
        try:
            return str(plot_losses(out, result))
        except Exception as error:  # a full disk, a missing package, strange records in the file
            self.note(f"can't draw {out / 'loss.png'}: {' '.join(str(error).split()) or type(error).__name__}")
            return None


def _console(stream: TextIO | None) -> Console:
    """A console that prints the user's text as it is: in a path, [lr=0.1] is not a style and :x: not an emoji."""
    file = unfailing(stream)
    # A pipe or a log file has no width: rich's default of 80 columns would wrap paths.
    width = None if file.isatty() else 120
    return Console(file=file, width=width, soft_wrap=True, markup=False, emoji=False, highlight=False)


def _memory(result: TrainResult) -> str | None:
    """The peak of memory and what it counts; None if this system tells none."""
    if result.peak_memory_bytes is None:
        return None
    kind = "allocated on the GPU" if result.model.wte.weight.is_cuda else "resident in the process"
    return f"{result.peak_memory_bytes / 2**20:,.0f} MiB {kind}"


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
    if config.data.startswith("dummy"):
        floor = math.log(config.vocab_size)
        label = "floor" if config.data == "dummy" else "uniform guess"
        axes.axhline(floor, color="gray", linestyle="--", label=f"{label}: ln {config.vocab_size} = {floor:.3f}")
        if config.data == "dummy":  # a scale on which noise around the floor doesn't look like a trend
            axes.set_ylim(floor - 0.5, max([floor + 0.5, *(loss + 0.1 for loss in losses)]))
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    title = f"{preset_name(result.model.config)} on {config.data}"
    axes.set_title(printable(title), parse_math=False)  # $ is part of the name
    axes.grid(alpha=0.3)
    axes.legend()
    path = out / "loss.png"
    figure.savefig(path, dpi=120)
    return path
