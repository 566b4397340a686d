"""One round of tests/trainer/faults.py: every fault strikes once, and the run recovers."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("rich", reason="the command needs rich")

PLANTED = """
from unittest import mock
import sys
from fastgpt2 import checkpoint
from tests.trainer import faults

sys.argv = ["faults", "--only", "damaged_checkpoint", "--rounds", "3"]
with mock.patch.object(checkpoint, "damage", lambda *_: None):
    sys.exit(faults.main())
"""


def test_a_run_survives_every_fault() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.trainer.faults"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    first, second = done.stdout.splitlines()[-1].split(" of ")
    assert second == f"{first} survived" and int(first) >= 12


def test_a_fault_that_is_not_survived_is_noticed() -> None:
    """Without checking, a damaged checkpoint is resumed or breaks the resume."""
    done = subprocess.run([sys.executable, "-c", PLANTED], capture_output=True, text=True)
    assert done.returncode == 1 and ": LOST: " in done.stdout, done.stdout + done.stderr
