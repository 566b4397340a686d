"""`python -m fastgpt2.train`, and `train(TrainConfig(...))`: build, loop, close.

The loop waits for the device at logging steps only: losses are kept there until then, and the next batch is
drawn and copied while the device works.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastgpt2 import checkpoint
from fastgpt2.arguments import naming_files, read_command_line
from fastgpt2.config import TrainConfig
from fastgpt2.data import DataError
from fastgpt2.device import device_name, give_back_freed_memory, peak_flops, peak_memory_bytes, pick_device
from fastgpt2.durable import OutputError, write_text
from fastgpt2.evaluate import evaluate
from fastgpt2.folder import as_saved, new_folder
from fastgpt2.metrics import JsonLines, Meter, NonFiniteLossError
from fastgpt2.model import FLOPS_PER_TOKEN, GPT, recompute_flops
from fastgpt2.optim import learning_rate
from fastgpt2.record import record_start
from fastgpt2.run import Run, activation_bytes, build, kept_from_cudnn, numerics, refuse_several_processes

MFU_FORMULA = "llm.c"


class Reporter:
    """What a run tells the world, and how it is asked to stop. This one says nothing."""

    stop_requested = False
    """Set it to end the run after the step at hand, with a checkpoint."""

    def started(self, run: Run) -> None:
        """The run is built; nothing has been computed."""

    def note(self, text: str) -> None:
        """Something the user should know."""

    def stepped(self, done: int) -> None:
        """Step `done` has been launched, not necessarily computed."""

    def logged(self, record: dict[str, Any]) -> None:
        """A logging step: the record that goes to metrics.jsonl."""

    def finished(self, result: TrainResult) -> None:
        """The run is over."""


@dataclass
class TrainResult:
    """What came of a run."""

    losses: list[float]
    """The training loss of each step that this call made, in nats a token, mean over its micro-steps."""
    val_losses: list[tuple[int, float]]
    """(step, validation loss)."""
    config: TrainConfig
    """The settled configuration."""
    model: GPT
    steps_done: int
    tokens_per_s: float
    """Without the first logged interval (warm-up, compilation)."""
    mfu: float | None
    peak_memory_bytes: int
    seconds: float
    skipped_steps: int
    """Steps that the float16 gradient scaler left out because a gradient was not finite."""
    out: Path | None = None


def train(config: TrainConfig, reporter: Reporter | None = None) -> TrainResult:
    """Train a GPT-2 as published: seed first, random tokens or shards, mean cross-entropy, Adam.

    Args:
        config: fields left at None are settled for this machine. Without `out` nothing is written.
        reporter: is told what happens.

    Raises:
        ConfigError: before any work, where the request can't be carried out.
        NonFiniteLossError: the loss became infinite or NaN; the message names the step and what to try.
        DataError: the data can't be read any more, or was found damaged; the steps before that are saved.
        OutputError: a checkpoint or a record can't be written, as on a full disk; the last good checkpoint is kept.
    """
    device = pick_device(config.device)
    config = as_saved(config)
    try:
        with numerics(config), contextlib.ExitStack() as held:
            return _train(config, reporter or Reporter(), held)
    finally:
        if device.type == "cpu":
            give_back_freed_memory()


def _train(config: TrainConfig, reporter: Reporter, held: contextlib.ExitStack) -> TrainResult:
    began = time.perf_counter()
    run = build(config, held)
    config, out = run.config, run.config.out
    B, T, steps = int(config.batch_size or 0), int(config.block_size or 0), int(config.steps or 0)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    log = None
    if out is not None:
        write_text(out / "config.toml", config.to_toml())
        record_start(out, run)
        log = JsonLines(out / "metrics.jsonl", keep_up_to_step=run.start if config.resume else None)
    reporter.started(run)
    for text in _notes(run):
        reporter.note(text)

    meter = Meter(run.device, run.start, config.grad_accum * B * T)
    val_losses: list[tuple[int, float]] = []
    done = run.start
    try:
        tokens = run.next_tokens(done) if done < steps else None
        while tokens is not None:
            due = _due(config, done + 1, first=done == run.start, last=done + 1 == steps or reporter.stop_requested)
            loss, norm = run.step(done, tokens, want_norm=due.log)
            done += 1
            tokens = run.next_tokens(done) if done < steps and not due.last else None
            meter.add(loss)
            reporter.stepped(done)
            if due.log:
                record = _record(run, meter, done, norm)
                if due.evaluate and run.val_source is not None:
                    record["val_loss"] = _evaluate(run, meter)
                    val_losses.append((done, record["val_loss"]))
                if log is not None:
                    log.write(record)
                reporter.logged(record)
            if due.save and out is not None:
                _save(run, meter, done)
    except NonFiniteLossError as error:
        raise NonFiniteLossError(error.step, error.loss, _advice(run)) from None
    except DataError as error:
        raise DataError(f"{error}; {_save_what_is_good(run, meter, done)}") from None
    finally:
        if log is not None:
            log.close()

    speed = meter.tokens_per_s()
    result = TrainResult(
        losses=meter.losses,
        val_losses=val_losses,
        config=config,
        model=run.model,
        steps_done=done,
        tokens_per_s=speed,
        mfu=_mfu(run, speed),
        peak_memory_bytes=peak_memory_bytes(run.device),
        seconds=time.perf_counter() - began,
        skipped_steps=run.skipped_steps(done),
        out=out,
    )
    reporter.finished(result)
    return result


@dataclass(frozen=True)
class _Due:
    """What is to be done after a step."""

    log: bool
    evaluate: bool
    save: bool
    last: bool


def _due(config: TrainConfig, step: int, *, first: bool, last: bool) -> _Due:
    """The first step is logged by itself: it holds the warm-up and the compilation."""
    evaluate_now = bool(config.eval_every) and (step % config.eval_every == 0 or last)
    save_now = bool(config.save_every) and (step % config.save_every == 0 or last)
    log_now = first or last or evaluate_now or save_now or step % config.log_every == 0
    return _Due(log_now, evaluate_now, save_now, last)


def _record(run: Run, meter: Meter, step: int, norm: Tensor | None) -> dict[str, Any]:
    """The object of a logged step; waits for the device."""
    step_ms = meter.read()
    speed = meter.tokens_per_step / step_ms * 1e3
    return {
        "step": step,
        "loss": meter.losses[-1],
        "lr": learning_rate(step - 1, run.config),
        "grad_norm": None if norm is None else norm.item(),
        "step_ms": step_ms,
        "tokens_per_s": speed,
        "mfu": _mfu(run, speed),
        "mfu_formula": MFU_FORMULA,
        "memory_bytes": peak_memory_bytes(run.device),
    }


def _mfu(run: Run, tokens_per_s: float) -> float | None:
    """Model FLOPs over the device's dense peak in this precision; None where the peak is not known."""
    peak = peak_flops(device_name(run.device), str(run.config.dtype))
    return peak and tokens_per_s * FLOPS_PER_TOKEN[MFU_FORMULA](run.model.config) / peak


def _evaluate(run: Run, meter: Meter) -> float:
    assert run.val_source is not None
    meter.pause()
    with run.autocast():
        loss = evaluate(run.model, run.val_source, run.val_source.batches, run.device)
    meter.go_on()
    return loss


def _save(run: Run, meter: Meter, done: int) -> None:
    """Save a checkpoint that is known to be good: the losses have been read, and the weights are finite."""
    meter.pause()
    assert run.config.out is not None
    if not torch.stack([p.isfinite().all() for p in run.parameters]).all().item():
        raise NonFiniteLossError(done + 1, float("nan"))
    run.check_data()
    progress = checkpoint.Progress(samples=run.samples_done(done), data=run.source.fingerprint or None)
    checkpoint.save(run.config.out, done, run.config, run.model, run.optimizer, run.scaler, progress)
    meter.go_on()


def _save_what_is_good(run: Run, meter: Meter, done: int) -> str:
    """Save the steps before the data failed, unless what they were trained on is damaged; returns what to do then."""
    if run.config.out is None:
        return "nothing is saved without --out"
    # Raises the same again where the data was damaged from the beginning.
    with contextlib.suppress(DataError):
        if run.config.save_every and done > run.start:
            _save(run, meter, done)
    saved = checkpoint.checkpoints(run.config.out)
    return f"then continue after {saved[-1].name} with --resume --out {run.config.out}" if saved else "nothing is saved"


def _advice(run: Run) -> str:
    """What to do about a loss that is not finite."""
    out = run.config.out
    saved = checkpoint.checkpoints(out) if out is not None else []
    where = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
    resume = f" (continue from it with --resume --out {out})" if saved else ""
    return f"{where}{resume}; try a lower --lr, --grad-clip 1.0 or --warmup-steps 100, or a wider --dtype"


def _notes(run: Run) -> Iterator[str]:
    config = run.config
    flags = {"--attn": config.attn, "--mlp": config.mlp, "--norm": config.norm, "--loss": config.loss}
    chosen = zip(flags.items(), run.chosen.values(), strict=True)
    if automatic := [f"{flag} {name}" for (flag, asked), name in chosen if asked == "auto"]:
        yield f"auto chose {', '.join(automatic)}"
    if kept_from_cudnn(run):
        yield (
            "deterministic algorithms keep SDPA from cuDNN, PyTorch's choice on this GPU: by arithmetic, not measured, "
            "some 10 ms a step of GPT-2 124M with 64k tokens on an H100. --no-deterministic allows cuDNN; --attn "
            "triton is deterministic too, and not measured either"
        )
    if config.recompute:
        kept, instead = (activation_bytes(run, recompute=r) / 2**20 for r in (True, False))
        more = recompute_flops(run.model.config) / FLOPS_PER_TOKEN[MFU_FORMULA](run.model.config)
        yield (
            f"--recompute keeps {kept:,.1f} MiB of activations rather than {instead:,.1f} "
            f"and computes the blocks' forward twice: {more:.0%} more FLOPs, which mfu does not count"
        )
    yield from run.found
    if run.start:
        yield f"continuing after step {run.start}"
    if run.start >= int(config.steps or 0):
        yield f"nothing to do: --steps {config.steps} is no more than the {run.start} already done"
    if config.data == "dummy":
        yield (
            f"dummy tokens are uniform and new at every step, so nothing can be learned: the loss stays at "
            f"ln {config.vocab_size} = {math.log(int(config.vocab_size or 1)):.4f} nats, its floor"
        )
    if config.data == "dummy-fixed":
        yield "dummy-fixed repeats one batch: the loss falls as the model learns it by heart"


def main(arguments: list[str] | None = None) -> int:
    """The command: train with a live display, write the outputs, print a summary."""
    from fastgpt2.display import TrainDisplay

    config, origins = read_command_line(sys.argv[1:] if arguments is None else arguments)
    refuse_several_processes()
    with contextlib.ExitStack() as folder, TrainDisplay() as display, naming_files(origins):
        if config.out is None:
            config = dataclasses.replace(config, out=folder.enter_context(new_folder(Path("runs"))))
        try:
            train(config, display)
        except (NonFiniteLossError, OutputError, DataError) as error:
            display.error(str(error))
            return 1
        except torch.OutOfMemoryError:
            display.error("out of GPU memory: halve --batch-size and double --grad-accum for the same step in less")
            return 1
    return 130 if display.stop_requested else 0


class _CallableModule(ModuleType):
    """`fastgpt2.train` names both this module and the function: calling the module calls the function."""

    def __call__(self, *args: Any, **kwargs: Any) -> TrainResult:
        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule

if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
