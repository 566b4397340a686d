"""`python -m fastgpt2.verify`: does every backend compute what the reference computes, on this machine?

Three checks, each against the naive form in float64, each with a budget relative to what PyTorch itself
loses in the same precision:

1. Errors: the attention's output and gradient on random input.
2. Losses: 100 training steps from the same seed on dummy tokens; a loss may deviate from the reference's by
   twice what the naive form deviates in that precision, or by LOSS_FLOOR.
3. Gradients: losses alone are blind (on random tokens a zeroed dQ hardly moves them), so every tenth step of
   a run whose attention is peaked (qkv weights initialised 5x larger) the backend gets the reference's
   weights and tokens, and its gradients of the qkv weights may err by twice the larger of naive's and sdpa's.

Without CUDA the Triton kernels run in the interpreter, in a process of its own.
"""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from fastgpt2.attention import naive_attention, sdpa_attention
from fastgpt2.config import Attention, ConfigError, Dtype, TrainConfig
from fastgpt2.data import split
from fastgpt2.device import pick_device
from fastgpt2.model import GPT
from fastgpt2.ops import ATTENTION, Ops, make_ops
from fastgpt2.run import TORCH_DTYPE, build, numerics
from fastgpt2.train import train

LOSS_FLOOR = {"float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-3, "float16": 1e-3}
"""What a loss in nats may deviate by however well the naive form does."""
ALLOWED = 2.0
"""A backend's error may be this multiple of the yardstick's."""
PEAKED = 5.0
"""The qkv weights of the gradient check are initialised this much larger: attention is then far from uniform."""
EVERY = 10
"""Steps between two gradient checks."""
UNITS_IN_LAST_PLACE = 4
FLOAT16_LOSS_SCALE = 1024.0


def small_config(device: str = "cpu", steps: int = 100) -> TrainConfig:
    """A run whose sequences span three tiles of the attention kernel, small enough for the interpreter on a CPU."""
    shape: dict[str, Any]
    if torch.device(device).type == "cuda":
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 128, "block_size": 320, "batch_size": 3}
    else:
        shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 40, "batch_size": 1}
    return TrainConfig(**shape, vocab_size=128, steps=steps, lr=1e-3, device=device, save_every=0, log_every=EVERY)


# ---------------------------------------------------------------------------------------------- losses


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


def reference_losses(config: TrainConfig) -> list[float]:
    """The losses of the run in float64 with the naive form."""
    return train(dataclasses.replace(config, attn="naive", dtype="float64", compile=False)).losses


def deviation(losses: list[float], reference: list[float]) -> float:
    """The largest difference of two runs' losses; infinite where they have not as many."""
    if len(losses) != len(reference):
        return float("inf")
    return max(abs(a - b) for a, b in zip(losses, reference, strict=True))


class Losses:
    """Check 2. The reference and the naive run of each precision are made once, when first needed."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.reference = reference_losses(config)
        self._naive: dict[Dtype, float] = {}

    def budget(self, dtype: Dtype) -> float:
        """What a backend's losses may deviate by in a precision."""
        if dtype not in self._naive:
            naive = dataclasses.replace(self.config, attn="naive", dtype=dtype)
            self._naive[dtype] = deviation(train(naive).losses, self.reference)
        return max(ALLOWED * self._naive[dtype], LOSS_FLOOR[dtype])

    def check(self, attn: Attention, dtype: Dtype, *, compile: bool = False) -> Row:
        """Train a backend and compare; a float16 run that skipped a step fails."""
        began = time.perf_counter()
        result = train(dataclasses.replace(self.config, attn=attn, dtype=dtype, compile=compile))
        error = float("inf") if result.skipped_steps else deviation(result.losses, self.reference)
        name = f"{attn} compiled" if compile else attn
        label = f"losses, {len(self.reference)} steps"
        return Row(label, name, dtype, error, self.budget(dtype), time.perf_counter() - began)


# ------------------------------------------------------------------------------------------- gradients


@dataclass(frozen=True)
class Snapshot:
    """A moment of the reference run: its weights, the tokens it is about to see, its qkv weights' gradients."""

    weights: dict[str, Tensor]
    tokens: Tensor
    gradients: list[Tensor]


class Gradients:
    """Check 3. The reference run is made once, with the snapshots that the backends are compared at."""

    def __init__(self, config: TrainConfig) -> None:
        with numerics(config):
            self.run = build(dataclasses.replace(config, attn="naive", dtype="float64"))
            with torch.no_grad():
                for weight in qkv_weights(self.run.model):
                    weight.mul_(PEAKED)
            self.snapshots = [s for step in range(int(config.steps or 0)) if (s := self._advance(step))]
        self._yardstick: dict[Dtype, list[list[float]]] = {}

    def _advance(self, step: int) -> Snapshot | None:
        weights = {name: t.clone() for name, t in self.run.model.state_dict().items()} if step % EVERY == 0 else None
        tokens = self.run.next_tokens(step)
        self.run.step(step, tokens)
        if weights is None:
            return None
        return Snapshot(weights, tokens[0], [_gradient(w).clone() for w in qkv_weights(self.run.model)])

    def errors(self, attention: Callable[..., Tensor], dtype: Dtype) -> list[list[float]]:
        """The relative error of each layer's qkv weight gradient, |g - g_ref| / |g_ref|, at each snapshot."""
        device, shape = self.run.device, self.run.model.config
        model = GPT(shape, Ops(attention=attention)).to(device)
        compute = TORCH_DTYPE[dtype]
        scale = FLOAT16_LOSS_SCALE if compute == torch.float16 else 1.0
        rows = []
        with numerics(dataclasses.replace(self.run.config, dtype=dtype)):
            for snapshot in self.snapshots:
                model.load_state_dict(snapshot.weights)
                model.zero_grad()
                with torch.autocast(device.type, dtype=compute, enabled=compute.itemsize == 2):
                    loss = model(*split(snapshot.tokens))
                (loss * scale).backward()
                got = [_gradient(w).double() / scale for w in qkv_weights(model)]
                rows.append([((g - r).norm() / r.norm()).item() for g, r in zip(got, snapshot.gradients, strict=True)])
        return rows

    def yardstick(self, dtype: Dtype) -> list[list[float]]:
        """The larger of naive's and sdpa's error in a precision, by snapshot and layer."""
        if dtype not in self._yardstick:
            pair = [self.errors(op, dtype) for op in (naive_attention, sdpa_attention)]
            self._yardstick[dtype] = [[max(e) for e in zip(*rows, strict=True)] for rows in zip(*pair, strict=True)]
        return self._yardstick[dtype]

    def check(self, name: str, attention: Callable[..., Tensor], dtype: Dtype) -> Row:
        """The worst of a backend's errors as a multiple of the yardstick's."""
        began = time.perf_counter()
        pairs = zip(self.errors(attention, dtype), self.yardstick(dtype), strict=True)
        ratios = [e / y for errors, yardsticks in pairs for e, y in zip(errors, yardsticks, strict=True)]
        # max() would pass over a NaN that isn't first.
        worst = max((r if r == r else float("inf") for r in ratios), default=float("inf"))
        return Row("qkv gradients, x yardstick", name, dtype, worst, ALLOWED, time.perf_counter() - began)


def qkv_weights(model: GPT) -> list[Tensor]:
    """The weight of each layer's qkv projection."""
    return [block.get_submodule("attn.c_attn").get_parameter("weight") for block in model.h]


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


# ---------------------------------------------------------------------------------------------- errors


def attention_with_gradient(attention: Callable[..., Tensor], qkv: Tensor, grad_output: Tensor) -> dict[str, Tensor]:
    """Output (B, T, H, D) and gradient (B, T, 3, H, D) of an attention at qkv, as "o", "dq", "dk", "dv"."""
    qkv = qkv.detach().requires_grad_()
    o = attention(qkv)
    (dqkv,) = torch.autograd.grad(o, qkv, grad_output)
    return {"o": o.detach(), **dict(zip(("dq", "dk", "dv"), dqkv.unbind(2), strict=True))}


def error_and_budget(
    attention: Callable[..., Tensor],
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    device: str,
    seeds: Iterable[int] = range(5),
) -> dict[str, tuple[float, float]]:
    """The largest error of an attention against float64 over some seeds, and its budget: {"dq by norm": ...}.

    Args:
        shape: B, T, H, D.

    By maximum and by norm (root mean square). The budget is twice the larger of naive's and sdpa's error in the
    same precision, pooled over the seeds, and 4 units in the last place of the tensor's scale: sdpa itself needs
    that where naive happens to be exact.
    """
    B, T, H, D = shape
    errors: dict[str, float] = {}
    peers: dict[str, float] = {}
    scales: dict[str, float] = {}

    def keep(largest: dict[str, float], key: str, value: float) -> None:
        # max() would pass over a NaN.
        largest[key] = max(largest.get(key, 0.0), value if value == value else float("inf"))

    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        qkv = torch.randn(B, T, 3, H, D, generator=generator).to(device, dtype)
        grad_output = torch.randn(B, T, H, D, generator=generator).to(device, dtype)
        exact = attention_with_gradient(naive_attention, qkv.double(), grad_output.double())
        ours = attention_with_gradient(attention, qkv, grad_output)
        theirs = [attention_with_gradient(op, qkv, grad_output) for op in (naive_attention, sdpa_attention)]
        for name, want in exact.items():
            for measure, size in (("maximum", _maximum), ("norm", _root_mean_square)):
                key = f"{name} by {measure}"
                keep(scales, key, size(want))
                keep(errors, key, size(ours[name].double() - want))
                for peer in theirs:
                    keep(peers, key, size(peer[name].double() - want))
    units = {
        key: UNITS_IN_LAST_PLACE * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(scale))
        for key, scale in scales.items()
    }
    return {key: (errors[key], ALLOWED * peers[key] + units[key]) for key in errors}


def _maximum(x: Tensor) -> float:
    return x.abs().max().item()


def _root_mean_square(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def attention_row(backend: str, attention: Callable[..., Tensor], dtype: Dtype, device: str) -> Row:
    """Check 1 for one backend and precision: the tensor and measure that use most of their budget."""
    shape = (2, 1000, 3, 64) if device.startswith("cuda") else (2, 41, 1, 16)
    began = time.perf_counter()
    with numerics(TrainConfig(dtype=dtype)):  # in tf32 the peers multiply in TF32, too
        table = error_and_budget(attention, shape, TORCH_DTYPE[dtype], device)
    name = max(table, key=lambda key: table[key][0] / table[key][1])
    check = f"attention {shape}, {name}"
    return Row(check, backend, dtype, *table[name], time.perf_counter() - began)


# --------------------------------------------------------------------------------------------- command


def backends(device: str, dtype: Dtype) -> dict[Attention, Callable[..., Tensor]]:
    """The attention implementations that run on a device in a precision, by name."""
    found: dict[Attention, Callable[..., Tensor]] = {}
    for name in ATTENTION:
        try:
            ops, _ = make_ops(name, device=device, dtype=TORCH_DTYPE[dtype], head_dim=16, tf32=dtype == "tf32")
        except ConfigError as error:
            print(f"{name}, {dtype}: not checked: {error}")
            continue
        found[cast(Attention, name)] = ops.attention
    return found


def verify(device: str, steps: int = 100) -> list[Row]:
    """All three checks of every backend in every precision of a device; prints a line as each is done."""
    config = small_config(device, steps)
    cuda = torch.device(device).type == "cuda"
    precisions: tuple[Dtype, ...] = ("float32", "tf32", "bfloat16", "float16") if cuda else ("float32", "bfloat16")
    losses, gradients = Losses(config), Gradients(config)
    rows: list[Row] = []

    def add(row: Row) -> None:
        verdict = "ok" if row.passed else "OUT OF BUDGET"
        figures = f"{row.error:>9.2e} of {row.budget:>8.2e} {row.seconds:>7.1f} s"
        print(f"{row.check:<44} {row.backend:<16} {row.dtype:<9} {figures}  {verdict}", flush=True)
        rows.append(row)

    for dtype in precisions:
        for name, attention in backends(device, dtype).items():
            add(attention_row(name, attention, dtype, device))
            add(gradients.check(name, attention, dtype))
            add(losses.check(name, dtype))
            if cuda and dtype == "bfloat16":  # the precision that is trained in; compiling takes long
                add(losses.check(name, dtype, compile=True))
    return rows


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 1 where a backend is out of budget."""
    import argparse

    parser = argparse.ArgumentParser(prog="python -m fastgpt2.verify", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--steps", type=int, default=100, help="training steps compared (default: 100)")
    given = parser.parse_args(arguments)
    pick_device(given.device)
    if given.device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        # Triton decides at its import whether it interprets, and torch may have imported it by now.
        again = [sys.executable, "-m", "fastgpt2.verify", "--device", "cpu", "--steps", str(given.steps)]
        return subprocess.run(again, env={**os.environ, "TRITON_INTERPRET": "1"}, check=False).returncode
    began = time.perf_counter()
    where = torch.cuda.get_device_name(given.device) if given.device != "cpu" else "this CPU (Triton interpreted)"
    print(f"fastgpt2 on {where}, torch {torch.__version__}: each backend against the naive form in float64\n")
    rows = verify(given.device, given.steps)
    failed = [row for row in rows if not row.passed]
    print(f"\n{len(rows) - len(failed)} of {len(rows)} within budget, in {time.perf_counter() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
