"""What a person sees of a run: live progress, notes, the summary table and the loss curve."""

from __future__ import annotations

import math
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastgpt2.config import preset_name
from fastgpt2.device import device_name
from fastgpt2.metrics import read_json_lines
from fastgpt2.model import parameter_count
from fastgpt2.train import Reporter

if TYPE_CHECKING:
    from fastgpt2.run import Run
    from fastgpt2.train import TrainResult


class TrainDisplay(Reporter):
    """A progress bar on a terminal, a line a logged step elsewhere. The first Ctrl-C (or SIGTERM) ends the run
    after the step at hand with a checkpoint, the second at once."""

    def __init__(self, console: Console | None = None) -> None:
        # A pipe or a log file has no width of its own: rich's 80 columns would wrap paths.
        self.console = console or Console(width=None if Console().is_terminal else 120, soft_wrap=False)
        self.live = self.console.is_terminal
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
        for number in (signal.SIGINT, signal.SIGTERM):
            self._handlers[number] = signal.signal(number, self._stop)
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        if self.stop_requested:
            raise KeyboardInterrupt
        self.stop_requested = True
        self.note("stopping after this step (once more to stop at once)")

    def started(self, run: Run) -> None:
        config, shape = run.config, run.model.config
        self.console.print(
            f"[bold]{preset_name(shape)}[/bold]: {parameter_count(shape):,} parameters "
            f"(L={shape.n_layer} H={shape.n_head} C={shape.n_embd} T={shape.block_size} V={shape.vocab_size}) "
            f"on {device_name(run.device)}, {config.dtype}"
        )
        parts = [f"{slot} {name}" for slot, name in run.chosen.items()]
        switches = {"compiled": config.compile, "recomputed": config.recompute, "one CUDA graph": config.cuda_graph}
        self.console.print(", ".join(parts + [name for name, on in switches.items() if on]))
        tokens = config.grad_accum * int(config.batch_size or 0) * shape.block_size
        self.console.print(f"{config.steps} steps of {tokens:,} tokens from {config.data}; writing to {config.out}")
        self._progress.start()
        self._task = self._progress.add_task("", total=config.steps, completed=run.start, status="starting")
        self._steps = int(config.steps or 0)

    def note(self, text: str) -> None:
        self.console.print(f"[dim]{text}[/dim]", highlight=False, soft_wrap=True)

    def error(self, text: str) -> None:
        """One line that says why the run ended."""
        self._progress.stop()
        Console(stderr=True, soft_wrap=True).print(f"[bold red]error:[/bold red] {text}", highlight=False)

    def stepped(self, done: int) -> None:
        self._progress.update(self._task, completed=done)

    def logged(self, record: dict[str, Any]) -> None:
        mfu = "" if record["mfu"] is None else f"  mfu {record['mfu']:.1%}"
        val = f"  val {record['val_loss']:.4f}" if "val_loss" in record else ""
        status = f"loss {record['loss']:.4f}{val}  {record['tokens_per_s']:,.0f} tok/s{mfu}"
        self._progress.update(self._task, status=status)
        if not self.live:
            self.console.print(
                f"step {record['step']:>6}/{self._steps}  {status}  {record['step_ms']:.0f} ms",
                highlight=False,
            )
        elif val:
            self.console.print(f"step {record['step']}:{val}", highlight=False)

    def finished(self, result: TrainResult) -> None:
        self._progress.stop()
        out = result.out
        table = Table(title="fastgpt2", show_header=False, title_justify="left")
        rows = {
            "steps": f"{result.steps_done} of {result.config.steps}",
            "final loss": f"{result.losses[-1]:.4f} nats" if result.losses else "no step was made",
            "validation loss": f"{result.val_losses[-1][1]:.4f} nats" if result.val_losses else None,
            "tokens/s": f"{result.tokens_per_s:,.0f}" if result.losses else None,
            "MFU (llm.c's formula)": None if result.mfu is None else f"{result.mfu:.1%}",
            "skipped steps": str(result.skipped_steps) if result.config.dtype == "float16" else None,
            "peak memory": f"{result.peak_memory_bytes / 2**20:,.0f} MiB {_memory_kind(result)}",
            "time": f"{result.seconds:.1f} s",
        }
        if out is not None:
            rows["metrics"] = str(out / "metrics.jsonl")
            rows["loss curve"] = str(plot_losses(out, result))
            if result.config.save_every:
                rows["checkpoints"] = str(out / "checkpoints")
        for name, value in rows.items():
            if value is not None:
                table.add_row(name, value)
        self.console.print(table)
        if self.stop_requested and out is not None and result.config.save_every:
            self.console.print(f"stopped early; continue with --resume --out {out}", highlight=False)


def _memory_kind(result: TrainResult) -> str:
    return "allocated on the GPU" if result.model.wte.weight.is_cuda else "resident in the process"


def plot_losses(out: Path, result: TrainResult) -> Path:
    """Draw metrics.jsonl of a run as loss.png beside it; returns its path."""
    # A Figure by itself: pyplot's would choose a backend for the whole process, a notebook's among them.
    from matplotlib.figure import Figure

    records = read_json_lines(out / "metrics.jsonl")
    config = result.config
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    # A few points are seen as points; many are a line.
    marker = "o" if len(records) < 30 else None
    axes.plot(
        [r["step"] for r in records],
        [r["loss"] for r in records],
        label="training",
        marker=marker,
        markersize=3,
    )
    validated = [r for r in records if "val_loss" in r]
    if validated:
        axes.plot(
            [r["step"] for r in validated],
            [r["val_loss"] for r in validated],
            "o-",
            label="validation",
            markersize=4,
        )
    if config.data.startswith("dummy"):
        floor = math.log(int(config.vocab_size or 1))
        label = "floor" if config.data == "dummy" else "uniform guess"
        axes.axhline(floor, color="gray", linestyle="--", label=f"{label}: ln {config.vocab_size} = {floor:.3f}")
        if config.data == "dummy":  # noise around the floor is not a trend: show it on a scale that says so
            axes.set_ylim(floor - 0.5, max([floor + 0.5, *(r["loss"] + 0.1 for r in records)]))
    title = f"{preset_name(result.model.config)} on {config.data}"
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    path = out / "loss.png"
    figure.savefig(path, dpi=120)
    return path
