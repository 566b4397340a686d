"""The processes that train one model together: join them, agree with them, leave them.

torchrun starts the processes and tells each, by environment variables, which one it is. Slurm, SkyPilot and Kubernetes
start torchrun. A process that nobody started so is alone: each function here then does nothing.

Two groups connect the processes. The main one moves gradients, by NCCL on GPUs. The control group lies in host memory,
by gloo: what the hosts agree on doesn't wait for a device.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastgpt2 import signals
from fastgpt2.fields import ConfigError
from fastgpt2.program import world_size
from fastgpt2.rendezvous import meet

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets and `joined` reads."""

SAY_EVERY_S = 1.0
"""How often a process says at which step it is."""

T = TypeVar("T")


@dataclass
class Place:
    """Where a process is in its run."""

    step: int | None = None
    """How many steps are done; None before the first call of Ranks.at."""
    say_next: float = 0.0
    since: float = field(default_factory=time.monotonic)


@dataclass(frozen=True)
class Ranks:
    """This process among those that train a model together. The default is a process alone."""

    rank: int = 0
    world: int = 1
    """How many processes there are, on all machines."""
    local_rank: int = 0
    """This process among those of its machine."""
    local_world: int = 1
    """How many processes this machine has."""
    control: Any = None
    """The group in host memory."""
    store: Any = None
    """Where the processes leave each other messages without meeting."""
    place: Place = field(default_factory=Place)
    """Where this process is, in case it fails."""

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, shows and saves."""
        return self.rank == 0

    def at(self, step: int) -> None:
        """Say that this many steps are done. The others learn of it at most once a second.

        Raises:
            DistError: the store is gone, and with it torchrun or process 0.
        """
        if self.world == 1:
            return
        self.place.step = step
        if (now := time.monotonic()) >= self.place.say_next:
            self.place.say_next = now + SAY_EVERY_S
            self.store.set(f"step/{self.rank}", str(step))

    def mean(self, x: Tensor) -> Tensor:
        """The mean of a tensor over the ranks, the same bits on each. Doesn't wait for the device."""
        if self.world == 1:
            return x
        total = x.clone()
        dist.all_reduce(total)
        return total / self.world

    def any(self, flag: bool) -> bool:
        """Whether it is true on any rank."""
        if self.world == 1:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in their order."""
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        dist.all_gather_object(values, value, group=self.control)
        return values

    def together(self, action: Callable[[], T], *failures: type[Exception]) -> T:
        """Run an action on each rank. If it fails on one, it fails on all, with that rank's error.

        Args:
            failures: the exceptions that are shared; by default ConfigError.

        Raises:
            Exception: the error of the lowest rank that failed. Where only some did, its message names that rank.
        """
        shared = failures or (ConfigError,)
        result: Any = None
        own: Exception | None = None
        try:
            result = action()
        except shared as error:
            own = error
        told = self.gather(None if own is None else (type(own), str(own)))
        failed = [(rank, *error) for rank, error in enumerate(told) if error is not None]
        if not failed:
            return result
        rank, kind, text = failed[0]
        if own is not None and len(failed) == self.world:
            raise _shared(own)
        raise _shared(kind(f"process {rank} of {self.world}: {text}")) from own

    def from_first(self, make: Callable[[], T]) -> T:
        """What rank 0 makes, on every rank. Its ConfigError is raised on all of them."""
        if self.world == 1:
            return make()
        box: list[Any] = [None, None]
        if self.first:
            try:
                box[0] = make()
            except ConfigError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, src=0, group=self.control)
        if box[1] is not None:
            raise _shared(ConfigError(box[1]))
        return box[0]

    def same(self, values: Mapping[str, Any]) -> None:
        """Check that a mapping is the same on each rank.

        Raises:
            ConfigError: it isn't. The message, the same on each rank, has the first key that differs and both values.
        """
        first, *others = self.gather({key: str(value) for key, value in values.items()})
        for rank, other in enumerate(others, 1):
            for key in first:
                if other.get(key) != first[key]:
                    raise _shared(
                        ConfigError(
                            f"{key} differs between the processes: process 0 has {first[key]}, "
                            f"process {rank} has {other.get(key)}"
                        )
                    )

    def barrier(self) -> None:
        """Wait until every rank has come here."""
        if self.world > 1:
            dist.barrier(group=self.control)


def _shared(error: T) -> T:
    error._on_every_rank = True  # type: ignore[attr-defined]
    return error


def is_shared(error: BaseException) -> bool:
    """Whether every rank has raised this error, so that one of them may tell the user."""
    return getattr(error, "_on_every_rank", False)


class Ballot:
    """Whether any rank has voted yes, known one vote later: no rank waits for another to catch up."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._counted: tuple[Any, Tensor] | None = None

    def vote(self, yes: bool) -> bool:
        """Vote, and return the result of the vote before this one; with a process alone, of this one."""
        if self._ranks.world == 1:
            return yes
        result = self._result()
        flags = torch.tensor(int(yes))
        work = dist.all_reduce(flags, dist.ReduceOp.MAX, group=self._ranks.control, async_op=True)
        self._counted = work, flags
        return result

    def _result(self) -> bool:
        if self._counted is None:
            return False
        work, flags = self._counted
        work.wait()
        return bool(flags)


ALONE = Ranks()
_here = ALONE
"""The processes that this one has joined. torch.distributed keeps its default group in the same way."""


def current() -> Ranks:
    """The processes that this one has joined; ALONE if none."""
    return _here


def launched() -> bool:
    """Whether torchrun has started this process as one of several."""
    return world_size() > 1


@contextlib.contextmanager
def joined(device: str | None, timeout_s: float) -> Iterator[Ranks]:
    """Join the processes that torchrun started with this one, and leave them together at the end.

    Within another `joined` it yields what that one did, and leaves nothing. If the body fails, this process leaves at
    once: the others must not wait for it.

    Args:
        device: a --device flag: which kind of device the gradients are on.
        timeout_s: how long to wait for another process, here and in every collective.

    Raises:
        ConfigError: torchrun's variables are incomplete, or a process did not come.
    """
    global _here
    if _here.world > 1 or not launched():
        yield _here
        return
    with signals.by_default():
        _here = _join(device, timeout_s)
    try:
        yield _here
        # A process that ends while another still talks to it takes that one down.
        _here.barrier()
        dist.destroy_process_group()
    except BaseException:
        # Otherwise its connections stay open until its collective operations have ended, and the others wait for it.
        # NCCL's shutdown would wait itself.
        with contextlib.suppress(Exception):
            dist.destroy_process_group(None if dist.get_backend() == "gloo" else _here.control)
        raise
    finally:
        _here = ALONE


def _join(device: str | None, timeout_s: float) -> Ranks:
    numbers = _numbers()
    rank, world, local_rank = numbers["RANK"], numbers["WORLD_SIZE"], numbers["LOCAL_RANK"]
    if dist.is_initialized():
        raise ConfigError("torch.distributed is already initialised: leave that to fastgpt2")
    cuda = (device or "cuda").startswith("cuda") and torch.cuda.is_available()
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {rank} is number {local_rank} on its machine, which has {torch.cuda.device_count()} GPUs: "
                f"give torchrun --nproc-per-node {torch.cuda.device_count()}, or --device cpu"
            )
        torch.cuda.set_device(local_rank)  # NCCL takes the current device
    limit = datetime.timedelta(seconds=timeout_s)
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "2000")  # the flight recorder's entries; read once, by the group
    where = f"{os.environ['MASTER_ADDR']}:{numbers['MASTER_PORT']}"
    try:
        store: dist.Store = _store(os.environ["MASTER_ADDR"], numbers["MASTER_PORT"], rank == 0, timeout_s)
        store = dist.PrefixStore(meet(store, rank, world, timeout_s), store)
        backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
        # NCCL's watchdog kills the process when its time is over. The control group's error must come before that.
        patience = 2 * limit if cuda else limit
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=patience)
        control = dist.new_group(backend="gloo", timeout=limit)
    except ConfigError as error:
        raise ConfigError(f"{error}{_elastic_advice()}") from None
    except RuntimeError as error:  # DistError of the store and NCCL; gloo has no type of its own
        raise ConfigError(f"process {rank} of {world} can't join the others at {where}: {_line(error)}") from None
    return Ranks(rank, world, local_rank, numbers["LOCAL_WORLD_SIZE"], control, store)


def agent_serves() -> bool:
    """Whether the store is that of torchrun's agent on the first machine. Otherwise rank 0 serves one."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _elastic_advice() -> str:
    """What to try if processes on several machines don't find each other: torchrun's agents remember the address of the
    first store that they saw, so that after machines have come and gone each may have another."""
    if not agent_serves() or int(os.environ.get("GROUP_WORLD_SIZE", "1")) == 1:
        return ""
    return "; if machines come and go (--nnodes MIN:MAX), start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"


@functools.cache
def _store(address: str, port: int, first: bool, timeout_s: float) -> dist.TCPStore:
    """The store of torchrun's agent, or one that rank 0 serves. It stays for a second run in the same process: another
    process may be connected to it already."""
    return dist.TCPStore(
        address,
        port,
        is_master=first and not agent_serves(),
        timeout=datetime.timedelta(seconds=timeout_s),
        wait_for_workers=False,  # meet waits, and says for whom
        multi_tenant=True,
    )


def _numbers() -> dict[str, int]:
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but these are not set: {', '.join(missing)}; start the "
            "processes by torchrun, or take WORLD_SIZE out of the environment"
        )
    numbers = {name: os.environ[name] for name in VARIABLES if name != "MASTER_ADDR"}
    if wrong := [f"{name}={value}" for name, value in numbers.items() if not (value.isascii() and value.isdecimal())]:
        raise ConfigError(f"{wrong[0]} is not a number: start the processes by torchrun")
    whole = {name: int(value) for name, value in numbers.items()}
    if whole["RANK"] >= whole["WORLD_SIZE"] or whole["MASTER_PORT"] > 65535:
        said = ", ".join(f"{name}={value}" for name, value in whole.items())
        raise ConfigError(f"{said} don't fit together: start the processes by torchrun")
    return whole


def _line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
