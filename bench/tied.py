"""`python -m bench.tied PARENT COMMAND...`: run a command that ends when its parent does, even by SIGKILL, with all
that it started.

It leads a process group. The kernel sends it SIGTERM when PARENT, the process that started it, is gone; it then kills
its group. SIGABRT, sent to the group, is left to the command, whose fault handler prints where it stands.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> int:
    """The command's exit status, as a shell has it: 128 and the signal where one ended it."""
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    signal.signal(signal.SIGABRT, lambda *_: None)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it was gone before the kernel was asked
        return 128 + signal.SIGTERM
    status = subprocess.run(command, check=False).returncode
    return 128 - status if status < 0 else status


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2:]))
