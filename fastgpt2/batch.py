"""The global batch: the sequences of an optimizer step over all processes, and which of them each process takes.

A step has grad_accum micro-steps. In each, every process takes batch_size sequences.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastgpt2.fields import ConfigError

NEAR = 1024
"""How far an error looks for a value that would work."""


class Batch(NamedTuple):
    """How a step's sequences are divided."""

    batch_size: int
    grad_accum: int
    global_batch: int


def settle_batch(
    batch_size: int | None,
    grad_accum: int | None,
    global_batch: int | None,
    *,
    world: int,
    default: int,
) -> Batch:
    """Settle what is None of the three.

    Args:
        world: how many processes share a step.
        default: the batch size if nothing decides it. With a global batch, the largest one up to it that divides.

    Raises:
        ConfigError: the global batch can't be divided so. The message says which values can.
    """
    if global_batch is None:
        batch_size = default if batch_size is None else batch_size
        grad_accum = 1 if grad_accum is None else grad_accum
        return Batch(batch_size, grad_accum, batch_size * grad_accum * world)
    if global_batch % world:
        raise ConfigError(
            f"--global-batch {global_batch} is not a multiple of the {world} processes: "
            f"start {_or(_divisors_near(global_batch, world))}, or give {_multiples_near(global_batch, world)}"
        )
    share = global_batch // world
    if batch_size is None:
        if grad_accum is None:
            batch_size = largest_divisor(share, default)
        else:
            batch_size = _divided(share, "--grad-accum", grad_accum, world)
    micro_steps = _divided(share, "--batch-size", batch_size, world)
    if grad_accum is not None and grad_accum != micro_steps:
        found = batch_size * grad_accum * world
        raise ConfigError(
            f"--batch-size {batch_size} x --grad-accum {grad_accum}{_times(world)} is {found}, not "
            f"--global-batch {global_batch}: give --grad-accum {micro_steps}, or leave one of the three out"
        )
    return Batch(batch_size, micro_steps, global_batch)


def with_global_batch(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved run with its global batch. Older versions had one process, and saved no global batch."""
    settings = dict(saved)
    if "global_batch" not in saved and "batch_size" in saved and "grad_accum" in saved:
        settings["global_batch"] = saved["batch_size"] * saved["grad_accum"]
    return settings


def resumed(saved: Mapping[str, Any], asked: Mapping[str, Any], world: int) -> dict[str, Any]:
    """The settings of a saved run that apply when it resumes.

    It keeps its global batch, and its batch size where that divides; else a smaller one. --grad-accum without
    --global-batch asks for another global batch.

    Args:
        saved: settings by name.
        asked: those that are asked for now. They replace the saved ones.
        world: how many processes share a step now.
    """
    settings = with_global_batch(saved)
    settings.pop("grad_accum", None)  # it follows
    if "grad_accum" in asked:
        settings.pop("batch_size" if "global_batch" in asked else "global_batch", None)
    elif "batch_size" in settings and "batch_size" not in asked:
        total = asked.get("global_batch", settings.get("global_batch", 0))
        if total and total % world == 0:
            settings["batch_size"] = largest_divisor(total // world, settings["batch_size"])
    return settings


class Rows:
    """The rows (sequences) that a process takes, numbered over all processes and steps of a run.

    A step takes the next rows: by micro-step, then process, then place in the batch. So the rows of a step don't depend
    on how many processes share it.
    """

    def __init__(self, batch_size: int, grad_accum: int = 1, rank: int = 0, world: int = 1) -> None:
        self.batch_size, self.grad_accum, self.rank, self.world = batch_size, grad_accum, rank, world
        self._step, self._samples = 0, 0

    def begin_at(self, step: int, samples: int) -> None:
        """Start at `step` after `samples` rows."""
        self._step, self._samples = step, samples

    def first(self, step: int) -> int:
        """The first row of a step over all processes. Python integers don't overflow."""
        return self._samples + (step - self._step) * self.grad_accum * self.world * self.batch_size

    @functools.cached_property
    def places(self) -> np.ndarray:
        """This process's rows, counted from the first of a step: int64 (grad_accum * batch_size,)."""
        micro = np.arange(self.grad_accum)[:, None] * self.world + self.rank
        return (micro * self.batch_size + np.arange(self.batch_size)).ravel()


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of a number that is at most `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)


def _divided(share: int, flag: str, by: int, world: int) -> int:
    """A process's share of the global batch over `by`, the value of a flag.

    Raises:
        ConfigError: it isn't a whole number.
    """
    if share % by:
        ways = [_multiples_near(share * world, by * world)]
        if sizes := _divisors_near(share, by):
            ways.insert(0, f"{flag} {_or(sizes)}")
        raise ConfigError(
            f"--global-batch {share * world} is not a multiple of {flag} {by}{_times(world)}: give {', or '.join(ways)}"
        )
    return share // by


def _divisors_near(number: int, about: int) -> list[int]:
    """The divisors next to one that isn't, if any is near."""
    below = range(min(number, about), max(0, about - NEAR), -1)
    above = range(about, min(number, about + NEAR) + 1)
    found = [next((n for n in side if number % n == 0), None) for side in (below, above)]
    return [n for n in found if n is not None]


def _multiples_near(number: int, of: int) -> str:
    below = number // of * of
    return f"--global-batch {_or([n for n in (below, below + of) if n])}"


def _or(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


def _times(world: int) -> str:
    return f" x {world} processes" if world > 1 else ""
