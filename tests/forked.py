"""Python programs in processes forked from one that has imported PyTorch and the trainer, which takes seconds.

The process that forks is a new interpreter with nothing of the tests' but their environment.
"""

from __future__ import annotations

import functools
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import traceback
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = (
    "fastgpt2.command", "fastgpt2.evaluate", "fastgpt2.prepare", "fastgpt2.sample", "fastgpt2.training",
    "fastgpt2.verify", "matplotlib.backends.backend_agg", "matplotlib.figure", "rich.progress", "safetensors.torch",
    "torch._dynamo", "torch.distributed.fsdp", "torch.distributed.tensor", "pytest",
)  # fmt: skip


Ended = subprocess.CompletedProcess[str]


def run(*words: str, cwd: Path, environment: dict[str, str] | None = None) -> Ended:
    """Run what `python WORDS` runs: -m MODULE, -c CODE or a script, with arguments.

    environment: in place of this process's.
    """
    (ended,) = _run(words, cwd, [dict(os.environ) if environment is None else environment], seconds=0)
    return ended


def run_ranks(world: int, *words: str, cwd: Path, seconds: int = 120, **environment: str) -> list[Ended]:
    """Run the same in `world` processes at once, with the variables that torchrun sets. Returns them by rank.

    seconds: after which a process is killed by SIGALRM.
    environment: besides this process's.
    """
    here = {
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
    }
    common = {**os.environ, **here, "MASTER_PORT": str(free_port()), **environment}
    each = [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)]
    return _run(words, cwd, each, seconds)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run(words: tuple[str, ...], cwd: Path, environments: list[dict[str, str]], seconds: int) -> list[Ended]:
    server = _server()
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        calls = []
        for rank, environment in enumerate(environments):
            os.mkdir(own := f"{folder}/{rank}")
            call = {"words": words, "cwd": str(cwd), "environment": environment, "folder": own, "seconds": seconds}
            calls.append(call)
        server.stdin.write(json.dumps(calls) + "\n")
        server.stdin.flush()
        statuses = json.loads(server.stdout.readline())
        ended = []
        for call, status in zip(calls, statuses, strict=True):
            files = (Path(call["folder"], name) for name in ("stdout", "stderr"))
            printed = (file.read_text(encoding="utf-8", errors="replace") for file in files)
            ended.append(subprocess.CompletedProcess(words, status, *printed))
        return ended


@functools.cache
def _server() -> subprocess.Popen[str]:
    """It ends with this process, when nothing can write to its stdin."""
    command, pipe = [sys.executable, "-m", "tests.forked"], subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)


def serve() -> None:
    for module in IMPORTED:
        import_module(module)
    while line := sys.stdin.readline():
        children = []
        for call in json.loads(line):
            if child := os.fork():
                children.append(child)
            else:
                os._exit(_status(**call))  # the end of Python would take a second
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)


def _status(words: list[str], cwd: str, environment: dict[str, str], folder: str, seconds: int) -> int:
    """Run a program in this process, and say how it ends."""
    signal.alarm(seconds)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate((os.devnull, f"{folder}/stdout", f"{folder}/stderr")):
        os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
    how, *rest = words
    sys.path[0] = cwd
    sys.argv = {"-m": rest, "-c": ["-c", *rest[1:]]}.get(how, words)
    try:
        if how == "-m":
            sys.modules.pop(rest[0], None)  # runpy warns of what is there already
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        elif how == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_path(how, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


if __name__ == "__main__":
    serve()
