"""Joining: fresh names, restarts by torchrun, and errors that say which process or variable is missing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fastgpt2 import rendezvous
from fastgpt2.fields import ConfigError
from fastgpt2.parallel import joined
from fastgpt2.rendezvous import meet

ROOT = Path(__file__).resolve().parents[2]

WORKER = """
import os, signal, sys
from pathlib import Path
import torch, torch.distributed as dist
from fastgpt2.parallel import joined
folder, own = Path(sys.argv[1]), int(os.environ["RANK"])
with joined("cpu", 60) as ranks:
    for step in range(4):
        total = torch.tensor([float(own)])
        dist.all_reduce(total)
        assert total.item() == 1.0
        if own == 1 and step == 2 and not (folder / "died").exists():
            (folder / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
(folder / f"finished-{own}").touch()
"""


def test_torchrun_restarts_after_a_kill(tmp_path) -> None:
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", "1", str(script), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(path.name for path in tmp_path.glob("*ed*")) == ["died", "finished-0", "finished-1"]


class Meeting:
    """Ranks that meet in threads over one store. What each finds is its name or its error."""

    def __init__(self, store: dist.Store, world: int) -> None:
        self.store, self.world = store, world
        self.found: dict[int, str | ConfigError] = {}
        self.threads: list[threading.Thread] = []

    def come(self, rank: int, timeout_s: float = 60) -> None:
        self.threads.append(threading.Thread(target=self._meet, args=(rank, timeout_s)))
        self.threads[-1].start()

    def _meet(self, rank: int, timeout_s: float) -> None:
        try:
            self.found[rank] = meet(self.store, rank, self.world, timeout_s)
        except ConfigError as error:
            self.found[rank] = error

    def names(self) -> set[str | ConfigError]:
        for thread in self.threads:
            thread.join()
        assert sorted(self.found) == list(range(self.world))
        return set(self.found.values())


def met(store: dist.Store, world: int) -> str:
    meeting = Meeting(store, world)
    for rank in range(world):
        meeting.come(rank)
    (name,) = meeting.names()
    assert isinstance(name, str)
    return name


def test_each_attempt_has_a_name_of_its_own() -> None:
    store = dist.HashStore()
    # The world may change: torchrun renumbers the processes of the machines that are left.
    assert len({met(store, world) for world in (3, 3, 2, 4)}) == 4


def test_name_of_a_dead_process_is_not_believed() -> None:
    store = dist.HashStore()
    old = met(store, 2)
    meeting = Meeting(store, 2)
    meeting.come(1)
    while not store.check([rendezvous._greeting(old, 1)]):
        time.sleep(0.001)
    meeting.come(0)
    assert old not in meeting.names()


def test_greeting_of_a_dead_process_is_not_taken_for_its_successor() -> None:
    store = dist.HashStore()
    died = Meeting(store, 2)
    died.come(0)  # publishes, and nobody comes
    while not store.check([rendezvous.ATTEMPT]):
        time.sleep(0.001)
    name = store.get(rendezvous.ATTEMPT).decode()
    store.set(rendezvous._greeting(name, 1), "of a process that has died since")
    died.threads[0].join()
    successor = Meeting(store, 2)
    successor.come(1, timeout_s=0.2)  # it must not believe the answer to the other's greeting
    successor.threads[0].join()
    assert isinstance(successor.found[1], ConfigError)


def test_error_names_who_is_missing() -> None:
    meeting = Meeting(dist.HashStore(), 4)
    meeting.come(0, timeout_s=0.5)
    meeting.come(2, timeout_s=0.5)
    for thread in meeting.threads:
        thread.join()
    assert str(meeting.found[0]) == "processes 1, 3 of 4 did not come within 0.5 s (--timeout)"
    alone = Meeting(dist.HashStore(), 2)
    alone.come(1, timeout_s=0.1)
    alone.threads[0].join()
    assert str(alone.found[1]) == "process 0 of 2 did not come within 0.1 s (--timeout)"


VARIABLES = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": None, "LOCAL_RANK": ""}, "not set: LOCAL_RANK, MASTER_ADDR; start the processes by torchrun"),
        ({"RANK": "one"}, "RANK=one is not a number"),
        ({"RANK": "2"}, "RANK=2, WORLD_SIZE=2, .* don't fit together"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT=70000 don't fit together"),
    ],
)
def test_wrong_variables(change, message, monkeypatch) -> None:
    for name, value in {**VARIABLES, **change}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message), joined("cpu", 1):
        pass


def test_advice_where_machines_come_and_go(monkeypatch) -> None:
    """Two processes with a store each, as torchrun's agents gave them when both had been the first machine."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = {"MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_WORLD_SIZE": "2"}
    for name, value in {**VARIABLES, **own}.items():
        monkeypatch.setenv(name, value)
    message = "process 1 of 2 .*start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"
    with pytest.raises(ConfigError, match=message), joined("cpu", 3):
        pass


def test_port_in_use(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {**VARIABLES, "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        message = f"can't join the others at 127.0.0.1:{port}: .*EADDRINUSE"
        with pytest.raises(ConfigError, match=message), joined("cpu", 1):
            pass
