"""What to train and how: two dataclasses, the presets, and the checks that need no device.

`TrainConfig` is the command line (a field is a flag, the string below it the help) and the argument of `train`.
`fastgpt2.settings.resolve` fills in the fields left at None.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fastgpt2.fields import (
    Choice,
    ConfigError,
    Count,
    Fraction,
    FunctionChoice,
    Name,
    Natural,
    NonNegative,
    Place,
    Positive,
    check_fields,
)
from fastgpt2.optim import OPTIMIZERS
from fastgpt2.optim.schedules import SCHEDULES
from fastgpt2.slots import SLOTS

Attention = Annotated[str, FunctionChoice(("auto", *SLOTS["attn"]))]
Mlp = Annotated[str, FunctionChoice(("auto", *SLOTS["mlp"]))]
Norm = Annotated[str, FunctionChoice(("auto", *SLOTS["norm"]))]
Loss = Annotated[str, FunctionChoice(("auto", *SLOTS["loss"]))]
Dtype = Literal["float64", "float32", "tf32", "bfloat16", "float16"]
Stream = Literal["full", "bfloat16-gradient", "bfloat16"]
Recompute = Literal["none", "elementwise", "blocks"]
Parallel = Literal["ddp", "fsdp", "hsdp"]
Optimizer = Annotated[str, Choice(tuple(OPTIMIZERS))]
Schedule = Annotated[str, Choice(tuple(SCHEDULES))]

VOCAB_PADDING = 128
"""The stored vocabulary is a multiple of this, so that the head's matmul is aligned."""

FIRST_LINE, LAST_LINE = "# A run's settings, complete with the last line.", "# end"
"""The first and last line of a config.toml. A truncated file may still be valid TOML, with other settings."""


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a GPT-2 (Radford et al. 2019): what decides its parameters and its function."""

    n_layer: Count = 12
    n_head: Count = 12
    n_embd: Count = 768
    block_size: Count = 1024
    vocab_size: Count = 50257
    dropout: Fraction = 0.0
    end_of_text: Natural | None = None
    """The token that starts a document, if positions attend only within their own document; else None."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"--n-embd {self.n_embd} is not divisible by --n-head {self.n_head}: "
                f"each head needs n_embd / n_head channels; try --n-embd {self._nearest_width()}"
            )
        if self.end_of_text is not None and self.end_of_text >= self.vocab_size:
            raise ConfigError(f"--end-of-text must be in [0, {self.vocab_size}), got {self.end_of_text}")

    def _nearest_width(self) -> int:
        return max(1, round(self.n_embd / self.n_head)) * self.n_head

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the stored embedding; the rows past vocab_size are never predicted and never trained."""
        return -(-self.vocab_size // VOCAB_PADDING) * VOCAB_PADDING


PRESETS: dict[str, ModelConfig] = {
    "tiny": ModelConfig(n_layer=2, n_head=2, n_embd=64, block_size=64, vocab_size=256),
    "mini": ModelConfig(n_layer=4, n_head=4, n_embd=128, block_size=128, vocab_size=1024),
    "small": ModelConfig(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=50257),
    "gpt2": ModelConfig(n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": ModelConfig(n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": ModelConfig(n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": ModelConfig(n_layer=48, n_head=25, n_embd=1600),
}
"""The four published sizes (Radford et al. 2019, table 2) and three small ones of ours."""

Preset = Annotated[str, Choice(tuple(PRESETS))]


@dataclass(frozen=True, repr=False)
class TrainConfig:
    """The settings of a run. The defaults train a model that suits this machine, on dummy tokens."""

    # A group of --help starts at the field that names it.
    model: Preset | None = field(default=None, metadata={"group": "model"})
    """Preset (default: gpt2 on a GPU, mini without)."""
    n_layer: Count | None = None
    """Transformer blocks (default: the preset's)."""
    n_head: Count | None = None
    """Attention heads (default: the preset's)."""
    n_embd: Count | None = None
    """Channels (default: the preset's)."""
    block_size: Count | None = None
    """Tokens in a sequence (default: the preset's, which is also the maximum of a published size)."""
    vocab_size: Count | None = None
    """Vocabulary; stored padded to a multiple of 128 (default: the data's, else the preset's)."""
    dropout: Fraction = 0.0
    """Dropout after the embeddings, on the attention weights and on each residual branch (default: 0, none)."""
    document_mask: bool = False
    """Attend only within a position's own document, which GPT-2 did not do; --end-of-text starts a document."""
    end_of_text: Natural | None = None
    """Token that starts a document, for --document-mask (default: the data's)."""

    data: Place = field(default="dummy", metadata={"group": "data"})
    """dummy (uniform random tokens), dummy-fixed (one such batch, repeated), stdlib (the source of Python's standard
    library), a text file, or a folder of token shards from python -m fastgpt2.prepare."""
    seed: Natural = 0
    """Determines the initial weights, the dummy tokens, the order of the data and the dropout."""
    eval_every: Natural = 0
    """Steps between validation losses (default: 0, no validation)."""
    eval_sequences: Count = 160
    """Sequences in a validation loss, the same ones at any batch size."""

    batch_size: Count | None = field(default=None, metadata={"group": "step"})
    """Sequences in a micro-step (default: 8 without a GPU; with one, what its memory holds of 124M, at most 32)."""
    grad_accum: Count | None = None
    """Micro-steps whose gradients are averaged before the optimizer steps (default: what --global-batch needs, else
    1)."""
    global_batch: Count | None = None
    """Sequences in an optimizer step over all processes: --batch-size times --grad-accum times the number of processes.
    A resumed run keeps it unless --grad-accum is given (default: what the three give)."""
    steps: Count | None = None
    """Optimizer steps (default: 200 on a GPU; 600 without one, about a minute)."""
    device: Name | None = None
    """cpu, cuda, cuda:N, or mps for an Apple GPU, untested (default: cuda if there is one, else cpu)."""
    dtype: Dtype | None = None
    """Precision. The 16-bit ones are autocast over float32 weights (default: bfloat16 on a GPU that supports it, else
    float32)."""
    stream: Stream = "full"
    """Precision of the residual stream. full: that of the weights (default); bfloat16-gradient: its gradient alone in
    bfloat16, needs --norm triton; bfloat16: stream and gradient. The last two need --dtype bfloat16 and err more."""
    deterministic: bool = True
    """Use only deterministic algorithms (default). --no-deterministic allows faster ones, and --attn cudnn."""
    compile: bool = False
    """Compile the model with torch.compile."""
    recompute: Recompute | None = None
    """What the backward pass recomputes instead of storing. none; elementwise: GELU, norms and casts, which saves a
    third of the activation memory in bfloat16 and needs --compile; blocks: all but the inputs of each block, which
    saves most and adds a quarter more work (default: elementwise with --compile on a CPU, where a step took 1%
    longer; else none)."""
    cuda_graph: bool = False
    """Replay the whole step (forward, backward, clip, optimizer) as one CUDA graph: for small batches, where launching
    takes longer than computing."""

    parallel: Parallel = field(default="ddp", metadata={"group": "processes"})
    """How the processes that torchrun starts share a run. ddp: each holds the whole model (default); fsdp: weights,
    gradients and optimizer state are sharded over all processes; hsdp: over --shard-size of them, with a copy of the
    model in each such group."""
    shard_size: Count | None = None
    """Processes that share one copy of the model with --parallel hsdp (default: those of one machine)."""
    reshard: bool = True
    """Free a block's gathered weights after its forward pass and gather them again for the backward pass, with
    --parallel fsdp or hsdp (default). --no-reshard keeps them: less traffic, more memory."""
    timeout: Positive = 600.0
    """Seconds to wait for another process before the run ends with an error."""

    optimizer: Optimizer = field(default="adam", metadata={"group": "optimizer"})
    """adam as published, or adamw, which decays the matrices apart from the gradient."""
    lr: NonNegative = 3e-4
    """Peak learning rate."""
    schedule: Schedule = "constant"
    """Learning rate after the warm-up: constant, or falling to a tenth along a cosine or a line."""
    warmup_steps: Natural = 0
    """Steps over which the learning rate rises from 0 (default: 0, no warm-up)."""
    weight_decay: NonNegative = 0.0
    """Weight decay of adamw (default: 0, none). Biases, LayerNorm weights and other vectors are never decayed."""
    beta1: Fraction = 0.9
    """Decay of Adam's mean of the gradients."""
    beta2: Fraction = 0.999
    """Decay of Adam's mean of their squares."""
    grad_clip: NonNegative = 0.0
    """Scale the gradients down to this total norm if it is larger (default: 0, no clipping)."""

    attn: Attention = field(default="auto", metadata={"group": "implementations"})
    """What computes the attention. An implementation asked for by name runs or is an error."""
    mlp: Mlp = "auto"
    """What computes the MLP: torch, or triton with the GELU fused into the matmuls around it."""
    norm: Norm = "auto"
    """What computes residual add and LayerNorm: torch, or triton in one pass."""
    loss: Loss = "auto"
    """What computes head and cross-entropy: torch (all logits at once), or chunked or triton (never all of them)."""

    out: Path | None = field(default=None, metadata={"group": "run"})
    """Folder for config.toml, metrics.jsonl, loss.png and checkpoints (default: a new one under runs/)."""
    resume: bool | Literal["auto"] = False
    """Continue the run in --out from its newest checkpoint with the settings in its config.toml; --config and flags
    override them. --resume auto starts the run if there is no checkpoint yet."""
    save_every: Natural = 1000
    """Steps between checkpoints; the last step also saves one. 0 saves none."""
    keep_checkpoints: Natural = 2
    """Number of newest checkpoints to keep; older ones are deleted. 0 keeps all."""
    log_every: Count = 10
    """Steps between log lines. The host waits for the device only then."""

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ConfigError(f"--warmup-steps {self.warmup_steps} must be below --steps {self.steps}")
        if self.weight_decay and not OPTIMIZERS[self.optimizer].decays:
            able = " or ".join(name for name, known in OPTIMIZERS.items() if known.decays)
            raise ConfigError(
                f"--weight-decay needs --optimizer {able}: {self.optimizer} would mix the decay into the gradient"
            )
        self._check_stream()
        if self.cuda_graph and self.dtype == "float16":
            raise ConfigError("--cuda-graph can't skip a step as float16's gradient scaler does: use --dtype bfloat16")
        if self.cuda_graph and self.recompute == "blocks" and self.dropout:
            raise ConfigError(
                "--recompute blocks with --dropout rewinds the random generator, which --cuda-graph can't: "
                "leave one of them out"
            )
        if self.recompute == "elementwise" and not self.compile:
            raise ConfigError("--recompute elementwise is done by the compiler: add --compile, or use blocks or none")
        if self.resume and self.out is None:
            given = "--resume auto" if self.resume == "auto" else "--resume"
            raise ConfigError(f"{given} needs --out: the folder of the run to continue")

    def _check_stream(self) -> None:
        if self.stream != "full" and self.dtype not in (None, "bfloat16"):
            raise ConfigError(f"--stream {self.stream} needs --dtype bfloat16, got {self.dtype}")
        able = [name for name, known in SLOTS["norm"].items() if known.stream_gradient]
        if self.stream == "bfloat16-gradient" and self.norm not in able:
            needed = f"--norm {' or '.join(able)}, which needs a CUDA GPU"
            raise ConfigError(f"--stream {self.stream} needs {needed}; got --norm {self.norm}")

    def __repr__(self) -> str:
        """The call that makes it, without arguments that have their default."""
        given = ((f, getattr(self, f.name)) for f in dataclasses.fields(self))
        return f"{type(self).__name__}({', '.join(f'{f.name}={value!r}' for f, value in given if value != f.default)})"

    def to_toml(self) -> str:
        """The configuration as `--config` reads it; `resume` and fields at None are left out."""
        rows = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "resume"}
        lines = [f"{name} = {_toml(value)}" for name, value in rows.items() if value is not None]
        return "\n".join([FIRST_LINE, *lines, LAST_LINE, ""])


def preset_name(shape: ModelConfig) -> str:
    """The preset with a model's layers, heads and channels and enough positions, else "custom"."""
    size = (shape.n_layer, shape.n_head, shape.n_embd)
    found = (name for name, p in PRESETS.items() if (p.n_layer, p.n_head, p.n_embd) == size)
    return next((name for name in found if shape.block_size <= PRESETS[name].block_size), "custom")


def _toml(value: Any) -> str:
    if isinstance(value, Path):
        # "~" at the beginning of what is read stands for the home folder.
        value = f"./{value}" if str(value).startswith("~") else str(value)
    # JSON's numbers, booleans and, but for one character, strings are TOML's.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
