"""The whole training step as one CUDA graph: forward, backward, clip and optimizer, replayed with new tokens.

A step of a small batch is some hundred kernels that take less time to run than to launch; a graph launches them
at once. The first steps run as usual, on the stream that will be captured, so that libraries and allocator have
done their first-time work; the next one is captured, which computes nothing, and replayed from then on. Every
step is a step of the run: nothing is computed for the warm-up alone, and the losses are those of a run without.

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
"""(grad_accum, B, T + 1) tokens -> the loss and the gradients' norm, both on the device; the weights are updated. It
reads nothing that changes but the tokens, the weights and what the optimizer keeps on the device, and waits for
nothing. It must leave the gradients' memory to the graph: no gradients at its start."""


class CapturedStep:
    """Calls the work for the first steps and replays its graph from then on.

    It is handed the work rather than keep it: were the run in a cycle with its graph, their memory would be held until
    the garbage collector comes by.

    Args:
        device: the CUDA device that is worked on.
    """

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.warm_up = WARM_UP_STEPS
        self.tokens: Tensor
        self.results: tuple[Tensor, Tensor | None]

    def __call__(self, work: Work, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
        """One step of the work, the same in every call; returns the loss and the norm in memory of their own."""
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
        # Were the collector to find the graph of an earlier run during the capture, destroying it would end the capture
        # with an error (pytorch #161037); torch.cuda.graph collects nothing by itself since 2.9.
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self.results = work(self.tokens)
        self.graph = graph
