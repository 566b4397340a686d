"""`python -m fastgpt2`, installed as `fastgpt2`: run a command, or list the commands."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Mapping

from fastgpt2 import __version__
from fastgpt2.program import typed

COMMANDS = {
    "train": "fastgpt2.train",
    "prepare": "fastgpt2.prepare",
    "sample": "fastgpt2.sample",
    "evaluate": "fastgpt2.evaluate",
    "verify": "fastgpt2.verify",
    "inspect": "fastgpt2.kernels.tools.inspect",
    "tune": "fastgpt2.kernels.tools.tune",
    "profile": "fastgpt2.kernels.tools.profile",
    "sanitize": "fastgpt2.kernels.tools.sanitize",
}
"""`fastgpt2 NAME` is `python -m MODULE`, whose docstring's first line the list shows."""


def main() -> None:
    """The console script."""
    program = "python -m fastgpt2" if sys.argv[0].endswith("__main__.py") else "fastgpt2"
    run_named_command(program, "Train GPT-2 as published, in PyTorch and Triton.", COMMANDS)


def run_named_command(program: str, about: str, commands: Mapping[str, str]) -> None:
    """Run the command that the first argument names, as `python -m MODULE` would; or list the commands.

    Little is imported before that, as train must answer signals early.
    """
    name, *rest = sys.argv[1:] or ["--help"]
    if name in commands:
        typed[commands[name]] = f"{program} {name}"
        sys.argv[1:] = rest
        # Under the name __main__, as pickled functions of the tools' worker processes need it.
        runpy.run_module(commands[name], run_name="__main__", alter_sys=True)
        return
    from fastgpt2.console import run_command

    run_command(lambda: _answer(name, program, about, commands))


def _answer(name: str, program: str, about: str, commands: Mapping[str, str]) -> int:
    from fastgpt2.fields import ConfigError, nearest
    from fastgpt2.flags import documentation

    if name == "--version":
        print(f"fastgpt2 {__version__}")
        return 0
    if name not in ("-h", "--help"):
        known = nearest(name, [*commands, "--help", "--version"])
        problem = f"the command comes first, got {name!r}" if name.startswith("-") else f"unknown command {name!r}"
        raise ConfigError(f"{problem}{known} ({program} --help lists the commands)")
    print(f"usage: {program} COMMAND [flags]\n\n{about}\n\ncommands:")
    width = max(map(len, commands))
    for command, module in commands.items():
        print(f"  {command:{width}}  {documentation(module)[0]}")
    print(f"\n{program} COMMAND --help shows a command's flags.")
    return 0


if __name__ == "__main__":
    main()
