"""Where and on what a benchmark ran, in its JSON; and a line a result as it is made, for runs that may be cut off."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from bench.ops import contests
from bench.ops.contests import Contest, Measured, Missing, call_once, free_memory
from bench.ops.shapes import DEVICE
from bench.roofline import read_or_measure
from bench.step.steps import STEPS, TUNED, Kernels
from bench.timing import append_json_line, commit, environment, replay
from fastgpt2.kernels.tuning import use_table
from fastgpt2.ops import SLOTS

if not torch.cuda.is_available():
    # A thread that waits for another spins; on cores shared with other work that costs a hundredfold, by chance.
    torch.set_num_threads(1)

ENTERED = pytest.StashKey[dict[Any, dict[str, Measured | Missing]]]()
"""What the contests of this session have shown."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt2")
    group.addoption("--bench-commit", help="commit that is measured, where there is no git repository to ask")
    group.addoption("--bench-jsonl", type=Path, help="append each result to this file as soon as it is there")
    group.addoption("--bench-without", action="append", choices=list(SLOTS), default=[], help="PyTorch's form there")
    group.addoption("--bench-table", type=Path, help="launch configurations, named by the architecture (sm_90.json)")
    group.addoption("--bench-ceilings", type=Path, help="file of the device's ceilings; measured if it isn't there")


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install pytest-benchmark")
    if table := config.getoption("--bench-table"):
        try:
            use_table(table)
        except ValueError as error:
            raise pytest.UsageError(f"--bench-table: {error}") from None


SLOT = {
    "bench_attention": "attn",
    "bench_mlp": "mlp",
    "bench_norm": "norm",
    "bench_loss": "loss",
}
"""Whose kernel is the candidate "triton" of a file."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the candidates that can't run with these options.

    A candidate is deselected if it is a kernel of --bench-without, if replacing such kernels makes it equal to another
    candidate, or if it needs --bench-table and none was given.
    """
    known = _kernels(config)

    def left_out(item: Any) -> bool:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        if name == "triton":
            return SLOT[item.path.stem] in known.without
        if name not in STEPS:
            return False
        same = STEPS[name].with_kernels(known).settings == STEPS["ours-torch"].settings and name != "ours-torch"
        return same or (name == TUNED and known.table is None)

    out = [item for item in items if left_out(item)]
    items[:] = [item for item in items if item not in out]
    config.hook.pytest_deselected(items=out)


def _kernels(config: pytest.Config) -> Kernels:
    return Kernels(tuple(config.getoption("--bench-without")), config.getoption("--bench-table"))


@pytest.fixture(scope="session")
def kernels(pytestconfig: pytest.Config) -> Kernels:
    """What --bench-without and --bench-table say of ours."""
    return _kernels(pytestconfig)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # The machine's own name says nothing about the figures, and results are published.
    machine_info.pop("node", None)
    machine_info["fastgpt2"] = environment()


@pytest.hookimpl(optionalhook=True)
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


@pytest.fixture(scope="session")
def measured_ceilings(pytestconfig: pytest.Config) -> Callable[[], dict[str, Any] | None]:
    """The device's ceilings: of the file --bench-ceilings, else measured when first asked for, and written there.

    None on a CPU unless there is such a file: what is timed there is small, and the caches that hold it are faster than
    any ceiling of the memory's.
    """
    path = pytestconfig.getoption("--bench-ceilings")

    @functools.cache
    def get() -> dict[str, Any] | None:
        if DEVICE.type == "cpu" and path is None:
            return None
        found = read_or_measure(path, DEVICE)
        free_memory()
        return found

    return get


@pytest.fixture
def selected(request: pytest.FixtureRequest) -> list[str]:
    """The candidates of this test's contest whose tests were selected: those that differ from it in `name` alone."""

    here = request.node

    def beside(item: Any) -> bool:
        if (item.path, getattr(item, "originalname", "")) != (here.path, here.originalname):
            return False
        return all(item.callspec.params[k] == v for k, v in here.callspec.params.items() if k != "name")

    items: list[Any] = request.session.items
    return [item.callspec.params["name"] for item in items if beside(item)]


@pytest.fixture
def compete(
    request: pytest.FixtureRequest,
    benchmark: Any,
    record: Callable[[dict[str, Any]], None],
    selected: list[str],
    measured_ceilings: Callable[[], dict[str, Any] | None],
) -> Callable[[Contest, str], None]:
    """Show a candidate's figures in a contest, which the first test of it that asks runs with all that are selected.

    Under --benchmark-disable the candidate is checked and called once instead.
    """

    def show(contest: Contest, name: str) -> None:
        benchmark.group = contest.group
        if not benchmark.enabled:
            benchmark.pedantic(lambda: None)
            missing = call_once(contest, name)
            if missing is not None:
                _stop(missing)
            return
        entered = request.session.stash.setdefault(ENTERED, {})
        if contest.group not in entered:
            entered[contest.group] = contests.run(contest, selected)
        outcome = entered[contest.group][name]
        if isinstance(outcome, Missing):
            _stop(outcome)
        record(contests.result(contest, name, outcome, measured_ceilings()))
        replay(benchmark, outcome.timed)

    return show


def _stop(missing: Missing) -> NoReturn:
    if missing.failed:
        pytest.fail(missing.reason, pytrace=False)
    pytest.skip(missing.reason)
