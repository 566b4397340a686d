"""What a run of several processes says when it fails: the process that failed first, and why."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from fastgpt2 import failures
from fastgpt2.parallel import Ranks, joined
from tests import forked, ranks

SHORT = datetime.timedelta(seconds=1)


def fails(ranks: Ranks, folder: Path) -> None:
    """The last process raises an error. The others lose it in a collective operation."""
    if ranks.rank == ranks.world - 1:
        raise ValueError("a bad batch\nwith details")
    dist.all_reduce(torch.ones(4))


def first_fails(ranks: Ranks, folder: Path) -> None:
    """Process 0 raises an error. It holds the store here, and the others find it gone."""
    if ranks.first:
        raise ValueError("a bad batch")
    dist.all_reduce(torch.ones(4))


def is_killed(ranks: Ranks, folder: Path) -> None:
    """The last process is killed."""
    if ranks.rank == ranks.world - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))


def first_is_killed(ranks: Ranks, folder: Path) -> None:
    """Process 0, which holds the store here, is killed."""
    if ranks.first:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(4))


def hangs(ranks: Ranks, folder: Path) -> None:
    """The last process does nothing until process 0 has given up."""
    group = dist.new_group(timeout=SHORT)
    if ranks.rank == ranks.world - 1:
        while not (folder / "done-0").exists():
            time.sleep(0.02)
        return
    dist.all_reduce(torch.ones(4), group=group)


def part(ranks: Ranks, folder: Path) -> None:
    """Each process waits for the others in another collective operation."""
    groups = [dist.new_group(timeout=SHORT) for _ in range(ranks.world)]
    if ranks.first:
        dist.all_reduce(torch.ones(4), group=groups[0])
    dist.broadcast(torch.ones(4), src=0, group=groups[1])


def main(how: str, path: str, grace_s: float) -> None:
    """Three steps, then a failure as the command would handle it. Prints what it would."""
    failures.GRACE_S, folder = grace_s, Path(path)
    with joined("cpu", 60) as ranks:
        try:
            for step in range(1, 4):
                ranks.place.say_next = 0.0
                ranks.at(step)
                dist.all_reduce(torch.ones(4))
            globals()[how](ranks, folder)
        except Exception as error:
            line = failures.explain(error, ranks, folder / "run")
            (folder / f"done-{ranks.rank}").touch()
            if line is not None:
                print(line)
            os._exit(1)
        os._exit(0)


def ended(how: str, world: int, folder: Path, grace_s: float) -> tuple[list[str], list[int]]:
    """All lines printed, and the status of each process."""
    code = f"from tests.trainer import test_failures as t; t.main({how!r}, {str(folder)!r}, {grace_s})"
    processes = forked.run_ranks(world, "-c", code, cwd=forked.ROOT)
    for process in processes:
        assert "Traceback" not in process.stderr, process.stderr
    return [line for p in processes for line in p.stdout.splitlines()], [p.returncode for p in processes]


@pytest.mark.parametrize(
    ("how", "world", "grace_s", "line", "statuses"),
    [
        (fails, 3, 60, "process 2 of 3 ended after step 3: ValueError: a bad batch; see {}/rank-2.txt", [1, 1, 1]),
        (first_fails, 2, 60, "process 0 of 2 ended after step 3: ValueError: a bad batch; see {}/rank-0.txt", [1, 1]),
        (is_killed, 2, 0.5, "process 1 of 2 died without a word, last heard of at step 3; see {}/rank-0.txt", [1, -9]),
        (first_is_killed, 2, 60, "process 1 of 2 ended: it lost process 0 after step 3; see {}/rank-1.txt", [-9, 1]),
        (
            hangs,
            2,
            0.5,
            "process 1 of 2 hangs or is cut off, last heard of at step 3: the others have waited 1 s in all_reduce; "
            "see {}/rank-0.txt",
            [1, 0],
        ),
    ],
)
def test_line_names_the_cause(how, world, grace_s, line, statuses, tmp_path) -> None:
    lines, got = ended(how.__name__, world, tmp_path, grace_s)
    folder = tmp_path / "run" / "failures"
    assert lines == [line.format(folder)]
    assert got == statuses
    for rank, status in enumerate(statuses):
        assert (folder / f"rank-{rank}.txt").exists() == (status == 1)


def test_processes_that_wait_in_different_operations(tmp_path) -> None:
    (line,), statuses = ended("part", 2, tmp_path, 60)
    assert line.startswith(
        "the processes lost each other: process 0 was in all_reduce after step 3, "
        "process 1 was in broadcast after step 3: RuntimeError: "
    )
    assert statuses == [1, 1]


def test_file_holds_each_attempt(tmp_path) -> None:
    for _ in range(2):
        ended("fails", 2, tmp_path, 60)
    consequence, cause = ((tmp_path / "run" / "failures" / f"rank-{rank}.txt").read_text() for rank in (0, 1))
    assert cause.count("ValueError: a bad batch\nwith details") == 2
    assert "process 1 of 2 on " in cause and " after step 3\n" in cause
    assert consequence.count("last collective operation: all_reduce, begun ") == 2
    assert consequence.count("/gloo/") == 2  # closed or reset by the peer


def test_without_a_folder_the_line_has_all(tmp_path) -> None:
    (tmp_path / "run").write_text("a file, where the folder would be")
    lines, _ = ended("fails", 2, tmp_path, 60)
    assert lines == ["process 1 of 2 ended after step 3: ValueError: a bad batch"]


def leave_with_a_vote_pending(path: str) -> None:
    """Process 1 fails, and lives until process 0 has noticed."""
    noticed = Path(path, "noticed")
    with contextlib.suppress(ValueError), joined("cpu", 60) as own:
        if own.rank == 1:
            dist.all_reduce(torch.ones(1), group=own.control, async_op=True)
            raise ValueError
        with pytest.raises(RuntimeError) as error:
            dist.all_reduce(torch.ones(1))
        noticed.write_text(str(error.value))
        raise ValueError  # leave without waiting
    while not noticed.exists():
        time.sleep(0.02)


def test_others_notice_at_once_that_a_process_fails(tmp_path) -> None:
    ranks.call(2, "tests.trainer.test_failures:leave_with_a_vote_pending", str(tmp_path))
    assert "Timed out" not in (tmp_path / "noticed").read_text()
