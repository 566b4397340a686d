"""A contest of one operation: who takes part, what each must get right before it is timed, and what is recorded.

A benchmark is a `Contest`, which says what the work is and how to call a candidate with it, and a test for each
candidate, so that `-k` selects. The contest is run by the first of its tests that pytest comes to, with the candidates
whose tests were selected; each test then shows its own candidate's figures, its failure, or why it can't run.
"""

from __future__ import annotations

import functools
import gc
import sys
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch._functorch.config as functorch_config

from bench import timing
from bench.device_state import make_state_query
from bench.ops.peers import PEERS, Unavailable
from bench.ops.shapes import DEVICE, SECONDS
from bench.roofline import Work, figures
from bench.step.worker import lacked_memory
from bench.timing import Call, Timed, peak_memory
from fastgpt2.config import ConfigError
from fastgpt2.device import synchronize
from fastgpt2.ops import make_ops

Function = Callable[..., Any]


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Args:
        load: gives the function, or raises Unavailable.
        role: "ours", "peer", or "floor", which does a part of the work alone.
    """

    load: Callable[[], Function]
    role: str


class Contest(ABC):
    """One piece of work at one shape, in one dtype and direction, and all who do it."""

    op: str
    """What is computed, as results name it: "mlp forward"."""
    dtype: str
    candidates: Mapping[str, Candidate]
    work: Work
    clock = DEVICE
    """The device whose clock tells the time; a CPU's is the wall clock."""
    retains = False
    """Whether a backward is to be run again and again on what one forward saved, which compiled code must not reuse.
    A forward says so, too, where the backward is timed by itself: then they share their compiled code."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """{"B": ..., "T": ...}"""

    @abstractmethod
    def draw(self) -> Sequence[Any]:
        """The sets of inputs, which all candidates are given in turn."""

    @abstractmethod
    def check(self, name: str, function: Function) -> None:
        """Raise an AssertionError that begins with "not timed: " where a candidate errs more than its budget."""

    @abstractmethod
    def prepare(self, name: str, function: Function, sets: Sequence[Any]) -> Call:
        """What is timed."""

    @property
    def group(self) -> str:
        """What pytest-benchmark's table is headed with."""
        return f"{self.op}, {' '.join(f'{k}={v}' for k, v in self.shape().items())}, {self.dtype}"


def ours(slot: str, name: str, dtype: torch.dtype, head_dim: int = 64) -> Function:
    """The trainer's implementation of a slot, as `fastgpt2.ops` has it."""
    if name == "triton" and DEVICE.type == "cpu":
        raise Unavailable("Triton on a CPU is interpreted: its time would say nothing about the kernel")
    try:
        ops, _ = make_ops({slot: name}, device=DEVICE, dtype=dtype, head_dim=head_dim)
    except ConfigError as error:
        raise Unavailable(str(error)) from None
    return getattr(ops, slot)


def peers(op: str) -> dict[str, Candidate]:
    """All of bench.ops.peers for an operation."""
    return {name: Candidate(peer.load, "peer" if peer.packed else "floor") for name, peer in PEERS[op].items()}


@dataclass(frozen=True)
class Measured:
    """What a contest has shown of a candidate."""

    timed: Timed
    memory: dict[str, Any]
    contest: str
    device_state: dict[str, dict[str, str]]
    deterministic: bool


@dataclass(frozen=True)
class Missing:
    """Why a contest has nothing to show of a candidate: it can't run here, or it failed.

    It holds text alone: an exception would keep the frames it passed through, and with them the device's memory.
    """

    reason: str
    failed: bool

    @classmethod
    def because(cls, error: Exception) -> Missing:
        if isinstance(error, Unavailable):
            return cls(str(error), failed=False)
        if lacked_memory(error):
            return cls(f"out of memory on {torch.cuda.get_device_name()}", failed=False)
        if isinstance(error, AssertionError) and str(error).startswith("not timed"):
            return cls(str(error), failed=True)
        return cls("".join(traceback.format_exception(error)), failed=True)


def run(contest: Contest, names: Sequence[str]) -> dict[str, Measured | Missing]:
    """Check the candidates, then time them against each other; what one can't do is not to lose the others."""
    _compile_anew_for(contest)
    try:
        with compiling(contest):
            return _run(contest, names)
    except Exception as error:  # drawing the inputs: out of memory
        return dict.fromkeys(names, Missing.because(error))
    finally:
        free_memory()


def _run(contest: Contest, names: Sequence[str]) -> dict[str, Measured | Missing]:
    calls: dict[str, Call] = {}
    memory: dict[str, dict[str, Any]] = {}
    outcomes: dict[str, Measured | Missing] = {}
    sets = contest.draw()
    inputs_bytes = _allocated()
    for name in names:
        try:
            calls[name], memory[name] = enter(contest, name, sets, inputs_bytes)
        except Exception as error:
            outcomes[name] = Missing.because(error)
    before = _device_state()
    timed = timing.contest(calls, contest.clock, seconds=SECONDS)
    state = {"before": before, "after": _device_state()} if before else {}
    identity, deterministic = f"{contest.group} {uuid.uuid4().hex[:12]}", torch.are_deterministic_algorithms_enabled()
    for name, figure in timed.items():
        if isinstance(figure, Timed):
            outcomes[name] = Measured(figure, memory[name], identity, state, deterministic)
        else:
            outcomes[name] = Missing.because(figure)
    return outcomes


_right: set[tuple[str, str, str]] = set()


def enter(contest: Contest, name: str, sets: Sequence[Any], inputs_bytes: int) -> tuple[Call, dict[str, Any]]:
    """Load, check, prepare and call a candidate: what is timed, and the memory of a call beside the inputs' own.

    One that was right with a shape in one direction is not compared again in the next.

    Args:
        inputs_bytes: the device's memory with the inputs alone; what is held beyond it belongs to other candidates.
    """
    function = contest.candidates[name].load()
    key = (type(contest).__name__, f"{contest.shape()} {contest.dtype}", name)
    if key not in _right:
        contest.check(name, function)
        _right.add(key)
    others = _allocated() - inputs_bytes
    call = contest.prepare(name, function, sets)
    call(0)  # compiles
    return call, peak_memory(lambda: call(0), DEVICE, others=others)


def compiling(contest: Contest) -> AbstractContextManager:
    """Compiled code may reuse what it saved for the backward, unless that is to be run again."""
    return functorch_config.patch(donated_buffer=False) if contest.retains else nullcontext()


def result(contest: Contest, name: str, measured: Measured, ceilings: Mapping[str, Any] | None) -> dict[str, Any]:
    """A candidate's result, as the records keep it; what the host does is not held against the device's ceilings."""
    ceilings = ceilings if contest.clock == DEVICE else None
    return {
        "contest": measured.contest,
        "op": contest.op,
        "backend": name,
        "role": contest.candidates[name].role,
        "compiled": None,
        "dtype": contest.dtype,
        "shape": contest.shape(),
        "deterministic": measured.deterministic,
        **measured.timed.info(),
        **figures(contest.work, measured.timed.ms_median, contest.dtype, DEVICE, ceilings),
        **measured.memory,
        "device_state": measured.device_state,
    }


_compiled_for: list[str] = []


def _compile_anew_for(contest: Contest) -> None:
    """Forget compiled code, which would only get another variant, unless it is of the same work in both directions."""
    key = f"{type(contest).__name__} {contest.shape()} {contest.dtype} {contest.retains}"
    if _compiled_for != [key]:
        forget_compiled()
    _compiled_for[:] = [key]


def forget_compiled() -> None:
    if "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@functools.cache
def _state_query() -> Callable[[], dict[str, str]]:
    return make_state_query()


def _device_state() -> dict[str, str]:
    return _state_query()() if DEVICE.type == "cuda" else {}


def _allocated() -> int:
    return torch.cuda.memory_allocated(DEVICE) if DEVICE.type == "cuda" else 0


def call_once(contest: Contest, name: str) -> Missing | None:
    """Check a candidate and call it, untimed."""
    _compile_anew_for(contest)
    try:
        with compiling(contest):
            enter(contest, name, contest.draw(), _allocated())
            synchronize(DEVICE)
    except Exception as error:
        return Missing.because(error)
    finally:
        free_memory()
    return None


def backward_of(function: Function, inputs: Sequence[Any], gradients: Any) -> Callable[[], object]:
    """The backward of one forward, to be run again and again."""
    outputs = function(*inputs)
    wanted = [x for x in inputs if torch.is_tensor(x) and x.requires_grad]
    return functools.partial(torch.autograd.grad, outputs, wanted, gradients, retain_graph=True)


def rotate(calls: Sequence[Callable[[], object]]) -> Call:
    """One call after the other."""
    return lambda i: calls[i % len(calls)]()
