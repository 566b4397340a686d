"""Peak FLOPs and memory of a device, and how a run on a CPU reuses and returns freed memory."""

from __future__ import annotations

import mmap
import os
import resource
import subprocess
import sys

import pytest
import torch

from fastgpt2.device import keep_freed_memory, peak_flops, peak_memory_bytes


def test_peaks_are_known_by_whole_names() -> None:
    assert peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H100 PCIe", "bfloat16") == 756e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "tf32") == 156e12
    assert peak_flops("NVIDIA H200", "bfloat16") == 989.4e12
    assert peak_flops("NVIDIA H200 NVL", "bfloat16") == 835.5e12
    assert peak_flops("NVIDIA H100 80GB HBM3 MIG 3g.40gb", "bfloat16") is None
    assert peak_flops("NVIDIA L40", "bfloat16") is None
    assert peak_flops("cpu", "float32") is None
    assert peak_flops("NVIDIA H100 80GB HBM3", "float64") is None


def test_the_peak_of_memory_stays_when_memory_is_given_back() -> None:
    with mmap.mmap(-1, 64 << 20) as memory:
        memory[::4096] = b"x" * (len(memory) // 4096)
        peak = peak_memory_bytes(torch.device("cpu"))
    # The kernel counts in batches of pages.
    assert peak_memory_bytes(torch.device("cpu")) > peak - (8 << 20) > 64 << 20


# ------------------------------------------------------------------------------------------------------ memory on a CPU

FAULTS = """
import resource, sys
import torch
import fastgpt2.run
from fastgpt2.config import TrainConfig
if sys.argv[1] == "given back":
    fastgpt2.run.keep_freed_memory = lambda: None
torch.set_num_threads(1)
run = fastgpt2.run.build(TrainConfig(model="tiny", vocab_size=50257, batch_size=4, device="cpu"))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
of_steps = []
for step in range(6):
    before = faults()
    run.step(step, run.next_tokens(step))
    of_steps.append(faults() - before)
print(sum(of_steps[1:]))
"""


def kept_and_given_back(program: str) -> tuple[list[int], list[int]]:
    """Run a program twice, keeping freed memory and giving it back; return the numbers that each run prints."""
    # An earlier run in this process has set this variable; the program must set it itself.
    environment = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}

    def numbers(how: str) -> list[int]:
        line = [sys.executable, "-c", program, how]
        done = subprocess.run(line, capture_output=True, text=True, check=True, env=environment)
        return [int(number) for number in done.stdout.split()]

    return numbers("kept"), numbers("given back")


def test_a_step_on_a_cpu_reuses_the_memory_of_the_step_before() -> None:
    (kept,), (given_back,) = kept_and_given_back(FAULTS)
    # Each of five steps allocates two gradients and a chunk of logits of at least 13 MB, in pages of 4 KB. The kernel
    # may take pages back or hand out large ones at any time. 61 times as many faults were measured.
    assert 10 * kept < given_back


RESIDENT = """
import sys
from pathlib import Path
import torch
import fastgpt2.training
from fastgpt2.config import TrainConfig
if sys.argv[1] == "kept":
    fastgpt2.training.give_back_freed_memory = lambda: None
torch.set_num_threads(1)
config = TrainConfig(model="tiny", vocab_size=50257, batch_size=2, device="cpu", steps=1, loss="torch")
kept = fastgpt2.training.train(config)
def pages():
    return int(Path("/proc/self/statm").read_text().split()[1])
of_the_run = pages()
blocks = [torch.ones(2**22) for _ in range(8)]
del blocks
print(of_the_run, pages())
"""


def test_what_a_run_on_a_cpu_freed_goes_back_to_the_system() -> None:
    """The memory that the run freed, and memory that is freed after the run."""
    for _ in range(3):
        kept, given_back = kept_and_given_back(RESIDENT)
        # The logits, their gradient and the loss's intermediate are 26 MB each, the blocks made after the run 17 MB.
        # A large page that also holds a live block can't be returned, which has happened twice: hence three tries.
        less = [(k - g) * resource.getpagesize() for k, g in zip(kept, given_back, strict=True)]
        if min(less) > 2 * 26e6:
            return
    raise AssertionError(less)


def test_what_the_user_says_of_large_pages_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    for users, expected in (("0", "0"), ("", ""), (None, "1")):
        monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
        if users is not None:
            monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", users)
        keep_freed_memory()
        assert os.environ["THP_MEM_ALLOC_ENABLE"] == expected
