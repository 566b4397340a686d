"""The candidates of a training step, ours and the peers: how each is built in its worker, and what a result says.

All train the same GPT-2 from the same weights on the same tokens with the same fused Adam, and draw the next batch
while the device works. Ours runs as the trainer does, under its numerics, which ask PyTorch for deterministic
algorithms; the peers run without that request, which is PyTorch at its fastest. Peers:

    plain                   bench.step.plain_gpt2: PyTorch alone, as nanoGPT does it, SDPA's choice of kernel
    plain-cudnn, -flash, -efficient      the same with SDPA held to one kernel
    plain-reduce-overhead   the same with PyTorch's own CUDA graphs (torch.compile's mode)
    transformers            GPT2LMHeadModel with attn_implementation="sdpa" and the one-kernel form of its GELU; logits,
                            then F.cross_entropy (its `labels=` path takes as long, within 1% on a CPU)
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.roofline import Work, figures
from bench.step.lockstep import Candidate, Finished, Values
from bench.step.plain_gpt2 import PlainGPT2
from fastgpt2.config import PRESETS, ConfigError, ModelConfig, TrainConfig
from fastgpt2.data import open_data, split
from fastgpt2.hugging_face import to_hugging_face
from fastgpt2.kernels.tuning import use_table
from fastgpt2.model import FLOPS_PER_TOKEN, GPT
from fastgpt2.ops import SLOTS
from fastgpt2.run import build, numerics, settle
from fastgpt2.settings import Settled

# ------------------------------------------------------------------------------------------------ candidates


@dataclass(frozen=True)
class StepShape:
    """A step of a preset, with other blocks or tokens where n_layer and T say so."""

    model: str
    B: int
    dtype: str
    T: int | None = None
    n_layer: int | None = None

    def size(self) -> ModelConfig:
        size = PRESETS[self.model]
        return dataclasses.replace(size, block_size=self.T or size.block_size, n_layer=self.n_layer or size.n_layer)

    def info(self) -> dict[str, Any]:
        """A result's `shape`."""
        size = self.size()
        return {"model": self.model, "n_layer": size.n_layer, "B": self.B, "T": size.block_size}


@dataclass(frozen=True)
class Kernels:
    """What was found out about our kernels on this machine.

    Args:
        without: slots whose kernel is not to run: PyTorch's form takes its place.
        table: file of launch configurations, used instead of the shipped table of the same name (sm_90.json).
    """

    without: tuple[str, ...] = ()
    table: Path | None = None


@dataclass(frozen=True)
class StepCandidate:
    """One way to train.

    Args:
        make: builds it in the worker, from the settings of a TrainConfig and `options`.
        settings: of the TrainConfig, beside the shape's.
        cuda: why it can't run without a CUDA GPU; "" where it can.
    """

    role: str
    make: str
    settings: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    cuda: str = ""

    def with_kernels(self, kernels: Kernels) -> StepCandidate:
        """Ours with what is known of our kernels: also a slot left at auto might become one that is not to run."""
        if self.role != "ours":
            return self
        flags = {slot: TORCH[slot] for slot in kernels.without}
        plain = {flag: form for flag, form in flags.items() if self.settings.get(flag, "auto") in ("auto", "triton")}
        table = {} if kernels.table is None else {"table": str(kernels.table)}
        return dataclasses.replace(self, settings=self.settings | plain, options=self.options | table)

    def on(
        self,
        shape: StepShape,
        device: torch.device,
        *,
        compiled: bool,
        threads: int | None = None,
        kernels: Kernels | None = None,
    ) -> Candidate:
        """As a worker's work.

        Args:
            threads: of PyTorch on a CPU; None leaves them as they are.
        """
        if kernels is not None:
            return self.with_kernels(kernels).on(shape, device, compiled=compiled, threads=threads)
        settings = {
            "model": shape.model,
            "n_layer": shape.n_layer,
            "block_size": shape.T,
            "batch_size": shape.B,
            "dtype": shape.dtype,
            "compile": compiled,
            "device": str(device),
            **self.settings,
        }
        environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        return Candidate(self.make, {"settings": settings, **self.options}, environment)


TORCH = {"attn": "sdpa", "mlp": "torch", "norm": "torch", "loss": "torch"}
"""What the ablation begins with: PyTorch's forms."""
_INTERPRETED = "Triton on a CPU is interpreted: its time would say nothing about the kernel"
_GRAPH = "a CUDA graph needs a CUDA GPU"
_KERNELS = "PyTorch's attention kernels are told apart on a CUDA GPU only"


def _ours(choices: dict[str, str] | None, **settings: Any) -> StepCandidate:
    """The trainer's step, with PyTorch's forms but for `choices`; None: slots are at auto but where settings say so."""
    chosen = {} if choices is None else TORCH | choices
    settings |= chosen
    needs = {
        _INTERPRETED: "triton" in settings.values(),
        "it trains on a CUDA GPU only": settings.get("attn") in ("cudnn", "flex"),
        _GRAPH: settings.get("cuda_graph", False),
    }
    if settings.get("attn") == "cudnn":
        settings["deterministic"] = False  # there is no deterministic form of it
    cuda = next((why for why, yes in needs.items() if yes), "")
    return StepCandidate("ours", "bench.step.steps:make_ours", settings, cuda=cuda)


def _plain(cuda: str = "", **options: Any) -> StepCandidate:
    return StepCandidate("peer", "bench.step.steps:make_plain", options=options, cuda=cuda)


_ALL = dict.fromkeys(SLOTS, "triton")
TUNED = "ours-triton-tuned"
"""All of our kernels, launched by a table that was just tuned; only where there is one."""
STEPS: dict[str, StepCandidate] = {
    "ours-auto": _ours(None),
    "ours-auto-attn": _ours(None, attn="triton"),
    "ours-triton": _ours(_ALL),
    "ours-torch": _ours({}),
    "ours-torch-any-order": _ours({}, deterministic=False),
    **{
        f"ours-{slot}-{name}": _ours({slot: name})
        for slot, table in SLOTS.items()
        for name in table
        if name not in (TORCH[slot], "naive")
    },
    "ours-triton-any-order": _ours(_ALL, deterministic=False),
    TUNED: _ours(_ALL),
    "ours-auto-lean": _ours(None, lean=True),
    "ours-auto-recompute": _ours(None, recompute=True),
    "ours-triton-recompute": _ours(_ALL, recompute=True),
    "ours-auto-graph": _ours(None, cuda_graph=True),
    "ours-triton-graph": _ours(_ALL, cuda_graph=True),
    "plain": _plain(),
    **{f"plain-{kernel}": _plain(_KERNELS, kernel=kernel) for kernel in ("cudnn", "flash", "efficient")},
    "plain-reduce-overhead": _plain(_GRAPH, mode="reduce-overhead"),
    "transformers": StepCandidate("peer", "bench.step.steps:make_transformers"),
}
"""By name. `ours-auto` is what the trainer does by default, `ours-auto-attn` what it does with `--attn triton`;
`ours-<slot>-<implementation>` has PyTorch's forms but for one slot."""
REFERENCES = ("plain", "plain-efficient", "plain-flash", "plain-cudnn", "transformers")
"""Whose losses the others' must agree with, by preference: there is nothing of ours in them."""

# ---------------------------------------------------------------------------------------------- in the worker


class Step:
    """A training step that draws its own tokens: what a worker times.

    Args:
        model: whose gradients the work leaves behind; its parameters have the names of fastgpt2.model.GPT's, maybe
            with something before them.
        work: (index, tokens (grad_accum, B, T + 1)) -> the loss, on the device.
        draw: index -> the tokens of a step, on their way to the device.
    """

    def __init__(
        self,
        device: torch.device,
        model: nn.Module,
        work: Callable[[int, Tensor], Tensor],
        draw: Callable[[int], Tensor],
        facts: dict[str, Any],
        *,
        keeps_memory: bool = False,
    ) -> None:
        self.device, self.facts, self.keeps_memory = device, facts, keeps_memory
        self._model, self._work, self._draw = model, work, draw
        self._tokens = draw(0)
        self._loss: Tensor

    def __call__(self, index: int) -> None:
        self._loss = self._work(index, self._tokens)
        self._tokens = self._draw(index + 1)

    def check(self) -> dict[str, float]:
        """The loss of the last step, and the norm of the gradient of each parameter; of q, k and v apart, since at the
        beginning nearly all of the three is v's."""
        values = {"loss": self._loss.item()}
        for name, parameter in self._model.named_parameters():
            name, grad = re.sub(r".*\btransformer\.", "", name), parameter.grad
            if grad is None:
                continue
            if name.endswith("c_attn.weight"):
                parts = grad.chunk(3, dim=0 if grad.size(0) > grad.size(1) else 1)
                values |= {f"{name} of {part}": g.norm().item() for part, g in zip("qkv", parts, strict=True)}
            else:
                values[name] = grad.norm().item()
        return values


def make_ours(settings: dict[str, Any], table: str | None = None) -> Step:
    """The trainer's step. Its numerics, and a table of launch configurations, hold to the end of the process."""
    if table is not None:
        use_table(Path(table))
    config, device = settle(TrainConfig(**settings))
    _for_good(numerics(config))
    run = build(config)
    facts = {
        "slots": run.chosen,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "recompute": config.recompute,
        "cuda_graph": config.cuda_graph,
    }
    return Step(
        device,
        run.model,
        lambda index, tokens: run.step(index, tokens)[0],
        run.next_tokens,
        facts,
        keeps_memory=config.cuda_graph,
    )


def make_plain(settings: dict[str, Any], kernel: str | None = None, mode: str | None = None) -> Step:
    """bench.step.plain_gpt2, with SDPA held to a kernel and torch.compile in a mode where they are given."""
    if kernel is not None:
        _for_good(sdpa_kernel(getattr(SDPBackend, f"{kernel.upper()}_ATTENTION")))
        # The compiler's caches on disk don't know what SDPA is held to: one candidate would run another's code.
        torch.compiler.config.cache_key_tag = kernel

    def model(size: ModelConfig, weights: dict[str, Tensor]) -> nn.Module:
        with torch.device("meta"):
            plain = PlainGPT2(size)
        plain.load_state_dict(weights, assign=True)
        return plain

    return _peer(settings, model, mode)


def make_transformers(settings: dict[str, Any]) -> Step:
    return _peer(settings, HuggingFace)


class HuggingFace(nn.Module):
    """The mean cross-entropy of transformers' GPT2LMHeadModel with our weights."""

    def __init__(self, size: ModelConfig, weights: dict[str, Tensor]) -> None:
        try:
            from transformers import GPT2Config, GPT2LMHeadModel
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error.name} is not installed") from None
        super().__init__()
        config = GPT2Config(  # type: ignore[call-arg]
            vocab_size=size.vocab_size,
            n_positions=size.block_size,
            n_embd=size.n_embd,
            n_layer=size.n_layer,
            n_head=size.n_head,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            use_cache=False,
            attn_implementation="sdpa",
        )
        self.model = GPT2LMHeadModel(config)
        self.to(next(iter(weights.values())).dtype)
        with torch.no_grad():
            for name, parameter in self.model.transformer.named_parameters():
                parameter.copy_(to_hugging_face(name, weights[name], size))

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.model(tokens).logits.flatten(0, 1), targets.flatten())


def _peer(
    settings: dict[str, Any], make_model: Callable[[ModelConfig, dict[str, Tensor]], nn.Module], mode: str | None = None
) -> Step:
    """A training loop's body with PyTorch alone."""
    config, device = settle(TrainConfig(**settings))
    dtype = config.torch_dtype
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    model = make_model(config.model_config(), initial_weights(config)).to(device)
    model.train()
    if config.compile:
        model.compile(mode=mode)
    optimizer = torch.optim.Adam(model.parameters(), config.lr, betas=(config.beta1, config.beta2), fused=True)
    mixed = torch.autocast(device.type, dtype) if dtype.itemsize == 2 else contextlib.nullcontext()
    source = open_data(
        config.data,
        split="train",
        vocab_size=config.vocab_size,
        batch_size=config.batch_size,
        block_size=config.block_size,
        grad_accum=1,
        seed=config.seed,
    )

    def draw(index: int) -> Tensor:
        tokens = source.tokens(index)
        return tokens.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tokens

    def work(index: int, tokens: Tensor) -> Tensor:
        inputs, targets = split(tokens[0])
        optimizer.zero_grad(set_to_none=True)
        with mixed:
            loss = model(inputs, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    facts = {"deterministic": torch.are_deterministic_algorithms_enabled()}
    return Step(device, model, work, draw, facts, keeps_memory=mode is not None)


def initial_weights(config: Settled) -> dict[str, Tensor]:
    """What the trainer begins with; float64 in that precision, else float32."""
    torch.manual_seed(config.seed)
    dtype = torch.promote_types(config.torch_dtype, torch.float32)
    return GPT(config.model_config()).to(dtype).state_dict()


_entered = contextlib.ExitStack()
atexit.register(_entered.close)  # while what they put back is still there


def _for_good(context: contextlib.AbstractContextManager) -> None:
    """Enter a context that a worker never leaves."""
    _entered.enter_context(context)


# ------------------------------------------------------------------------------------------------- the result

LOSS_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-3}
"""Of the first losses between candidates, relative."""
GRADIENT_TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}
"""Of the norm of each parameter's first gradient, relative."""


def agree_in(shape: StepShape) -> Callable[[str, Values, str, Values], str | None]:
    """What bench.step.lockstep checks before it times: the first losses, and the norms of the first step's gradients, since
    on random tokens a loss hardly feels what is wrong.

    A vocabulary that is predicted with its padding, as nanoGPT's is, adds up to log(padded / V) to the loss.
    """
    size = shape.size()

    def padding(name: str) -> float:
        return math.log(size.padded_vocab_size / size.vocab_size) if name.startswith("plain") else 0.0

    def agree(name: str, values: Values, reference: str, right: Values) -> str | None:
        apart = padding(name) + padding(reference) if padding(name) != padding(reference) else 0.0
        norms = {parameter: norm for parameter, norm in right[0].items() if parameter != "loss"}
        off = {p: abs(values[0].get(p, math.inf) - norm) / max(norm, 1e-30) for p, norm in norms.items()}
        worst = max(off, key=lambda p: math.inf if math.isnan(off[p]) else off[p], default="")
        allowed = GRADIENT_TOLERANCE[shape.dtype] + apart
        if worst and not off[worst] <= allowed:
            return (
                f"the gradient of {worst} has the norm {values[0].get(worst)}, with {reference} {norms[worst]}: "
                f"{off[worst]:.1e} off, {allowed:.1e} is allowed"
            )
        for step, (mine, theirs) in enumerate(zip(values, right, strict=True)):
            allowed = apart + LOSS_TOLERANCE[shape.dtype] * theirs["loss"]
            if not abs(mine["loss"] - theirs["loss"]) <= allowed:
                return (
                    f"the loss of step {step} is {mine['loss']:.6f}, with {reference} {theirs['loss']:.6f}; "
                    f"{allowed:.1e} apart is allowed"
                )
        return None

    return agree


def result(
    name: str,
    shape: StepShape,
    compiled: bool,
    finished: Finished,
    device: torch.device,
    ceilings: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """A result of format 2 but for name, group, contest and device_state."""
    size = shape.size()
    tokens = shape.B * size.block_size
    flops = {formula: float(tokens * FLOPS_PER_TOKEN[formula](size)) for formula in ("llm.c", "nanogpt")}
    work = Work(tokens, flops["llm.c"], None, None, "llm.c", "not counted")
    return {
        "op": "training step",
        "backend": name,
        "role": STEPS[name].role,
        "compiled": compiled,
        "dtype": shape.dtype,
        "shape": shape.info(),
        **finished.facts,
        **finished.timed.info(),
        **figures(work, finished.timed.ms_median, shape.dtype, device, ceilings, {"nanogpt": flops["nanogpt"]}),
        "peak_memory_bytes": finished.peak_memory_bytes,
        "peak_memory_meaning": finished.peak_memory_meaning,
        "held_before_bytes": None,
        "first_losses": [values["loss"] for values in finished.values],
    }
