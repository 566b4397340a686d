"""`python -m bench`: run a command of the benchmarks, or list the commands."""

from __future__ import annotations

from fastgpt2.__main__ import run_named_command

COMMANDS = {
    name: f"bench.{name}" for name in ("cpu", "gpu", "smoke", "kernel_profile", "roofline", "report", "pictures")
}

if __name__ == "__main__":
    run_named_command("python -m bench", "Time fastgpt2 beside its peers, from a checkout.", COMMANDS)
