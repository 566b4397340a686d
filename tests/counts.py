"""`python -m tests.counts`: count what a step and each slot ask of PyTorch, running nothing.

Times on shared CPUs say little; these counts are the same on every machine, and CI holds them. The step is GPT-2
124M's with 4 sequences of 1024 tokens, on fake tensors, which have sizes and no values: nothing is computed, and what
asks for a value is found. Our opaque operators are looked into: their launchers run, on fake tensors too, with a tally
in place of each Triton kernel. It is the CPU's path that is counted: a launcher may do otherwise on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before torch.utils.flop_counter imports Triton, which reads it

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastgpt2.accuracy import Problem, attention_problem, loss_problem, mlp_problem, norm_problem
from fastgpt2.config import TrainConfig
from fastgpt2.console import run_command
from fastgpt2.fields import ConfigError
from fastgpt2.flags import read_arguments
from fastgpt2.model import GPT, saved_bytes
from fastgpt2.ops import Ops, Site, make_ops
from fastgpt2.run import Run, settle
from fastgpt2.settings import TORCH_DTYPE
from fastgpt2.slots import OURS, SLOTS, TORCH
from fastgpt2.state import RunState
from tests.operator_counter import Counts, OperatorCounter, counted, tallied

CHECKED_IN = Path(__file__).parent / "counts.json"
B, T, H, D, V = 4, 1024, 12, 64, 50257


# ------------------------------------------------------------------------------------------------ what is counted


def step_counts(choices: dict[str, str], dtype: str, ops: Ops | None = None, **settings: Any) -> Counts:
    """The second step of GPT-2 124M, when the optimizer has its state; `ops` in place of the choices' own."""
    config = TrainConfig(**{"model": "gpt2", "batch_size": B, "dtype": dtype, **settings})
    with FakeTensorMode():
        run, tokens = _run(config, choices, ops)
        with OperatorCounter(look_inside=False):
            run.step(0, tokens)
            with run.autocast():
                saved = saved_bytes(run.model, tokens[0, :, :-1], tokens[0, :, 1:])
        return {**counted(lambda: run.step(1, tokens)), "saved bytes": saved}


def compile_counts(choices: dict[str, str], dtype: str, ops: Ops | None = None) -> Counts:
    """What torch.compile makes of the model in three steps: of a tiny one, as the graphs don't depend on its sizes."""
    from torch._dynamo.utils import counters

    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16, "vocab_size": 64}
    config = TrainConfig(**shape, batch_size=2, dtype=dtype)  # type: ignore[arg-type]
    run, tokens = _run(config, choices, ops)
    graphs = 0

    def backend(module: Any, inputs: Any) -> Callable[..., Any]:
        nonlocal graphs
        graphs += 1
        return module.forward

    torch.compiler.reset()
    counters.clear()
    run.model.compile(backend=backend, dynamic=False)
    with tallied():
        made = [(run.step(step, tokens), graphs)[1] for step in range(3)]
    torch.compiler.reset()
    breaks = sum(counters["graph_break"].values())
    return {"graphs": made[0], "graph breaks": breaks, "recompilations": made[-1] - made[0]}


def _run(config: TrainConfig, choices: dict[str, str], ops: Ops | None) -> tuple[Run, Tensor]:
    """A run that is ready to step, and tokens (1, B, T + 1) for it."""
    config, device = settle(dataclasses.replace(config, device="cpu", steps=3))
    size = config.model_config()
    ops = ops or make_ops(choices, Site(dtype=config.torch_dtype, head_dim=size.head_dim))[0]
    model = GPT(size, ops, recompute=config.recompute == "blocks")
    run = Run(config, device, RunState.begin(model, config), None, None, {})  # type: ignore[arg-type]
    return run, torch.zeros(1, config.batch_size, size.block_size + 1, dtype=torch.int64)


PROBLEMS = {
    "attn": attention_problem((B, T, H, D)),
    "mlp": mlp_problem((B * T, H * D)),
    "norm": norm_problem((B * T, H * D)),
    "loss": loss_problem((T, H * D, V)),  # a chunk; the step has several
}


class _Slot(nn.Module):
    """An implementation with its inputs for parameters, so that what it saves beside them can be counted."""

    def __init__(self, op: Callable[..., Any], problem: Problem, dtype: torch.dtype) -> None:
        super().__init__()
        self.op, self.problem, self.dtype = op, problem, dtype
        for name, size in problem.sizes.items():
            kind = torch.promote_types(dtype, torch.float32) if name in problem.master else dtype
            self.register_parameter(name, nn.Parameter(torch.zeros(size, dtype=kind)))

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        given = [targets] if self.problem.targets else []
        with torch.autocast("cpu", self.dtype, enabled=self.dtype.itemsize == 2):
            outputs = self.op(*self.parameters(), *given, **self.problem.options)
        return outputs if isinstance(outputs, tuple) else (outputs,)


def slot_counts(slot: str, name: str, dtype: str) -> Counts:
    """Forward and backward of a slot's implementation at GPT-2 124M's sizes, in a precision as in training."""
    compute = TORCH_DTYPE[dtype]
    with FakeTensorMode():
        op = getattr(make_ops({slot: name}, Site(dtype=compute))[0], slot)
        module = _Slot(op, PROBLEMS[slot], compute)
        targets = torch.zeros(T, dtype=torch.int64)
        saved = saved_bytes(module, targets, targets)  # type: ignore[arg-type]
        upstream = [torch.empty_like(y) for y in module(targets, targets)]

        def both() -> object:
            outputs = module(targets, targets)
            return torch.autograd.grad(outputs, list(module.parameters()), upstream)

        return {**counted(both), "saved bytes": saved}


DTYPES = ("bfloat16", "float32")
CASES: dict[str, Callable[[], Counts]] = {
    # On a CPU the default's loss goes through its rows in thousands of operators, which take seconds to count: once,
    # with fewer rows, which are still two chunks.
    "step default float32, 2 sequences": functools.partial(step_counts, {}, "float32", batch_size=2),
    **{
        f"step {name} {dtype}": functools.partial(step_counts, choices, dtype)
        for name, choices in (("plain", TORCH), ("all-triton", OURS))
        for dtype in DTYPES
    },
    "step all-triton-recompute bfloat16": functools.partial(step_counts, OURS, "bfloat16", recompute="blocks"),
    **{
        f"{slot} {name} {dtype}": functools.partial(slot_counts, slot, name, dtype)
        for slot, table in SLOTS.items()
        for name, known in table.items()
        for dtype in DTYPES
        if not known.cuda
    },
    **{
        f"compile {name} bfloat16": functools.partial(compile_counts, choices, "bfloat16")
        for name, choices in (("default", {}), ("plain", TORCH), ("all-triton", OURS))
    },
}
"""By name, how to count. Slots are counted forward and backward."""


# ------------------------------------------------------------------------------------------------ the file


def version() -> str:
    """PyTorch's, without the patch: another one may count differently, and has counts of its own."""
    return ".".join(torch.__version__.split(".")[:2])


def checked_in() -> dict[str, Counts]:
    """The counts of this version of PyTorch by case; empty where there are none."""
    return json.loads(CHECKED_IN.read_text()).get(version(), {}) if CHECKED_IN.exists() else {}


def changes(case: str, old: Counts | None, new: Counts | None) -> list[str]:
    """What differs in a case, a line each: totals, then the calls and launches behind them."""
    if old is None or new is None:
        return [
            f"{case}: not in {CHECKED_IN.name}" if old is None else f"{case}: in {CHECKED_IN.name}, not counted now"
        ]
    lines = []
    for name in sorted({*old, *new}, key=lambda name: (isinstance(new.get(name), dict), name)):
        before, now = old.get(name, 0), new.get(name, 0)
        if isinstance(now, dict):
            lines += changes(f"{case}, {name}", before or {}, now)
        elif before != now:
            lines.append(f"{case}: {name} {'grew' if now > before else 'fell'} from {before:,} to {now:,}")
    return lines


INTENDED = "if that is intended: python -m tests.counts --write"


def table(counts: dict[str, Counts]) -> str:
    """One line a case, its numbers under their names."""
    columns: dict[str, tuple[str, Callable[[Any], str]]] = {
        "operators": ("operators", "{:,}".format),
        "views": ("views", "{:,}".format),
        "kernel launches": ("launches", "{:,}".format),
        "host synchronisations": ("syncs", "{:,}".format),
        "allocated bytes": ("allocated", _mebibytes),
        "peak bytes": ("peak", _mebibytes),
        "saved bytes": ("saved", _mebibytes),
        "flops": ("GFLOP", lambda value: f"{value / 1e9:,.1f}"),
    }
    lines = [["", *(title for title, _ in columns.values())]]
    rest = []
    for case, found in counts.items():
        if "graphs" in found:
            rest.append(f"{case}: " + ", ".join(f"{name} {value}" for name, value in found.items()))
        else:
            lines.append([case, *(form(found[name]) for name, (_, form) in columns.items())])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = [
        [line[0].ljust(widths[0])] + [x.rjust(w) for x, w in zip(line[1:], widths[1:], strict=True)] for line in lines
    ]
    return "\n".join(["  ".join(line) for line in aligned] + rest)


def _mebibytes(value: int) -> str:
    return f"{value / 2**20:,.1f} MiB"


@dataclasses.dataclass(frozen=True)
class CountsConfig:
    """What becomes of the counts (default: a table)."""

    check: bool = False
    """Compare with tests/counts.json; exit with status 1 if a count differs."""
    write: bool = False
    """Rewrite the file's counts of this version of PyTorch."""

    def __post_init__(self) -> None:
        if self.check and self.write:
            raise ConfigError("--check and --write exclude each other: leave one of them out")


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    given = read_arguments(CountsConfig, "tests.counts", arguments)
    torch.set_num_threads(1)  # the chunked loss takes some rows a thread at once
    counts = {}
    for number, (name, count) in enumerate(CASES.items(), start=1):
        print(f"{number} of {len(CASES)}: {name}", file=sys.stderr, flush=True)
        counts[name] = count()
    if given.write:
        known = json.loads(CHECKED_IN.read_text()) if CHECKED_IN.exists() else {}
        CHECKED_IN.write_text(json.dumps({**known, version(): counts}, indent=1, sort_keys=True) + "\n")
    if not given.check:
        print(table(counts))
        return 0
    known = checked_in()
    if not known:
        print(f"no counts of torch {version()} in {CHECKED_IN.name}: python -m tests.counts --write", file=sys.stderr)
        return 1
    lines = [line for case in {**known, **counts} for line in changes(case, known.get(case), counts.get(case))]
    print("\n".join([*lines, INTENDED]) if lines else f"{len(counts)} cases: the counts are those of {CHECKED_IN.name}")
    return int(bool(lines))


if __name__ == "__main__":
    run_command(main)
