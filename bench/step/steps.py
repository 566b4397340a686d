"""The candidates of a training step, ours and the peers, and their contests.

All train the same GPT-2 from the same weights on the same tokens with the same fused Adam, and draw the next batch
while the device works. Ours runs as the trainer does, with its numerics, which ask PyTorch for deterministic
algorithms. The peers run without, which is PyTorch at its fastest. `products` is a floor: the matrix
products of the linear layers and the head, alone. Peers:

    plain                   bench.step.plain_gpt2: PyTorch alone, as nanoGPT does it, SDPA's choice of kernel
    plain-cudnn, -flash, -efficient      the same with SDPA restricted to one kernel
    plain-reduce-overhead   the same with PyTorch's own CUDA graphs (torch.compile's mode)
    nanogpt                 plain with what nanoGPT's CPU recipe has: exact GELU, the vocabulary without padding, AdamW
                            that decays weights and is not fused
    transformers            GPT2LMHeadModel with attn_implementation="sdpa" and the one-kernel form of its GELU; logits,
                            then F.cross_entropy (its `labels=` path takes as long, within 1% on a CPU)
"""

from __future__ import annotations

import dataclasses
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bench.contest import CUDA, DEVICE, Candidate, Contest, Measured, Missing, Values
from bench.roofline import Work
from bench.smoke import FORMS
from bench.step import lockstep
from bench.step.lockstep import Limits
from bench.timing import stage_ends
from fastgpt2.config import PRESETS, ModelConfig
from fastgpt2.model import FLOPS_PER_TOKEN
from fastgpt2.settings import STREAM_DTYPES
from fastgpt2.slots import OURS, REFERENCE, SLOTS, TORCH, implementation

AT_ONCE = min(8, max(1, len(os.sched_getaffinity(0)) // 2)) if CUDA else 1
"""Candidates that are built at the same time: each is traced by one thread, and compiled by processes of its own."""

# ------------------------------------------------------------------------------------------------ candidates


@dataclass(frozen=True)
class StepShape:
    """A step of a preset, with other blocks, tokens or vocabulary where n_layer, T and vocab_size say so."""

    model: str
    B: int
    dtype: str
    T: int | None = None
    n_layer: int | None = None
    vocab_size: int | None = None

    def size(self) -> ModelConfig:
        size = PRESETS[self.model]
        return dataclasses.replace(
            size,
            block_size=self.T or size.block_size,
            n_layer=self.n_layer or size.n_layer,
            vocab_size=self.vocab_size or size.vocab_size,
        )

    def info(self) -> dict[str, Any]:
        """A result's `shape`."""
        size = self.size()
        shape = {"model": self.model, "n_layer": size.n_layer, "B": self.B, "T": size.block_size}
        return shape | ({"V": self.vocab_size} if self.vocab_size else {})


@dataclass(frozen=True)
class Kernels:
    """What was found out about our kernels on this machine.

    Args:
        without: forms (a slot, or another of smoke.FORMS) that are not to run: PyTorch's takes its place.
        table: file of launch configurations, used instead of the shipped table of the same name (sm_90.json).
    """

    without: tuple[str, ...] = ()
    table: Path | None = None


class StepCandidate(Candidate):
    """One way to train: its worker builds it from the settings of a TrainConfig and maybe more arguments."""

    @property
    def settings(self) -> dict[str, Any]:
        """The TrainConfig's settings beside its shape."""
        return self.arguments["settings"]

    def with_kernels(self, kernels: Kernels) -> StepCandidate:
        """Ours with what is known of our kernels. A slot at auto might choose one that is not to run."""
        if self.role != "ours":
            return self
        out = [FORMS[form] for form in kernels.without]
        plain = {slot: TORCH[slot] for slot, name in out if self.settings.get(slot, "auto") in ("auto", name)}
        table = {} if kernels.table is None else {"table": str(kernels.table)}
        return dataclasses.replace(self, arguments={**self.arguments, "settings": self.settings | plain, **table})

    def on(
        self,
        shape: StepShape,
        device: torch.device,
        *,
        compiled: bool,
        threads: int | None = None,
        kernels: Kernels | None = None,
    ) -> Candidate:
        """The candidate at a shape.

        Args:
            threads: of PyTorch on a CPU; None leaves them as they are.
        """
        if kernels is not None:
            return self.with_kernels(kernels).on(shape, device, compiled=compiled, threads=threads)
        settings = {
            "model": shape.model,
            "n_layer": shape.n_layer,
            "block_size": shape.T,
            "vocab_size": shape.vocab_size,
            "batch_size": shape.B,
            "dtype": shape.dtype,
            "compile": compiled,
            "device": str(device),
            **self.settings,
        }
        environment = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        return dataclasses.replace(self, arguments=self.arguments | {"settings": settings}, environment=environment)


_INTERPRETED = "Triton on a CPU is interpreted: its time would say nothing about the kernel"
_GRAPH = "a CUDA graph needs a CUDA GPU"
_KERNELS = "PyTorch's attention kernels are told apart on a CUDA GPU only"


def _ours(choices: dict[str, str] | None, *, inductor: dict[str, Any] | None = None, **settings: Any) -> StepCandidate:
    """The trainer's step, with PyTorch's forms but for `choices`; None: slots are at auto but where settings say so.

    inductor: settings of torch._inductor.config.
    """
    chosen = {} if choices is None else TORCH | choices
    settings |= chosen
    used = [implementation(slot, settings[slot]) for slot in SLOTS if settings.get(slot, "auto") != "auto"]
    needs = {
        _INTERPRETED: any(known.interpreted for known in used),
        "it trains on a CUDA GPU only": any(known.cuda for known in used),
        _GRAPH: settings.get("cuda_graph", False),
    }
    if not all(known.deterministic for known in used):
        settings["deterministic"] = False
    cuda = next((why for why, yes in needs.items() if yes), "")
    more = {} if inductor is None else {"inductor": inductor}
    return StepCandidate("ours", "bench.step.build:make_ours", {"settings": settings, **more}, needs_gpu=cuda)


def _plain(cuda: str = "", **options: Any) -> StepCandidate:
    return StepCandidate("peer", "bench.step.build:make_plain", {"settings": {}, **options}, needs_gpu=cuda)


TUNED = "ours-triton-tuned"
"""All of our kernels, launched by a table that was just tuned; only where there is one."""
GROUPED = "ours-triton-grouped"
"""The same with elementwise kernels that don't depend on each other, such as the weights' casts, in one launch."""
STEPS: dict[str, StepCandidate] = {
    "ours-auto": _ours(None),
    "ours-auto-attn": _ours(None, attn=OURS["attn"]),
    "ours-triton": _ours(OURS),
    "ours-torch": _ours({}),
    "ours-torch-any-order": _ours({}, deterministic=False),
    **{
        f"ours-{slot}-{name}": _ours({slot: name})
        for slot, table in SLOTS.items()
        for name in table
        if name not in (TORCH[slot], REFERENCE[slot])
    },
    "ours-triton-any-order": _ours(OURS, deterministic=False),
    TUNED: _ours(OURS),
    GROUPED: _ours(OURS, inductor={"combo_kernels": True, "combo_kernels_pointwise_only": True}),
    "ours-auto-elementwise": _ours(None, recompute="elementwise"),
    "ours-auto-recompute": _ours(None, recompute="blocks"),
    "ours-triton-recompute": _ours(OURS, recompute="blocks"),
    **{f"ours-triton-{stream}": _ours(OURS, stream=stream) for stream in STREAM_DTYPES if stream != "full"},
    "ours-auto-graph": _ours(None, cuda_graph=True),
    "ours-triton-graph": _ours(OURS, cuda_graph=True),
    "plain": _plain(),
    **{f"plain-{kernel}": _plain(_KERNELS, kernel=kernel) for kernel in ("cudnn", "flash", "efficient")},
    "plain-reduce-overhead": _plain(_GRAPH, mode="reduce-overhead"),
    "nanogpt": StepCandidate("peer", "bench.step.build:make_nanogpt", {"settings": {}}),
    "transformers": StepCandidate("peer", "bench.step.build:make_transformers", {"settings": {}}),
    "products": StepCandidate("floor", "bench.step.build:Products", {"settings": {}}),
}
"""By name. `ours-auto` is what the trainer does by default, `ours-auto-attn` what it does with `--attn triton`;
`ours-<slot>-<implementation>` has PyTorch's forms but for one slot."""
REFERENCES = ("plain", "plain-efficient", "plain-flash", "plain-cudnn", "transformers")
"""Whose losses the others' must agree with, by preference: there is nothing of ours in them."""

# -------------------------------------------------------------------------------------------------- contests

LOSS_TOLERANCE = {"float64": 1e-10, "float32": 1e-5, "tf32": 1e-3, "bfloat16": 1e-3}
"""Relative tolerance between candidates' first losses."""
GRADIENT_TOLERANCE = {"float64": 1e-8, "float32": 1e-3, "tf32": 2e-2, "bfloat16": 5e-2}
"""Relative tolerance between the norms of each parameter's first gradient."""
OTHER_MODEL = {"nanogpt": 1e-3}
"""More, for another GELU and weight decay."""


def agree_in(shape: StepShape) -> Callable[[str, Values, str, Values], str | None]:
    """Make the check before timing: the first losses, and the norms of the first step's gradients, because the loss on
    random tokens hardly changes with a fault.

    Predicting GPT-2's vocabulary with its padding, as nanoGPT does, adds up to log(padded / V) to the loss. Another
    vocabulary is predicted as it is.
    """
    size = shape.size()

    def padding(name: str) -> float:
        padded = name.startswith("plain") and shape.vocab_size is None
        return math.log(size.padded_vocab_size / size.vocab_size) if padded else 0.0

    def agree(name: str, values: Values, reference: str, right: Values) -> str | None:
        if not any(values) or not any(right):  # a floor has neither loss nor gradients
            return None
        apart = padding(name) + padding(reference) if padding(name) != padding(reference) else 0.0
        apart += max(OTHER_MODEL.get(name, 0.0), OTHER_MODEL.get(reference, 0.0))
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


@dataclass(eq=False)
class StepContest(Contest):
    """One shape, compiled or not, and who takes part, each in a process of its own.

    Args:
        kind: why they are compared.
        round_s: about how long a candidate is timed in a round.
        at_once: candidates that are built at the same time.
        eager: also compare the losses with those of an eager step of plain PyTorch, which takes time and memory.
        threads: of PyTorch on a CPU.
        until: time.monotonic() after which no round starts; by default CONTEST_S from the start, or as the stage ends.
    """

    kind: str
    step: StepShape
    compiled: bool
    names: tuple[str, ...]
    rounds: int = 10 if CUDA else 3
    round_s: float = 0.4 if CUDA else 0.05
    at_once: int = AT_ONCE
    eager: bool = True
    threads: int | None = None if CUDA else 1
    kernels: Kernels | None = None
    limits: Limits = field(default_factory=Limits)
    until: float | None = None
    device: torch.device = DEVICE
    op = "training step"

    @property
    def title(self) -> str:
        return f"{self.step.model}-B{self.step.B}-{'compiled' if self.compiled else 'eager'}-{self.kind}"

    @property
    def group(self) -> str:
        return f"training step, {self.title}, {self.step.dtype}"

    def __post_init__(self) -> None:
        size = self.step.size()
        tokens = self.step.B * size.block_size
        flops = {formula: float(tokens * FLOPS_PER_TOKEN[formula](size)) for formula in ("llm.c", "nanogpt")}
        self.dtype, self.clock = self.step.dtype, self.device
        self.candidates: dict[str, Candidate] = {name: STEPS[name] for name in self.names}
        self.work = Work(tokens, flops.pop("llm.c"), None, None, "llm.c", "not counted")
        self.more_flops = flops

    def shape(self) -> dict[str, Any]:
        return self.step.info()

    def run(self, names: Sequence[str]) -> dict[str, Measured | Missing]:
        # Nothing of ours and no compiler is in it. It comes first: it is done with the device while the others compile.
        reference = f"{REFERENCES[0]}, eager"
        eager = {reference: self.place(REFERENCES[0], False)} if self.eager else {}
        now = time.monotonic()
        until = self.until or (now + CONTEST_S if math.isinf(stage_ends()) else stage_ends() - ENDING_S)
        return lockstep.contest(
            {**eager, **{name: self.place(name, self.compiled) for name in names}},
            rounds=self.rounds,
            seconds=self.rounds * self.round_s,
            limits=self.limits,
            references=(reference, *REFERENCES),
            agree=agree_in(self.step),
            at_once=self.at_once,
            untimed=[reference],
            built_by=now + BUILT_WITHIN * (until - now),
            until=until,
            say=lambda text: print(f"{self.title}: {text}", file=sys.stderr, flush=True),
        )

    def place(self, name: str, compiled: bool) -> Candidate:
        return STEPS[name].on(
            self.step,
            self.device,
            compiled=compiled,
            threads=self.threads,
            kernels=self.kernels,
        )


CONTEST_S = 300.0
"""No round starts when a contest has taken this long, or as its stage ends; what was timed until then is kept."""
BUILT_WITHIN = 0.75
"""The share of a contest's time for building. A candidate built later takes no part and costs no round."""
ENDING_S = 15.0
"""Kept for a contest's last round, the workers' ends and the results, before its stage is stopped."""
