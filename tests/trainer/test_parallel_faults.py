"""Some faults of tests/trainer/parallel_faults.py, each once, and the run recovers."""

from __future__ import annotations

import subprocess
import sys

FAULTS = ("killed_once_fsdp", "interrupted_fsdp", "cut_shard_fsdp")


def test_run_recovers() -> None:
    command = [sys.executable, "-m", "tests.trainer.parallel_faults", "--only", *FAULTS]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line.partition(",")[0] for line in done.stdout.splitlines()] == [f"{n}: 1 of 1 recovered" for n in FAULTS]
