"""A run that is ready to step: `build` makes it from a configuration, and `Run.step` makes one step.

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
from torch import Tensor, nn

from fastgpt2 import __version__, checkpoint
from fastgpt2.backends.attention import CUDNN, sdpa_attention, sdpa_picks
from fastgpt2.config import ConfigError, TrainConfig, preset_name
from fastgpt2.cuda_graph import CapturedStep
from fastgpt2.data import (
    GIVEN,
    DataError,
    ShardTokens,
    TokenSource,
    data_end_of_text,
    data_vocab_size,
    key_of,
    open_data,
    split,
)
from fastgpt2.device import copy_async, keep_freed_memory, notes_on, pick_device, seed_generators
from fastgpt2.fields import flag
from fastgpt2.folder import Claim, check_shared, claim
from fastgpt2.given import GivenTokens, Source, try_ops
from fastgpt2.memory import check_memory
from fastgpt2.model import GPT, saved_bytes
from fastgpt2.ops import Ops, Site, ablation, as_choices, make_ops, name_of
from fastgpt2.parallel import ALONE, Ranks, current
from fastgpt2.record import package_version
from fastgpt2.settings import STREAM_DTYPES, Settled, resolve
from fastgpt2.sharding import compile_model, is_sharded, micro_step, shard_count, spread, whole
from fastgpt2.slots import SLOTS, implementation, is_outside
from fastgpt2.state import RunState
from fastgpt2.state_json import (
    UNKNOWN,
    Progress,
    carried_over,
    changed_data,
    changed_settings,
    config_as_json,
    read_progress,
)


@dataclass(repr=False)
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
    """The progress of the run that this one resumes."""
    found_other_data: bool = False
    """Whether that run had other data: its losses can't be compared with this one's."""
    samples_before: int = 0
    """Sequences that the steps before `start` took from the data."""
    found: list[str] = field(default_factory=list)
    """Notes for the user about the checkpoints that were found."""
    captured: CapturedStep | None = None
    """The step as a CUDA graph; None without --cuda-graph."""
    ranks: Ranks = ALONE
    """The processes that make the step together."""
    wrapped: nn.Module | None = None
    """What a step calls, if it isn't the model itself: the model in DistributedDataParallel."""

    def __post_init__(self) -> None:
        self.model = self.state.model
        self.called = self.model if self.wrapped is None else self.wrapped
        self.parameters = list(self.model.parameters())

    def __repr__(self) -> str:
        parts = [f"{slot}={name}" for slot, name in self.chosen.items()]
        return f"Run({preset_name(self.model.config)} on {self.device}, {self.config.steps} steps, {', '.join(parts)})"

    def autocast(self) -> contextlib.AbstractContextManager:
        """16-bit matmuls over float32 weights; does nothing in float32 and float64."""
        dtype = self.config.torch_dtype
        return torch.autocast(self.device.type, dtype=dtype) if dtype.itemsize == 2 else contextlib.nullcontext()

    def next_tokens(self, step: int) -> Tensor:
        """Copy the tokens (grad_accum, B, T + 1) of a step counted from 0 to the device, without waiting."""
        return copy_async(self.source.tokens(step), self.device)

    @property
    def samples_per_step(self) -> int:
        """Sequences that a step takes, over all processes."""
        return self.config.global_batch

    def samples_done(self, done: int) -> int:
        """Sequences that the first `done` steps took from the data."""
        return self.samples_before + (done - self.start) * self.samples_per_step

    def check_data(self) -> None:
        """Wait until the data is verified: a model trained on damaged data must not be saved.

        Raises:
            DataError: the data is damaged or has changed, as one of the processes found.
        """
        self.ranks.together(self.source.check, DataError)

    def step(self, step: int, tokens: Tensor, *, want_norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """Make one optimizer step. Launches work without waiting for it.

        Args:
            step: counted from 0; decides the learning rate.
            tokens: (grad_accum, B, T + 1).
            want_norm: return the norm of the gradients even when they are not clipped.

        Returns:
            The loss (a scalar on the device, mean over this process's micro-steps) and the norm before clipping of the
            gradients, which are those of all processes.
        """
        self.state.set_learning_rates(step, self.config)
        # Dropout draws from here: other masks in each process, and the same ones in a resumed run.
        seed_generators(self.device, key_of("step", self.config.seed, step, self.ranks.rank, size=8))
        if self.captured is None:
            return self._same_every_step(tokens, want_norm)
        loss, norm = self.captured(self._same_every_step, tokens)
        # The replayed gradients stay where they are until the next replay.
        return loss, self._norm() if norm is None and want_norm else norm

    def _same_every_step(self, tokens: Tensor, want_norm: bool = False) -> tuple[Tensor, Tensor | None]:
        """The part of a step that never changes: what a CUDA graph captures."""
        self.state.zero_grad()
        total = torch.zeros((), device=self.device)
        for number, micro in enumerate(tokens, 1):
            inputs, targets = split(micro)
            with micro_step(self.called, last=number == len(tokens)):
                with self.autocast():
                    loss = self.called(inputs, targets)
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
        return whole(torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None]))

    def epoch(self, done: int) -> float | None:
        """Passes over the data in the first `done` steps; None for dummy tokens, which are endless."""
        return self.samples_done(done) / self.source.windows if isinstance(self.source, ShardTokens) else None

    def progress(self, done: int, loss: float, diverged: bool) -> Progress:
        """What a checkpoint after `done` steps stores besides the tensors."""
        return Progress(self.samples_done(done), self.fingerprint, loss, diverged)

    @property
    def fingerprint(self) -> str | None:
        """Identifies the contents of the data; see Progress.data."""
        val = self.val_source.fingerprint if self.val_source else ""
        return f"{self.source.fingerprint}+{val}".rstrip("+") or None

    def skipped_steps(self, done: int) -> int:
        """How many of `done` steps the gradient scaler skipped: the fused optimizer didn't count those."""
        updates = self.state.updates() if self.state.scaler.is_enabled() else None
        return 0 if updates is None else done - updates


def build(
    config: TrainConfig,
    held: contextlib.ExitStack | None = None,
    *,
    ops: Ops | Mapping[str, Callable[..., Any]] | None = None,
    source: Source | None = None,
) -> Run:
    """Check everything that can be checked, then make the model, the data and the optimizer.

    Args:
        held: holds the lock on --out until it is closed. By default the lock ends when this returns.
        ops: functions by slot, used instead of the configuration's.
        source: gives the training tokens of a step, instead of --data.

    Raises:
        ConfigError: this machine can't do what the configuration asks.
    """
    with contextlib.ExitStack() as until_it_returns:
        return _build(config, held or until_it_returns, as_choices(ops), source)


def _build(
    asked: TrainConfig, held: contextlib.ExitStack, own: dict[str, Callable[..., Any]], own_source: Source | None
) -> Run:
    ranks = current()
    named: dict[str, Any] = {slot: name_of(slot, function) for slot, function in own.items()}
    asked = dataclasses.replace(asked, **named)
    if own_source is not None:
        asked = _with_given_tokens(asked)
    config, device = ranks.together(lambda: settle(asked, ranks))
    ops, chosen, source, val_source = ranks.together(lambda: _choose(config, device, own, own_source, ranks))
    if ranks.world > 1:
        ranks.same(_what_must_agree(config, chosen, source, val_source))
    # The last check, because it makes a folder.
    claimed = Claim(None, [])
    if config.out is not None:
        claimed = ranks.from_first(lambda: claim(config, held))
        check_shared(config.out, ranks)
    notes = [*notes_on(device), *source.notes, *(val_source.notes if val_source else ()), *claimed.notes]
    model_config = config.model_config()
    latest = claimed.latest
    if latest is not None:
        saved = ranks.together(lambda: checkpoint.check_shape(latest, model_config))
        notes += changed_settings(saved, config) + carried_over(saved, config, device, ranks.world)
    torch.manual_seed(config.seed)
    stream, _ = STREAM_DTYPES[config.stream]
    model = GPT(model_config, ops, recompute=config.recompute == "blocks", stream=stream)
    model.to(dtype=torch.promote_types(config.torch_dtype, torch.float32))
    model.train()
    called = spread(model, config, ranks, device)
    if config.compile:
        # torch.compile caches at most eight variants of a function and raises on the ninth: forget earlier runs.
        torch.compiler.reset()
        # On a CPU blocks includes elementwise, as when they were two flags: runs saved then keep their bits.
        elementwise = config.recompute == "elementwise" or (config.recompute == "blocks" and device.type == "cpu")
        compile_model(model, config, ranks, inductor_recomputing_elementwise if elementwise else "inductor")
    state = RunState.begin(model, config)
    wrapped = None if called is model else called
    run = Run(config, device, state, source, val_source, chosen, found=notes, ranks=ranks, wrapped=wrapped)
    if config.cuda_graph:
        run.captured = CapturedStep(device)
    if latest is not None:
        run.start = ranks.together(lambda: checkpoint.restore(latest, state))
        _continue_data(run, saved)
    return run


def _choose(
    config: Settled, device: torch.device, own: dict[str, Callable[..., Any]], own_source: Source | None, ranks: Ranks
) -> tuple[Ops, dict[str, str], TokenSource, TokenSource | None]:
    """What computes the slots and where the tokens come from."""
    model_config = config.model_config()
    _, stream_gradient = STREAM_DTYPES[config.stream]
    ops, chosen = make_ops(
        {slot: own.get(slot, getattr(config, slot)) for slot in SLOTS},
        Site(
            device=device,
            dtype=config.torch_dtype,
            head_dim=model_config.head_dim,
            n_embd=model_config.n_embd,
            dropout=config.dropout,
            tf32=config.dtype == "tf32",
            stream_gradient=stream_gradient,
        ),
    )
    if is_sharded(config, ranks):
        # A block's weights are gone when the next block's norm would use its bias.
        ops = dataclasses.replace(ops, bias_gradients=ops.bias_gradients - {"norm"})
    check_memory(config, device, shard_count(config, ranks))
    if outside := {slot: name for slot, name in chosen.items() if is_outside(name)}:
        try_ops(ops, outside, model_config, device, config.torch_dtype)
    if device.type == "cpu":
        keep_freed_memory()
    return ops, chosen, *_open_sources(config, own_source, ranks)


def _what_must_agree(
    config: Settled, chosen: Mapping[str, str], source: TokenSource, val_source: TokenSource | None
) -> dict[str, Any]:
    """What decides a step, by the name that a message uses."""
    return {
        "fastgpt2's version": __version__,
        "torch's version": torch.__version__,
        "triton's version": package_version("triton"),
        **{flag(name): value for name, value in config_as_json(config).items()},
        **{f"--{slot} auto": name for slot, name in chosen.items()},
        "the training data's fingerprint": source.fingerprint,
        "the validation data's fingerprint": val_source.fingerprint if val_source else "",
    }


def inductor_recomputing_elementwise(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """torch.compile's own backend, allowed to recompute elementwise results that a matmul of the backward pass reads.

    By default it stores them: GELU, LayerNorm's output, weights cast to 16 bits. Recomputing them reduces what a block
    stores for each token and channel in bfloat16 from 36 bytes to 24.
    """
    import torch._functorch.config as partitioning
    from torch._inductor.compile_fx import compile_fx

    with partitioning.patch(ban_recompute_materialized_backward=False):
        return compile_fx(graph, inputs)


def activation_bytes(run: Run, *, recompute: bool) -> int:
    """Bytes that a micro-step's forward pass stores for the backward pass, counted on fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    config, weights = run.config, run.model.state_dict()
    ops = run.model.ops
    if not implementation("attn", run.chosen["attn"]).fake:  # it stores what SDPA without a mask stores
        ops = dataclasses.replace(ops, attn=lambda qkv, dropout_p, documents: sdpa_attention(qkv, dropout_p))
    with FakeTensorMode(), run.device, run.autocast():
        model = GPT(run.model.config, ops, recompute=recompute, stream=run.model.stream)
        # .to() can't convert fake parameters.
        whole_ones = {name: torch.empty(weight.shape, dtype=weight.dtype) for name, weight in weights.items()}
        model.load_state_dict(whole_ones, assign=True)
        tokens = torch.zeros(config.batch_size, config.block_size, dtype=torch.int64)
        return saved_bytes(model, tokens, tokens)


def settle(config: TrainConfig, ranks: Ranks = ALONE) -> tuple[Settled, torch.device]:
    """Settle a configuration for this machine. Returns it and this process's device.

    Raises:
        ConfigError: there is no such device, or it can't compute in the requested precision.
    """
    device = _own_device(config, ranks)
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if device.type == "mps":
        _check_mps(config)
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
        raise ConfigError(f"--compile on a CPU needs a C++ compiler, but {cxx} is not found: install it or set CXX")
    if config.cuda_graph and device.type != "cuda":
        raise ConfigError("--cuda-graph needs a CUDA GPU: leave it out")
    if config.cuda_graph and ranks.world > 1:
        raise ConfigError(f"--cuda-graph needs a single process, there are {ranks.world}: leave it out")
    if config.shard_size is not None and config.parallel != "hsdp":
        raise ConfigError(f"--shard-size is for --parallel hsdp, got --parallel {config.parallel}: leave it out")
    settled = resolve(
        config,
        cuda=device.type == "cuda",
        bf16=bf16,
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else 0,
        world=ranks.world,
        data_vocab_size=data_vocab_size(config.data),
        data_end_of_text=data_end_of_text(config.data),
    )
    shard_count(settled, ranks)
    return settled, device


def _own_device(config: TrainConfig, ranks: Ranks) -> torch.device:
    """The device of this process: on a machine with several processes each has the GPU of its number."""
    device = pick_device(config.device)
    if ranks.world == 1:
        return device
    if device.type == "mps":
        raise ConfigError(f"--device mps trains in a single process, there are {ranks.world}")
    if device.index is not None:
        raise ConfigError(f"--device {config.device} is one GPU for {ranks.world} processes: give --device cuda")
    return device if device.type == "cpu" else torch.device("cuda", ranks.local_rank)


def _check_mps(config: TrainConfig) -> None:
    """Raise ConfigError for what --device mps doesn't take. It is untested, so it takes only the plain path."""
    if config.dtype not in (None, "float32"):
        raise ConfigError(f"--dtype {config.dtype} is not supported with --device mps: use --dtype float32")
    if config.compile:
        raise ConfigError("--compile is not supported with --device mps: leave it out")


@contextlib.contextmanager
def numerics(config: TrainConfig) -> Iterator[None]:
    """Set torch's global numerics during a run: exact float32 products except with --dtype tf32, and deterministic
    algorithms except with --no-deterministic. SDPA's flash and memory-efficient backward passes on CUDA otherwise sum
    in any order, even in PyTorch's warn-only mode."""
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
    """Whether deterministic algorithms keep SDPA without documents from cuDNN, PyTorch's own choice here, at a cost not
    measured on this GPU."""
    config, size = run.config, run.model.config
    asked = (
        implementation("attn", run.chosen["attn"]).picks_kernel and size.end_of_text is None and config.deterministic
    )
    if run.device.type != "cuda" or not asked or ablation(run.device, config.dtype):
        return False
    shape = (1, size.block_size, 3, size.n_head, size.head_dim)
    with numerics(dataclasses.replace(config, deterministic=False)):
        return sdpa_picks(shape, config.torch_dtype, run.device, config.dropout) == CUDNN


def _open_sources(config: Settled, own: Source | None, ranks: Ranks) -> tuple[TokenSource, TokenSource | None]:
    def open_split(name: str, grad_accum: int, sequences: int) -> TokenSource:
        return open_data(
            config.data,
            split=name,
            vocab_size=config.vocab_size,
            batch_size=config.batch_size,
            block_size=config.block_size,
            grad_accum=grad_accum,
            seed=config.seed,
            rank=ranks.rank,
            world=ranks.world,
            sequences=sequences,
        )

    if own is not None:
        shape = (config.grad_accum, config.batch_size, config.block_size + 1)
        return GivenTokens(own, shape, config.vocab_size), None
    train = open_split("train", config.grad_accum, sequences=0)
    return train, open_split("val", 1, config.eval_sequences) if config.eval_every else None


def _with_given_tokens(config: TrainConfig) -> TrainConfig:
    """The configuration of a run whose training tokens are given in Python, as it is saved.

    Raises:
        ConfigError: it also asks for other tokens.
    """
    if config.data not in (TrainConfig.data, GIVEN):
        raise ConfigError(f"source gives the training tokens, and --data {config.data} too: leave one of them out")
    if config.eval_every:
        raise ConfigError(
            "--eval-every needs validation tokens, and a source has none: leave it out, and compute the loss of saved "
            "checkpoints by python -m fastgpt2.evaluate --from RUN --data FOLDER"
        )
    return dataclasses.replace(config, data=GIVEN)


def _continue_data(run: Run, state: dict[str, Any]) -> None:
    """Continue with the samples after the checkpoint's, and add a note if the data differ."""
    saved, run.resumed = state["config"], read_progress(state)
    samples = run.resumed.samples
    # The checkpoint is older than this field: all its batches had one size.
    run.samples_before = run.start * saved["batch_size"] * saved["grad_accum"] if samples is None else samples
    run.source.begin_at(run.start, run.samples_before)
    data = run.config.data
    other = changed_data(run.resumed.data, run.fingerprint, data)
    run.found_other_data = bool(other) or saved["data"] != data
    if other:
        run.found += other
    elif run.fingerprint and saved["seed"] != run.config.seed:
        run.found.append(f"--seed {run.config.seed} shuffles {data} in another order: this epoch may repeat windows")
