"""Contests between processes: rounds that are interleaved, and what a worker that fails costs the others."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.contest import Candidate, Measured, Missing
from bench.step.lockstep import Limits, Worker, contest
from bench.step.worker import FIRST_CALLS, Built, Round, Serving
from bench.timing import ROOT

MIB = 2**20


def sleeper(name: str, log: Path, **arguments: Any) -> Candidate:
    return Candidate("peer", "tests.bench.contestants:Sleeper", {"name": name, "log": str(log), **arguments})


def trouble(name: str, log: Path, what: str, at: int) -> Candidate:
    return Candidate("peer", "tests.bench.contestants:Trouble", {"name": name, "log": str(log), "what": what, "at": at})


def equal(name: str, values: list[dict[str, float]], reference: str, right: list[dict[str, float]]) -> str | None:
    return None if values == right else f"{name} is not {reference}"


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A contest of two that are right and five that are not: its outcomes, and the calls (name, index, begin, end)."""
    log = tmp_path_factory.mktemp("contest") / "calls"
    candidates = {
        "reference": sleeper("reference", log),
        "lean": sleeper("lean", log),
        "fat": sleeper("fat", log, sleep_ms=15.0, hold_bytes=200 * MIB),
        "wrong": sleeper("wrong", log, value=1.5),
        "crashes": trouble("crashes", log, "crash", at=FIRST_CALLS + 3),
        "hangs": trouble("hangs", log, "hang", at=FIRST_CALLS + 3),
        "fails": trouble("fails", log, "fail", at=0),
        "lacks-memory": trouble("lacks-memory", log, "lack_memory", at=0),
    }
    outcomes = contest(
        candidates,
        rounds=4,
        seconds=0.0,  # one call a round, after an untimed one
        limits=Limits(build=60.0, round=4.0),
        references=["not here", "reference"],
        agree=equal,
        at_once=2,
        untimed=["reference"],
    )
    calls = [line.split() for line in log.read_text().splitlines()]
    return {"outcomes": outcomes, "calls": [(n, int(i), float(a), float(b)) for n, i, a, b in calls], "log": log}


def test_what_goes_wrong_in_one_worker_costs_only_that_one(troubled: dict[str, Any]) -> None:
    outcomes = troubled["outcomes"]
    assert list(outcomes) == ["lean", "fat", "wrong", "crashes", "hangs", "fails", "lacks-memory"]
    assert {n for n, o in outcomes.items() if isinstance(o, Measured)} == {"lean", "fat", "lacks-memory"}
    for name in ("lean", "fat", "lacks-memory"):
        assert len(outcomes[name].timed.round_ms) == 4
    reasons = {
        "wrong": "not timed: wrong is not reference",
        "crashes": "the worker was ended by SIGABRT",
        "hangs": "no answer to 'round' within 4 s",
        "fails": "ValueError: what it was given is of no use",
    }
    for name, reason in reasons.items():
        lost = outcomes[name]
        assert isinstance(lost, Missing) and lost.reason == reason and lost.failed, lost
    assert "about to crash" in outcomes["crashes"].output
    assert 'contestants.py", line' in outcomes["hangs"].output, "a hang says where it hung"
    assert "Traceback" in outcomes["fails"].output


def test_rounds_are_interleaved_rotated_and_one_at_a_time(troubled: dict[str, Any]) -> None:
    calls = troubled["calls"]
    rounds: dict[str, list[list[float]]] = {}
    for name, index, began, ended in calls:
        if index >= FIRST_CALLS:  # the first are compared, not timed
            rounds.setdefault(name, []).append([began, ended])
    right = ("lean", "fat", "lacks-memory")
    assert all(len(rounds[name]) == 8 for name in right), "an untimed call and a timed one in each of 4 rounds"
    assert "reference" not in rounds and "wrong" not in rounds, "what only gives its values, or wrong ones, isn't timed"
    intervals = sorted(interval for several in rounds.values() for interval in several)
    assert all(before[1] <= after[0] for before, after in pairwise(intervals))
    assert max(ended for _, index, _, ended in calls if index < FIRST_CALLS) <= intervals[0][0], (
        "all are built before any is timed"
    )
    turns = [name for name, index, _, _ in calls if index in range(FIRST_CALLS + 1, 99, 2) and name in right]
    # Five take part in the first round, and in the second until two of them are lost.
    assert turns[:6] == ["lean", "fat", "lacks-memory", "fat", "lacks-memory", "lean"]
    assert turns[6:] == ["lacks-memory", "lean", "fat", "lean", "fat", "lacks-memory"]


def test_a_workers_time_and_memory_are_its_own(troubled: dict[str, Any]) -> None:
    lean, fat = (troubled["outcomes"][name] for name in ("lean", "fat"))
    assert all(ms >= 15.0 for ms in fat.timed.round_ms) and all(ms >= 5.0 for ms in lean.timed.round_ms)
    held = (fat.facts["peak_memory_bytes"] - lean.facts["peak_memory_bytes"]) / MIB
    assert 150 < held < 250, held
    assert lean.versions["torch"] == torch.__version__
    assert 0 < lean.facts["seconds_to_build"] < lean.seconds_to_first
    assert lean.timed.host_ms is None and lean.timed.info()["rounds"] == 4


def test_what_lacked_memory_beside_others_is_built_again_alone(troubled: dict[str, Any]) -> None:
    assert Path(f"{troubled['log']}.lacked").exists()
    again = [began for name, index, began, _ in troubled["calls"] if (name, index) == ("lacks-memory", 0)]
    assert troubled["outcomes"]["lacks-memory"].facts["built"] == 1, "it went on in the process that it had"
    others = [ended for name, index, _, ended in troubled["calls"] if index < FIRST_CALLS and name != "lacks-memory"]
    assert len(again) == 1 and max(others) <= again[0]


def test_out_of_time_is_no_failure_and_keeps_whole_rounds(tmp_path: Path) -> None:
    lost = contest({"slow": sleeper("slow", tmp_path / "calls")}, rounds=3, seconds=0.0, until=time.monotonic())
    assert lost == {"slow": Missing("the time was up before its first round", False, "")}


def test_a_candidate_that_hangs_while_it_is_built_costs_the_others_no_round(tmp_path: Path) -> None:
    log = tmp_path / "calls"
    candidates = {"hangs": trouble("hangs", log, "hang", at=0), "fine": sleeper("fine", log)}
    by = time.monotonic() + 20.0  # starting takes some seconds
    outcomes = contest(candidates, rounds=2, seconds=0.0, at_once=2, built_by=by, until=by + 60)
    hangs, fine = outcomes["hangs"], outcomes["fine"]
    assert isinstance(fine, Measured) and len(fine.timed.round_ms) == 2
    assert isinstance(hangs, Missing) and hangs.failed and "no answer to 'build'" in hangs.reason
    assert 'contestants.py", line' in hangs.output, "a hang says where it hung"
    nothing = contest({"late": sleeper("late", log)}, rounds=1, seconds=0.0, built_by=time.monotonic())
    assert nothing == {"late": Missing("the time was up before it was built", False, "")}


def test_a_worker_whose_parent_is_killed_goes_too(tmp_path: Path) -> None:
    program = f"""
from bench.contest import Candidate
from bench.step.lockstep import Limits, Worker
arguments = {{"name": "x", "log": {str(tmp_path / "calls")!r}, "what": "hang", "at": 0}}
worker = Worker("x", Candidate("peer", "tests.bench.contestants:Trouble", arguments), Limits())
import threading
threading.Thread(target=lambda: worker.build(), daemon=True).start()
while worker._process is None: pass
print(worker._process.pid, flush=True)
threading.Event().wait()
"""
    parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    worker = int(parent.stdout.readline())
    ends = time.monotonic() + 60
    while time.monotonic() < ends and not (tmp_path / "calls.x").exists():
        time.sleep(0.05)
    time.sleep(0.5)  # it is built, and now hangs in its first call
    os.kill(worker, 0)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    ends = time.monotonic() + 30
    while time.monotonic() < ends and _runs(worker):
        time.sleep(0.05)
    assert not _runs(worker)


def _runs(pid: int) -> bool:
    try:
        # A zombie whose new parent has not asked after it yet has ended.
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_round_on_a_gpu_is_one_wall_clock_over_consecutive_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """With clocks that are played: the host launches a call in 2 ms, the device works on it for 10 ms after that."""
    clock = SimpleNamespace(host_s=0.0, device_s=0.0)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            clock.device_s = max(clock.device_s, clock.host_s)
            self.at_s = clock.device_s

        def elapsed_time(self, later: Event) -> float:
            return 1e3 * (later.at_s - self.at_s)

    class Queued:
        device = torch.device("cuda")

        def __call__(self, index: int) -> None:
            clock.host_s += 0.002
            clock.device_s = max(clock.device_s, clock.host_s) + 0.010

    def synchronize(_: torch.device) -> None:
        clock.host_s = max(clock.host_s, clock.device_s)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    monkeypatch.setattr("bench.step.worker.time", SimpleNamespace(perf_counter=lambda: clock.host_s))
    serving = Serving()
    serving.contestant = Queued()
    answer = serving._cuda_round(5)
    assert serving.index == 5
    # The first call starts when it has been launched, later ones when the one before has ended.
    assert answer.samples_ms == pytest.approx([12.0, 10.0, 10.0, 10.0, 10.0])
    assert answer.ms == pytest.approx(52.0 / 5) and answer.host_ms == pytest.approx(2.0)


@pytest.mark.parametrize(("kind", "call_s", "untimed"), [("cuda", 1.0, 1), ("cpu", 1.0, 0), ("cpu", 0.1, 1)])
def test_a_round_on_a_gpu_begins_with_a_call_that_takes_back_its_memory(
    monkeypatch: pytest.MonkeyPatch, kind: str, call_s: float, untimed: int
) -> None:
    asked: dict[str, Any] = {}

    def ask(command: str, limit: float, **arguments: Any) -> Round:
        asked.update(arguments)
        return Round(1e3 * call_s, [1e3 * call_s], None)

    with Worker("x", sleeper("x", Path("unused")), Limits(), round_s=2.5) as worker:
        monkeypatch.setattr(worker, "ask", ask)
        worker.built = Built(kind, {}, [], call_s, 0.0, 0.0)
        worker.round()
    assert asked == {"calls": int(2.5 / call_s), "untimed": untimed}
