"""What a TrainConfig became on a machine: the preset, the data and the device have settled what it left open."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from fastgpt2.batch import settle_batch
from fastgpt2.config import PRESETS, ConfigError, Dtype, ModelConfig, Recompute, Stream, TrainConfig
from fastgpt2.fields import Count

TORCH_DTYPE = {
    "float64": torch.float64,
    "float32": torch.float32,
    "tf32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
STREAM_DTYPES: dict[Stream, tuple[torch.dtype | None, torch.dtype | None]] = {
    "full": (None, None),
    "bfloat16-gradient": (None, torch.bfloat16),
    "bfloat16": (torch.bfloat16, None),
}
"""Of the residual stream and of its gradient. None: the embeddings', and the stream's."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Settled(TrainConfig):
    """A configuration that trains the same run on any machine: no field that decides the computation is None.

    `model` and `device` stay as they were asked, None included: the shape decides in place of the preset, and a run may
    be resumed on another device. Made by `resolve`.
    """

    n_layer: Count
    n_head: Count
    n_embd: Count
    block_size: Count
    vocab_size: Count
    batch_size: Count
    grad_accum: Count
    global_batch: Count
    steps: Count
    dtype: Dtype
    recompute: Recompute

    def model_config(self) -> ModelConfig:
        """The shape of the model."""
        shape = {f.name: getattr(self, f.name) for f in dataclasses.fields(ModelConfig) if f.name != "end_of_text"}
        return ModelConfig(**shape, end_of_text=self.end_of_text if self.document_mask else None)

    def to_toml(self) -> str:
        """See TrainConfig.to_toml. Without grad_accum, which follows from the global batch and the processes."""
        asked = {f.name: getattr(self, f.name) for f in dataclasses.fields(TrainConfig)}
        return TrainConfig(**asked | {"grad_accum": None}).to_toml()

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type of the matmuls' operands."""
        return TORCH_DTYPE[self.dtype]


def resolve(
    config: TrainConfig,
    *,
    cuda: bool,
    bf16: bool = True,
    memory_bytes: int = 0,
    world: int = 1,
    data_vocab_size: int | None = None,
    data_end_of_text: int | None = None,
) -> Settled:
    """Fill every field left at None that decides what is computed; `model` and `device` stay as they were asked.

    Args:
        cuda: whether the run is on a CUDA device.
        bf16: whether that device computes in bfloat16.
        memory_bytes: its memory, which decides the batch size that nothing else decides.
        world: how many processes train together.
        data_vocab_size: the vocabulary of the token shards, None for dummy data.
        data_end_of_text: their end-of-text token, None if it isn't known.

    Raises:
        ConfigError: no such preset, a block_size over the published model's positions, a vocabulary too small for the
            data, a document mask without the token that opens a document, or a global batch that can't be divided.
    """
    preset = _preset(config, cuda)
    settled = {
        **{name: getattr(preset, name) for name in ("n_layer", "n_head", "n_embd", "block_size")},
        "vocab_size": preset.vocab_size if data_vocab_size is None else data_vocab_size,
        "steps": 200 if cuda else 600,
        "dtype": "bfloat16" if cuda and bf16 else "float32",
        "recompute": "elementwise" if config.compile and not cuda else "none",
        "end_of_text": data_end_of_text if config.document_mask else None,
    }
    asked: dict[str, Any] = {f.name: getattr(config, f.name) for f in dataclasses.fields(TrainConfig)}
    values = asked | {name: value for name, value in settled.items() if asked[name] is None}
    values |= settle_batch(
        config.batch_size,
        config.grad_accum,
        config.global_batch,
        world=world,
        default=_sequences_that_fit(memory_bytes) if cuda else 8,
    )._asdict()
    if data_vocab_size is not None and values["vocab_size"] < data_vocab_size:
        raise ConfigError(
            f"--vocab-size {values['vocab_size']} is smaller than the vocabulary of --data {config.data}: "
            f"{data_vocab_size}"
        )
    if config.document_mask and values["end_of_text"] is None:
        raise ConfigError(
            f"--document-mask needs the token that opens a document, and --data {config.data} doesn't name one: "
            "give it by --end-of-text"
        )
    return Settled(**values)


def _preset(config: TrainConfig, cuda: bool) -> ModelConfig:
    name = config.model or ("gpt2" if cuda else "mini")
    positions = PRESETS[name].block_size
    if config.block_size is not None and config.model is not None and config.block_size > positions:
        raise ConfigError(
            f"--block-size {config.block_size} is over the {positions} positions of {name}; "
            f"for a longer context leave --model out and give the size by flags"
        )
    return PRESETS[name]


def _sequences_that_fit(memory_bytes: int) -> int:
    """The largest power of two up to 32 whose sequences fit at 1.25 GiB each, after 3 GiB for what comes once.

    GPT-2 124M at 1024 tokens stores 0.3 GiB of activations in bfloat16 (counted); the rest is for the backward's
    temporaries and a chunk of logits. The 3 GiB are weights, gradients and Adam's averages. This is an estimate with
    room for the plain loss, not a measurement.
    """
    fits = (memory_bytes / 2**30 - 3) / 1.25
    return next((n for n in (32, 16, 8, 4, 2) if n <= fits), 1)
