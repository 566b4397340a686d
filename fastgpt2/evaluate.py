"""The loss on data not trained on: a function for the trainer, `python -m fastgpt2.evaluate` for a run."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fastgpt2.config import ConfigError
from fastgpt2.console import run_command
from fastgpt2.data import DUMMY, ShardTokens, TokenSource, count_tokens, open_data, split, unigram_entropy
from fastgpt2.device import on_its_way, pick_device
from fastgpt2.pretrained import load_run


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: TokenSource,
    batches: int,
    device: torch.device | str,
    stop: Callable[[], bool] | None = None,
) -> float:
    """Mean loss in nats per token over the source's first batches, in evaluation mode (no dropout).

    Always the same batches, so that a run's values can be compared. The host waits for the device once, at the end,
    or with `stop` for each micro-batch but the last; whether the model was training is restored.

    Args:
        model: called as model(inputs, targets), int64 (B, T) each; returns its mean loss, a scalar.
        batches: batches (of grad_accum micro-batches each) to average over, at least 1.
        stop: asked before each micro-batch; once it says True the result is NaN.
    """
    was_training = model.training
    model.eval()
    try:
        losses: list[Tensor] = []
        for tokens in (tokens for step in range(batches) for tokens in source.tokens(step)):
            if stop is not None and stop():
                return math.nan
            losses.append(_loss(model, tokens, device))
            if stop is not None and len(losses) > 1:
                losses[-2].item()  # else the host would be far ahead of the device, and asked too early
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
    inputs, targets = split(on_its_way(tokens, torch.device(device)))
    return model(inputs, targets)


def main(arguments: list[str] | None = None) -> None:
    """`python -m fastgpt2.evaluate --from OUT`: prints the loss, the perplexity and the unigram entropy."""
    parser = argparse.ArgumentParser(
        prog="python -m fastgpt2.evaluate",
        description="The loss of a run's newest checkpoint over a validation split: each window once, in order.",
    )
    parser.add_argument("--from", dest="run", type=Path, required=True, metavar="OUT", help="the run's --out folder")
    parser.add_argument("--data", help="a folder of token shards (default: the one that the run was trained on)")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences at a time (default: 8)")
    parser.add_argument(
        "--batches", type=int, default=0, help="stop after this many batches; 0, the default, takes all"
    )
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda where there is one)")
    args = parser.parse_args(arguments)
    for flag, value, least in (("--batch-size", args.batch_size, 1), ("--batches", args.batches, 0)):
        if value < least:
            raise ConfigError(f"{flag} must be at least {least}, got {value}")
    device = pick_device(args.device)
    model, state = load_run(args.run, device)
    data = args.data or state["config"]["data"]
    if data in DUMMY:
        raise ConfigError(f"{args.run} was trained on dummy tokens: give --data a folder of token shards")
    source = open_data(
        data,
        split="val",
        vocab_size=model.config.vocab_size,
        batch_size=args.batch_size,
        block_size=model.config.block_size,
    )
    assert isinstance(source, ShardTokens)
    loss, tokens = evaluate_split(model, source, device, args.batches)
    print(f"step {state['step']} of {args.run} on the val split of {data}: {tokens:,} tokens")
    print(f"loss       {loss:.4f} nats/token")
    print(f"perplexity {math.exp(min(loss, 700.0)):.2f}")
    print(f"unigram    {_unigram(source):.4f} nats/token, the entropy of the split's own token frequencies")


def _unigram(source: ShardTokens) -> float:
    counts = sum(count_tokens(shard, source.vocab_size) for shard in source.shards)
    return unigram_entropy(np.asarray(counts))


if __name__ == "__main__":
    run_command(main)
