"""`train(TrainConfig(...))`: build, loop, close."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Never

import torch

from fastgpt2.config import TrainConfig
from fastgpt2.corpus import about
from fastgpt2.device import give_back_freed_memory, peak_memory_bytes, pick_device
from fastgpt2.folder import as_saved
from fastgpt2.given import Source
from fastgpt2.loop import MFU_FORMULA, Loop, advice, mfu
from fastgpt2.metrics import NonFiniteLossError
from fastgpt2.model import FLOPS_PER_TOKEN, recompute_flops
from fastgpt2.ops import Ops
from fastgpt2.outputs import Outputs
from fastgpt2.parallel import joined
from fastgpt2.reporter import Reporter, Reporters, TrainResult
from fastgpt2.reporters.metrics_file import MetricsFile
from fastgpt2.run import Run, activation_bytes, build, kept_from_cudnn, numerics


def train(
    config: TrainConfig,
    *misplaced: Never,
    ops: Ops | Mapping[str, Callable[..., Any]] | None = None,
    source: Source | None = None,
    reporters: Sequence[Reporter] = (),
) -> TrainResult:
    """Train a GPT-2 as published, on random tokens or shards.

    Args:
        config: fields left at None are settled for this machine. Without `out` nothing is written.
        misplaced: nothing. The other arguments are given by name.
        ops: functions by slot, {"attn": function}, used instead of the configuration's; see docs/extending.md. The
            checkpoints name them as module:function.
        source: gives the training tokens of a step, instead of `data`: source(step), counted from 0, is int64 on the
            CPU, (grad_accum, batch_size, block_size + 1). There are no validation tokens.
        reporters: receive the run's events. Without one nothing is printed, and warnings become Python's.

    Raises:
        ConfigError: this machine can't do what the configuration asks. Raised before any work.
        NonFiniteLossError: the loss, a weight or the optimizer's state became infinite or NaN. The message names
            the step and what to try.
        OutputError: `out` can't be written at the start. Later failures don't end the run: reporters are warned, the
            write is retried, and the result lists what is still missing at the end.
        DataError: the data is damaged or can no longer be read. The steps before that are saved.
    """
    if misplaced:
        raise TypeError("train() takes the configuration alone by position: train(config, ops=..., reporters=[...])")
    _check_reporters(reporters)
    with joined(config.device, config.timeout) as ranks:
        device = ranks.together(lambda: pick_device(config.device))
        config = ranks.together(lambda: as_saved(config))
        try:
            with numerics(config), contextlib.ExitStack() as held:
                return _train(reporters, lambda: build(config, held, ops=ops, source=source))
        finally:
            if device.type == "cpu":
                give_back_freed_memory()


def _check_reporters(reporters: Sequence[Reporter]) -> None:
    right = "call train(config, reporters=[MyReporter()]), where MyReporter is a subclass of fastgpt2.Reporter"
    if not isinstance(reporters, Sequence):
        raise TypeError(f"reporters must be a list, got {type(reporters).__name__}: {right}")
    for reporter in reporters:
        if not isinstance(reporter, Reporter):
            got = f"the class {reporter.__name__}" if isinstance(reporter, type) else type(reporter).__name__
            raise TypeError(f"reporters must hold Reporter instances, got {got}: {right}")


def _train(reporters: Sequence[Reporter], make: Callable[[], Run]) -> TrainResult:
    began = time.perf_counter()
    run = make()
    if not reporters:  # report what was found, such as changed settings, even so
        for text in run.found:
            warnings.warn(text, RuntimeWarning, stacklevel=3)
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    reporter = Reporters(reporters, first=run.ranks.first)
    outputs = Outputs(run, reporter.warn)
    seconds_before = 0.0
    if outputs.folder is not None:
        metrics = MetricsFile(outputs.folder, run.start if run.config.resume else None, reporter.warn)
        reporter.add_first(metrics)
        seconds_before = metrics.seconds_before
    loop = Loop(run, reporter, outputs, began - seconds_before)
    missing: list[str] = []
    try:
        try:
            _tell_and_go(run, reporter, loop)
        finally:
            missing += [*outputs.missing(loop.done), *reporter.close()]
    except BaseException as error:
        reporter.failed(error)
        raise
    result = _result(loop, time.perf_counter() - began, missing)
    reporter.finished(result)
    return result


def _tell_and_go(run: Run, reporter: Reporters, loop: Loop) -> None:
    reporter.started(run)
    for text in _notes(run):
        reporter.note(text)
    try:
        loop.go()
    except NonFiniteLossError as error:
        raise NonFiniteLossError(error.step, error.loss, advice(run), error.what) from None


def _result(loop: Loop, seconds: float, missing: list[str]) -> TrainResult:
    run, speed = loop.run, loop.meter.tokens_per_s()
    return TrainResult(
        losses=loop.meter.losses,
        val_losses=loop.val_losses,
        config=run.config,
        model=run.model,
        steps_done=loop.done,
        tokens_per_s=speed,
        mfu=mfu(run, speed),
        peak_memory_bytes=peak_memory_bytes(run.device),
        seconds=seconds,
        skipped_steps=run.skipped_steps(loop.done),
        out=run.config.out,
        missing=missing,
    )


def _notes(run: Run) -> Iterator[str]:
    config = run.config
    if automatic := [f"--{slot} {name}" for slot, name in run.chosen.items() if getattr(config, slot) == "auto"]:
        yield f"auto chose {', '.join(automatic)}"
    if kept_from_cudnn(run):
        yield (
            "deterministic algorithms keep SDPA from cuDNN, PyTorch's choice on this GPU. Estimated cost, not "
            "measured: 10 ms a step of GPT-2 124M with 64k tokens on an H100. --no-deterministic allows cuDNN; --attn "
            "triton is deterministic too, but has not been measured either"
        )
    if config.recompute == "blocks":
        kept, instead = (activation_bytes(run, recompute=r) / 2**20 for r in (True, False))
        more = recompute_flops(run.model.config) / FLOPS_PER_TOKEN[MFU_FORMULA](run.model.config)
        yield (
            f"--recompute blocks stores {kept:,.1f} MiB of activations instead of {instead:,.1f} "
            f"and computes the blocks' forward twice: {more:.0%} more FLOPs, which mfu does not count"
        )
    yield from about(config.data)
    yield from run.found
    if run.start:
        yield f"continuing after step {run.start}"
    if run.start >= config.steps:
        yield f"nothing to do: --steps {config.steps} is not above the {run.start} steps already done"
    if config.data == "dummy":
        yield (
            f"dummy tokens are uniform and new at every step, so nothing can be learned: the loss stays at "
            f"ln {config.vocab_size} = {math.log(config.vocab_size):.4f} nats, its floor. --data stdlib trains on text"
        )
    if config.data == "dummy-fixed":
        yield "dummy-fixed repeats one batch: the loss falls as the model memorises it"
