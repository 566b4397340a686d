"""Train, resume, evaluate and sample in a process without what Windows lacks: modules, functions, signals, Triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT = """
import os, select, signal, sys
sys.modules["triton"] = None
# Other packages for Linux import what is hidden below.
import asyncio, selectors, subprocess
import matplotlib.backends.backend_agg, matplotlib.figure, rich.progress, safetensors.torch, torch

for module in ("resource", "fcntl", "termios", "pwd", "grp"):
    sys.modules[module] = None
for name in (
    "pread pwrite preadv fork register_at_fork sysconf getuid geteuid uname sched_getaffinity "
    "O_NONBLOCK O_CLOEXEC O_DIRECTORY O_NOFOLLOW O_SYNC"
).split():
    delattr(os, name)
for name in ("poll", "epoll", "PIPE_BUF", "POLLIN", "POLLOUT"):
    delattr(select, name)
for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGTSTP", "SIGCONT", "SIGQUIT", "SIGALRM", "SIGPIPE"):
    delattr(signal, name)
    del signal.Signals._member_map_[name]

opened = os.open
def windows_open(path, flags, *args, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", path)
    return opened(path, flags, *args, **options)
os.open = windows_open
from pathlib import Path
exists = Path.exists
Path.exists = lambda path: not str(path).startswith("/proc") and exists(path)
"""

PROGRAM = """
from pathlib import Path

import fastgpt2.evaluate, fastgpt2.sample
from fastgpt2 import TrainConfig, train
from fastgpt2.command import main
from fastgpt2.metrics import read_json_lines
from fastgpt2.prepare import PrepareConfig, prepare

out = Path("run")
Path("text.txt").write_text("To be, or not to be, that is the question. " * 20, encoding="utf-8")
Path("other.txt").write_text("Whether 'tis nobler in the mind to suffer. " * 20, encoding="utf-8")
prepare(PrepareConfig((Path("text.txt"), Path("other.txt")), out=Path("data"), tokenizer="byte", val_fraction=0.5))
words = "--model tiny --block-size 16 --batch-size 2 --data data --out run --save-every 2 --log-every 1 --dropout 0.1"
main([*words.split(), "--steps", "4"])
main("--out run --resume --steps 6".split())
whole = train(TrainConfig(model="tiny", block_size=16, batch_size=2, data="data", dropout=0.1, steps=6))
print("losses", whole.losses[4:] == [r["loss"] for r in read_json_lines(out / "metrics.jsonl")][4:])
print("peak", whole.peak_memory_bytes)
fastgpt2.evaluate.main(["--from", "run"])
sys.argv = ["sample", "--from", "run", "--max-new-tokens", "5", "--prompt", "To be"]
fastgpt2.sample.main()
"""


def test_training_needs_nothing_that_windows_lacks(tmp_path: Path) -> None:
    line = [sys.executable, "-c", WITHOUT + PROGRAM]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    for words in ("losses True\n", "peak None\n", "perplexity ", "To be"):
        assert words in done.stdout
    assert "nothing keeps a second run out of this folder" in done.stdout + done.stderr
    assert "peak memory" not in done.stdout
    assert (tmp_path / "run" / "loss.png").stat().st_size > 0
