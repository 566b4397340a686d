"""Agree on a name that no earlier attempt to start this run has used.

torchrun keeps one store over its restarts. After a worker has died the store still holds the addresses of the dead
processes, and a restarted worker that reads one of them hangs or fails (pytorch #135712). The count of restarts can't
tell attempts apart, since each machine's agent counts its own. Therefore the processes agree on a fresh name by a
handshake, and everything else that they store lies behind it.
"""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING

from fastgpt2.fields import ConfigError

if TYPE_CHECKING:
    from torch.distributed import Store

ATTEMPT = "fastgpt2/attempt"
POLL_S = 0.02


def meet(store: Store, rank: int, world: int, timeout_s: float) -> str:
    """The name of this attempt, the same on each rank.

    Rank 0 publishes a fresh name. Another rank that reads a name greets it with a fresh name of its own, and believes
    it once rank 0 has answered that greeting: only a living rank 0 can.

    A rank may die after its greeting was answered. The others then fail as they connect to it, and torchrun starts the
    next attempt under another name.

    Raises:
        ConfigError: not all ranks came within timeout_s.
    """
    return _welcome(store, world, timeout_s) if rank == 0 else _greet(store, rank, world, timeout_s)


def _welcome(store: Store, world: int, timeout_s: float) -> str:
    """Publish a name and answer the greeting of each other rank."""
    limit = time.monotonic() + timeout_s
    name = uuid.uuid4().hex
    store.set(ATTEMPT, name)
    missing = list(range(1, world))
    while True:
        for rank in missing.copy():
            if store.check([_greeting(name, rank)]):
                store.set(_answer(name, store.get(_greeting(name, rank)).decode()), "")
                missing.remove(rank)
        if not missing:
            return name
        which = f"process {missing[0]}" if len(missing) == 1 else f"processes {', '.join(map(str, missing))}"
        _wait(limit, f"{which} of {world} did not come within {timeout_s:g} s (--timeout)")


def _greet(store: Store, rank: int, world: int, timeout_s: float) -> str:
    """Greet each name that is published until one is answered."""
    limit = time.monotonic() + timeout_s
    own, greeted = uuid.uuid4().hex, None
    while True:
        if store.check([ATTEMPT]) and (name := store.get(ATTEMPT).decode()) != greeted:
            store.set(_greeting(name, rank), own)
            greeted = name
        if greeted is not None and store.check([_answer(greeted, own)]):
            return greeted
        _wait(limit, f"process 0 of {world} did not come within {timeout_s:g} s (--timeout)")


def _greeting(name: str, rank: int) -> str:
    return f"{name}/greeting/{rank}"


def _answer(name: str, greeting: str) -> str:
    return f"{name}/answer/{greeting}"


def _wait(limit: float, problem: str) -> None:
    if time.monotonic() > limit:
        raise ConfigError(problem)
    time.sleep(POLL_S)
