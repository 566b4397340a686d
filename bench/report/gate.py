"""`python -m bench.report.gate NEW.json [--against STORED.json]`: is anything of ours slower, or larger, than it was?

Clocks differ between two runs, so a result is judged by its speed over that of the fastest peer timed in turn with it,
where both runs have that peer: one that slowed down as much is the machine. Without one its own speed is taken, over
the median change of all the peers that both runs have. A slowdown is flagged beyond 2% and three standard errors: the
median of n rounds is known to 1.25 deviations over sqrt(n), and a deviation is half the distance from the 20th to the
80th percentile over 0.84; those of the two runs are added as squares. Peak memory is flagged beyond 1%.

Exit status: 0; 1 where something is flagged; 2 where the two can't be compared.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.report.results import (
    RESULTS,
    Key,
    Record,
    RecordError,
    align,
    best_peer,
    gib,
    key,
    load,
    milliseconds,
    pick,
    round_ratios,
    stored,
    work,
)
from bench.result import Result
from bench.timing import percentile
from fastgpt2.flags import Parser

SLOWER = 0.02
"""What two runs of the same code may differ by beyond what the spread over a run's rounds tells."""
STANDARD_ERRORS = 3.0
LARGER = 0.01


@dataclass(frozen=True)
class Change:
    """One of our results in two runs; speeds are over `against`, which is a peer or this machine's own change."""

    work: str
    backend: str
    against: str
    speed: float
    """The new speed over the old one, less 1: -0.05 is 5% slower."""
    allowed: float
    """A slowdown that may be noise."""
    memory: tuple[int, int] | None
    """Peak bytes before and now, where both runs know them in the same meaning."""

    @property
    def verdict(self) -> str:
        slower = ["slower"] * (self.speed < -self.allowed)
        larger = ["larger"] * (self.memory is not None and self.memory[1] > (1 + LARGER) * self.memory[0])
        return " and ".join(slower + larger)

    def row(self) -> dict[str, str]:
        return {
            "<": self.verdict or "ok",
            "<work": self.work,
            "<backend": self.backend,
            "<speed over": self.against,
            ">change": f"{self.speed:+.1%}",
            ">allowed": f"-{self.allowed:.1%}",
            ">GiB": "" if self.memory is None else " -> ".join(gib(count) for count in self.memory),
        }


def compare(new: Record, old: Record) -> list[Change]:
    """Every result of ours that two runs of the same device both have.

    Raises:
        RecordError: the devices differ, or nothing of ours is in both.
    """
    if new.device != old.device:
        raise RecordError(
            f"{_name(new)} was measured on {new.device}, {_name(old)} on {old.device}: compare runs of one device"
        )
    now, before = ({key(result): result for result in pick(record, "")} for record in (new, old))
    both = [name for name in now if name in before]
    drifts = [milliseconds(before[name]) / milliseconds(now[name]) for name in both if now[name].role == "peer"]
    machine = statistics.median(drifts) if drifts else None
    changes = [_change(now[name], before[name], now, before, machine) for name in both if now[name].role == "ours"]
    if not changes:
        raise RecordError(f"{_name(new)} and {_name(old)} have no result of ours in common: run the same stages")
    return changes


def _change(
    new: Result, old: Result, now: dict[Key, Result], before: dict[Key, Result], machine: float | None
) -> Change:
    peers = [
        r for name, r in now.items() if name in before and round_ratios(new, r) and round_ratios(old, before[name])
    ]
    peer = best_peer(new, peers)
    if peer is not None:
        against, factor = peer.backend, 1.0
        speeds = [round_ratios(new, peer) or [], round_ratios(old, before[key(peer)]) or []]
    else:
        against, factor = ("nothing: no peer is in both", 1.0) if machine is None else ("all peers' median", machine)
        speeds = [[1 / ms for ms in result.round_ms] for result in (new, old)]
    medians = [statistics.median(rounds) for rounds in speeds]
    meanings = {result.peak_memory_meaning for result in (new, old)}
    held = [result.peak_memory_bytes for result in (old, new)]
    return Change(
        work=" ".join(work(new)).rstrip(),
        backend=new.backend,
        against=against,
        speed=medians[0] / medians[1] / factor - 1,
        allowed=SLOWER + STANDARD_ERRORS * math.hypot(*(standard_error(rounds) for rounds in speeds)),
        memory=(held[0], held[1]) if len(meanings) == 1 and all(held) else None,  # type: ignore[arg-type]
    )


def standard_error(rounds: Sequence[float]) -> float:
    """Of the rounds' median, over it; from the spread of their middle, so that a round that was disturbed is none."""
    deviation = (percentile(list(rounds), 80) - percentile(list(rounds), 20)) / 2 / 0.84
    return 1.25 * deviation / math.sqrt(len(rounds)) / statistics.median(rounds)


def _name(record: Record) -> str:
    return record.path.name


def earlier(new: Record, folder: Path) -> Record:
    """The newest record in a folder of the same device and another commit.

    Raises:
        RecordError: there is none.
    """
    others = [r for r in stored(folder) if r.device == new.device and r.commit_id != new.commit_id]
    if not others:
        raise RecordError(
            f"no record of {new.device} and another commit is stored in {folder}: "
            "name one by --against, or store this one as the first"
        )
    return others[-1]


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = Parser(prog="python -m bench.report.gate", description="Flag what got slower or larger.")
    parser.add_argument("new", type=Path, help="the record of the run to judge")
    parser.add_argument(
        "--against", type=Path, help="the record to judge by (default: the newest of its device and another commit)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="where records are stored (bench/results)")
    given = parser.parse_args(arguments)
    new = load(given.new)
    old = load(given.against) if given.against else earlier(new, given.results)
    changes = compare(new, old)
    print(f"{new.device}: commit {new.commit_id[:12]} against {old.commit_id[:12]} ({_name(old)})")
    now, before = new.versions, old.versions
    if differing := [f"{n} {before[n]} -> {now[n]}" for n in now if before.get(n, now[n]) != now[n]]:
        print(f"versions differ, and a peer that got faster looks like a slowdown of ours: {', '.join(differing)}")
    print(align([change.row() for change in sorted(changes, key=lambda change: not change.verdict)]))
    flagged = [change for change in changes if change.verdict]
    print(f"{len(changes)} compared, {len(flagged)} flagged")
    return int(bool(flagged))


if __name__ == "__main__":
    from fastgpt2.console import run_command

    run_command(main)
