"""How many exponentials a second the special-function units of a CUDA GPU give: a loop of exp2 in registers.

The machine code of the loop for sm_90, as its disassembly shows it: 64 MUFU.EX2 in 131 instructions with Triton 3.6
(the others 64 FADD that negate, and the loop's own 3), 256 in 259 with Triton 3.9. A warp's MUFU keeps the units of
its quarter of a multiprocessor, four lanes, for eight clocks, an instruction its scheduler for one: 512 clocks for 131
issued ones, so that the special-function units set the time. It reads no memory and writes each number once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl

BLOCK, WARPS = 1024, 4
"""Numbers and warps of a program: 8 numbers a thread, so that each waits for none of the others."""
RUNS, UNROLLED = 512, 8
"""Runs of the loop, and exponentials of each number in one."""
PROGRAMS = 16 * 8
"""For each multiprocessor: 16 fill its 64 warps, eight times over, so that the last wave is little of it."""


@triton.jit
def exp2_loop(out_ptr, RUNS: tl.constexpr, UNROLLED: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = offsets.to(tl.float32)
    for _ in range(RUNS):
        for _ in tl.static_range(UNROLLED):
            # Towards the fixed point 0.641: never an infinity, a zero or a denormal.
            x = tl.exp2(-x)
    tl.store(out_ptr + offsets, x)


def exponentials(device: torch.device) -> int:
    """How many a launch computes."""
    return _programs(device) * BLOCK * RUNS * UNROLLED


def make_launch(device: torch.device) -> Callable[[int], object]:
    """A launch of the loop, in bench.timing's form of a call."""
    out = torch.empty(_programs(device) * BLOCK, device=device)
    return lambda _: exp2_loop[(_programs(device),)](out, RUNS, UNROLLED, BLOCK, num_warps=WARPS)


def _programs(device: torch.device) -> int:
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count
