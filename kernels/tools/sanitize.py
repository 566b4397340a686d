"""`python -m fastgpt2.kernels.tools.sanitize`: run every kernel at a small odd shape under compute-sanitizer.

memcheck finds accesses outside an allocation. racecheck finds shared memory that is read or written without a barrier
between. Each must first find a planted fault. Each tensor gets an allocation of its own: memcheck sees no fault inside
a block of PyTorch's caching allocator.

    python -m fastgpt2.kernels.tools.sanitize
    python -m fastgpt2.kernels.tools.sanitize --only attention layer

It needs a CUDA GPU and compute-sanitizer, which comes with the CUDA toolkit. It watches only this package's kernels, to
save time in libraries.
Exit status: 0; 1 if a tool found a fault, missed the planted one or did not finish; 2 if it can't run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from fastgpt2 import kernels
from fastgpt2.console import run_command
from fastgpt2.fields import Choice, ConfigError
from fastgpt2.flags import read_arguments
from fastgpt2.kernels.specs import all_kernels
from fastgpt2.kernels.tools.toolkit import align, find_tool

NAME = "compute-sanitizer"
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
SUMMARY = {
    "memcheck": re.compile(r"ERROR SUMMARY: (\d+) error"),
    "racecheck": re.compile(r"RACECHECK SUMMARY: (\d+) hazard"),
}
"""The last line of each tool's report, with the number of faults."""
SECONDS = 150.0
"""Time limit of a case under a tool."""
AT_A_TIME = 4

# memcheck: a write past an allocation of four. racecheck: a read of another thread's shared memory without a barrier.
PLANTED = {
    "memcheck": """extern "C" __global__ void planted_fault(float* x) { x[threadIdx.x] = threadIdx.x; }""",
    "racecheck": """extern "C" __global__ void planted_fault(float* x) {
        __shared__ volatile float y[256];
        y[threadIdx.x] = threadIdx.x;
        if (threadIdx.x < 4) x[threadIdx.x] = y[255 - threadIdx.x];
    }""",
}


def _random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype).requires_grad_()


def _attention(head_dim: int, T: int = 130, **options: Any) -> Callable[[torch.dtype], Tensor]:
    """Two sequences of just over two tiles, three heads. With D = 80 a tile is wider than the tensor."""
    return lambda dtype: kernels.flash_attention_qkv(_random(2, T, 3, 3, head_dim, dtype=dtype), **options)


def _documents(dtype: torch.dtype) -> Tensor:
    """Documents of 20 tokens, the last one cut off."""
    first = torch.arange(130, dtype=torch.int32, device=DEVICE).expand(2, -1) // 20 * 20
    return _attention(64, documents=torch.stack((first, (first + 20).clamp(max=130))), dropout_p=0.1)(dtype)


def _gelu_mlp(C: int) -> Callable[[torch.dtype], Tensor]:
    def run(dtype: torch.dtype) -> Tensor:
        x, w_fc, w_proj = (_random(*shape, dtype=dtype) for shape in ((130, C), (4 * C, C), (C, 4 * C)))
        return kernels.gelu_mlp(x, w_fc, _random(4 * C, dtype=dtype), w_proj, _random(C, dtype=dtype))

    return run


def _layer_norm(C: int) -> Callable[[torch.dtype], Tensor]:
    def run(dtype: torch.dtype) -> Tensor:
        x, residual = _random(7, C, dtype=dtype), _random(7, C, dtype=dtype)
        weight, bias = _random(C, dtype=torch.float32), _random(C, dtype=torch.float32)
        y, total = kernels.add_layer_norm(x, residual, weight, bias)
        return y + total + kernels.layer_norm(x, weight, bias) + kernels.layer_norm(x, weight, bias, residual=residual)

    return run


def _linear_cross_entropy(dtype: torch.dtype) -> Tensor:
    targets = torch.randint(1003, (130,), device=DEVICE)
    targets[5] = -100
    return kernels.linear_cross_entropy(_random(130, 72, dtype=dtype), _random(1003, 72, dtype=dtype), targets)


CASES: dict[str, Callable[[torch.dtype], Tensor]] = {
    "attention": _attention(64),
    "attention, odd heads": _attention(80),
    "attention, one token": _attention(64, T=1),
    "attention, documents and dropout": _documents,
    "gelu_mlp": _gelu_mlp(128),
    "gelu_mlp, odd channels": _gelu_mlp(72),
    "layer norm": _layer_norm(768),
    "layer norm, odd channels": _layer_norm(1001),
    "linear cross-entropy": _linear_cross_entropy,
}
PLANT = "planted fault"


@dataclass(frozen=True)
class Outcome:
    """A tool's verdict on a case.

    found: the number of faults; None if the tool printed no summary. report: the end of its output.
    """

    tool: str
    case: str
    found: int | None
    report: str

    @property
    def right(self) -> bool:
        """Whether it found what it should: the planted fault, and none elsewhere."""
        return self.found is not None and (self.found > 0) == (self.case == PLANT)


def run_case(name: str, tool: str) -> None:
    """Run the operation and its gradients in bfloat16 and float32, or the planted fault. Called under the tool."""
    if name == PLANT:
        fault = torch.cuda._compile_kernel(PLANTED[tool], "planted_fault")
        fault(grid=(1, 1, 1), block=(256, 1, 1), args=[torch.zeros(4, device=DEVICE)])
    else:
        torch.manual_seed(0)
        for dtype in (torch.bfloat16, torch.float32):
            CASES[name](dtype).float().square().mean().backward()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def watched() -> list[str]:
    """The names of the kernels to watch, the planted one included."""
    return ["planted_fault", *dict.fromkeys(kernel.function.__name__ for kernel in all_kernels().values())]


def check(program: str, tool: str, case: str) -> Outcome:
    """Run a case under a tool, in a process of its own."""
    names = [option for name in watched() for option in ("--kernel-name", f"kns={name}")]
    inner = [sys.executable, "-m", "fastgpt2.kernels.tools.sanitize", "--run", case, "--tool", tool]
    # A failing API call is not a kernel's fault: PyTorch probes the driver for optional features.
    command = [program, "--tool", tool, "--print-limit", "10", "--report-api-errors", "no", *names, *inner]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=SECONDS
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stdout or b"").decode(errors="replace")[-3000:]
        return Outcome(tool, case, None, f"stopped after {SECONDS:.0f} s\n{said}")
    text = done.stdout.decode(errors="replace")
    summaries = SUMMARY[tool].findall(text)
    # A case that raises proves nothing, whatever the tool counted. The planted fault may end its process.
    ended = done.returncode == 0 or case == PLANT
    return Outcome(tool, case, int(summaries[-1]) if summaries and ended else None, text[-3000:])


@dataclass(frozen=True)
class SanitizeConfig:
    """Which tools to run on which cases."""

    tool: tuple[Annotated[str, Choice(tuple(SUMMARY))], ...] = tuple(SUMMARY)
    """Tools to run."""
    only: tuple[str, ...] = ()
    """Only the cases whose name contains one of these."""
    run: Annotated[str, Choice((PLANT, *CASES))] | None = None

    def __post_init__(self) -> None:
        if unknown := [repr(text) for text in self.only if not (text and _named([text]))]:
            raise ConfigError(f"--only: no case's name contains {' or '.join(unknown)}; there are {', '.join(CASES)}")


def main(arguments: list[str] | None = None) -> int:
    """The command. check() starts it with --run for one case, in a process that a tool watches."""
    given = read_arguments(SanitizeConfig, "fastgpt2.kernels.tools.sanitize", arguments)
    if given.run:
        run_case(given.run, given.tool[0])
        return 0
    program = find_tool(NAME)
    if DEVICE.type != "cuda":
        raise ConfigError(f"no CUDA GPU here: {NAME} watches kernels run on one")
    if program is None:
        raise ConfigError(f"{NAME} is not installed; it comes with the CUDA toolkit")
    return report(program, given.tool, given.only)


def _named(texts: Sequence[str]) -> list[str]:
    """The cases whose name contains one of the texts; all cases if there are no texts."""
    return [case for case in CASES if any(text in case for text in texts or [""])]


def report(program: str, tools: Sequence[str], only: Sequence[str]) -> int:
    """Check the cases, several at a time, and print a line for each. Returns the exit status."""
    pairs = [(tool, case) for tool in tools for case in [PLANT, *_named(only)]]
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        outcomes = list(pool.map(lambda pair: check(program, *pair), pairs))
    for outcome in outcomes:
        if not outcome.right:
            print(f"==== {outcome.tool}: {outcome.case}\n{outcome.report}\n")
    print(align([_row(outcome) for outcome in outcomes]))
    wrong = sum(not outcome.right for outcome in outcomes)
    print(f"{len(outcomes)} checks, {wrong} not as expected")
    return int(wrong > 0)


def _row(outcome: Outcome) -> dict[str, str]:
    found = "no summary" if outcome.found is None else str(outcome.found)
    verdict = "as expected" if outcome.right else "WRONG"
    return {"<tool": outcome.tool, "<case": outcome.case, ">faults": found, "<": verdict}


if __name__ == "__main__":
    run_command(main)
