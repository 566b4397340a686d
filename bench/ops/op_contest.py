"""Contests of one operation, in one process: what each candidate must get right before it is timed, and how.

Every candidate is compared with float64 first, in the precision and with the size that is timed: nothing wrong is
timed. Inputs require gradients, so that the forward also saves what the backward needs. PyTorch's global numerics are
at their defaults, so its kernels may add in any order, which is fastest; `deterministic` records it.
"""

from __future__ import annotations

import functools
import sys
from abc import abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch import Tensor

from bench import timing
from bench.contest import (
    CUDA,
    DEVICE,
    Candidate,
    Contest,
    Function,
    Measured,
    Missing,
    Unavailable,
    free_memory,
)
from bench.ops.budget import Yardstick
from bench.ops.peers import PEERS, compiled
from bench.roofline import Work
from bench.timing import Call, Timed, input_sets, peak_memory
from fastgpt2.config import ConfigError
from fastgpt2.ops import Site, make_ops
from fastgpt2.slots import REFERENCE, SLOTS, implementation, is_outside

SECONDS = 0.2 if CUDA else 0.1
"""About how long a candidate is timed in all rounds of a contest."""
ONCE = "what it is given, gives and keeps, once"
"""What the bytes of a forward or backward count."""


class OpContest(Contest):
    """Candidates that are called in this process."""

    compiled = None
    retains = False
    """Whether one forward's saved tensors are used by many backwards, which compiled code must not reuse then. A
    forward that is timed by itself says so too: forward and backward then share their compiled code."""

    @abstractmethod
    def draw(self) -> Sequence[Any]:
        """The sets of inputs, which each candidate is given in turn."""

    @abstractmethod
    def check(self, name: str, function: Function) -> None:
        """Raise an AssertionError that begins with "not timed: " if a candidate's error exceeds its budget."""

    @abstractmethod
    def prepare(self, name: str, function: Function, sets: Sequence[Any]) -> Call:
        """What is timed."""

    def run(self, names: Sequence[str]) -> dict[str, Measured | Missing]:
        _compile_anew_for(self)
        try:
            with self._compiling():
                return self._run(names)
        except Exception as error:  # drawing the inputs: out of memory
            return dict.fromkeys(names, Missing.because(error))
        finally:
            free_memory()

    def _run(self, names: Sequence[str]) -> dict[str, Measured | Missing]:
        calls: dict[str, Call] = {}
        facts: dict[str, dict[str, Any]] = {}
        outcomes: dict[str, Measured | Missing] = {}
        sets = self.draw()
        inputs_bytes = _allocated()
        for name in names:
            try:
                calls[name], facts[name] = self._enter(name, sets, inputs_bytes)
            except Exception as error:
                outcomes[name] = Missing.because(error)
        for name, timed in timing.contest(calls, self.clock, seconds=SECONDS).items():
            outcomes[name] = Measured(timed, facts[name]) if isinstance(timed, Timed) else Missing.because(timed)
        return outcomes

    def _enter(self, name: str, sets: Sequence[Any], inputs_bytes: int) -> tuple[Call, dict[str, Any]]:
        """Load, check, prepare and call a candidate; returns what is timed, and facts for its result.

        A candidate that was right at a shape in one direction is not compared again in the next.

        Args:
            inputs_bytes: the inputs' share of the device's memory; what is held beyond it belongs to other candidates.
        """
        function = self.candidates[name].loaded()
        key = (type(self).__name__, f"{self.shape()} {self.dtype}", name)
        if key not in _right:
            self.check(name, function)
            _right.add(key)
        others = _allocated() - inputs_bytes
        call = self.prepare(name, function, sets)
        call(0)  # compiles
        memory = peak_memory(lambda: call(0), DEVICE, others=others)
        return call, {"deterministic": torch.are_deterministic_algorithms_enabled(), **memory}

    def _compiling(self) -> AbstractContextManager:
        return functorch_config.patch(donated_buffer=False) if self.retains else nullcontext()


_right: set[tuple[str, str, str]] = set()
_compiled_for: list[str] = []


def _compile_anew_for(contest: OpContest) -> None:
    """Forget compiled code, or it would only gain a variant, unless this is the same work in the other direction."""
    key = f"{type(contest).__name__} {contest.shape()} {contest.dtype} {contest.retains}"
    if _compiled_for != [key] and "torch._dynamo" in sys.modules:  # importing it takes seconds
        torch.compiler.reset()
    _compiled_for[:] = [key]


def _allocated() -> int:
    return torch.cuda.memory_allocated(DEVICE) if CUDA else 0


# ------------------------------------------------------------------------------------------ a slot's operation

Drawn = tuple[list[Tensor], Any]
"""The inputs, of which those that are differentiated require gradients, and the gradients of the outputs."""


class SlotContest(OpContest):
    """A slot's implementations, those named from outside, its plain form compiled, and the slot's PEERS.

    Args:
        size: a dataclass of the shape and the dtype, with a method work(direction).
        direction: "forward" and "backward" are timed apart, "forward+backward" and "training" together; "evaluation"
            records no gradients.
        outside: "module:function".
    """

    slot: str
    title: str
    """The operation's name in results."""
    names: Sequence[str]
    """The names of the outputs and of the inputs' gradients."""

    def __init__(self, size: Any, direction: str, outside: Sequence[str] = ()) -> None:
        self.size, self.direction = size, direction
        self.op, self.dtype = f"{self.title} {direction}", str(size.dtype).removeprefix("torch.")
        self.work: Work = size.work(direction)
        self.retains = direction in ("forward", "backward")
        self.plain = REFERENCE[self.slot]
        self.candidates = {}
        for name in (*SLOTS[self.slot], *outside):
            role = "ours" if is_outside(name) or implementation(self.slot, name).ours else "peer"
            self.candidates[name] = Candidate(role, functools.partial(self.load, name))
        self.candidates[f"{self.plain}-compiled"] = Candidate("peer", lambda: compiled(self.load(self.plain)))
        self.candidates |= PEERS.get(self.slot, {})

    def load(self, name: str) -> Function:
        """The trainer's implementation of the slot, or "module:function" from outside."""
        if implementation(self.slot, name).interpreted and not CUDA:
            raise Unavailable("Triton on a CPU is interpreted: its time would say nothing about the kernel")
        head_dim = getattr(self.size, "D", 64)
        try:
            ops, _ = make_ops({self.slot: name}, Site(device=DEVICE, dtype=self.size.dtype, head_dim=head_dim))
        except ConfigError as error:
            raise Unavailable(str(error)) from None
        return getattr(ops, self.slot)

    def shape(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self.size).items() if name != "dtype"}

    @abstractmethod
    def draw_set(self, seed: int) -> Drawn: ...

    def draw(self) -> Sequence[Drawn]:
        first = self.draw_set(0)
        given = sum(tensor.nbytes for tensor in first[0])
        return [first, *(self.draw_set(seed) for seed in range(1, input_sets(DEVICE, given)))]

    def prepare(self, name: str, function: Function, sets: Sequence[Drawn]) -> Call:
        prepare = PREPARE[self.direction]
        calls = [prepare(function, inputs, gradients) for inputs, gradients in sets]
        return lambda i: calls[i % len(calls)]()

    @functools.cached_property
    def _yardstick(self) -> Yardstick:
        plain = self.load(self.plain)
        return Yardstick(
            self.names,
            lambda seed: self.results(plain, seed, plain_in=torch.float64),
            lambda seed: self.results(plain, seed, plain_in=self.size.dtype),
        )

    def results(self, function: Function, seed: int = 0, *, plain_in: torch.dtype | None = None) -> Sequence[Tensor]:
        """Outputs and gradients; of the plain form in a precision of its own."""
        inputs, gradients = self.draw_set(seed)
        if plain_in == torch.float64:
            inputs = [in_float64(x) for x in inputs]
            gradients = [in_float64(g) for g in gradients]
        return differentiate(function, inputs, gradients)

    def check(self, name: str, function: Function) -> None:
        self._yardstick.check(self.results(function))


def in_float64(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x


def differentiate(function: Function, inputs: Sequence[Tensor], gradients: Any) -> tuple[Tensor, ...]:
    """The outputs, and the gradients of the inputs that require one."""
    outputs = function(*inputs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = [x for x in inputs if x.requires_grad]
    return (*(y.detach() for y in outputs), *torch.autograd.grad(outputs, wanted, gradients))


def _backward(function: Function, inputs: Sequence[Tensor], gradients: Any) -> Callable[[], object]:
    """The backward of one forward, again and again."""
    outputs = function(*inputs)
    wanted = [x for x in inputs if x.requires_grad]
    return functools.partial(torch.autograd.grad, outputs, wanted, gradients, retain_graph=True)


PREPARE: dict[str, Callable[[Function, Sequence[Tensor], Any], Callable[[], object]]] = {
    "forward": lambda function, inputs, gradients: functools.partial(function, *inputs),
    "backward": _backward,
    "forward+backward": lambda *given: functools.partial(differentiate, *given),
    "training": lambda *given: functools.partial(differentiate, *given),
    "evaluation": lambda function, inputs, gradients: functools.partial(torch.no_grad()(function), *inputs),
}
