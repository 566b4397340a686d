"""Options of the benchmarks, and the fixture `compete`, which shows one candidate of a contest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from bench.contest import CUDA, DEVICE, Contest, Missing, free_memory, hold
from bench.result import Result
from bench.roofline import read_or_measure
from bench.smoke import FORMS
from bench.step.steps import STEPS, TUNED, Kernels
from bench.timing import append_json_line, commit, environment, replay
from fastgpt2.kernels.tuning import use_table
from fastgpt2.slots import SLOTS

if not torch.cuda.is_available():
    # A waiting thread spins. On cores shared with other work that can cost a hundredfold.
    torch.set_num_threads(1)

Held = tuple[dict[str, Any], dict[str, Any]]
HELD = pytest.StashKey[dict[str, Held]]()
"""What the contests of this session returned."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastgpt2")
    group.addoption("--bench-commit", help="commit that is measured, if there is no git repository to ask")
    group.addoption("--bench-jsonl", type=Path, help="append each result to this file at once")
    group.addoption(
        "--bench-without", action="append", choices=list(FORMS), default=[], help="use PyTorch's form there"
    )
    group.addoption("--bench-table", type=Path, help="launch configurations, named by the architecture (sm_90.json)")
    group.addoption("--bench-ceilings", type=Path, help="file of the device's ceilings; measured if it doesn't exist")
    for slot in SLOTS:
        group.addoption(
            f"--{slot}", action="append", default=[], metavar="MODULE:FUNCTION", help=f"time this {slot}, too"
        )


def pytest_configure(config: pytest.Config) -> None:
    if not config.pluginmanager.has_plugin("benchmark"):
        raise pytest.UsageError("the benchmarks need pytest-benchmark: pip install pytest-benchmark")
    if table := config.getoption("--bench-table"):
        try:
            use_table(table)
        except ValueError as error:
            raise pytest.UsageError(f"--bench-table: {error}") from None


def _outside(config: pytest.Config, module: Any) -> list[str]:
    """Implementations from outside to be timed by a module."""
    contest = getattr(module, "CONTEST", None)
    return [] if contest is None else config.getoption(f"--{contest.slot}")


@pytest.hookimpl(trylast=True)
def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A slot's operation has a test for each candidate, those from outside included."""
    contest = getattr(metafunc.module, "CONTEST", None)
    if contest is not None and "name" in metafunc.fixturenames:
        size = metafunc.module.SHAPES[0]
        direction = next(iter(metafunc.module.FLOPS))
        metafunc.parametrize(
            "name", list(contest(size, direction, _outside(metafunc.config, metafunc.module)).candidates)
        )


@pytest.fixture
def outside(request: pytest.FixtureRequest) -> Sequence[str]:
    """Implementations from outside that the command line names for this module's slot."""
    return _outside(request.config, request.module)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the candidates that can't run with these options: kernels of --bench-without, candidates that would then
    equal another, and the one that needs --bench-table if there is none."""
    known = _kernels(config)

    def left_out(item: Any) -> bool:
        name = item.callspec.params.get("name") if hasattr(item, "callspec") else None
        contest = getattr(item.module, "CONTEST", None)
        if contest is not None:
            return (contest.slot, name) in [FORMS[form] for form in known.without]
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
    """What --bench-without and --bench-table say of our kernels."""
    return _kernels(pytestconfig)


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    # Results are published, and the machine's name says nothing about them.
    machine_info.pop("node", None)
    machine_info["fastgpt2"] = environment()


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_commit_info(config: pytest.Config, commit_info: dict[str, Any]) -> None:
    commit_info.update(commit(config.getoption("--bench-commit")))


@pytest.fixture
def record(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Result], None]:
    """Keep a result in pytest-benchmark's extra_info, and as a line of --bench-jsonl."""

    def keep(result: Result) -> None:
        info = result.to_json() | {"name": request.node.name, "group": benchmark.group}
        benchmark.extra_info.update(info)
        path = request.config.getoption("--bench-jsonl")
        if path is not None:
            append_json_line(path, {"kind": "benchmark", **info})

    return keep


@pytest.fixture(scope="session")
def measured_ceilings(pytestconfig: pytest.Config) -> Callable[[], dict[str, Any] | None]:
    """The device's ceilings, from the file --bench-ceilings, or measured on first use and written there.

    None on a CPU without such a file: the work timed there is small and fits in caches that are faster than memory.
    """
    path = pytestconfig.getoption("--bench-ceilings")

    @functools.cache
    def get() -> dict[str, Any] | None:
        if not CUDA and path is None:
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
    record: Callable[[Result], None],
    selected: list[str],
    measured_ceilings: Callable[[], dict[str, Any] | None],
) -> Callable[[Contest, str], None]:
    """Show a candidate's figures in a contest, which the first of its tests runs with all that are selected."""

    def show(contest: Contest, name: str) -> None:
        benchmark.group = contest.group
        if contest.candidates[name].needs_gpu and not CUDA:
            pytest.skip(contest.candidates[name].needs_gpu)
        held = request.session.stash.setdefault(HELD, {})
        if contest.group not in held:
            able = [other for other in selected if CUDA or not contest.candidates[other].needs_gpu]
            held[contest.group] = hold(contest, able)
        outcomes, shared = held[contest.group]
        outcome = outcomes[name]
        if isinstance(outcome, Missing):
            stop(outcome)
        record(contest.result(name, outcome, measured_ceilings(), **shared))
        replay(benchmark, outcome.timed)

    return show


def stop(missing: Missing) -> NoReturn:
    if missing.failed:
        pytest.fail(f"{missing.reason}\n{missing.output}".rstrip(), pytrace=False)
    pytest.skip(missing.reason)
