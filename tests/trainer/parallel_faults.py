"""`python -m tests.trainer.parallel_faults`: kill processes of runs under torchrun's agent and count what recovers.

    # every fault 20 times
    python -m tests.trainer.parallel_faults --rounds 20
    # joining without our handshake: torch.distributed's own env://
    python -m tests.trainer.parallel_faults --rounds 20 --only env_kill env_two_agents

The first faults strike a small function: all processes join, one dies on the first attempt, and all must finish the
second. The others strike the trainer: the run must end with the bits of an undisturbed one. CI does some of each.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist

import fastgpt2.command
from fastgpt2 import checkpoint
from fastgpt2.console import run_command
from fastgpt2.fields import Choice, Count, Natural
from fastgpt2.flags import read_arguments
from fastgpt2.metrics import read_json_lines
from fastgpt2.parallel import joined
from tests.forked import free_port
from tests.trainer.faults import FLAGS, STEPS, prepared
from tests.trainer.launching import Agent

PATIENCE_S = 120
"""After which a run counts as hung."""
TIMEOUT_S = 60.0
ADDED, DIES_AT = 6, 3


# ------------------------------------------------------------------------------------------------- joining


@contextlib.contextmanager
def env() -> Any:
    """What trainers usually do."""
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=TIMEOUT_S))
    yield
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
    """An agent's."""
    rank: int = 1
    by: Callable[[], None] = kill
    join: Callable[[], Any] = handshake
    while_joining: bool = False
    lends_store: bool = True


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
    "two_agents_own_store": Death(agents=2, workers=1, lends_store=False),
    "env_kill": Death(join=env),
    "env_four_ranks": Death(workers=4, rank=2, join=env),
    "env_two_agents": Death(agents=2, workers=1, join=env),
}


def add_up(death: Death, folder: Path) -> None:
    """One worker: join, add numbers up over the processes, die once or finish."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dies = rank == death.rank and not (folder / "died").exists()
    if dies and death.while_joining:
        _die_in_the_handshake(folder, death)
    with death.join():
        for step in range(ADDED):
            total = torch.tensor([float(rank + step)])
            dist.all_reduce(total)
            assert total.item() == world * (world - 1) / 2 + world * step
            if dies and step == DIES_AT:
                (folder / "died").touch()
                death.by()
    (folder / f"finished-{rank}").touch()


def _die_in_the_handshake(folder: Path, death: Death) -> None:
    """Die once process 0 has answered, before the connections are made."""

    def dies_instead(*arguments: Any, **named: Any) -> None:
        (folder / "died").touch()
        death.by()

    dist.init_process_group = dies_instead


def joins_again(name: str, folder: Path, data: Path, seed: str) -> None:
    """All join, one dies, all join again and finish."""
    death = DEATHS[name]
    start = functools.partial(
        Agent,
        add_up,
        death,
        folder,
        folder=folder,
        port=free_port(),
        workers=death.workers,
        restarts=1,
        machines=(death.agents, death.agents),
        lends_store=death.lends_store,
    )
    agents = [start() for _ in range(death.agents)]
    statuses = [agent.wait(PATIENCE_S) for agent in agents]
    assert None not in statuses, f"hung for {PATIENCE_S} s"
    missing = [rank for rank in range(death.agents * death.workers) if not (folder / f"finished-{rank}").exists()]
    assert not missing, f"processes {missing} did not finish"


# ------------------------------------------------------------------------------------------------- training


def train(folder: Path, flags: list[str]) -> None:
    """One worker: the command. Its PID is in a file."""
    (folder / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    sys.argv = ["python -m fastgpt2.train", *flags]
    try:
        run_command(fastgpt2.command.main)
    except SystemExit as end:
        if end.code:
            os._exit(int(end.code))


class Scene:
    """A run of two processes that a fault will strike."""

    def __init__(self, folder: Path, data: Path, seed: str, mode: str) -> None:
        self.folder, self.out, self.random, self.mode = folder, folder / "run", random.Random(seed), mode
        self.data = Path(shutil.copytree(data, folder / "data"))

    def start(self, *flags: str, restarts: int = 0, port: int = 0, **how: Any) -> Agent:
        """Start or continue the run."""
        always = ["--data", str(self.data), "--out", str(self.out), "--resume", "auto", "--parallel", self.mode]
        given = [*FLAGS, *always, "--timeout", str(TIMEOUT_S), *flags]
        return Agent(train, self.folder, given, folder=self.folder, port=port or free_port(), restarts=restarts, **how)

    def steps(self) -> int:
        """The last step in metrics.jsonl."""
        return max((r["step"] for r in read_json_lines(self.out / "metrics.jsonl") if "last_loss" in r), default=0)

    def reach(self, step: int, run: Agent) -> None:
        while run.alive() and self.steps() < step:
            time.sleep(0.005)

    def pid(self, rank: int, run: Agent) -> int:
        """A worker's PID, once it has begun."""
        file = self.folder / f"pid-{rank}"
        while run.alive() and not (file.exists() and file.read_text()):
            time.sleep(0.005)
        return int(file.read_text())

    def kill(self, rank: int, run: Agent) -> None:
        """Kill a worker. The PIDs of the next attempt are others."""
        pid = self.pid(rank, run)
        for file in self.folder.glob("pid-*"):
            file.unlink()
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

    def said(self) -> str:
        return (self.folder / "log.txt").read_text(errors="replace")

    def finish(self, expected: Records) -> None:
        """Continue the run to its end and compare it with the undisturbed run."""
        status = self.start().wait(PATIENCE_S)
        assert status == 0, f"continuing ended with {status}"
        self.compare(expected)

    def compare(self, expected: Records) -> None:
        lines, tensors = records(self.out)
        assert tensors == expected[1], "the final tensors differ"
        for step, (loss, norm) in expected[0].items():
            assert lines[step] in ((loss, norm), (loss, None)), f"step {step}: {lines[step]} instead of {(loss, norm)}"


Records = tuple[dict[int, tuple[float, float | None]], dict[str, str]]
"""Each step's loss and gradient norm, and the hashes of the last checkpoint's tensors."""


def records(out: Path) -> Records:
    """Read a run that has ended. A step that was logged because the run stopped has no gradient norm."""
    lines = {r["step"]: (r["last_loss"], r["grad_norm"]) for r in read_json_lines(out / "metrics.jsonl") if "lr" in r}
    assert sorted(lines) == list(range(1, STEPS + 1)), f"records of the steps {sorted(lines)}"
    newest = checkpoint.checkpoints(out)[-1]
    assert newest.name == f"step-{STEPS:08d}", f"the newest checkpoint is {newest.name}"
    assert checkpoint.damage(newest) is None
    sums = (line.split() for line in (newest / checkpoint.SUMS).read_text().splitlines())
    return lines, {name: digest for digest, name in sums if name.endswith(".safetensors")}


@functools.cache
def undisturbed(mode: str, data: Path, *flags: str) -> Records:
    folder = Path(tempfile.mkdtemp(prefix=f"undisturbed-{mode}-"))
    scene = Scene(folder, data, "", mode)
    status = scene.start(*flags).wait(PATIENCE_S)
    assert status == 0, f"an undisturbed run ends with {status}; see {folder}"
    expected = records(scene.out)
    shutil.rmtree(folder)
    return expected


def killed(scene: Scene, expected: Records, times: int = 10) -> None:
    """A random process is killed ten times; torchrun restarts the run each time."""
    run = scene.start(restarts=times)
    for number in range(times):
        if scene.random.random() < 1 / 5:  # while the processes join, or build
            scene.pid(0, run)
            time.sleep(scene.random.uniform(0, 1))
        else:
            scene.reach(number * STEPS // times + scene.random.randrange(STEPS // times), run)
        scene.kill(scene.random.randrange(2), run)
    status = run.wait(PATIENCE_S)
    assert status == 0, f"it ended with {status}"
    scene.compare(expected)


def killed_once(scene: Scene, expected: Records) -> None:
    """A random process is killed once."""
    killed(scene, expected, times=1)


def killed_saving(scene: Scene, expected: Records) -> None:
    """A random process is killed three times while the processes write a checkpoint."""
    run, folder = scene.start("--save-every", "1", restarts=3), scene.out / "checkpoints"
    for number in range(3):
        scene.reach(5 + 10 * number, run)
        while run.alive() and not any(folder.glob(".writing-*/*")):
            time.sleep(0.0005)
        time.sleep(scene.random.uniform(0, 0.005))
        scene.kill(scene.random.randrange(2), run)
        for saved in checkpoint.checkpoints(scene.out):
            assert checkpoint.damage(saved) is None
    status = run.wait(PATIENCE_S)
    assert status == 0, f"it ended with {status}"
    scene.compare(expected)


def lost_machine(scene: Scene, expected: Records) -> None:
    """One of two machines is lost for good under --nnodes 1:2. The other goes on alone.

    torchrun's agents remember the address of the first store that they saw: where machines come and go, each may have
    another. So here process 0 makes the store.
    """
    flags = ("--dropout", "0")  # dropout's masks depend on how many processes there are
    expected = undisturbed(scene.mode, scene.data, *flags)
    how = {"port": free_port(), "restarts": 3, "workers": 1, "machines": (1, 2), "lends_store": False}
    first, second = (scene.start(*flags, **how) for _ in range(2))
    scene.pid(1, first)
    scene.reach(scene.steps() + STEPS // 4, first)
    second.lose()  # not the first: it holds the store by which the agents themselves meet
    status = first.wait(PATIENCE_S)
    second.wait(PATIENCE_S)
    assert status == 0, f"the other ended with {status}"
    losses = {step: loss for step, (loss, _) in records(scene.out)[0].items()}
    for step, (loss, _) in expected[0].items():
        assert abs(losses[step] - loss) <= 1e-6 * loss, f"step {step}: {losses[step]} instead of {loss}"


def full_disk(scene: Scene, expected: Records) -> None:
    """For a while no file of process 0 can grow."""
    run = scene.start()
    scene.reach(STEPS // 4, run)
    pid = scene.pid(0, run)
    with contextlib.suppress(ProcessLookupError):
        _, hard = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (scene.random.choice((0, 1, 4096)), hard))
        time.sleep(scene.random.uniform(0, 1))
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (hard, hard))
    status = run.wait(PATIENCE_S)
    assert status == 0, f"a full disk ended it with {status}"
    scene.compare(expected)


def stopped(scene: Scene, expected: Records) -> None:
    """torchrun gets SIGTERM: the run saves once and continues from there."""
    _stop(scene, expected, lambda run: run.send(signal.SIGTERM))


def interrupted(scene: Scene, expected: Records) -> None:
    """Ctrl-C twice: torchrun passes SIGINT on, then SIGTERM. The processes may get their own from the terminal."""

    def press(run: Agent) -> None:
        for _ in range(2):
            run.send(signal.SIGINT)
            for rank in range(2):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(scene.pid(rank, run), signal.SIGINT)
            time.sleep(scene.random.uniform(0, 0.1))

    _stop(scene, expected, press)


def _stop(scene: Scene, expected: Records, stop: Callable[[Agent], None]) -> None:
    run = scene.start("--save-every", "1000000")
    scene.reach(STEPS // 4, run)
    stop(run)
    assert run.wait(PATIENCE_S) is not None, "the agent hangs"
    saved = [path.name for path in checkpoint.checkpoints(scene.out)]
    assert saved == [f"step-{scene.steps():08d}"], f"after step {scene.steps()} there are {saved}"
    assert scene.steps() < STEPS
    assert scene.said().count("stopping after this step") == 1
    scene.finish(expected)


def lost_agent(scene: Scene, expected: Records) -> None:
    """torchrun itself is killed: its processes end too."""
    run = scene.start("--steps", "100000000")
    scene.reach(STEPS // 4, run)
    pids = [scene.pid(rank, run) for rank in range(2)]
    run.send(signal.SIGKILL)
    limit = time.monotonic() + PATIENCE_S
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < limit, "orphans go on"
        time.sleep(0.05)
    run.wait(PATIENCE_S)


def cut_shard(scene: Scene, expected: Records) -> None:
    """A shard is truncated while the processes read it: one line names it."""
    shard = scene.data / "train_000000.bin"
    good = shard.read_bytes()
    run = scene.start()
    scene.reach(STEPS // 4, run)
    os.truncate(shard, scene.random.randrange(len(good) // 2))
    began = time.monotonic()
    status = run.wait(PATIENCE_S)
    assert status == 1, f"a cut shard ended it with {status}"
    assert time.monotonic() - began < TIMEOUT_S, "it waited for its timeout"
    assert shard.name in scene.said()
    assert scene.said().count("error: ") == 1
    shard.write_bytes(good)
    scene.finish(expected)


def strike(fault: Callable[[Scene, Records], None], mode: str, name: str, folder: Path, data: Path, seed: str) -> None:
    fault(Scene(folder, data, seed, mode), undisturbed(mode, data))


FAULTS: dict[str, Callable[[str, Path, Path, str], None]] = {
    **dict.fromkeys(DEATHS, joins_again),
    **{
        f"{fault.__name__}_{mode}": functools.partial(strike, fault, mode)
        for fault in (
            killed,
            killed_once,
            killed_saving,
            lost_machine,
            full_disk,
            stopped,
            interrupted,
            lost_agent,
            cut_shard,
        )
        for mode in ("ddp", "fsdp")
    },
}


@dataclass(frozen=True)
class FaultsConfig:
    """Which faults strike, and how often."""

    rounds: Count = 1
    """How many times each fault strikes."""
    seed: Natural = 0
    """Seed of the first round; each further round uses the next seed."""
    only: tuple[Annotated[str, Choice(tuple(FAULTS))], ...] = tuple(FAULTS)
    """Only these faults (default: all)."""


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    given = read_arguments(FaultsConfig, "tests.trainer.parallel_faults", arguments)
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    base = Path(tempfile.mkdtemp(prefix="parallel-faults-"))
    data = prepared(base)
    lost = 0
    for name in given.only:
        began, survived = time.monotonic(), 0
        for seed in range(given.seed, given.seed + given.rounds):
            folder = base / f"{name}-{seed}"
            folder.mkdir()
            try:
                FAULTS[name](name, folder, data, f"{name}/{seed}")
            except AssertionError as error:
                print(f"{name} --seed {seed}: LOST: {error}; see {folder}", flush=True)
            else:
                survived += 1
                shutil.rmtree(folder)
        lost += given.rounds - survived
        seconds = (time.monotonic() - began) / given.rounds
        print(f"{name}: {survived} of {given.rounds} recovered, {seconds:.1f} s a round", flush=True)
    if not lost:
        shutil.rmtree(base)
    return int(lost > 0)


if __name__ == "__main__":
    run_command(main)
