"""`python -m tests.trainer.faults`: kill runs and damage their files; resumed, they end with the same bits.

    # every fault 20 times, each round with another seed
    python -m tests.trainer.faults --rounds 20
    python -m tests.trainer.faults --only killed --seed 7

A fault strikes at a random moment drawn from the seed. The run is then continued with `--resume auto`, the command that
a preempted job repeats. It must end with the weights, optimizer state and losses of an undisturbed run. CI does one
round (tests/trainer/test_faults.py). A fault that is not survived leaves its folder and log behind.

The trainer runs in real processes, forked from this one to import PyTorch only once.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated

import fastgpt2.command
import fastgpt2.reporters.display
from fastgpt2 import checkpoint
from fastgpt2.console import run_command
from fastgpt2.fields import Choice, Count, Natural
from fastgpt2.flags import read_arguments
from fastgpt2.metrics import read_json_lines
from fastgpt2.preparation import PrepareConfig, prepare
from fastgpt2.prepare import main as prepare_main
from tests.trainer.runs import FILES, MODEL, SUMS

STEPS, SAVE_EVERY, EVAL_EVERY = 40, 5, 10
SETTINGS = {
    "n-layer": 1, "n-head": 1, "n-embd": 16, "block-size": 16, "batch-size": 2, "dropout": 0.1, "lr": 1e-2,
    "steps": STEPS, "save-every": SAVE_EVERY, "eval-every": EVAL_EVERY, "eval-sequences": 8, "log-every": 1,
    "device": "cpu", "dtype": "float32",
}  # fmt: skip
FLAGS = [part for name, value in SETTINGS.items() for part in (f"--{name}", str(value))]
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
IMPORTED_ONCE = (
    "matplotlib.backends.backend_agg", "matplotlib.figure", "safetensors.torch", "torch._inductor.standalone_compile",
)  # fmt: skip
"""Imported before the forks: importing these in each process would take longer than its run."""
PATIENCE = 120
"""Seconds after which a process counts as hung."""


class Process:
    """One of our commands in a forked process, with its output appended to a log."""

    def __init__(
        self, main: Callable[[], int | None], arguments: list[str], log: Path, output: int | None = None
    ) -> None:
        self.log = log
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        try:
            os.setsid()
            into = output if output is not None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            for descriptor in (1, 2):
                os.dup2(into, descriptor)
            for stream, number in (("stdout", 1), ("stderr", 2)):
                setattr(sys, stream, os.fdopen(number, "w", closefd=False, buffering=1))
            sys.argv = ["python -m fastgpt2", *arguments]
            run_command(main)
        except SystemExit as end:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(end.code if isinstance(end.code, int) else 1)
        except BaseException:
            with contextlib.suppress(OSError):
                traceback.print_exc()
            os._exit(99)

    def send(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def alive(self) -> bool:
        return not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)

    def wait(self) -> int:
        """Wait for the exit status; -n after signal n."""
        deadline = time.monotonic() + PATIENCE
        while self.alive():
            if time.monotonic() > deadline:
                self.send(signal.SIGKILL)
                raise AssertionError(f"still running after {PATIENCE} s")
            time.sleep(0.002)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


class Scene:
    """A folder with prepared data and a run that a fault will strike."""

    def __init__(self, folder: Path, data: Path, seed: str) -> None:
        self.folder, self.out, self.log = folder, folder / "run", folder / "log.txt"
        self.random = random.Random(seed)
        folder.mkdir(parents=True)
        self.data = Path(shutil.copytree(data, folder / "data"))

    def start(self, *flags: str, output: int | None = None) -> Process:
        """Start or continue the run, like a job that restarts after each preemption."""
        always = ["--data", str(self.data), "--out", str(self.out), "--resume", "auto"]
        return Process(fastgpt2.command.main, [*FLAGS, *always, *flags], self.log, output)

    def soon(self, run: Process, expected: Expected) -> None:
        """Wait for a random moment of the run: during a step or, one time in nine, before the first."""
        step = self.random.randrange(-STEPS // 8, STEPS)
        if step < 0:
            time.sleep(self.random.uniform(0, expected.seconds / 2))
        while run.alive() and (self.steps() or [0])[-1] < step:
            time.sleep(0.002)
        time.sleep(self.random.uniform(0, expected.seconds / STEPS))

    def steps(self) -> list[int]:
        """The steps in metrics.jsonl."""
        return [r["step"] for r in read_json_lines(self.out / "metrics.jsonl") if "last_loss" in r]

    def check_saved(self, when: str) -> None:
        """Check that the last recorded step is saved."""
        if steps := self.steps():
            saved = [path.name for path in checkpoint.checkpoints(self.out)]
            assert saved[-1:] == [f"step-{steps[-1]:08d}"], f"step {steps[-1]} is not saved {when}: {saved}"

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def finish(self, expected: Expected, *flags: str) -> None:
        """Continue the run to its end and compare it with the undisturbed run."""
        status = self.start(*flags).wait()
        assert status == 0, f"continuing ended with {status}"
        expected.check(self.out)
        assert "Traceback" not in self.said(), "a traceback was printed"


class Expected:
    """The results of an undisturbed run, and how long it takes."""

    def __init__(self, folder: Path, data: Path) -> None:
        scene = Scene(folder, data, "")
        began = time.monotonic()
        status = scene.start().wait()
        assert status == 0, f"the run ends with {status} without any fault:\n{scene.said()}"
        self.seconds = time.monotonic() - began
        self.tensors, self.losses = self._read(scene.out)
        assert sorted(self.losses) == list(range(1, STEPS + 1))

    @staticmethod
    def _read(out: Path) -> tuple[list[str], dict[int, float]]:
        newest = checkpoint.checkpoints(out)[-1]
        assert newest.name == f"step-{STEPS:08d}", f"the newest checkpoint is {newest.name}"
        assert checkpoint.damage(newest) is None
        tensors = [newest / name for name in FILES if name.endswith(".safetensors")]
        sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in tensors]
        losses = {r["step"]: r["last_loss"] for r in read_json_lines(out / "metrics.jsonl") if "last_loss" in r}
        return sums, losses

    def check(self, out: Path) -> None:
        tensors, losses = self._read(out)
        assert tensors == self.tensors, "the final tensors differ"
        assert losses == self.losses, "losses differ or are missing"


# ------------------------------------------------------------------------------------------------- processes


def killed(scene: Scene, expected: Expected) -> None:
    """kill -9 at random moments, up to four times in a run."""
    for _ in range(scene.random.randint(1, 4)):
        run = scene.start()
        scene.soon(run, expected)
        run.send(signal.SIGKILL)
        assert run.wait() in (0, -signal.SIGKILL)
    scene.finish(expected)


def signalled(scene: Scene, expected: Expected) -> None:
    """A signal that asks the run to stop, or two that come together."""
    numbers = scene.random.sample(SIGNALS, scene.random.choice((1, 1, 2)))
    run = scene.start("--save-every", "1000000")
    scene.soon(run, expected)
    for number in numbers:
        run.send(number)
    status = run.wait()
    assert status in (0, *(128 + n for n in numbers)), f"{numbers} ended it with {status}"
    scene.check_saved(f"after {numbers}")
    scene.finish(expected)


def stalled_reader(scene: Scene, expected: Expected) -> None:
    """The reader of the output stops reading; then the run is asked to stop."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writing, b"full")
    os.set_blocking(writing, True)
    run = scene.start("--save-every", "1000000", output=writing)
    os.close(writing)
    scene.soon(run, expected)
    run.send(signal.SIGTERM)
    status = run.wait()
    os.close(reading)
    assert status in (0, 128 + signal.SIGTERM), f"a stalled pipe ended it with {status}"
    scene.check_saved("behind a stalled pipe")
    scene.finish(expected)


def second_process(scene: Scene, expected: Expected) -> None:
    """The same command is started again while the run is alive."""
    first = scene.start()
    scene.soon(first, expected)
    second = scene.start()
    statuses = first.wait(), second.wait()
    # The second process was refused, or found the run complete.
    assert 0 in statuses and set(statuses) <= {0, 2}, f"the two ended with {statuses}"
    scene.finish(expected)


def no_reader(scene: Scene, expected: Expected) -> None:
    """The reader of the output goes away."""
    reading, writing = os.pipe()
    run = scene.start(output=writing)
    os.close(writing)
    scene.soon(run, expected)
    os.close(reading)
    status = run.wait()
    assert status == 0, f"a closed pipe ended it with {status}"
    scene.finish(expected)


# ------------------------------------------------------------------------------------------------- disks


def full_disk(scene: Scene, expected: Expected) -> None:
    """For a while no file can grow: checkpoints, metrics or log."""
    run = scene.start()
    scene.soon(run, expected)
    under_way = bool(scene.steps())
    with contextlib.suppress(ProcessLookupError):
        _, hard = resource.prlimit(run.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (scene.random.choice((0, 1, 4096, 20000)), hard))
        time.sleep(scene.random.uniform(0, 0.3 * expected.seconds))
        resource.prlimit(run.pid, resource.RLIMIT_FSIZE, (hard, hard))
    status = run.wait()
    # Before the first step the run may be refused. After it, there is room again for the last save.
    assert status in ((0,) if under_way else (0, 1, 2)), f"a full disk ended it with {status}"
    if status == 0:
        expected.check(scene.out)
    scene.finish(expected)


def diverged(scene: Scene, expected: Expected) -> None:
    """The learning rate is far too high for a while: the last good checkpoint is kept."""
    assert scene.start("--steps", str(STEPS // 2)).wait() == 0
    rate = scene.random.choice(("10", "30", "1e3"))
    status = scene.start("--lr", rate, "--keep-checkpoints", "1", "--steps", str(STEPS)).wait()
    assert status in (0, 1), f"diverging ended it with {status}"
    good = f"step-{STEPS // 2:08d}"
    assert good in [path.name for path in checkpoint.checkpoints(scene.out)], f"--lr {rate} took {good} away"
    for path in checkpoint.checkpoints(scene.out):
        if path.name != good:
            shutil.rmtree(path)
    scene.finish(expected)


def damaged_checkpoint(scene: Scene, expected: Expected) -> None:
    """The newest checkpoint has a flipped bit, zeroed, missing or extra bytes, or lacks a file."""
    assert scene.start().wait() == 0
    path = checkpoint.checkpoints(scene.out)[-1] / scene.random.choice((*FILES, SUMS))
    contents = bytearray(path.read_bytes())
    at = scene.random.randrange(len(contents))
    kind = scene.random.choice(("flip", "zero", "cut", "more", "lost"))
    if kind == "flip":
        contents[at] ^= 1 << scene.random.randrange(8)
    elif kind == "zero":
        contents[at : at + 4096] = bytes(len(contents[at : at + 4096]))
    elif kind == "cut":
        del contents[at:]
    elif kind == "more":
        contents += b"\0"
    if kind == "lost":
        path.unlink()
    else:
        path.write_bytes(contents)
    scene.finish(expected)


def own_copies(scene: Scene, expected: Expected) -> None:
    """The user keeps copies of checkpoints beside the run's own."""
    assert scene.start("--steps", str(STEPS // 2)).wait() == 0
    for name in ("step-best", "step-final", "step-00000010.old"):
        shutil.copytree(checkpoint.checkpoints(scene.out)[0], scene.out / "checkpoints" / name)
    scene.finish(expected, "--steps", str(STEPS))
    assert all((scene.out / "checkpoints" / name).is_dir() for name in ("step-best", "step-final", "step-00000010.old"))


def unreadable_checkpoint(scene: Scene, expected: Expected) -> None:
    """The newest checkpoint is unreadable for now: it is neither set aside nor passed over."""
    assert scene.start("--steps", str(STEPS // 2)).wait() == 0
    path = checkpoint.checkpoints(scene.out)[-1] / MODEL
    kept = path.rename(scene.folder / "kept")
    path.symlink_to(path.name)  # a link to itself, which root can't read either
    assert scene.start("--steps", str(STEPS)).wait() == 2, "a checkpoint that can't be read is passed over"
    path.unlink()
    kept.rename(path)
    scene.finish(expected, "--steps", str(STEPS))


def lost_settings(scene: Scene, expected: Expected) -> None:
    """config.toml is lost or truncated: the checkpoint has every setting."""
    assert scene.start("--steps", str(STEPS // 2)).wait() == 0
    path = scene.out / "config.toml"
    if scene.random.random() < 0.5:
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: scene.random.randrange(path.stat().st_size)])
    flags = ["--resume", "--out", str(scene.out), "--steps", str(STEPS), "--device", "cpu"]
    status = Process(fastgpt2.command.main, flags, scene.log).wait()
    if status == 2:  # a truncated file is an error; without the file the run continues
        path.unlink()
        status = Process(fastgpt2.command.main, flags, scene.log).wait()
    assert status == 0, f"without config.toml it ends with {status}"
    expected.check(scene.out)


# ------------------------------------------------------------------------------------------------- data


def flipped_shard(scene: Scene, expected: Expected) -> None:
    """A bit of a shard is flipped: the shard is named and nothing is trained."""
    shard = scene.random.choice(sorted(scene.data.glob("*.bin")))
    good = shard.read_bytes()
    bad = bytearray(good)
    bad[scene.random.randrange(len(bad))] ^= 1 << scene.random.randrange(8)
    shard.write_bytes(bad)
    status = scene.start().wait()
    assert status == 2 and shard.name in scene.said(), f"a flipped bit in {shard.name} ended with {status}"
    shard.write_bytes(good)
    scene.finish(expected)


def cut_shard(scene: Scene, expected: Expected) -> None:
    """A shard is truncated while the run reads it."""
    shard = scene.data / "train_000000.bin"
    good = shard.read_bytes()
    run = scene.start()
    scene.soon(run, expected)
    os.truncate(shard, scene.random.randrange(len(good) // 2))
    status = run.wait()
    assert status in (0, 1, 2), f"a cut shard ended it with {status}"
    if status:
        assert shard.name in scene.said()
        scene.check_saved("though a shard was cut")
    shard.write_bytes(good)
    scene.finish(expected)


def killed_prepare(scene: Scene, expected: Expected) -> None:
    """prepare is killed: what it leaves is complete, refused or absent, and running it again gives the same bytes."""
    good = {path.name: path.read_bytes() for path in scene.data.glob("[!.]*")}
    flags = [str(scene.data.parent.parent / "text"), "--out", str(scene.data), "--tokenizer", "byte", "--overwrite"]
    flags += ["--val-fraction", "0.1"]
    run = Process(prepare_main, flags, scene.log)
    time.sleep(scene.random.uniform(0, 0.1))
    run.send(signal.SIGKILL)
    run.wait()
    status = scene.start().wait()
    assert status in (0, 2), f"data that prepare left half done ended with {status}"
    assert Process(prepare_main, flags, scene.log).wait() == 0, "prepare fails when run again"
    assert good == {name: (scene.data / name).read_bytes() for name in good}, "prepared again, the bytes differ"
    scene.finish(expected)


FAULTS: dict[str, Callable[[Scene, Expected], None]] = {
    fault.__name__: fault
    for fault in (
        killed, signalled, second_process, no_reader, stalled_reader, full_disk, diverged, damaged_checkpoint,
        own_copies, unreadable_checkpoint, lost_settings, flipped_shard, cut_shard, killed_prepare,
    )
}  # fmt: skip


def prepared(folder: Path) -> Path:
    """Import what the runs need, write texts and prepare them. Returns the folder of the data."""
    for module in IMPORTED_ONCE:
        import_module(module)
    (folder / "text").mkdir(parents=True)
    numbers = random.Random(0)
    for name in range(20):
        words = (f"{numbers.choice(('one', 'two', 'three'))} {numbers.randrange(100)}\n" for _ in range(300))
        (folder / "text" / f"{name}.txt").write_text("".join(words))
    prepare(PrepareConfig(sources=(folder / "text",), out=folder / "data", tokenizer="byte", val_fraction=0.1))
    return folder / "data"


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
    given = read_arguments(FaultsConfig, "tests.trainer.faults", arguments)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    lost = 0
    expected = Expected(folder / "expected", prepared(folder))
    for seed in range(given.seed, given.seed + given.rounds):
        for name in given.only:
            scene = Scene(folder / f"{name}-{seed}", folder / "data", f"{name}/{seed}")
            try:
                FAULTS[name](scene, expected)
            except AssertionError as error:
                lost += 1
                print(f"{name} --seed {seed}: LOST: {error}; see {scene.folder}", flush=True)
            else:
                print(f"{name} --seed {seed}: survived", flush=True)
                shutil.rmtree(scene.folder)
    total = given.rounds * len(given.only)
    print(f"{total - lost} of {total} survived")
    if not lost:
        shutil.rmtree(folder)
    return int(lost > 0)


if __name__ == "__main__":
    run_command(main)
