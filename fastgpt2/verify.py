"""`python -m fastgpt2.verify`: check every implementation against the float64 reference, here.

    python -m fastgpt2.verify
    python -m fastgpt2.verify --attn triton
    python -m fastgpt2.verify --attn my_package.attention:flash

Three checks against the plain form in float64. The budget of each is relative to what PyTorch itself loses in the same
precision:

1. Errors: outputs and gradients of the operation by itself, on random input.
2. Losses: 100 training steps from the same seed on dummy tokens. A loss may deviate from the reference's by twice what
   the plain form's does in that precision, or by LOSS_FLOOR.
3. Gradients: losses alone are blind, as on random tokens a zeroed dQ hardly moves them. At every tenth step of a run
   whose attention is peaked (qkv weights initialised 5x larger) the backend gets the reference's weights and tokens.
   The gradient of each parameter may err by twice as much as the plain form's or sdpa's, whichever errs more.

Without CUDA the Triton kernels run in the interpreter, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastgpt2.accuracy import ALLOWED, SEEDS, error_and_budget, excess, problems
from fastgpt2.config import Attention, ConfigError, Dtype, Loss, Mlp, Norm, Stream, TrainConfig
from fastgpt2.data import split
from fastgpt2.device import pick_device
from fastgpt2.fields import Count, Name
from fastgpt2.flags import read_arguments
from fastgpt2.model import GPT
from fastgpt2.ops import Ops, Site, make_ops
from fastgpt2.reporter import TrainResult
from fastgpt2.run import build, numerics
from fastgpt2.settings import STREAM_DTYPES, TORCH_DTYPE
from fastgpt2.slots import OURS, REFERENCE, SLOTS, TORCH, implementation, is_outside
from fastgpt2.training import train

LOSS_FLOOR = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-3, "float16": 1e-3}
"""What a loss in nats may deviate by however well the plain form does."""
PEAKED = 5.0
"""The qkv weights of the gradient check are initialised this much larger: attention is then far from uniform."""
STREAM_ALLOWED = 2 * ALLOWED
"""What a gradient may err by with --stream bfloat16, in yardsticks: the yardstick's own stream is float32."""
SNAPSHOTS = 10
"""The moments of a run at which gradients are compared; a shorter run has one a step. Errors are pooled over them: by
one moment alone the ratio to the yardstick varied by half from seed to seed."""
FLOAT16_LOSS_SCALE = 1024.0


def small_config(device: str = "cpu", steps: int = 100, *, short: bool = False) -> TrainConfig:
    """A run whose sequences span three tiles of the attention kernel, small enough for the interpreter on a CPU.

    short: one block and a fifth of the tokens, on a CPU, where the interpreter's time grows with both.
    """
    shape: dict[str, Any]
    if torch.device(device).type == "cuda":
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 320, "batch_size": 3}
    elif short:
        shape = {"n_layer": 1, "n_head": 1, "n_embd": 32, "block_size": 8, "batch_size": 1}
    else:
        shape = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 40, "batch_size": 1}
    return TrainConfig(**shape, vocab_size=128, steps=steps, lr=1e-3, device=device, save_every=0)


@dataclass(frozen=True)
class Backend:
    """What is compared: the implementation of a slot, or of several, with the others in their plain form."""

    name: str
    choices: dict[str, str]
    stream: Stream = "full"

    def config(self, config: TrainConfig) -> TrainConfig:
        """A run with it."""
        names: dict[str, Any] = REFERENCE | self.choices
        deterministic = all(implementation(slot, name).deterministic for slot, name in self.choices.items())
        return dataclasses.replace(config, **names, deterministic=deterministic, stream=self.stream)

    def ops(self, device: str, dtype: Dtype) -> Ops:
        """Its functions.

        Raises:
            ConfigError: it can't run there; the message says why.
        """
        names = REFERENCE | self.choices
        site = Site(
            torch.device(device),
            TORCH_DTYPE[dtype],
            head_dim=16,
            n_embd=32,
            tf32=dtype == "tf32",
            stream_gradient=STREAM_DTYPES[self.stream][1],
        )
        return make_ops(names, site)[0]


def backends(only: Mapping[str, str] | None = None) -> dict[str, Backend]:
    """Every implementation of every slot by itself, and all of ours together, by the name that the table shows.

    Args:
        only: these instead, each by itself: {"attn": "mypackage.module:function"}.
    """
    if only:
        return {f"{slot} {name}": Backend(f"{slot} {name}", {slot: name}) for slot, name in only.items()}
    single = {
        f"{slot} {name}": {slot: name} for slot, table in SLOTS.items() for name in table if name != REFERENCE[slot]
    }
    return {name: Backend(name, choices) for name, choices in {"plain": {}, **single, "all triton": OURS}.items()}


STREAMS: dict[str, Backend] = {
    "bfloat16 gradient": Backend("bfloat16 gradient", {"norm": OURS["norm"]}, "bfloat16-gradient"),
    "bfloat16 stream": Backend("bfloat16 stream", {}, "bfloat16"),
}
"""What --stream costs, in bfloat16 alone."""


@dataclass(frozen=True)
class Row:
    """One line of the table: what was compared, how far off it was, and how far it may be."""

    check: str
    backend: str
    dtype: str
    error: float
    budget: float
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """NaN never passes."""
        return self.error <= self.budget


# ---------------------------------------------------------------------------------------------- losses


def reference_losses(config: TrainConfig) -> list[float]:
    """The losses of the run in float64 with the plain forms."""
    return train(dataclasses.replace(Backend("plain", {}).config(config), dtype="float64", compile=False)).losses


def deviation(losses: list[float], reference: list[float]) -> float:
    """The largest difference of two runs' losses; infinite where they have not as many."""
    if len(losses) != len(reference):
        return float("inf")
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


class Losses:
    """Check 2. The reference and the plain run of each precision are made once, when first needed."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.reference = reference_losses(config)
        self._plain: dict[Dtype, float] = {}

    def train(self, backend: Backend, dtype: Dtype, *, compile: bool = False) -> TrainResult:
        """Train a backend in a precision."""
        return train(dataclasses.replace(backend.config(self.config), dtype=dtype, compile=compile))

    def budget(self, dtype: Dtype) -> float:
        """What a backend's losses may deviate by in a precision."""
        if dtype not in self._plain:
            self._plain[dtype] = deviation(self.train(Backend("plain", {}), dtype).losses, self.reference)
        return max(ALLOWED * self._plain[dtype], LOSS_FLOOR[dtype])

    def check(self, backend: Backend, dtype: Dtype, *, compile: bool = False) -> Row:
        """Train a backend and compare; a float16 run that skipped a step fails."""
        began = time.perf_counter()
        result = self.train(backend, dtype, compile=compile)
        error = float("inf") if result.skipped_steps else deviation(result.losses, self.reference)
        name = f"{backend.name}, compiled" if compile else backend.name
        label = f"losses, {len(self.reference)} steps"
        return Row(label, name, dtype, error, self.budget(dtype), time.perf_counter() - began)


# ------------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Snapshot:
    """A moment of the reference run: its weights, the tokens it is about to see, its parameters' gradients."""

    weights: dict[str, Tensor]
    tokens: Tensor
    gradients: dict[str, Tensor]


class Gradients:
    """Check 3. The reference run is made once, with the snapshots that the backends are compared at."""

    def __init__(self, config: TrainConfig) -> None:
        with numerics(config):
            self.run = build(dataclasses.replace(Backend("plain", {}).config(config), dtype="float64"))
            with torch.no_grad():
                for name, weight in self.run.model.named_parameters():
                    if name.endswith("attn.c_attn.weight"):
                        weight.mul_(PEAKED)
            self.snapshots = [s for step in range(self.run.config.steps) if (s := self._advance(step))]
        self._yardstick: dict[Dtype, dict[str, float]] = {}

    def _advance(self, step: int) -> Snapshot | None:
        due = step % max(1, self.run.config.steps // SNAPSHOTS) == 0
        weights = {name: t.clone() for name, t in self.run.model.state_dict().items()} if due else None
        tokens = self.run.next_tokens(step)
        self.run.step(step, tokens)
        if weights is None:
            return None
        return Snapshot(weights, tokens[0], {name: g.clone() for name, g in _gradients(self.run.model).items()})

    def errors(self, ops: Ops, dtype: Dtype, stream: Stream = "full") -> dict[str, float]:
        """The relative error of each parameter's gradient, |g - g_ref| / |g_ref|, as the root of its mean square over
        the snapshots."""
        device, shape = self.run.device, self.run.model.config
        model = GPT(shape, ops, stream=STREAM_DTYPES[stream][0]).to(device)
        compute = TORCH_DTYPE[dtype]
        scale = FLOAT16_LOSS_SCALE if compute == torch.float16 else 1.0
        squares: dict[str, list[Tensor]] = {}
        # cuDNN's backward is not deterministic, and only the size of the error counts here.
        with numerics(dataclasses.replace(self.run.config, dtype=dtype, deterministic=False)):
            for snapshot in self.snapshots:
                model.load_state_dict(snapshot.weights)
                model.zero_grad()
                with torch.autocast(device.type, dtype=compute, enabled=compute.itemsize == 2):
                    loss = model(*split(snapshot.tokens))
                (loss * scale).backward()
                for name, got in _gradients(model).items():
                    want = snapshot.gradients[name]
                    error = (got.double() / scale - want).norm() / want.norm()
                    squares.setdefault(name, []).append(error.square())
        return {name: torch.stack(values).mean().sqrt().item() for name, values in squares.items()}

    def yardstick(self, dtype: Dtype) -> dict[str, float]:
        """The larger of the plain form's and sdpa's error in a precision, by parameter."""
        if dtype not in self._yardstick:
            device = str(self.run.device)
            pair = [
                self.errors(backends()[name].ops(device, dtype), dtype) for name in ("plain", f"attn {TORCH['attn']}")
            ]
            self._yardstick[dtype] = {name: max(errors[name] for errors in pair) for name in pair[0]}
        return self._yardstick[dtype]

    def check(self, name: str, ops: Ops, dtype: Dtype, stream: Stream = "full") -> Row:
        """The worst of a backend's errors as a multiple of the yardstick's."""
        began = time.perf_counter()
        yardstick = self.yardstick(dtype)
        ratios = {name: excess(error, yardstick[name]) for name, error in self.errors(ops, dtype, stream).items()}
        # max() would pass over a NaN that isn't first.
        worst = max(ratios, key=lambda parameter: ratios[parameter] if ratios[parameter] == ratios[parameter] else 1e9)
        label = f"gradients, x yardstick: {worst}"
        allowed = ALLOWED if STREAM_DTYPES[stream][0] is None else STREAM_ALLOWED
        return Row(label, name, dtype, ratios[worst], allowed, time.perf_counter() - began)


def _gradients(model: GPT) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


class Checks:
    """Losses and Gradients of a device, made when first needed: over whole sequences where the attention is what is
    compared, over short ones for what works row by row."""

    def __init__(self, device: str, steps: int = 100) -> None:
        self.device, self.steps = device, steps
        self._made: dict[tuple[type, bool], Any] = {}

    def losses(self, backend: Backend) -> Losses:
        return self._make(Losses, backend)

    def gradients(self, backend: Backend) -> Gradients:
        return self._make(Gradients, backend)

    def _make(self, check: type, backend: Backend) -> Any:
        short = not set(backend.choices) <= {"attn"}
        if (check, short) not in self._made:
            self._made[check, short] = check(small_config(self.device, self.steps, short=short))
        return self._made[check, short]


# --------------------------------------------------------------------------------------------- command


def error_row(name: str, form: str, ops: Ops, dtype: Dtype, device: str, seeds: Iterable[int] = range(SEEDS)) -> Row:
    """Check 1 of one of `problems` in a precision: the tensor and measure that use most of their budget."""
    problem = problems(device)[form]
    began = time.perf_counter()
    with numerics(TrainConfig(dtype=dtype, deterministic=False)):  # in tf32 the peers multiply in TF32, too
        table = error_and_budget(getattr(ops, problem.slot), problem, TORCH_DTYPE[dtype], device, seeds)
    worst = max(table, key=lambda key: excess(*table[key]))
    return Row(f"{form} {problem.shape}, {worst}", name, dtype, *table[worst], time.perf_counter() - began)


def verify(device: str, steps: int = 100, only: Mapping[str, str] | None = None) -> list[Row]:
    """All three checks of every backend in every precision of a device; prints a line as each is done.

    A check that raises is a row with an infinite error: the others are still made.

    Args:
        only: see backends.

    Raises:
        ConfigError: no run of so many steps, or a function that can't be used.
    """
    for backend in backends(only).values() if only else ():
        if any(map(is_outside, backend.choices.values())):
            _try(backend.config(small_config(device)))
    cuda = torch.device(device).type == "cuda"
    precisions: tuple[Dtype, ...] = ("float32", "tf32", "bfloat16", "float16") if cuda else ("float32", "bfloat16")
    checks = Checks(device, steps)
    rows: list[Row] = []

    def add(name: str, dtype: Dtype, what: str, check: Callable[[], Row]) -> None:
        try:
            row = check()
        except ConfigError:
            raise
        except Exception as error:
            traceback.print_exc()
            row = Row(f"{what}: raised {type(error).__name__}", name, dtype, float("inf"), 0.0)
        verdict = "ok" if row.passed else "OUT OF BUDGET"
        figures = f"{row.error:>9.2e} of {row.budget:>8.2e} {row.seconds:>7.1f} s"
        print(f"{row.check:<52} {row.backend:<17} {row.dtype:<9} {figures}  {verdict}", flush=True)
        rows.append(row)

    for dtype in precisions:
        streams = STREAMS if dtype == "bfloat16" and not only else {}
        for name, backend in (backends(only) | streams).items():
            try:
                ops = backend.ops(device, dtype)
            except ConfigError as error:
                print(f"{name}, {dtype}: not checked: {error}", flush=True)
                continue
            for what, check in _each(checks, name, backend, ops, dtype):
                add(name, dtype, what, check)
    return rows


def _try(config: TrainConfig) -> None:
    """Build a run, which refuses a function from outside that can't be used."""
    with numerics(config):
        build(config)


def _each(
    checks: Checks, name: str, backend: Backend, ops: Ops, dtype: Dtype
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """The checks of a backend in a precision, by name."""
    device = checks.device
    for form, problem in problems(device).items():
        if [problem.slot] == list(backend.choices) and backend.stream == "full":
            yield form, partial(error_row, name, form, ops, dtype, device)
    yield "gradients", lambda: checks.gradients(backend).check(name, ops, dtype, backend.stream)
    yield "losses", lambda: checks.losses(backend).check(backend, dtype)
    if torch.device(device).type == "cuda" and dtype == "bfloat16":  # trained in; compiling takes long
        yield "losses, compiled", lambda: checks.losses(backend).check(backend, dtype, compile=True)


@dataclass(frozen=True)
class VerifyConfig:
    """What to check, and where."""

    device: Name | None = None
    """cpu, cuda or cuda:N (default: cuda if there is one)."""
    steps: Count = 100
    """Training steps compared."""
    attn: Attention | None = None
    """Check only this attention: a name, or module:function for your own (default: every one, of every slot)."""
    mlp: Mlp | None = None
    """Check only this MLP."""
    norm: Norm | None = None
    """Check only this norm."""
    loss: Loss | None = None
    """Check only this loss."""


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 1 where a backend is out of budget."""
    given = read_arguments(VerifyConfig, "fastgpt2.verify", arguments)
    device = str(pick_device(given.device))
    if device == "mps":
        raise ConfigError("--device mps has no float64 for the reference: use --device cpu")
    only = {slot: name for slot in SLOTS if (name := getattr(given, slot))}
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides at its import whether it interprets, and torch may have imported it by now.
        flags = {"device": "cpu", "steps": str(given.steps), **only}
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        again = [sys.executable, "-m", "fastgpt2.verify", *words]
        return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    began = time.perf_counter()
    interpreted = "" if any(map(is_outside, only.values())) else " (Triton interpreted)"
    where = torch.cuda.get_device_name(device) if device != "cpu" else f"this CPU{interpreted}"
    print(f"fastgpt2 on {where}, torch {torch.__version__}: each backend against the plain form in float64\n")
    rows = verify(device, given.steps, only)
    failed = [row for row in rows if not row.passed]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} within budget, in {time.perf_counter() - began:.0f} s")
    return 1 if failed or not rows else 0


if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
