"""The loss on data not trained on: a function for the trainer, `python -m fastgpt2.evaluate` for a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from torch import Tensor, nn

from fastgpt2.checkpoint import load_model
from fastgpt2.config import ConfigError
from fastgpt2.console import run_command
from fastgpt2.data import DUMMY, ShardTokens, TokenSource, count_tokens, open_data, split, unigram_entropy
from fastgpt2.model import GPT


@torch.no_grad()
def evaluate(model: nn.Module, source: TokenSource, batches: int, device: torch.device | str) -> float:
    """Mean loss in nats per token over the source's first batches, in evaluation mode (no dropout).

    Always the same batches, so that a run's values can be compared. The host waits for the device once, at
    the end; whether the model was training is restored.

    Args:
        model: called as model(inputs, targets), int64 (B, T) each; returns its mean loss, a scalar.
        batches: batches (of grad_accum micro-batches each) to average over, at least 1.
    """
    was_training = model.training
    model.eval()
    try:
        micro = (tokens for step in range(batches) for tokens in source.tokens(step))
        losses = [_loss(model, tokens, device) for tokens in micro]
        return torch.stack(losses).double().mean().item()
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate_split(
    model: nn.Module, source: ShardTokens, device: torch.device | str, batches: int = 0
) -> tuple[float, int]:
    """Mean loss in nats per token over a split's windows, each once and in order, and the number of tokens.

    Args:
        batches: stop after this many; 0 takes all.
    """
    was_training = model.training
    model.eval()
    try:
        losses, sizes = [], []
        for tokens in islice(source.sweep(), batches or None):
            losses.append(_loss(model, tokens, device))
            sizes.append(tokens.size(0) * (tokens.size(1) - 1))
        # The last batch may be smaller, and counts by its tokens.
        weights = torch.tensor(sizes, dtype=torch.float64)
        return (torch.stack(losses).double().cpu() @ weights).item() / sum(sizes), sum(sizes)
    finally:
        model.train(was_training)


def _loss(model: nn.Module, tokens: Tensor, device: torch.device | str) -> Tensor:
    inputs, targets = split(tokens.to(device, non_blocking=True))
    return model(inputs, targets)


@dataclass(frozen=True)
class EvaluateConfig:
    """The loss of a run's newest checkpoint over a validation split: each window once, in order."""

    from_: Annotated[Path, tyro.conf.arg(name="from")]
    """The run's --out folder."""
    data: str | None = None
    """A folder of token shards (default: the one that the run was trained on)."""
    batch_size: int = 8
    """Sequences at a time."""
    batches: int = 0
    """Stop after this many batches; 0 takes the whole split."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: cuda where there is one)."""


def main() -> None:
    """`python -m fastgpt2.evaluate --from OUT`: prints the loss, the perplexity and the unigram entropy."""
    args = tyro.cli(EvaluateConfig, prog="python -m fastgpt2.evaluate")
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--batches", args.batches, 0)):
        if value < least:
            raise ConfigError(f"{flag} must be at least {least}, got {value}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    tensors, shape, state = load_model(args.from_)
    model = GPT(shape)
    model.load_state_dict(tensors)
    try:
        model.to(device)
    except (RuntimeError, AssertionError):
        raise ConfigError(f"--device {device} is not available on this machine") from None
    data = args.data or state["config"]["data"]
    if data in DUMMY:
        raise ConfigError(f"{args.from_} was trained on dummy tokens: give --data a folder of token shards")
    source = open_data(
        data,
        split="val",
        vocab_size=model.config.vocab_size,
        batch_size=args.batch_size,
        block_size=model.config.block_size,
    )
    assert isinstance(source, ShardTokens)
    loss, tokens = evaluate_split(model, source, device, args.batches)
    print(f"step {state['step']} of {args.from_} on the val split of {data}: {tokens:,} tokens")
    print(f"loss       {loss:.4f} nats/token")
    print(f"perplexity {math.exp(min(loss, 700.0)):.2f}")
    print(f"unigram    {_unigram(source):.4f} nats/token, the entropy of the split's own token frequencies")


def _unigram(source: ShardTokens) -> float:
    counts = sum(count_tokens(shard, source.vocab_size) for shard in source.shards)
    return unigram_entropy(np.asarray(counts))


if __name__ == "__main__":
    run_command(main)
