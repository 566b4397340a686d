"""What every contest shares: its candidates, what becomes of each, and the result of those that were timed.

A benchmark is a `Contest`, which knows the work and who does it, and a test for each candidate, so that `-k` selects.
The first of its tests runs the contest with the candidates whose tests were selected; each test then shows its own
candidate's figures, its failure, or why it can't run. Operations are timed in one process (bench.ops.op_contest),
training steps in one process a candidate (bench.step.lockstep); both take turns by bench.timing.take_turns.
"""

from __future__ import annotations

import functools
import gc
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import torch

from bench.device_state import make_state_query
from bench.result import Result
from bench.roofline import Work, figures
from bench.timing import Timed
from fastgpt2.config import ConfigError

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda:0" if CUDA else "cpu")

Function = Callable[..., Any]
Values = list[dict[str, float]]

NO_KERNEL = ("No available kernel", "No viable backend")
"""Texts of SDPA's errors when the kernel that it is restricted to can't take the inputs."""
LACKED_MEMORY = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED")
"""Texts of errors of PyTorch, its compiler and its libraries when the device is full."""


class Unavailable(ConfigError):
    """A candidate can't run here; the message says why in one line."""


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Args:
        role: "ours", "peer", or "floor", which does only a part of the work.
        load: returns the function to time, or raises Unavailable. A string "module:function" is loaded in a process of
            its own and returns a bench.step.worker.Contestant.
        arguments: of `load`, as JSON can hold them.
        environment: of the process, beside the parent's variables.
        needs_gpu: why it can't run without a CUDA GPU; "" if it can.
    """

    role: str
    load: Callable[..., Function] | str
    arguments: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    needs_gpu: str = ""

    def loaded(self) -> Any:
        """What `load` returns, in this process."""
        load = imported(self.load) if isinstance(self.load, str) else self.load
        return load(**self.arguments)


def imported(name: str) -> Function:
    """The function "module:function"."""
    module, _, function = name.partition(":")
    return getattr(import_module(module), function)


@dataclass(frozen=True)
class Measured:
    """A candidate that was timed.

    Args:
        facts: more fields of its Result.
        values: what each of the first calls returned, by name.
        versions: environment of its process.
        seconds_to_first: from the start of the process to the end of the first call, while others may have been built.
    """

    timed: Timed
    facts: dict[str, Any]
    values: Values = field(default_factory=list)
    versions: dict[str, Any] = field(default_factory=dict)
    seconds_to_first: float = 0.0


@dataclass(frozen=True)
class Missing:
    """A candidate that was not timed. It holds text only: an exception's frames would keep the device's memory.

    Args:
        failed: it crashed, hung or is wrong. Otherwise it can't run here, needs more memory, or time ran out.
        output: end of what its process printed.
    """

    reason: str
    failed: bool
    output: str = ""

    @classmethod
    def because(cls, error: Exception) -> Missing:
        if isinstance(error, Unavailable):
            return cls(str(error), failed=False)
        if lacked_memory(error):
            return cls(f"out of memory on {torch.cuda.get_device_name()}", failed=False)
        if isinstance(error, AssertionError) and str(error).startswith("not timed"):
            return cls(str(error), failed=True)
        return cls("".join(traceback.format_exception(error)), failed=True)


def lacked_memory(error: Exception) -> bool:
    """Whether the device's memory was too small. The compiler wraps errors in its own, text included."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or any(sign in str(error) for sign in LACKED_MEMORY)


class Contest(ABC):
    """One piece of work at one shape and in one dtype, and all who do it."""

    op: str
    """What is computed, as results name it: "mlp forward"."""
    dtype: str
    candidates: dict[str, Candidate]
    work: Work
    more_flops: dict[str, float] | None = None
    """FLOPs by other formulas, for MFU by each."""
    compiled: bool | None
    clock = DEVICE
    """The device that does the work."""

    @abstractmethod
    def shape(self) -> dict[str, Any]:
        """{"B": ..., "T": ...}"""

    @abstractmethod
    def run(self, names: Sequence[str]) -> dict[str, Measured | Missing]:
        """Check the candidates, then time them against each other. One that fails doesn't cost the others."""

    @property
    def group(self) -> str:
        """Title of pytest-benchmark's table."""
        return f"{self.op}, {' '.join(f'{k}={v}' for k, v in self.shape().items())}, {self.dtype}"

    def result(self, name: str, measured: Measured, ceilings: Mapping[str, Any] | None = None, **more: Any) -> Result:
        """A candidate's result. The host's work is not compared with the device's ceilings."""
        timed, ceilings = measured.timed, ceilings if self.clock == DEVICE else None
        return Result(
            group=self.group,
            op=self.op,
            backend=name,
            role=self.candidates[name].role,
            compiled=self.compiled,
            dtype=self.dtype,
            shape=self.shape(),
            **timed.info(),
            **figures(self.work, timed.ms_median, self.dtype, self.clock, ceilings, self.more_flops),
            **measured.facts,
            **more,
        )


def hold(contest: Contest, names: Sequence[str]) -> tuple[dict[str, Measured | Missing], dict[str, Any]]:
    """Run a contest; returns the outcomes, and what all its results share: `contest` and `device_state`."""
    before = device_state()
    outcomes = contest.run(names)
    state = {"before": before, "after": device_state()} if before else {}
    return outcomes, {"contest": f"{contest.group} {uuid.uuid4().hex[:12]}", "device_state": state}


_state_query = functools.cache(make_state_query)


def device_state() -> dict[str, str]:
    return _state_query()() if CUDA else {}


def free_memory() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
