"""Triton's kernels run in its interpreter where there is no GPU; tests marked gpu are skipped there."""

import os
from collections.abc import Iterator
from importlib.util import find_spec

# The tests' tensors are tiny: a second thread would only wait, for seconds if other processes share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests import seeds

if not torch.cuda.is_available():
    # Triton reads this when it is imported, so nothing may import it earlier.
    os.environ.setdefault("TRITON_INTERPRET", "1")
    if find_spec("triton") is not None:
        from tests.interpreter import make_faster

        make_faster()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--seeds-from",
        type=int,
        default=0,
        metavar="N",
        help="shift the seeds of the numeric tests' inputs: 5, 10, 15 and 20 give 20 others (default: 0)",
    )


def pytest_configure(config: pytest.Config) -> None:
    seeds.first = config.getoption("--seeds-from")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device; this machine has none")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or fills the user's cache, in which text given to --data is prepared."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.hookimpl(trylast=True)
def pytest_runtest_logfinish(nodeid: str) -> None:
    """Leave the process after an illegal memory access: every later test would fail.

    Under pytest-xdist a new process runs the remaining tests. Waiting for the GPU after each test also blames a fault
    on the test that caused it.
    """
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
            torch.cuda.empty_cache()  # other processes' tests need the memory
    except RuntimeError as error:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit(f"{nodeid} lost the GPU: {error}", returncode=1)
