"""The whole training step as one CUDA graph: forward, backward, clip and optimizer, replayed with new tokens.

A step of a small batch is a few hundred kernels that take longer to launch than to run. A graph launches them all at
once. The first steps run normally on the stream to be captured, to finish the first-time work of libraries and the
allocator. The next step is captured, which computes nothing, and replayed from then on. The warm-up steps train too:
the losses equal those of a run without a graph.

What changes from step to step is in device memory that the graph reads: the tokens, the learning rate, the
optimizer's step count, and the generator's offset, which a replay advances as the step would have.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_STEPS = 3

Work = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""(grad_accum, B, T + 1) tokens -> the loss and the gradients' norm, both on the device; updates the weights.

Only the tokens, the weights and the optimizer's state on the device may change between calls. It never waits for the
device. It sets the gradients to None first, so that the graph owns their memory."""


class CapturedStep:
    """Calls the work for the first steps and replays its graph from then on.

    The work is passed to each call, not stored: a reference cycle would keep the run and its graph alive until the
    garbage collector runs.

    Args:
        device: the CUDA device of the run.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm_up = WARM_UP_STEPS
        self.tokens: Tensor
        self.results: tuple[Tensor, Tensor | None]

    def __call__(self, work: Work, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run one step. Pass the same work in every call. Returns copies of the loss and the norm."""
        if self.warm_up:
            self.warm_up -= 1
            return self._on_stream(work, tokens)
        if self.graph is None:
            self._capture(work, tokens)
        assert self.graph is not None
        self.tokens.copy_(tokens)
        self.graph.replay()
        loss, norm = self.results
        return loss.clone(), None if norm is None else norm.clone()

    def _on_stream(self, work: Work, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        here = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(here)
        with torch.cuda.stream(self.stream):
            results = work(tokens)
        here.wait_stream(self.stream)
        return results

    def _capture(self, work: Work, tokens: Tensor) -> None:
        self.tokens = torch.empty_like(tokens)
        # Collect now: if the collector destroys an earlier run's graph during the capture, the capture fails
        # (pytorch #161037), and torch.cuda.graph no longer collects by itself since 2.9.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.results = work(self.tokens)
        self.graph = graph
