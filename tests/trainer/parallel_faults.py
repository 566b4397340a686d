"""`python -m tests.trainer.parallel_faults`: kill processes of a run under torchrun's agent and count what recovers.

    # each way of dying, 20 times
    python -m tests.trainer.parallel_faults --rounds 20
    # the same without our handshake: torch.distributed's own env://
    python -m tests.trainer.parallel_faults --rounds 20 --only env_kill env_two_agents

A round recovers if all processes join, one dies on the first attempt, and all finish the second. The agents are
torchrun's own, in processes forked from this one to import PyTorch only once, and so are the workers.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from fastgpt2.console import run_command
from fastgpt2.fields import Choice, Count
from fastgpt2.flags import read_arguments
from fastgpt2.parallel import joined
from tests.forked import free_port

PATIENCE_S = 90
"""After which a round counts as hung."""
TIMEOUT_S = 30.0
STEPS, DIES_AT = 6, 3


@contextlib.contextmanager
def env() -> Any:
    """What trainers usually do."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    yield None
    dist.barrier()
    dist.destroy_process_group()


def handshake() -> Any:
    return joined("cpu", TIMEOUT_S)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave() -> None:
    os._exit(3)


def fail() -> None:
    raise ValueError("on purpose")


@dataclass(frozen=True)
class Death:
    """Who dies, how, and when."""

    agents: int = 1
    workers: int = 2
    """A machine's."""
    rank: int = 1
    by: Callable[[], None] = kill
    join: Callable[[], Any] = handshake
    while_joining: bool = False


DEATHS = {
    "kill": Death(),
    "exit": Death(by=leave),
    "exception": Death(by=fail),
    "first_rank": Death(rank=0),
    "four_ranks": Death(workers=4, rank=2),
    "while_joining": Death(while_joining=True),
    "two_agents": Death(agents=2, workers=1),
    "two_agents_first_rank": Death(agents=2, workers=1, rank=0),
    "two_agents_four_ranks": Death(agents=2, workers=2, rank=3),
    "env_kill": Death(join=env),
    "env_four_ranks": Death(workers=4, rank=2, join=env),
    "env_two_agents": Death(agents=2, workers=1, join=env),
}


def work(name: str, folder: Path) -> None:
    """One worker: join, add numbers up, die once or finish."""
    death, rank, world = DEATHS[name], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dies = rank == death.rank and not (folder / "died").exists()
    if dies and death.while_joining:
        _die_in_the_handshake(folder, death)
    with death.join():
        for step in range(STEPS):
            total = torch.tensor([float(rank + step)])
            dist.all_reduce(total)
            assert total.item() == world * (world - 1) / 2 + world * step
            if dies and step == DIES_AT:
                (folder / "died").touch()
                death.by()
    (folder / f"finished-{rank}").touch()


def _die_in_the_handshake(folder: Path, death: Death) -> None:
    """Die once process 0 has answered, before the connections are made."""
    original = dist.init_process_group

    def dies_instead(*arguments: Any, **named: Any) -> None:
        dist.init_process_group = original
        (folder / "died").touch()
        death.by()

    dist.init_process_group = dies_instead


def agent(name: str, folder: Path, port: int, number: int) -> int:
    """What torchrun does, with forked workers."""
    death = DEATHS[name]
    config = LaunchConfig(
        min_nodes=death.agents,
        max_nodes=death.agents,
        nproc_per_node=death.workers,
        run_id=f"{name}-{port}",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        rdzv_configs={"timeout": 60},
        max_restarts=1,
        start_method="fork",
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / f"logs-{number}")),
    )
    try:
        elastic_launch(config, work)(name, folder)
    except ChildFailedError:
        return 1
    return 0


def recovers(name: str, folder: Path) -> str | None:
    """Play one round. Returns what is wrong."""
    death, port = DEATHS[name], free_port()
    log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    pids = [_fork(lambda number=number: agent(name, folder, port, number), log) for number in range(death.agents)]
    os.close(log)
    limit = time.monotonic() + PATIENCE_S
    left = set(pids)
    while left and time.monotonic() < limit:
        for pid in tuple(left):
            if os.waitpid(pid, os.WNOHANG)[0]:
                left.remove(pid)
        time.sleep(0.02)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    if left:
        return f"hung for {PATIENCE_S} s"
    missing = [rank for rank in range(death.agents * death.workers) if not (folder / f"finished-{rank}").exists()]
    return f"processes {missing} did not finish" if missing else None


def _fork(main: Callable[[], int], log: int) -> int:
    sys.stdout.flush()
    if pid := os.fork():
        return pid
    status = 99
    try:
        os.setsid()
        for descriptor in (1, 2):
            os.dup2(log, descriptor)
        status = main()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


@dataclass(frozen=True)
class FaultsConfig:
    """Which deaths, and how often."""

    rounds: Count = 1
    """How many times each."""
    only: tuple[Annotated[str, Choice(tuple(DEATHS))], ...] = tuple(DEATHS)
    """Only these (default: all)."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    given = read_arguments(FaultsConfig, "tests.trainer.parallel_faults", arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    lost = 0
    for name in given.only:
        began, recovered = time.monotonic(), 0
        for _ in range(given.rounds):
            folder = Path(tempfile.mkdtemp(prefix=f"{name}-"))
            if problem := recovers(name, folder):
                print(f"{name}: {problem}; see {folder}", flush=True)
            else:
                recovered += 1
                shutil.rmtree(folder)
        lost += given.rounds - recovered
        seconds = (time.monotonic() - began) / given.rounds
        print(f"{name}: {recovered} of {given.rounds} recovered, {seconds:.1f} s a round", flush=True)
    return int(lost > 0)


if __name__ == "__main__":
    run_command(main)
