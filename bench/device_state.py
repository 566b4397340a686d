"""The GPU's clocks, power, temperature and throttle reasons, as nvidia-smi reports them; nothing here changes any."""

from __future__ import annotations

import os
import re
import subprocess
import time
from collections.abc import Callable
from typing import Any

STATE_EVERY_S = 5.0
"""Between two looks while a stage runs."""
_STATE_FIELDS = ["pstate", "clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "utilization.gpu"]
FIXED_FIELDS = [
    *("name", "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "memory.total"),
    *("ecc.mode.current", "persistence_mode", "compute_mode", "mig.mode.current"),
]
_THROTTLE_FIELDS = ["clocks_event_reasons.active", "clocks_throttle_reasons.active"]
"""The reasons for lower clocks, a bit mask, under the name of newer drivers and that of older ones."""


def query_gpu(fields: list[str]) -> dict[str, str]:
    """What nvidia-smi reports of the first visible GPU, {field: value with unit}, or nothing; it changes nothing."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    command = ["nvidia-smi", f"--id={gpu}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.split("\n")[0].split(",")]
    return dict(zip(fields, values, strict=False))


def make_state_query() -> Callable[[], dict[str, str]]:
    """query_gpu of what changes, with the name for the throttle reasons that this driver knows."""
    known = next((field for field in _THROTTLE_FIELDS if query_gpu([field])), None)
    fields = [*_STATE_FIELDS, *([known] if known else [])]
    return lambda: query_gpu(fields)


class States:
    """Looks at the device's state every few seconds and remembers the extremes."""

    def __init__(self, state: Callable[[], dict[str, str]] | None) -> None:
        self._state, self._next = state, time.monotonic()
        self._seen: list[dict[str, str]] = []

    def look(self) -> None:
        if self._state is not None and time.monotonic() >= self._next:
            self._seen.append(self._state())
            self._next = time.monotonic() + STATE_EVERY_S

    def summary(self) -> dict[str, Any]:
        """{field: {"min", "max", "last"}} of numbers, with their unit in `last`; the distinct values of all else."""
        fields: dict[str, Any] = {"looks": len(self._seen)}
        for field in {name: None for seen in self._seen for name in seen}:
            values = [seen[field] for seen in self._seen if field in seen]
            numbers = [float(m[1]) for value in values if (m := re.fullmatch(r"([\d.]+)(?: [A-Za-z%]+)?", value))]
            if len(numbers) == len(values):
                fields[field] = {"min": min(numbers), "max": max(numbers), "last": values[-1]}
            else:
                fields[field] = sorted(set(values))
        return fields
