"""Contestants that a worker of bench.step.lockstep can be given: each sleeps, and one thing goes wrong with it."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import torch


class Sleeper:
    """Sleeps in each call and notes when, in a file that all share."""

    def __init__(self, name: str, log: str, sleep_ms: float = 5.0, value: float = 1.0, hold_bytes: int = 0) -> None:
        self.device, self.keeps_memory = torch.device("cpu"), False
        built = Path(f"{log}.{name}")
        with built.open("a", encoding="utf-8") as file:
            file.write("x")
        self.facts: dict[str, Any] = {"built": built.stat().st_size}
        self._name, self._log, self._sleep_s, self._value = name, log, sleep_ms / 1e3, value
        self._held = torch.ones(hold_bytes, dtype=torch.uint8)

    def __call__(self, index: int) -> None:
        began = time.time()
        time.sleep(self._sleep_s)
        with open(self._log, "a", encoding="utf-8") as file:
            file.write(f"{self._name} {index} {began} {time.time()}\n")

    def check(self) -> dict[str, float]:
        return {"loss": self._value}


class Trouble(Sleeper):
    """Does something in its call number `at`."""

    def __init__(self, name: str, log: str, what: str, at: int) -> None:
        super().__init__(name, log)
        self._what, self._at = getattr(self, what), at

    def __call__(self, index: int) -> None:
        if index == self._at:
            self._what()
        super().__call__(index)

    def crash(self) -> None:
        print("about to crash", flush=True)
        os.abort()

    def hang(self) -> None:
        time.sleep(600)

    def fail(self) -> None:
        raise ValueError("what it was given\nis of no use")

    def lack_memory(self) -> None:
        """The first time, for those that know the log by this name."""
        mark = Path(f"{self._log}.lacked")
        if not mark.exists():
            mark.touch()
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 TiB")
