"""`python -m fastgpt2.kernels.tools.inspect`: inspect the machine code of every shipped kernel, without a GPU.

    python -m fastgpt2.kernels.tools.inspect --arch sm_90 --op attention

Each kernel is compiled for each architecture that has a table, as its launcher compiles it, with the assembler that
comes with Triton. The report lists registers a thread, bytes spilled, shared memory, blocks that fit on a
multiprocessor, matrix instructions, products that missed them, asynchronous copies, the instructions in each loop, and,
for GPT-2's sizes, a lower bound on the time at the 124M model's shape (bounds.py explains it).

In bfloat16, float16 and TF32 these are failures: a spill, a product outside the matrix units, a register touched while
a product owns it, serialised products, warp roles whose barriers don't match (hazards.py explains these), and a tile
over the table's shared memory. Exact float32 has no matrix unit and is only reported.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from typing import Annotated, Any

from fastgpt2.console import run_command
from fastgpt2.fields import Choice, ConfigError
from fastgpt2.flags import read_arguments
from fastgpt2.kernels.specs import all_kernels
from fastgpt2.kernels.specs.records import Work
from fastgpt2.kernels.tools.bounds import CARDS, SLACK, Bound, allowed, bound, check_in, read_code
from fastgpt2.kernels.tools.hazards import early_arrivals, serialised, touched_in_flight, unmatched_barriers
from fastgpt2.kernels.tools.toolkit import align, run_compiling
from fastgpt2.kernels.tuning import LaunchConfig, architectures, configurations, read_table

ELEMENTS = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "fp32"}
Precision = Annotated[str, Choice(tuple(ELEMENTS))]
Architecture = Annotated[str, Choice(tuple(architectures()))]

ASYNCHRONOUS_COPIES = {"cp.async": "LDGSTS", "TMA": "UTMALDG"}
MATRIX_INSTRUCTIONS = {"wgmma": "wgmma.mma_async", "mma": "mma.sync", "tcgen05": "tcgen05.mma"}

# A multiprocessor's shared memory in bytes (each block takes 1 KiB more for the system), registers and threads.
SHARED_MEMORY = {"sm_80": 164 << 10, "sm_90": 228 << 10, "sm_100": 228 << 10}
REGISTERS, THREADS = 65536, 2048

LEGEND = """\
registers    a thread; spilled and shared are bytes
blocks       that fit on a multiprocessor
missed       products outside the matrix units, of all
serialised   each product waits for the one before
loops        machine instructions that a warp spends on one run of each loop
at least     the least time at GPT-2 124M's shape (the wall that sets it, the share of the card's limit within reach)
"""


@dataclass(frozen=True)
class Case:
    """A kernel as it is shipped for one precision, size and architecture.

    constants: arguments to compile as constants, such as {"T": 1}, which Triton specializes on.
    variant: the name of one of the kernel's variants, or "" for the form that GPT-2's training calls.
    """

    op: str
    precision: str
    size: int
    arch: str
    config: LaunchConfig
    constants: dict[str, Any] = field(default_factory=dict)
    variant: str = ""


@dataclass(frozen=True)
class Report:
    case: Case
    registers: int
    spilled: int
    shared: int
    blocks: int
    instructions: list[str]
    products: int
    missed: int
    expected: int
    copies: list[str]
    loops: list[int]
    races: list[str]
    barriers: list[str]
    serialised: bool
    at_least: Bound | None
    unbound: bool

    @property
    def faults(self) -> list[str]:
        """The reasons not to ship it; empty for exact float32."""
        if self.case.precision == "float32":
            return []
        case, most = self.case, read_table(self.case.arch)["shared_memory"]
        least = allowed(case.arch, case.op, case.precision, _triton_version()) if self.at_least else None
        return [
            fault
            for wrong, fault in (
                (self.spilled, f"spills {self.spilled} bytes"),
                (self.races, f"races in {len(self.races)} places: {''.join(self.races[:1])}"),
                (self.barriers, f"barriers of warp roles: {''.join(self.barriers[:1])}"),
                (self.serialised, "each product waits for the one before: the assembler has serialised them"),
                (
                    self.expected and not self.products,
                    "no product found: the compiler's output has changed, and this tool must change too",
                ),
                (
                    self.unbound,
                    f"the loops, of {self.loops} instructions, are not those of the kernel's work",
                ),
                (
                    self.at_least is not None and least is not None and self.at_least.seconds > SLACK * least,
                    f"takes at least {_in_words(self.at_least)}; {(least or 0.0) * 1e3:.3f} ms is checked in",
                ),
                (self.missed, f"{self.missed} of {self.products} products miss the matrix units"),
                (self.shared > most, f"needs {self.shared} bytes of shared memory, the table allows {most}"),
            )
            if wrong
        ]


def shipped(
    archs: Iterable[str],
    precisions: Iterable[str] | None = None,
    sizes: Iterable[int] | None = None,
    ops: Iterable[str] | None = None,
    variants: bool = False,
) -> list[Case]:
    """The entries of the tables, of all or some precisions, sizes and kernels (by the beginning of the name).

    variants: include the other forms of a kernel (dropout, documents, evaluation).
    """
    return [
        Case(op, precision, size, arch, config, variant=variant)
        for arch in archs
        for (op, precision, size), config in configurations(arch).items()
        if (precisions is None or precision in precisions)
        and (sizes is None or size in sizes)
        and (ops is None or op.startswith(tuple(ops)))
        for variant in ("", *(all_kernels()[op].variants if variants else ()))
    ]


def why_nothing(
    known: Iterable[tuple[str, str, int]],
    ops: Iterable[str] | None,
    precisions: Iterable[str] | None,
    sizes: Iterable[int] | None,
) -> str | None:
    """The value of --op, --precision or --size that matches nothing, in a line that lists the choices; or None.

    Args:
        known: kernel, precision and size of what can be chosen.
    """
    for flag, place, asked in (("--op", 0, ops), ("--precision", 1, precisions), ("--size", 2, sizes)):
        there = dict.fromkeys(key[place] for key in known)
        chosen = {
            value: [x for x in there if x == value or (place == 0 and value and str(x).startswith(str(value)))]
            for value in (there if asked is None else asked)
        }
        if unknown := [str(value) or "''" for value, found in chosen.items() if not found]:
            has = "no kernel's name begins so" if flag == "--op" else "no kernel chosen has it"
            return f"{flag} {' '.join(unknown)}: {has}; there are {', '.join(map(str, there))}"
        known = [key for key in known if any(key[place] in found for found in chosen.values())]
    return None


def inspect_all(cases: list[Case]) -> list[Report]:
    """Compile the cases, one a processor at a time. Triton must not be interpreting in this process."""
    reports = []
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), get_context("fork")) as pool:
        for report in pool.map(inspect_one, cases):
            reports.append(report)
            if sys.stderr.isatty():
                print(f"\rcompiled {len(reports)} of {len(cases)}", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return reports


def inspect_one(case: Case) -> Report:
    import triton

    kernel = _compile(case)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        usage, sass = (
            subprocess.run([tool, option, file.name], check=True, capture_output=True, text=True).stdout
            for option in ("--dump-resource-usage", "--dump-sass")
        )
    registers = int(re.search(r"REG:(\d+)", usage)[1])  # type: ignore[index]
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])  # type: ignore[index]
    shared, warps = kernel.metadata.shared, case.config.num_warps
    products = re.findall(r"\b(?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma) .*", kernel.asm["ttgir"])
    # A plain dot over blocked operands is computed by multiply-adds, not by the matrix units.
    missed = [line for line in products if line.startswith("tt.dot ") and "parent = #blocked" in line]
    code, work = read_code(sass), _work(case)
    limit = bound(code, work, CARDS[case.arch], case.precision, case.config.num_warps) if work is not None else None
    return Report(
        case=case,
        registers=registers,
        spilled=spilled,
        shared=shared,
        blocks=_blocks(case, registers, shared, kernel.metadata.num_warps),
        instructions=[name for name, code in MATRIX_INSTRUCTIONS.items() if code in kernel.asm["ptx"]],
        products=len(products),
        missed=len(missed),
        expected=all_kernels()[case.op].products,
        copies=[name for name, instruction in ASYNCHRONOUS_COPIES.items() if instruction in sass],
        loops=[body.total() for body in code.loops],
        races=touched_in_flight(sass),
        barriers=[*unmatched_barriers(sass), *early_arrivals(sass)] if kernel.metadata.num_warps > warps else [],
        serialised=serialised(kernel.asm["ptx"], sass),
        at_least=limit,
        unbound=work is not None and limit is None,
    )


def _work(case: Case) -> Work | None:
    """What the kernel does at GPT-2 124M's shape; None if that model never calls it like this."""
    kernel = all_kernels()[case.op]
    work = kernel.work and kernel.work(case.precision, case.size, case.config)
    return work if work is not None and work.size == case.size and not (case.constants or case.variant) else None


def _compile(case: Case) -> Any:
    """Compile the kernel as its launcher does: at GPT-2's shapes the launch finds it in Triton's cache."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, element = all_kernels()[case.op], ELEMENTS[case.precision]
    options = case.config.arguments()
    blocks = {name: value for name, value in options.items() if name in kernel.function.arg_names}
    options = {name: value for name, value in options.items() if not name.startswith("BLOCK_")}
    variant = kernel.variants[case.variant] if case.variant else {}
    constants = kernel.constants(case.precision, case.size) | blocks | variant | case.constants
    retyped = {name: value for name, value in variant.items() if str(value).startswith("*")}
    constants = {name: value for name, value in constants.items() if value is not ... and name not in retyped}
    signature: dict[str, Any] = {}
    divisible: dict[tuple[int, ...], list] = {}
    # A launch records an empty list of attributes for each constant (Triton 3.6: only for strings). They are part of
    # the cache key.
    noted_always = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 7)
    types = kernel.types | kernel.descriptors(case.precision, case.size, case.config) | retyped
    for i, argument in enumerate(kernel.function.arg_names):
        if argument in constants:
            signature[argument] = "constexpr"
            if noted_always or isinstance(constants[argument], str):
                divisible[(i,)] = []
        else:
            default = "*{}" if argument.endswith("_ptr") else ("i32",) * 3 if argument.endswith("_strides") else "i32"
            signature[argument] = _of_element(types.get(argument, default), element)
            if argument.endswith(("_ptr", "_ptrs", "_strides")) or argument in kernel.multiples_of_16:
                divisible |= {path: [["tt.divisibility", 16]] for path in _places((i,), signature[argument])}
    target = GPUTarget("cuda", int(case.arch.removeprefix("sm_")), 32)
    source = _gluon_source() if kernel.function.is_gluon() else ASTSource
    return triton.compile(source(kernel.function, signature, constants, divisible), target=target, options=options)


def _gluon_source() -> Any:
    from triton.experimental.gluon._runtime import GluonASTSource

    return GluonASTSource


def _of_element(kind: Any, element: str) -> Any:
    """Triton's type of an argument, or the tuple of them, with the precision's element written in."""
    return kind.format(element) if isinstance(kind, str) else tuple(_of_element(part, element) for part in kind)


def _places(place: tuple[int, ...], kind: Any) -> list[tuple[int, ...]]:
    """Where the argument at `place` holds a scalar or pointer: itself, or each member of a tuple."""
    if isinstance(kind, str):
        return [place]
    return [inner for j, part in enumerate(kind) for inner in _places((*place, j), part)]


def _blocks(case: Case, registers: int, shared: int, warps: int) -> int:
    """Blocks that fit on a multiprocessor: by registers (allocated 256 at a time a warp), shared memory and threads.

    warps: of a block, those of all roles.
    """
    by_registers = REGISTERS // (-(-registers * 32 // 256) * 256 * warps)
    return min(by_registers, SHARED_MEMORY[case.arch] // (shared + 1024), THREADS // (32 * warps))


def table(reports: list[Report]) -> str:
    """A line a report."""
    return align([_row(report) for report in reports])


def _row(report: Report) -> dict[str, str]:
    case = report.case
    return {
        "<kernel": f"{case.op} {case.variant}".rstrip(),
        "<precision": case.precision,
        "<size": str(case.size),
        "<arch": case.arch,
        "<tile, warps, stages": str(case.config),
        "<registers": str(report.registers),
        "<spilled": str(report.spilled),
        "<shared": str(report.shared),
        "<blocks": str(report.blocks),
        "<matrix": "+".join(report.instructions) or "none",
        "<missed": f"{report.missed}/{report.products}",
        "<serialised": "yes" if report.serialised else "no",
        "<copies": "+".join(report.copies) or "none",
        "<loops": "+".join(map(str, report.loops)),
        "<at least": _in_words(report.at_least),
        "<": "; ".join(report.faults),
    }


def _triton_version() -> str:
    import triton

    return triton.__version__


def _in_words(limit: Bound | None) -> str:
    """0.35 ms (special 45%): the bound, the wall that sets it, and the share of the card's limit that is reachable."""
    return "" if limit is None else f"{limit.seconds * 1e3:.3f} ms ({limit.limit} {limit.fraction:.0%})"


@dataclass(frozen=True)
class InspectConfig:
    """Which kernels to inspect, and what becomes of the reports."""

    arch: tuple[Architecture, ...] = ()
    """Only these architectures (default: all)."""
    precision: tuple[Precision, ...] = ()
    """Only these precisions (default: all)."""
    op: tuple[str, ...] = ()
    """Only kernels whose name begins so."""
    size: tuple[int, ...] = ()
    """Only these head sizes, channels or vocabularies."""
    variants: bool = False
    """Include dropout, documents, evaluation and the like."""
    check_in_bounds: bool = False
    """Write the bounds to kernels/tools/bounds.json."""
    json: bool = False
    """Print JSON instead of a table."""


def main(arguments: list[str] | None = None) -> int:
    """The command; exit status 1 if a kernel must not ship."""
    given = read_arguments(InspectConfig, "fastgpt2.kernels.tools.inspect", arguments)
    archs, ops = given.arch or tuple(architectures()), given.op or None
    precisions, sizes = given.precision or None, given.size or None
    if problem := why_nothing(
        [(case.op, case.precision, case.size) for case in shipped(archs)], ops, precisions, sizes
    ):
        raise ConfigError(problem)
    reports = inspect_all(shipped(archs, precisions, sizes, ops, given.variants))
    if given.check_in_bounds:
        found = [(r.case.arch, r.case.op, r.case.precision, r.at_least.seconds) for r in reports if r.at_least]
        check_in(found, _triton_version())
    if given.json:
        print(json.dumps([asdict(r) | {"faults": r.faults} for r in reports], indent=1))
    else:
        print(f"{table(reports)}\n\n{LEGEND}")
        faulty = sum(bool(r.faults) for r in reports)
        print(f"{len(reports)} kernels compiled, {faulty} must not ship (exact float32 is reported only)")
    return int(any(r.faults for r in reports))


if __name__ == "__main__":
    run_command(lambda: run_compiling(main))
