"""The training loop: steps and what follows each, in an order that loses least if the run is killed.

It waits for the device only at logging steps: losses stay on the device until then, and the next batch is drawn and
copied while the device works.
"""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastgpt2 import checkpoint
from fastgpt2.data import DataError
from fastgpt2.device import device_name, peak_flops, peak_memory_bytes
from fastgpt2.evaluate import evaluate
from fastgpt2.metrics import Meter, NonFiniteLossError
from fastgpt2.model import FLOPS_PER_TOKEN
from fastgpt2.optim.schedules import learning_rate
from fastgpt2.outputs import Outputs
from fastgpt2.parallel import Ballot, is_shared
from fastgpt2.reporter import Reporters
from fastgpt2.run import Run
from fastgpt2.settings import Settled
from fastgpt2.sharding import own_part

MFU_FORMULA = "llm.c"
LAST_TRIES_S = (1.0, 2.0, 4.0)
"""Seconds between attempts to save a run's last state."""
RISE = 2.0
"""A loss that rises this many nats has diverged: perplexity is 7 times as large."""


@dataclass(frozen=True)
class _Due:
    """What to do after a step."""

    log: bool
    save: bool
    evaluate: bool


def _due(config: Settled, step: int, *, first: bool) -> _Due:
    """What to do after a step. The first is logged by itself: it includes warm-up and compilation."""
    last = step == config.steps
    save_now = bool(config.save_every) and (step % config.save_every == 0 or last)
    evaluate_now = bool(config.eval_every) and (step % config.eval_every == 0 or last)
    log_now = first or last or save_now or evaluate_now or step % config.log_every == 0
    return _Due(log_now, save_now, evaluate_now)


class Loop:
    """Makes the steps of a run. After each come its record, then a checkpoint, then the validation, if due."""

    def __init__(self, run: Run, reporter: Reporters, outputs: Outputs, began: float) -> None:
        config = run.config
        self.run, self.reporter, self.outputs, self.began = run, reporter, outputs, began
        self.steps, self.block_size = config.steps, config.block_size
        self.meter = Meter(run.device, run.start, run.samples_per_step * self.block_size, run.ranks)
        self.stop = Ballot(run.ranks)
        self.val_losses: list[tuple[int, float]] = []
        self.done = run.start
        self.uniform_loss = math.log(config.vocab_size)
        """The loss of a uniform guess in nats: a new run begins near it."""
        self.good_loss: float | None = None
        """The loss at the newest checkpoint saved while the run had not diverged."""
        self.diverged = run.resumed.diverged
        if not run.found_other_data:
            self.good_loss = _loss_of_newest_good(run)

    def go(self) -> None:
        """Make steps until the last one or until a reporter asks to stop, then save the result."""
        try:
            self._steps()
        except DataError as error:
            # The other processes don't answer in the middle of a step.
            if self.run.ranks.world == 1 or is_shared(error):
                # _end raises again if damaged data may have been trained on, and then saves nothing.
                with contextlib.suppress(DataError):
                    self._end()
            error.args = (f"{error}; {self._how_to_resume()}",)
            raise
        self._end()

    def _steps(self) -> None:
        run, reporter = self.run, self.reporter
        tokens = self._next_tokens()
        while tokens is not None and not self.stop.vote(reporter.stop_requested):
            due = _due(run.config, self.done + 1, first=self.done == run.start)
            loss, norm = run.step(self.done, tokens, want_norm=due.log)
            self.done += 1
            run.ranks.at(self.done)
            self.meter.add(loss)
            reporter.stepped(self.done)
            tokens = self._next_tokens()
            if due.log:
                self._log(norm)
            if due.save and self.outputs.saves:
                self._save(f"continuing, next try {self._next_save()}")
            if due.evaluate:
                self._evaluate()

    def _next_tokens(self) -> Tensor | None:
        return self.run.next_tokens(self.done) if self.done < self.steps else None

    def _end(self) -> None:
        """After the last step, log and save what has not been."""
        if self.meter.unread:
            self._log(None)
        for seconds in (*LAST_TRIES_S, 0.0):
            if not self.outputs.saves or self.outputs.saved_step == self.done:
                break
            if not self._save(f"next try in {seconds:g} s" if seconds else "this was the last try"):
                time.sleep(seconds)

    def _how_to_resume(self) -> str:
        out = self.run.config.out
        saved = checkpoint.checkpoints(out) if out is not None else []
        return f"then continue after {saved[-1].name} with --resume --out {out}" if saved else "nothing is saved"

    def _log(self, norm: Tensor | None) -> None:
        """Report a record of the steps since the last one. Waits for the device."""
        step_ms = self.meter.read()
        speed = self.meter.tokens_per_step / step_ms * 1e3
        record = {
            "step": self.done,
            "loss": self._mean(),
            "last_loss": self.meter.losses[-1],
            "lr": learning_rate(self.run.config.lr, self.done - 1, self.run.config),
            "grad_norm": None if norm is None else norm.item(),
            "step_ms": step_ms,
            "tokens_per_s": speed,
            "mfu": mfu(self.run, speed),
            "mfu_formula": MFU_FORMULA,
            "memory_bytes": peak_memory_bytes(self.run.device),
            "epoch": self.run.epoch(self.done),
            **self._position(),
        }
        self.reporter.logged(record)
        self._watch()

    def _position(self) -> dict[str, Any]:
        """The last fields of each record: how far the run is, over all its starts."""
        return {
            "tokens": self.run.samples_done(self.done) * self.block_size,
            "seconds": time.perf_counter() - self.began,
        }

    def _mean(self) -> float:
        return math.fsum(self.meter.interval) / len(self.meter.interval)

    def _worst(self) -> float:
        """The mean loss since the last record, or the last step's loss less a margin if that is higher: a run may have
        diverged in the last steps, but one step's loss varies more than the mean."""
        return max(self._mean(), self.meter.losses[-1] - RISE / 2)

    def _watch(self) -> None:
        """Warn once if the loss is far above where the run began or stood at the last good checkpoint. The run is
        good again once the excess has halved."""
        before = self.uniform_loss if self.good_loss is None else min(self.uniform_loss, self.good_loss)
        bound = before + (RISE / 2 if self.diverged else RISE)
        had_diverged, self.diverged = self.diverged, self._worst() > bound
        if self.diverged and not had_diverged:
            self.reporter.warn(
                f"the run has diverged: at step {self.done} the loss is {self._worst():.4g}, above {bound:.4g}; "
                # By then newer checkpoints of the diverged run will exist.
                + advice(self.run, "it is kept: to go back, move newer ones away and use")
            )

    def _next_save(self) -> str:
        every = self.run.config.save_every
        step = min((self.done // every + 1) * every, self.steps)
        return f"after step {step}" if self.done < step else "at the end"

    def _save(self, otherwise: str) -> bool:
        """Save a checkpoint after checking that weights and optimizer state are finite. The losses have been read.

        Args:
            otherwise: what happens if it can't be saved, for the warning.
        """
        self.meter.pause()
        _check_finite(self.run, self.done, self.meter.losses[-1])
        self.run.check_data()
        progress = self.run.progress(self.done, self._mean(), self.diverged)
        self.reporter.saving()
        saved = self.outputs.save(self.done, progress, otherwise)
        if saved and not self.diverged:
            self.good_loss = self._mean()
        self.meter.resume()
        return saved

    def _evaluate(self) -> None:
        """Compute the validation loss, unless a stop is requested."""
        run, reporter = self.run, self.reporter
        if run.val_source is None or run.ranks.any(reporter.stop_requested):
            return
        reporter.validating()
        self.meter.pause()
        with run.autocast():
            loss = evaluate(
                run.called,
                run.val_source,
                run.val_source.batches,
                run.device,
                run.ranks,
                stop=lambda: reporter.stop_requested,
            )
        self.meter.resume()
        if math.isnan(loss) and run.ranks.any(reporter.stop_requested):
            return
        self.val_losses.append((self.done, loss))
        record = {"step": self.done, "val_loss": loss, **self._position()}
        reporter.validated(record)


def _loss_of_newest_good(run: Run) -> float | None:
    good = checkpoint.newest_good(run.config.out) if run.start and run.config.out else None
    progress = checkpoint.progress_of(good) if good else None
    return progress.loss if progress else None


def mfu(run: Run, tokens_per_s: float) -> float | None:
    """Model FLOPs over the dense peak of all processes' devices in this precision; None if the peak is unknown."""
    peak = peak_flops(device_name(run.device), run.config.dtype)
    return peak and tokens_per_s * FLOPS_PER_TOKEN[MFU_FORMULA](run.model.config) / (peak * run.ranks.world)


def _check_finite(run: Run, step: int, loss: float) -> None:
    """Check that all weights and the optimizer's averages are finite: after a gradient of 1e30 the loss looks fine, but
    an average of squares stays infinite. Waits for the device once.

    Raises:
        NonFiniteLossError: one is not finite, in the part that one of the processes holds. The message names it.
    """
    tensors = {name: own_part(tensor) for name, tensor in run.state.named_tensors()}
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    own = next((name for name, good in zip(tensors, finite, strict=True) if not good), None)
    first = next((name for name in run.ranks.gather(own) if name is not None), None)
    if first is not None:
        raise NonFiniteLossError(step, loss, what=f"{first} is not finite after step {step}")


def advice(run: Run, back: str = "continue from it with") -> str:
    """What to do about a loss that is not finite, or far too high."""
    out = run.config.out
    good = checkpoint.newest_good(out) if out is not None else None
    where = f"the last good checkpoint is {good}" if good else "no good checkpoint was saved"
    resume = f" ({back} --resume --out {out})" if good else ""
    return f"{where}{resume}; try a lower --lr, --grad-clip 1.0 or --warmup-steps 100, or a wider --dtype"
