"""What the processes of a run agree on."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastgpt2.fields import ConfigError
from fastgpt2.parallel import ALONE, current, joined
from tests import ranks


def _agree() -> dict[str, Any]:
    def fails_on_1() -> int:
        if own.rank == 1:
            raise ConfigError("no such thing")
        return 7

    with joined("cpu", 30) as own:
        with joined("cpu", 30) as inner:
            assert inner is own is current()
        with pytest.raises(ConfigError) as one:
            own.together(fails_on_1)
        with pytest.raises(ConfigError) as all_of_them:
            own.together(lambda: int(ranks_error(own.rank)))
        with pytest.raises(ConfigError) as of_first:
            own.from_first(lambda: ranks_error(own.rank))
        with pytest.raises(ConfigError) as differs:
            own.same({"--lr": 0.1, "--steps": 100 + own.rank})
        own.same({"--lr": 0.1})
        found = {
            "mean": own.mean(torch.tensor([1.0, own.rank])).tolist(),
            "any": (own.any(own.rank == 1), own.any(False)),
            "gather": own.gather(own.rank),
            "from_first": own.from_first(lambda: f"made by {own.rank}"),
            "together": own.together(lambda: own.rank),
            "errors": [str(e.value) for e in (one, all_of_them, of_first, differs)],
        }
    assert current() is ALONE
    return found


def ranks_error(rank: int) -> str:
    raise ConfigError(f"error of {rank}")


def test_processes_agree() -> None:
    for rank, found in enumerate(ranks.call(2, "tests.trainer.test_parallel:_agree")):
        assert found["mean"] == [1.0, 0.5]
        assert found["any"] == (True, False)
        assert found["gather"] == [0, 1]
        assert found["from_first"] == "made by 0"
        assert found["together"] == rank
        assert found["errors"] == [
            "process 1 of 2: no such thing",
            f"error of {rank}",
            "error of 0",
            "--steps differs between the processes: process 0 has 100, process 1 has 101",
        ]


def test_a_process_alone_agrees_with_itself() -> None:
    x = torch.tensor(3.0)
    assert ALONE.mean(x) is x and ALONE.any(True) and not ALONE.any(False)
    assert ALONE.gather(5) == [5] and ALONE.from_first(lambda: 6) == 6
    ALONE.same({"--lr": 1})
    with pytest.raises(ConfigError, match=r"^error of 0$"):
        ALONE.together(lambda: ranks_error(0))
