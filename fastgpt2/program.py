"""How a command was started: what the user typed, and in how many processes. It imports little, as it comes first."""

import os

typed: dict[str, str] = {}
"""By module, where it wasn't `python -m MODULE`. The front door sets it."""


def program(module: str) -> str:
    """Such as `fastgpt2 train` or `python -m fastgpt2.train`."""
    return typed.get(module, f"python -m {module}")


def world_size() -> int:
    """How many processes torchrun has started, this one included."""
    world = os.environ.get("WORLD_SIZE", "")
    return max(1, int(world)) if world.isascii() and world.isdecimal() else 1
