"""Draw tokens from a model, one by one, and decode them as they come."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastgpt2.config import ConfigError
from fastgpt2.fields import Natural, NonNegative, check_fields
from fastgpt2.model import GPT
from fastgpt2.tokenizer import Tokenizer


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the model's distribution."""

    temperature: NonNegative = 0.8
    """Below 1 makes likely tokens likelier; 0 always takes the likeliest."""
    top_k: Natural = 50
    """Draw from this many of the likeliest tokens; 0 draws from all."""
    top_p: NonNegative = 1.0
    """Draw from the fewest likeliest tokens that together have this probability; 1 draws from all."""

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0.0 < self.top_p <= 1.0:
            raise ConfigError(f"--top-p must be over 0 and at most 1, got {self.top_p}")


@torch.no_grad()
def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    sampling: Sampling,
    generator: torch.Generator,
    vocab_size: int | None = None,
) -> Iterator[int]:
    """Draw tokens one by one, each conditioned on the last block_size tokens.

    Args:
        model: in evaluation mode.
        prompt: ids to continue, at least one.
        max_new_tokens: how many to draw.
        generator: of the CPU; the same state gives the same tokens.
        vocab_size: draw only ids below it (default: the model's vocabulary).

    Raises:
        ConfigError: the logits are not finite, as after a run diverged.
    """
    device = model.wte.weight.device
    ids = list(prompt)
    for _ in range(max_new_tokens):
        context = torch.tensor([ids[-model.config.block_size :]], device=device)
        # Not model(...): a compiled model would be compiled anew for each length.
        logits = model.forward(context)[0, -1, :vocab_size].cpu()
        if not logits.isfinite().all():
            raise ConfigError("the model's logits are not finite: the run had diverged at this checkpoint")
        ids.append(draw(logits, sampling, generator))
        yield ids[-1]


def draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """An id from softmax(logits / temperature) cut to top_k, then to top_p; logits (V,), on the CPU."""
    logits, ids = logits.double().topk(min(sampling.top_k or len(logits), len(logits)))
    if sampling.temperature == 0.0:
        return int(ids[0])
    # Subtract the largest: dividing by a temperature near 0 would overflow.
    probabilities = ((logits - logits[0]) / sampling.temperature).softmax(0)
    # Compare the mass before a token: this keeps the first token and the one that crosses the bound.
    before = probabilities.cumsum(0) - probabilities
    kept = probabilities[before < sampling.top_p]
    return int(ids[kept.multinomial(1, generator=generator)])


def stream(ids: Iterator[int], tokenizer: Tokenizer) -> Iterator[str]:
    """Decode ids as soon as they form whole characters; an incomplete last character becomes U+FFFD."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in ids:
        yield decoder.decode(tokenizer.decode([token]))
    yield decoder.decode(b"", final=True)
