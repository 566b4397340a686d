"""One measurement, as it goes from the clock to the page: a line of --bench-jsonl, an entry of a record's `results`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Result:
    """What one candidate achieved in one contest. None stands for "not known" and "doesn't apply".

    Results with equal `contest` were timed in turn, round by round.

    Args:
        group: title of the contest, the same in every run of it.
        contest: unique to one run of the contest.
        op, shape, dtype: the work.
        compiled: whether a training step was compiled.
        backend: name of the candidate.
        role: "ours", "peer", or "floor", which does only a part of the work.
        slots: implementation of each slot, of a training step of ours.
        ms_median, ms_p20, ms_p80: over the rounds, milliseconds a call.
        round_ms: median of each round.
        host_ms: the host's time to launch a call.
        mfu: FLOP/s over the data sheet's peak, by the formula that counted the FLOPs.
        limit: the measured ceiling that binds; limit_ms is the time at that ceiling.
        held_before_bytes: memory held before the call; the peak includes it.
        seconds_to_first: seconds from process start to the first step done, by state of the caches.
        device_state: what nvidia-smi reported before and after the contest.
    """

    name: str = ""
    group: str = ""
    contest: str | None = None
    op: str
    backend: str
    role: str
    compiled: bool | None = None
    dtype: str
    shape: dict[str, Any]
    slots: dict[str, str] | None = None
    deterministic: bool | None = None
    stream: str | None = None
    recompute: str | None = None
    cuda_graph: bool | None = None

    ms_median: float | None = None
    ms_p20: float | None = None
    ms_p80: float | None = None
    ms_clock: str | None = None
    rounds: int = 0
    samples: int = 0
    round_ms: list[float] = field(default_factory=list)
    host_ms: float | None = None

    tokens: int | None = None
    flops: float | None = None
    bytes: float | None = None
    special: float | None = None
    flops_formula: str | None = None
    bytes_formula: str | None = None
    tokens_per_s: float | None = None
    tflops: float | None = None
    bytes_per_s: float | None = None
    mfu: dict[str, float | None] = field(default_factory=dict)
    peak_flops: float | None = None
    limit: str | None = None
    limit_ms: float | None = None
    limit_fraction: float | None = None

    peak_memory_bytes: int | None = None
    peak_memory_meaning: str | None = None
    held_before_bytes: int | None = None
    first_losses: list[float] = field(default_factory=list)
    seconds_to_build: float | None = None
    seconds_to_first: dict[str, float] = field(default_factory=dict)
    device_state: dict[str, dict[str, str]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Result:
        """Read a stored result. Keys that are no fields, such as a line's `kind`, are ignored."""
        return cls(**{f.name: stored[f.name] for f in fields(cls) if f.name in stored})
