"""A run that is ready to step: what `build` makes of a configuration, and one step of it.

A step draws tokens (grad_accum, B, T + 1), splits them into inputs and the targets that follow, takes the
mean cross-entropy, and steps the optimizer. Nothing in it waits for the device.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fastgpt2 import checkpoint
from fastgpt2.backends.attention import CUDNN, sdpa_attention, sdpa_picks
from fastgpt2.config import ConfigError, TrainConfig
from fastgpt2.cuda_graph import CapturedStep
from fastgpt2.data import ShardTokens, TokenSource, data_end_of_text, data_vocab_size, open_data, split
from fastgpt2.device import copy_async, keep_freed_memory, pick_device
from fastgpt2.folder import Claim, claim
from fastgpt2.memory import check_memory
from fastgpt2.model import GPT, saved_bytes
from fastgpt2.ops import Ops, Site, ablation, as_choices, make_ops, name_of
from fastgpt2.settings import Settled, resolve
from fastgpt2.slots import SLOTS, implementation
from fastgpt2.state import RunState
from fastgpt2.state_json import UNKNOWN, Progress, carried_over, changed_data, changed_settings, read_progress


@dataclass
class Run:
    """A run that is ready to step."""

    config: Settled
    device: torch.device
    state: RunState
    source: TokenSource
    val_source: TokenSource | None
    chosen: dict[str, str]
    """The implementation of each slot."""
    start: int = 0
    """Steps already done by the run that this one resumes."""
    resumed: Progress = UNKNOWN
    """Where the run stood that this one resumes."""
    found_other_data: bool = False
    """Whether its data, or their contents, are not those of this one: their losses don't compare."""
    samples_before: int = 0
    """Sequences that those steps took from the data."""
    found: list[str] = field(default_factory=list)
    """What the user should know of the checkpoints that were found."""
    captured: CapturedStep | None = None
    """The step as a CUDA graph, where one is asked for."""

    def __post_init__(self) -> None:
        self.model = self.state.model
        self.parameters = list(self.model.parameters())

    def autocast(self) -> contextlib.AbstractContextManager:
        """Mixed precision: 16-bit matmuls over float32 weights; nothing in the other precisions."""
        dtype = self.config.torch_dtype
        return torch.autocast(self.device.type, dtype=dtype) if dtype.itemsize == 2 else contextlib.nullcontext()

    def next_tokens(self, step: int) -> Tensor:
        """The tokens of a step counted from 0, (grad_accum, B, T + 1), on their way to the device."""
        return copy_async(self.source.tokens(step), self.device)

    @property
    def samples_per_step(self) -> int:
        """Sequences that a step takes."""
        return self.config.grad_accum * self.config.batch_size

    def samples_done(self, done: int) -> int:
        """Sequences that the first `done` steps took from the data."""
        return self.samples_before + (done - self.start) * self.samples_per_step

    def check_data(self) -> None:
        """Wait until the data has been verified: what was trained on damaged data is not to be saved.

        Raises:
            DataError: it is damaged, or was changed since.
        """
        self.source.check()

    def step(self, step: int, tokens: Tensor, *, want_norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """One optimizer step; launches work and waits for nothing.

        Args:
            step: counted from 0; decides the learning rate.
            tokens: (grad_accum, B, T + 1).
            want_norm: return the norm of the gradients even when they are not clipped.

        Returns:
            The loss (a scalar on the device, mean over micro-steps) and the gradients' norm before clipping.
        """
        self.state.set_learning_rates(step, self.config)
        if self.captured is None:
            return self._same_every_step(tokens, want_norm)
        loss, norm = self.captured(self._same_every_step, tokens)
        # The replayed gradients stay where they are until the next replay.
        return loss, self._norm() if norm is None and want_norm else norm

    def _same_every_step(self, tokens: Tensor, want_norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """The part of a step that never changes: what a CUDA graph captures."""
        self.state.zero_grad()
        total = torch.zeros((), device=self.device)
        for micro in tokens:
            inputs, targets = split(micro)
            with self.autocast():
                loss = self.model(inputs, targets)
            self.state.backward(loss / len(tokens))
            total = total + loss.detach()
        norm = None
        if want_norm or self.config.grad_clip:
            self.state.unscale()
            norm = self._norm()
            if self.config.grad_clip:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.grad_clip, norm)
        self.state.update()
        return total / len(tokens), norm

    def _norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def epoch(self, done: int) -> float | None:
        """Passes over the data in the first `done` steps; None for dummy tokens, which have no end."""
        return self.samples_done(done) / self.source.windows if isinstance(self.source, ShardTokens) else None

    def progress(self, done: int, loss: float, diverged: bool) -> Progress:
        """What a checkpoint after `done` steps keeps beside the tensors."""
        return Progress(self.samples_done(done), self.fingerprint, loss, diverged)

    @property
    def fingerprint(self) -> str | None:
        """What identifies the contents of the data, see Progress.data."""
        val = self.val_source.fingerprint if self.val_source else ""
        return f"{self.source.fingerprint}+{val}".rstrip("+") or None

    def skipped_steps(self, done: int) -> int:
        """Of the `done` steps, those that the gradient scaler left out: the fused optimizer didn't count them."""
        updates = self.state.updates() if self.state.scaler.is_enabled() else None
        return 0 if updates is None else done - updates


def build(
    config: TrainConfig,
    held: contextlib.ExitStack | None = None,
    *,
    ops: Ops | Mapping[str, Callable[..., Any]] | None = None,
    source: TokenSource | None = None,
) -> Run:
    """Check everything that can be checked, then make the model, the data and the optimizer.

    Args:
        held: keeps other runs out of --out until it is closed; without it they are kept out until this returns.
        ops: functions for slots, in place of the configuration's.
        source: training tokens, in place of --data's.

    Raises:
        ConfigError: the request can't be carried out on this machine.
    """
    with contextlib.ExitStack() as until_it_returns:
        return _build(config, held or until_it_returns, as_choices(ops), source)


def _build(
    asked: TrainConfig, held: contextlib.ExitStack, own: dict[str, Callable[..., Any]], own_source: TokenSource | None
) -> Run:
    refuse_several_processes()
    named: dict[str, Any] = {slot: name_of(slot, function) for slot, function in own.items()}
    asked = dataclasses.replace(asked, **named)
    config, device = settle(asked)
    model_config = config.model_config()
    ops, chosen = make_ops(
        {slot: own.get(slot, getattr(config, slot)) for slot in SLOTS},
        Site(
            device=device,
            dtype=config.torch_dtype,
            head_dim=model_config.head_dim,
            n_embd=model_config.n_embd,
            dropout=config.dropout,
            tf32=config.dtype == "tf32",
        ),
    )
    check_memory(config, device)
    if device.type == "cpu":
        keep_freed_memory()
    source, val_source = _open_sources(config, own_source)
    # Last of the checks, since it makes a folder.
    claimed = claim(config, held) if config.out is not None else Claim(None, [])
    notes = [*source.notes, *(val_source.notes if val_source else ()), *claimed.notes]
    if claimed.latest is not None:
        saved = checkpoint.check_shape(claimed.latest, model_config)
        notes += changed_settings(saved, config) + carried_over(saved, config, device)
    torch.manual_seed(config.seed)
    model = GPT(model_config, ops, recompute=config.recompute == "blocks")
    model.to(device=device, dtype=torch.promote_types(config.torch_dtype, torch.float32))
    model.train()
    if config.compile:
        # torch.compile caches at most eight variants of a function and raises on the ninth: forget earlier runs'.
        torch.compiler.reset()
        elementwise = config.recompute == "elementwise"
        backend = inductor_recomputing_elementwise if elementwise else "inductor"
        model.compile(dynamic=False, fullgraph=True, backend=backend)
    state = RunState.begin(model, config)
    run = Run(config, device, state, source, val_source, chosen, found=notes)
    if config.cuda_graph:
        run.captured = CapturedStep(device)
    if claimed.latest is not None:
        run.start = checkpoint.restore(claimed.latest, state)
        _continue_data(run, saved)
    return run


def refuse_several_processes() -> None:
    """Raises ConfigError under torchrun: each of its processes would train the whole run, in one folder."""
    world = os.environ.get("WORLD_SIZE", "")
    if world.isdecimal() and int(world) > 1:
        raise ConfigError(
            f"{world} processes were started (WORLD_SIZE, as torchrun sets it), and fastgpt2 trains in one: "
            f"start python -m fastgpt2.train without torchrun"
        )


def inductor_recomputing_elementwise(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """torch.compile's own backend, allowed to recompute elementwise results that a matmul of the backward pass reads.

    By default it stores these: GELU, LayerNorm's output, weights cast to 16 bits. Recomputing them leaves 24 of the 36
    bytes that a token stores for each channel of a block in bfloat16.
    """
    import torch._functorch.config as partitioning
    from torch._inductor.compile_fx import compile_fx

    with partitioning.patch(ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)


def activation_bytes(run: Run, *, recompute: bool) -> int:
    """Bytes that the forward of a micro-step keeps for its backward, counted on fake tensors: nothing is computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config, weights = run.config, run.model.state_dict()
    ops = run.model.ops
    if not implementation("attn", run.chosen["attn"]).fake:  # it keeps what sdpa does without a mask
        ops = dataclasses.replace(ops, attn=lambda qkv, dropout_p, documents: sdpa_attention(qkv, dropout_p))
    with FakeTensorMode() as mode, run.device, run.autocast():
        model = GPT(run.model.config, ops, recompute=recompute)
        # .to() can't convert fake parameters.
        model.load_state_dict({name: mode.from_tensor(weight) for name, weight in weights.items()}, assign=True)
        tokens = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
        return saved_bytes(model, tokens, tokens)


def settle(config: TrainConfig) -> tuple[Settled, torch.device]:
    """The settled configuration and its device.

    Raises:
        ConfigError: no such device, or one that can't compute in the precision asked for.
    """
    device = pick_device(config.device)
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
    if config.compile and device.type == "cpu" and shutil.which(cxx := os.environ.get("CXX", "g++")) is None:
        raise ConfigError(f"--compile on a CPU needs a C++ compiler and {cxx} is not found: install it or set CXX")
    if config.cuda_graph and device.type != "cuda":
        raise ConfigError("--cuda-graph needs a CUDA GPU: leave it out")
    settled = resolve(
        config,
        cuda=device.type == "cuda",
        bf16=bf16,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
        data_vocab_size=data_vocab_size(config.data),
        data_end_of_text=data_end_of_text(config.data),
    )
    return settled, device


@contextlib.contextmanager
def numerics(config: TrainConfig) -> Iterator[None]:
    """Set torch's global numerics for a run and restore them: exact float32 products unless tf32 is asked for, and
    deterministic algorithms unless --no-deterministic. Otherwise SDPA's flash and memory-efficient backwards on CUDA
    add in any order; they still do if torch is only told to warn."""
    precision = torch.get_float32_matmul_precision()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("high" if config.dtype == "tf32" else "highest")
    torch.use_deterministic_algorithms(config.deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]


def kept_from_cudnn(run: Run) -> bool:
    """Whether deterministic algorithms keep SDPA, without documents, from cuDNN, which PyTorch would pick here
    otherwise, and nobody has measured on this GPU what that costs."""
    config, size = run.config, run.model.config
    asked = (
        implementation("attn", run.chosen["attn"]).picks_kernel and size.end_of_text is None and config.deterministic
    )
    if run.device.type != "cuda" or not asked or ablation(run.device, config.dtype):
        return False
    shape = (1, size.block_size, 3, size.n_head, size.head_dim)
    with numerics(dataclasses.replace(config, deterministic=False)):
        return sdpa_picks(shape, config.torch_dtype, run.device, config.dropout) == CUDNN


def _open_sources(config: Settled, own: TokenSource | None) -> tuple[TokenSource, TokenSource | None]:
    def open_split(name: str, grad_accum: int, sequences: int) -> TokenSource:
        return open_data(
            config.data,
            split=name,
            vocab_size=config.vocab_size,
            batch_size=config.batch_size,
            block_size=config.block_size,
            grad_accum=grad_accum,
            seed=config.seed,
            sequences=sequences,
        )

    train = own or open_split("train", config.grad_accum, sequences=0)
    return train, open_split("val", 1, config.eval_sequences) if config.eval_every else None


def _continue_data(run: Run, state: dict[str, Any]) -> None:
    """Make a resumed run continue with the samples after its checkpoint's, and note if the data differ."""
    saved, run.resumed = state["config"], read_progress(state)
    samples = run.resumed.samples
    # A checkpoint older than the field: all its batches had one size.
    run.samples_before = run.start * saved["batch_size"] * saved["grad_accum"] if samples is None else samples
    run.source.begin_at(run.start, run.samples_before)
    data = run.config.data
    other = changed_data(run.resumed.data, run.fingerprint, data)
    run.found_other_data = bool(other) or saved["data"] != data
    if other:
        run.found += other
    elif run.fingerprint and saved["seed"] != run.config.seed:
        run.found.append(f"--seed {run.config.seed} is another order of {data}: windows may come twice in this epoch")
