"""Benchmark of the whole training step, as the trainer runs it: draw the next batch, forward, backward, optimizer.

Each contest is a set of candidates of bench.step.steps, each in a process of its own, timed in turn once their losses
and gradients agree with those of plain PyTorch, eager:

    peers       ours by default, and with every kernel of ours, beside plain PyTorch and transformers
    first       65,536 tokens, the first figures on a GPU; `tuned`: again with the table that was tuned there, and as a
                CUDA graph
    ablation    PyTorch's forms, one slot's implementation changed at a time, and all; the cost of determinism; the
                compiler's launches grouped
    graph       small batches, where launching takes longer than computing: with CUDA graphs, ours and PyTorch's
    recompute   what the backward recomputes: nothing, elementwise operations, or whole blocks
    stream      the residual stream in float32, its gradient in bfloat16, and both in bfloat16
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import pytest

from bench.contest import CUDA, Contest
from bench.step.steps import AT_ONCE, GROUPED, STEPS, TUNED, Kernels, StepContest, StepShape
from bench.timing import REPLAY
from fastgpt2.slots import SLOTS

FIRST = ("ours-triton", "plain", "plain-flash")
PEERS = ("ours-auto", "ours-auto-attn", "ours-triton", "plain", "plain-cudnn", "transformers")
FEWER = ("ours-auto", "ours-triton", "plain", "plain-cudnn", "transformers")
ABLATION = (
    *("ours-torch", "ours-torch-any-order"),
    *(name for name in STEPS if name.startswith(tuple(f"ours-{slot}-" for slot in SLOTS))),
    *("ours-triton", "ours-triton-any-order", GROUPED),
)
GRAPH = ("ours-auto", "ours-auto-graph", "ours-triton-graph", "plain", "plain-reduce-overhead")
RECOMPUTE = ("ours-auto", "ours-auto-elementwise", "ours-auto-recompute", "ours-triton-recompute")
STREAM = ("ours-triton", "ours-triton-bfloat16-gradient", "ours-triton-bfloat16")


def _gpt2(B: int) -> StepShape:
    return StepShape("gpt2", B, "bfloat16")


def _at_64(kind: str, names: Sequence[str], rounds: int = 10, *, eager: bool = True) -> StepContest:
    """A step of 65,536 tokens; a card of 80 GB holds two at once."""
    return StepContest(kind, _gpt2(64), True, tuple(names), rounds, at_once=min(2, AT_ONCE), eager=eager)


# By importance.
ON_A_GPU = [
    _at_64("first", FIRST, rounds=5, eager=False),
    _at_64("tuned", (TUNED, *FIRST[1:], "ours-triton-graph"), rounds=5, eager=False),
    _at_64("peers", PEERS),
    _at_64("stream", STREAM, rounds=5, eager=False),
    StepContest("peers", _gpt2(32), True, (*PEERS, "plain-flash", "plain-efficient")),
    StepContest("ablation", _gpt2(32), True, ABLATION),
    StepContest("graph", _gpt2(1), True, GRAPH),
    StepContest("graph", _gpt2(4), True, GRAPH),
    _at_64("graph", GRAPH[:2], rounds=5),
    StepContest("peers", _gpt2(32), False, FEWER),
    # A candidate holds 16 bytes a parameter between its rounds: the larger the model, the fewer fit.
    StepContest("peers", StepShape("gpt2-medium", 16, "bfloat16"), True, FEWER),
    StepContest("peers", StepShape("gpt2-large", 8, "bfloat16"), True, ("ours-auto", "plain", "plain-cudnn")),
    StepContest("peers", StepShape("gpt2-xl", 4, "bfloat16"), True, ("ours-auto", "plain-cudnn")),
    StepContest("recompute", _gpt2(32), True, RECOMPUTE),
    *(StepContest("peers", _gpt2(B), True, FEWER) for B in (16, 8, 4, 1)),
    *(StepContest("graph", _gpt2(B), False, GRAPH[:-1]) for B in (1, 4)),
]
_TINY = StepShape("tiny", 8, "float32", n_layer=1)
"""One block: most of a CPU's time goes into compiling."""
ON_A_CPU = [
    StepContest("peers", _TINY, False, FEWER),
    StepContest("peers", _TINY, True, FEWER),
    StepContest("ablation", _TINY, True, ABLATION),
]


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(
    ("entered", "name"),
    [pytest.param(c, name, id=f"{c.title}-{name}") for c in (ON_A_GPU if CUDA else ON_A_CPU) for name in c.names],
)
def test_train_step(compete: Callable[[Contest, str], None], kernels: Kernels, entered: StepContest, name: str) -> None:
    compete(dataclasses.replace(entered, kernels=kernels), name)
