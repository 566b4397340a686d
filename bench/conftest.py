"""Where and on what a benchmark ran, in its JSON; and a line a result as it is made, for runs that may be cut off."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.timing import append_json_line, commit, environment

if not torch.cuda.is_available():
    # A thread that waits for another spins; on cores shared with other work that costs a hundredfold, by chance.
    torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt2")
    group.addoption("--bench-commit", help="commit that is measured, where there is no git repository to ask")
    group.addoption("--bench-jsonl", type=Path, help="append each result to this file as soon as it is there")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # The machine's own name says nothing about the figures, and results are published.
    machine_info.pop("node", None)
    machine_info["fastgpt2"] = environment()


def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.update(commit(config.getoption("--bench-commit")))


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[dict[str, Any]], None]:
    """Keep what was measured: in pytest-benchmark's extra_info, and as a line of --bench-jsonl."""

    def keep(info: dict[str, Any]) -> None:
        benchmark.extra_info.update(info)
        path = request.config.getoption("--bench-jsonl")
        if path is not None:
            append_json_line(path, {"kind": "benchmark", "name": request.node.name, "group": benchmark.group, **info})

    return keep


@pytest.fixture(autouse=True)
def clean_device() -> Iterator[None]:
    """Leave nothing for the next benchmark: no memory held, no compiled code that it would only add a variant to."""
    yield
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
