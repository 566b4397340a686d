"""The whole training step, as the trainer runs it: draw the next batch, forward, backward, optimizer.

Each contest is a set of candidates of bench.step.steps, every one in a process of its own (bench.step.lockstep), timed in turn
once their losses and gradients are seen to agree with those of plain PyTorch, eager:

    peers       ours as it comes, and with every kernel of ours, beside plain PyTorch and transformers
    first       65,536 tokens, the first figures that a GPU gives; `tuned`: again with the table that was tuned there
    ablation    PyTorch's forms, one slot's implementation changed at a time, and all; what equal bits cost
    graph       small batches, where launching takes longer than computing: with CUDA graphs, ours and PyTorch's
    recompute   what a block keeps for the backward: less by the compiler's choice, or its inputs alone
"""

from __future__ import annotations

import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import pytest

from bench.device_state import make_state_query
from bench.ops.shapes import CUDA, DEVICE
from bench.step.lockstep import Candidate, Finished, Limits, Lost, contest
from bench.step.steps import REFERENCES, STEPS, TUNED, Kernels, StepShape, agree_in, result
from bench.timing import REPLAY, replay, stage_ends
from fastgpt2.ops import SLOTS

ROUNDS = 10 if CUDA else 3
ROUND_S = 0.4 if CUDA else 0.05
"""About how long a candidate is timed in a round."""
CONTEST_S = 300.0
"""No round starts when a contest has taken so long, or as its stage ends: what was timed until then is kept."""
BUILT_WITHIN = 0.75
"""Of a contest's time: who is built later takes no part, and costs the others no round."""
LIMITS = Limits(build=240.0, round=30.0)
ENDING_S = 15.0
"""Before the stage that it is in is stopped, for a contest's last round, the workers' ends and the results."""
AT_ONCE = min(8, max(1, len(os.sched_getaffinity(0)) // 2)) if CUDA else 1
"""Candidates that are built at the same time: each is traced by one thread, and compiled by processes of its own."""


@dataclass(frozen=True)
class StepContest:
    """One shape, compiled or not, and who takes part."""

    kind: str
    shape: StepShape
    compiled: bool
    names: tuple[str, ...]
    rounds: int = ROUNDS
    at_once: int = AT_ONCE
    eager: bool = True
    """Whether the losses are compared with those of an eager step as well, which takes time and memory."""

    @property
    def title(self) -> str:
        return f"{self.shape.model}-B{self.shape.B}-{'compiled' if self.compiled else 'eager'}-{self.kind}"


@dataclass(frozen=True)
class Held:
    """What a contest came to."""

    outcomes: dict[str, Finished | Lost]
    identity: str
    device_state: dict[str, dict[str, str]]


FIRST = ("ours-triton", "plain", "plain-flash")
PEERS = ("ours-auto", "ours-auto-attn", "ours-triton", "plain", "plain-cudnn", "transformers")
FEWER = ("ours-auto", "ours-triton", "plain", "plain-cudnn", "transformers")
ABLATION = (
    *("ours-torch", "ours-torch-any-order"),
    *(name for name in STEPS if name.startswith(tuple(f"ours-{slot}-" for slot in SLOTS))),
    *("ours-triton", "ours-triton-any-order"),
)
GRAPH = ("ours-auto", "ours-auto-graph", "ours-triton-graph", "plain", "plain-reduce-overhead")
RECOMPUTE = ("ours-auto", "ours-auto-lean", "ours-auto-recompute", "ours-triton-recompute")


def _gpt2(B: int) -> StepShape:
    return StepShape("gpt2", B, "bfloat16")


def _at_64(kind: str, names: Sequence[str], rounds: int = ROUNDS, *, eager: bool = True) -> StepContest:
    """A step of 65,536 tokens, of which a card of 80 GB holds two at once."""
    return StepContest(kind, _gpt2(64), True, tuple(names), rounds, at_once=min(2, AT_ONCE), eager=eager)


# By importance.
ON_A_GPU = [
    _at_64("first", FIRST, rounds=5, eager=False),
    _at_64("tuned", (TUNED, *FIRST[1:]), rounds=5, eager=False),
    _at_64("peers", PEERS),
    StepContest("peers", _gpt2(32), True, (*PEERS, "plain-flash", "plain-efficient")),
    StepContest("ablation", _gpt2(32), True, ABLATION),
    StepContest("graph", _gpt2(1), True, GRAPH),
    StepContest("graph", _gpt2(4), True, GRAPH),
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


@pytest.fixture(scope="session")
def held() -> dict[StepContest, Held]:
    """The contests of this session."""
    return {}


@pytest.mark.benchmark(timer=REPLAY)
@pytest.mark.parametrize(
    ("entered", "name"),
    [pytest.param(c, name, id=f"{c.title}-{name}") for c in (ON_A_GPU if CUDA else ON_A_CPU) for name in c.names],
)
def test_train_step(
    benchmark: Any,
    record: Callable[[dict[str, Any]], None],
    measured_ceilings: Callable[[], dict[str, Any]],
    selected: list[str],
    kernels: Kernels,
    held: dict[StepContest, Held],
    entered: StepContest,
    name: str,
) -> None:
    shape, benchmark.group = entered.shape, f"training step, {entered.title}, {entered.shape.dtype}"
    if reason := STEPS[name].cuda * (not CUDA):
        pytest.skip(reason)
    if not benchmark.enabled:
        (outcome,) = hold(entered, [name], rounds=1, kernels=kernels).outcomes.values()
        if isinstance(outcome, Lost):
            _stop(outcome)
        benchmark.pedantic(lambda: None)
        return
    if entered not in held:
        held[entered] = hold(entered, selected, entered.rounds, kernels)
    outcome = held[entered].outcomes[name]
    if isinstance(outcome, Lost):
        _stop(outcome)
    record(
        {
            "contest": held[entered].identity,
            **result(name, shape, entered.compiled, outcome, DEVICE, measured_ceilings()),
            "device_state": held[entered].device_state,
        }
    )
    replay(benchmark, outcome.timed)


def _stop(lost: Lost) -> NoReturn:
    if lost.failed:
        pytest.fail(f"{lost.reason}\n{lost.output}", pytrace=False)
    pytest.skip(lost.reason)


def hold(entered: StepContest, names: Sequence[str], rounds: int, kernels: Kernels) -> Held:
    """Run a contest with those of its candidates that are named and can run here."""
    names = [name for name in names if CUDA or not STEPS[name].cuda]
    threads = None if CUDA else 1

    def candidate(name: str, compiled: bool) -> Candidate:
        return STEPS[name].on(entered.shape, DEVICE, compiled=compiled, threads=threads, kernels=kernels)

    # Nothing of ours and no compiler is in it. It comes first: it is done with the device while the others compile.
    reference = f"{REFERENCES[0]}, eager"
    eager = {reference: candidate(REFERENCES[0], False)} if entered.eager else {}
    state = make_state_query() if CUDA else dict
    before, now = state(), time.monotonic()
    until = now + CONTEST_S if math.isinf(stage_ends()) else stage_ends() - ENDING_S
    outcomes = contest(
        {**eager, **{name: candidate(name, entered.compiled) for name in names}},
        rounds=rounds,
        seconds=rounds * ROUND_S,
        limits=LIMITS,
        references=(reference, *REFERENCES),
        agree=agree_in(entered.shape),
        at_once=entered.at_once,
        untimed=[reference],
        built_by=now + BUILT_WITHIN * (until - now),
        until=until,
        say=lambda text: print(f"{entered.title}: {text}", file=sys.stderr, flush=True),
    )
    device_state = {"before": before, "after": state()} if before else {}
    return Held(outcomes, f"{entered.title} {uuid.uuid4().hex[:12]}", device_state)
