"""torch.cuda's streams and graphs, simulated on a CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

Results = tuple[Tensor | None, ...]


@dataclass
class Stream:
    name: str
    log: list[str]
    device = torch.device("cpu")

    def wait_stream(self, other: Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


class Graph:
    """A replay repeats the captured work: it reads the captured tokens and writes into the captured results."""

    work: Callable[[], Results]
    results: Results

    def replay(self) -> None:
        for kept, new in zip(self.results, self.work(), strict=True):
            if kept is not None and new is not None:
                kept.copy_(new)


class PlayedCuda:
    """Replaces torch.cuda's streams and graphs, and logs the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self._stream = Stream("main", self.log)
        self._graph: Graph | None = None
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side", self.log))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self._stream)
        monkeypatch.setattr(torch.cuda, "stream", self._on)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", self._capture)

    @contextlib.contextmanager
    def _on(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        yield
        self._stream = before

    @contextlib.contextmanager
    def _capture(self, graph: Graph, stream: Stream | None = None) -> Iterator[None]:
        self.log.append(f"capture on {(stream or self._stream).name}")
        self._graph = graph
        yield
        self._graph = None

    def capturable(self, work: Callable[..., Results]) -> Callable[..., Results]:
        """Wrap the work. While a graph is captured it computes nothing and returns memory that a replay fills."""
        last: Results = ()

        def recorded(*args: Any) -> Results:
            nonlocal last
            if self._graph is None:
                self.log.append(f"work on {self._stream.name}")
                last = work(*args)
                return last
            self._graph.work = partial(work, *args)
            self._graph.results = tuple(None if result is None else torch.empty_like(result) for result in last)
            return self._graph.results

        return recorded
