"""`python -m fastgpt2.evaluate`: compute a checkpoint's loss over a validation split.

    python -m fastgpt2.evaluate --from runs/NAME

The trainer evaluates with the same function.
"""

from __future__ import annotations

import functools
import io
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt2.config import ConfigError
from fastgpt2.console import run_command
from fastgpt2.corpus import prepare_aloud
from fastgpt2.data import DUMMY, DataError, ShardTokens, TokenSource, open_data, split, unigram_entropy
from fastgpt2.device import copy_async, pick_device
from fastgpt2.fields import Count, Name, Natural
from fastgpt2.flags import read_arguments
from fastgpt2.parallel import ALONE, Ranks
from fastgpt2.pretrained import check_vocabulary, load_run


@dataclass(frozen=True)
class EvaluateConfig:
    """Compute a checkpoint's loss over a validation split, each window once and in order, in the precision of the saved
    weights (float32), whatever precision the run was trained in."""

    from_: Path
    """A run's --out folder, for its newest checkpoint, or a checkpoint (OUT/checkpoints/step-00000200)."""
    step: Natural | None = None
    """Use the run's checkpoint of this step instead of the newest."""
    data: Name | None = None
    """stdlib, a text file or a folder of token shards (default: what the run was trained on)."""
    batch_size: Count = 8
    """Sequences in a batch."""
    batches: Natural = 0
    """Stop after this many batches (default: 0, take all)."""
    device: Name | None = None
    """cpu, cuda, cuda:N, or mps, an Apple GPU (untested) (default: cuda if there is one, else cpu)."""


@torch.no_grad()
def evaluate(
    model: nn.Module,
    source: TokenSource,
    batches: int,
    device: torch.device | str,
    ranks: Ranks = ALONE,
    stop: Callable[[], bool] | None = None,
) -> float:
    """Mean loss in nats per token over the source's first batches, in evaluation mode (no dropout).

    The batches are always the same, so values of a run compare. The ranks take them in turn, and each rank returns the
    same bits. The host waits for the device once, at the end; with `stop`, for each batch but the last. The model's
    training mode is restored.

    Args:
        model: called as model(inputs, targets), int64 (B, T) each; returns its mean loss, a scalar. With --parallel
            fsdp the ranks call it together.
        source: gives each rank the same batches (see ShardTokens, `sequences`).
        batches: batches (of grad_accum micro-batches each) to average over, at least 1.
        stop: called before each batch; once it returns True on any rank the result is NaN.

    Raises:
        DataError: the data has become unreadable or is damaged, on any rank.
    """
    was_training = model.training
    model.eval()
    try:
        losses: list[Tensor] = []
        for begin in range(0, batches, ranks.world):
            # A rank without a batch repeats the last one, because the ranks call the model together.
            number = min(begin + ranks.rank, batches - 1)
            tokens = ranks.together(functools.partial(source.tokens, number), DataError)
            if stop is not None and ranks.any(stop()):
                return math.nan
            losses.append(torch.stack([_loss(model, micro, device) for micro in tokens]))
            if stop is not None and len(losses) > 1:
                losses[-2].tolist()  # keep the host from running far ahead of the device and calling stop too early
        ranks.together(source.check, DataError)
        by_rank = ranks.gather(torch.stack(losses).tolist())
        in_order = [loss for turn in zip(*by_rank, strict=True) for loss in turn][:batches]
        return torch.tensor(in_order, dtype=torch.float64).mean().item()
    finally:
        model.train(was_training)


@torch.no_grad()
def evaluate_split(
    model: nn.Module, source: ShardTokens, device: torch.device | str, batches: int = 0
) -> tuple[float, int]:
    """Mean loss in nats per token over a split's windows, each once and in order, and the number of tokens.

    Args:
        batches: stop after this many; 0 takes all.

    Raises:
        DataError: the data has become unreadable or is damaged.
    """
    was_training = model.training
    model.eval()
    try:
        losses, sizes = [], []
        for tokens in islice(source.sweep(), batches or None):
            losses.append(_loss(model, tokens, device))
            sizes.append(tokens.size(0) * (tokens.size(1) - 1))
        source.check()
        # Weight by tokens: the last batch may be smaller.
        weights = torch.tensor(sizes, dtype=torch.float64)
        return (torch.stack(losses).cpu().double() @ weights).item() / sum(sizes), sum(sizes)
    finally:
        model.train(was_training)


def _loss(model: nn.Module, tokens: Tensor, device: torch.device | str) -> Tensor:
    inputs, targets = split(copy_async(tokens, torch.device(device)))
    return model(inputs, targets)


def main(arguments: list[str] | None = None) -> None:
    """`python -m fastgpt2.evaluate --from OUT`: prints the loss, the perplexity and the unigram entropy."""
    config = read_arguments(EvaluateConfig, "fastgpt2.evaluate", arguments)
    device = pick_device(config.device)
    model, state = load_run(config.from_, device, config.step)
    data = config.data or state["config"]["data"]
    if data in DUMMY:
        raise ConfigError(
            f"{config.from_} was trained on dummy tokens: give --data stdlib, a text file or a folder of token shards"
        )
    prepare_aloud(data)
    source = open_data(
        data,
        split="val",
        vocab_size=model.config.vocab_size,
        batch_size=config.batch_size,
        block_size=model.config.block_size,
    )
    assert isinstance(source, ShardTokens)
    if config.data:  # the run's own data may have a smaller vocabulary than the model, as --vocab-size asked
        check_vocabulary(f"the data in {data}", source.vocab_size, model.config)
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    try:
        loss, tokens = evaluate_split(model, source, device, config.batches)
        unigram = unigram_entropy(source.count_tokens())
    except DataError as error:
        raise ConfigError(str(error)) from None
    if not math.isfinite(loss):
        raise ConfigError(f"the loss is {loss}: the run had diverged at this checkpoint")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a path may have characters that the terminal can't show
    print(f"step {state['step']} of {config.from_} on the val split of {data}: {tokens:,} tokens")
    print(f"loss       {loss:.4f} nats/token")
    print(f"perplexity {_perplexity(loss)}")
    print(f"unigram    {unigram:.4f} nats/token, the entropy of the split's own token frequencies")


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):.2f}" if loss < 20 else f"e^{loss:.2f}"


if __name__ == "__main__":
    run_command(main)
