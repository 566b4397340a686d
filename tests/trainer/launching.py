"""torchrun's agents in processes forked from this one, and so their workers: PyTorch is imported only once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.fsdp  # noqa: F401 - the agents' first failure and the workers' first step import it
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch


class Agent:
    """What torchrun does on one machine. A worker calls a function; what it prints is appended to a log."""

    def __init__(
        self,
        work: Callable[..., None],
        *arguments: Any,
        folder: Path,
        port: int,
        workers: int = 2,
        restarts: int = 0,
        machines: tuple[int, int] = (1, 1),
        lends_store: bool = True,
    ) -> None:
        """
        Args:
            machines: the fewest and the most; each has an agent with the same port.
            lends_store: the agent of the first machine lends the workers its store. Otherwise process 0 makes one, as
                with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
        """
        self._config = LaunchConfig(
            min_nodes=machines[0],
            max_nodes=machines[1],
            nproc_per_node=workers,
            run_id=str(port),
            rdzv_backend="c10d",
            rdzv_endpoint=f"127.0.0.1:{port}",
            rdzv_configs={"timeout": 60, "last_call_timeout": 5, "keep_alive_interval": 1},
            max_restarts=restarts,
            start_method="fork",
            local_addr="127.0.0.1",
        )
        self._work, self._arguments, self._folder, self._lends_store = work, arguments, folder, lends_store
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run()

    def _run(self) -> None:
        status = 99
        try:
            os.setsid()
            log = os.open(self._folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            for stream, number in (("stdout", 1), ("stderr", 2)):
                setattr(sys, stream, os.fdopen(number, "w", closefd=False, buffering=1))
            os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = str(int(not self._lends_store))
            self._config.logs_specs = DefaultLogsSpecs(log_dir=str(self._folder / "logs"))
            elastic_launch(self._config, _after_siblings)(self._folder, self._work, *self._arguments)
            status = 0
        except ChildFailedError:
            status = 1
        except BaseException:
            traceback.print_exc()
        os._exit(status)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the agent alone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def lose(self) -> None:
        """Kill the agent and its workers, as if their machine had lost power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def alive(self) -> bool:
        return not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)

    def wait(self, seconds: float) -> int | None:
        """The exit status, -n after signal n; None if it hangs. It and its workers are then killed."""
        limit = time.monotonic() + seconds
        while self.alive() and time.monotonic() < limit:
            time.sleep(0.01)
        hung = self.alive()
        self.lose()
        status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return None if hung else status


def _after_siblings(folder: Path, work: Callable[..., None], *arguments: Any) -> None:
    """Work once the agent has forked all its workers.

    When a worker connects to the agent's store, a thread of the agent looks its name up. A worker forked then would
    wait for the lock that this thread held, which in the new process nobody releases.
    """
    attempt = f"forked-{os.getppid()}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
    (folder / f"{attempt}-{os.environ['LOCAL_RANK']}").touch()
    while len(list(folder.glob(f"{attempt}-*"))) < int(os.environ["LOCAL_WORLD_SIZE"]):
        time.sleep(0.005)
    work(*arguments)
