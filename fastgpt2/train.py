"""`python -m fastgpt2.train`, and `train(TrainConfig(...))`: build, loop, close.

A step draws tokens (grad_accum, B, T + 1), splits them into inputs and the targets that follow, takes the
mean cross-entropy, and steps the optimizer. Nothing in it waits for the device: losses are kept there and
read at the logging steps, and the next batch is drawn and copied while the device works.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastgpt2 import checkpoint
from fastgpt2.config import ConfigError, TrainConfig, read_toml, to_arguments
from fastgpt2.data import TokenSource, data_vocab_size, open_data, split
from fastgpt2.evaluate import evaluate
from fastgpt2.metrics import (
    JsonLines,
    Meter,
    NonFiniteLossError,
    device_name,
    peak_flops,
    peak_memory_bytes,
)
from fastgpt2.model import FLOPS_PER_TOKEN, GPT
from fastgpt2.ops import make_ops
from fastgpt2.optim import learning_rate, make_optimizer

MFU_FORMULA = "llm.c"

TORCH_DTYPE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


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


@dataclass
class Run:
    """A run that is ready to step."""

    config: TrainConfig
    device: torch.device
    model: GPT
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    source: TokenSource
    val_source: TokenSource | None
    chosen: dict[str, str]
    """The implementation of each slot."""
    start: int = 0
    """Steps already done by the run that this one resumes."""
    parameters: list[torch.nn.Parameter] = field(default_factory=list)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision: 16-bit matmuls over float32 weights; nothing in the other precisions."""
        dtype = TORCH_DTYPE[str(self.config.dtype)]
        return torch.autocast(self.device.type, dtype=dtype) if dtype.itemsize == 2 else contextlib.nullcontext()

    def next_tokens(self, step: int) -> Tensor:
        """The tokens of a step counted from 0, (grad_accum, B, T + 1), on their way to the device."""
        tokens = self.source.tokens(step)
        if self.device.type == "cuda":
            return tokens.pin_memory().to(self.device, non_blocking=True)
        return tokens

    def step(self, step: int, tokens: Tensor, *, want_norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """One optimizer step; launches work and waits for nothing.

        Args:
            step: counted from 0; decides the learning rate.
            tokens: (grad_accum, B, T + 1).
            want_norm: return the norm of the gradients even when they are not clipped.

        Returns:
            The loss (a scalar on the device, mean over micro-steps) and the gradients' norm before clipping.
        """
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        for micro in tokens:
            inputs, targets = split(micro)
            with self.autocast():
                loss = self.model(inputs, targets)
            self.scaler.scale(loss / len(tokens)).backward()
            total = total + loss.detach()
        norm = None
        if want_norm or self.config.grad_clip:
            self.scaler.unscale_(self.optimizer)
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])
            if self.config.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        rate = learning_rate(step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return total / len(tokens), norm

    def skipped_steps(self, done: int) -> int:
        """Of the `done` steps, those that the gradient scaler left out: the fused optimizer didn't count them."""
        if not self.scaler.is_enabled() or not self.optimizer.state:
            return 0
        return done - int(self.optimizer.state[self.parameters[0]]["step"].item())


def build(config: TrainConfig) -> Run:
    """Check everything that can be checked, then make the model, the data and the optimizer.

    Raises:
        ConfigError: the request can't be carried out on this machine.
    """
    config, device = settle(config)
    model_config = config.model_config()
    source, val_source = _open_sources(config)
    latest = None
    if config.out is not None:
        latest = _claim_folder(config)
    if latest is not None:
        checkpoint.check_shape(latest, model_config)
    dtype = TORCH_DTYPE[str(config.dtype)]
    ops, chosen = make_ops(
        config.attn,
        device=device,
        dtype=dtype,
        head_dim=model_config.head_dim,
        dropout=config.dropout,
        tf32=config.dtype == "tf32",
    )
    torch.manual_seed(config.seed)
    model = GPT(model_config, ops)
    model.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
    model.train()
    if config.compile:
        model.compile(dynamic=False)
    optimizer = make_optimizer(model, config)
    scaler = torch.amp.GradScaler(device.type, enabled=config.dtype == "float16")
    run = Run(
        config,
        device,
        model,
        optimizer,
        scaler,
        source,
        val_source,
        chosen,
        parameters=list(model.parameters()),
    )
    if latest is not None:
        run.start = checkpoint.restore(latest, model, optimizer, scaler, device)
    return run


def settle(config: TrainConfig) -> tuple[TrainConfig, torch.device]:
    """The resolved configuration and its device.

    Raises:
        ConfigError: no such device, or one that can't compute in the precision asked for.
    """
    name = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise ConfigError(f"--device {name!r} is not cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {name}: torch {torch.__version__} sees no CUDA GPU here; use --device cpu")
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigError(f"--device {name}: there are {torch.cuda.device_count()} CUDA GPUs, numbered from 0")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if config.dtype == "float16" and device.type == "cpu":
        raise ConfigError("--dtype float16 needs a CUDA GPU: on a CPU use --dtype bfloat16 or float32")
    if config.dtype == "tf32" and (capability is None or capability < (8, 0)):
        raise ConfigError("--dtype tf32 needs an NVIDIA GPU of compute capability 8.0 or newer: use --dtype float32")
    bf16 = capability is not None and capability >= (8, 0)
    if config.dtype == "bfloat16" and capability is not None and not bf16:
        raise ConfigError(
            f"--dtype bfloat16 needs compute capability 8.0, this GPU has {capability}: use --dtype float16"
        )
    resolved = config.resolve(cuda=device.type == "cuda", bf16=bf16, data_vocab_size=data_vocab_size(config.data))
    return dataclasses.replace(resolved, device=name), device


def train(config: TrainConfig, reporter: Reporter | None = None) -> TrainResult:
    """Train a GPT-2 as published: seed first, random tokens or shards, mean cross-entropy, Adam.

    Args:
        config: fields left at None are settled for this machine. Without `out` nothing is written.
        reporter: is told what happens.

    Raises:
        ConfigError: before any work, where the request can't be carried out.
        NonFiniteLossError: the loss became infinite or NaN; the message names the step and what to try.
    """
    with numerics(config):
        return _train(config, reporter or Reporter())


def _train(config: TrainConfig, reporter: Reporter) -> TrainResult:
    began = time.perf_counter()
    run = build(config)
    config, out = run.config, run.config.out
    B, T, steps = int(config.batch_size or 0), int(config.block_size or 0), int(config.steps or 0)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    log = None
    if out is not None:
        (out / "config.toml").write_text(config.to_toml(), encoding="utf-8")
        log = JsonLines(out / "metrics.jsonl", keep_up_to_step=run.start if config.resume else None)
    reporter.started(run)
    for text in _notes(run):
        reporter.note(text)

    meter = Meter(run.device, run.start, config.grad_accum * B * T)
    val_losses: list[tuple[int, float]] = []
    done = run.start
    tokens = run.next_tokens(done) if done < steps else None
    try:
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
        "lr": run.optimizer.param_groups[0]["lr"],
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
        loss = evaluate(run.model, run.val_source, run.config.eval_batches, run.device)
    meter.go_on()
    return loss


def _save(run: Run, meter: Meter, done: int) -> None:
    """Save a checkpoint that is known to be good: the losses have been read, and the weights are finite."""
    meter.pause()
    assert run.config.out is not None
    if not torch.stack([p.isfinite().all() for p in run.parameters]).all().item():
        raise NonFiniteLossError(done + 1, float("nan"))
    checkpoint.save(run.config.out, done, run.config, run.model, run.optimizer, run.scaler)
    meter.go_on()


def _advice(run: Run) -> str:
    """What to do about a loss that is not finite."""
    out = run.config.out
    saved = checkpoint.checkpoints(out) if out is not None else []
    where = f"the last good checkpoint is {saved[-1]}" if saved else "no checkpoint had been saved"
    resume = f" (continue from it with --resume --out {out})" if saved else ""
    return f"{where}{resume}; try a lower --lr, --grad-clip 1.0 or --warmup-steps 100, or a wider --dtype"


def _notes(run: Run) -> Iterator[str]:
    config = run.config
    if config.attn == "auto":
        yield f"--attn auto chose {run.chosen['attention']}"
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


def _open_sources(config: TrainConfig) -> tuple[TokenSource, TokenSource | None]:
    def open_split(name: str) -> TokenSource:
        return open_data(
            config.data,
            split=name,
            vocab_size=int(config.vocab_size or 0),
            batch_size=int(config.batch_size or 0),
            block_size=int(config.block_size or 0),
            grad_accum=config.grad_accum if name == "train" else 1,
            seed=config.seed,
        )

    return open_split("train"), open_split("val") if config.eval_every else None


def _claim_folder(config: TrainConfig) -> Path | None:
    """Make --out, see that it can be written and holds no other run; the checkpoint to resume from, if any."""
    out = config.out
    assert out is not None
    if config.resume:
        latest: Path | None = checkpoint.newest(out)
    else:
        latest = None
        if (out / "metrics.jsonl").exists() or checkpoint.checkpoints(out):
            raise ConfigError(f"--out {out} already holds a run: continue it with --resume, or choose another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
        probe = out / ".can-write"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"can't write to --out {out}: {error.strerror}") from None
    return latest


@contextlib.contextmanager
def numerics(config: TrainConfig) -> Iterator[None]:
    """Set torch's global numerics for a run and put them back: exact float32 products unless tf32 is asked for,
    and algorithms that give the same bits every time (SDPA's flash backward on CUDA adds in any order otherwise)."""
    # cuBLAS is deterministic only with this workspace setting, which it reads when its handle is made.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


@dataclass(frozen=True)
class CommandLine(TrainConfig):
    __doc__ = TrainConfig.__doc__

    config: Path | None = None
    """TOML file of settings by flag name; flags given as well win over it."""

    def __post_init__(self) -> None:
        """Nothing: TrainConfig checks, where a ConfigError is one line rather than tyro's box."""


def parse(arguments: list[str]) -> TrainConfig:
    """A configuration from command-line arguments; prints help or an error and exits where tyro does.

    A --config file, and the config.toml of a run that is resumed, become arguments in front of the user's,
    so that they are checked in the same way and the user's win.
    """
    import tyro

    early = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    early.add_argument("--config", type=Path)
    early.add_argument("--out", type=Path)
    early.add_argument("--resume", action="store_true")
    seen, _ = early.parse_known_args(arguments)
    settings: dict[str, Any] = {}
    if seen.resume and seen.out is not None and (seen.out / "config.toml").exists():
        settings |= read_toml(seen.out / "config.toml")
    if seen.config is not None:
        settings |= read_toml(seen.config)
    line = tyro.cli(CommandLine, args=to_arguments(settings) + arguments, prog="python -m fastgpt2.train")
    return TrainConfig(**{f.name: getattr(line, f.name) for f in dataclasses.fields(TrainConfig)})


def main(arguments: list[str] | None = None) -> int:
    """The command: train with a live display, write the outputs, print a summary."""
    from fastgpt2.display import TrainDisplay

    config = parse(sys.argv[1:] if arguments is None else arguments)
    if config.out is None:
        config = dataclasses.replace(config, out=Path("runs") / datetime.now().strftime("%Y-%m-%d-%H%M%S"))
    with TrainDisplay() as display:
        try:
            train(config, display)
        except NonFiniteLossError as error:
            display.error(str(error))
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
