"""Functions of the tests in several processes that train together, without torchrun: two take a second."""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
from importlib import import_module
from pathlib import Path
from typing import Any

from tests import forked


def call(world: int, target: str, *arguments: Any, seconds: int = 120, **environment: str) -> list[Any]:
    """What "module:function" returns in each of `world` processes, by rank. The processes haven't joined yet.

    arguments: the same for each; they and what is returned are pickled.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = Path(folder, "given")
        given.write_bytes(pickle.dumps(arguments))
        words = ("-m", "tests.ranks", target, folder)
        ended = forked.run_ranks(world, *words, cwd=forked.ROOT, seconds=seconds, **environment)
        for rank, process in enumerate(ended):
            assert process.returncode == 0, f"process {rank} ended with {process.returncode}: {process.stderr[-3000:]}"
        return [pickle.loads(Path(folder, f"result-{rank}").read_bytes()) for rank in range(world)]


def main(target: str, folder: str) -> None:
    module, function = target.split(":")
    arguments = pickle.loads(Path(folder, "given").read_bytes())
    result = getattr(import_module(module), function)(*arguments)
    Path(folder, f"result-{os.environ['RANK']}").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
