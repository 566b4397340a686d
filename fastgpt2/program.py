"""What the user typed to run a command, for its usage line and its errors. It imports nothing, as it comes first."""

typed: dict[str, str] = {}
"""By module, where it wasn't `python -m MODULE`. The front door sets it."""


def program(module: str) -> str:
    """Such as `fastgpt2 train` or `python -m fastgpt2.train`."""
    return typed.get(module, f"python -m {module}")
