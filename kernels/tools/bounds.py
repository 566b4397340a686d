"""A lower bound on a kernel's time on a card, from its machine code and its shape.

Find the loops of the machine code (natural loops of its control flow) and count the instructions of each. The kernel's
`Work` says how often each loop runs at GPT-2 124M's shape. Then compute four walls, each as if the others did not
exist; the highest is the bound:

    matrix    products executed, masked halves of tiles included, over the matrix units' dense peak
    special   MUFU instructions (exp2, rsqrt, ...): 16 lanes a clock a multiprocessor
    issue     instructions: one a clock on each of a multiprocessor's four schedulers
    memory    bytes that must be read and written once, over the data sheet's bandwidth

No kernel reaches its bound: latencies, barriers, the last wave and L2 misses add to it. It is not a forecast, but a
kernel whose bound got worse has become worse. An iteration that the compiler peeled off a loop is counted in it as
well.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from fastgpt2.kernels.specs.records import Work


@dataclass(frozen=True)
class Card:
    """A card by its data sheet, at the boost clock. matrix: dense FLOPs a clock a multiprocessor, by precision."""

    name: str
    multiprocessors: int
    clock: float
    bandwidth: float
    matrix: dict[str, int]

    def per_second(self, per_clock: float) -> float:
        """Convert a rate a clock and multiprocessor to the card's rate a second."""
        return per_clock * self.multiprocessors * self.clock


def _matrix(dense_16_bit: int, float32: int) -> dict[str, int]:
    # Exact float32 has no matrix unit: 64 or 128 lanes do one multiply-add a clock.
    return {"bfloat16": dense_16_bit, "float16": dense_16_bit, "tf32": dense_16_bit // 2, "float32": float32}


CARDS = {
    "sm_80": Card("A100 SXM 80 GB", 108, 1.41e9, 2.039e12, _matrix(2048, 128)),
    "sm_90": Card("H100 SXM", 132, 1.83e9, 3.35e12, _matrix(4096, 256)),
    "sm_100": Card("B200", 148, 1.855e9, 8.0e12, _matrix(8192, 256)),
}
SPECIAL_LANES, SCHEDULERS, WARP = 16, 4, 32

CHECKED_IN = Path(__file__).with_name("bounds.json")
"""{architecture: {kernel: {precision: {Triton's minor version: seconds}}}}, for kernels of GPT-2 124M's sizes."""
SLACK = 1.001
"""A bound may exceed the one checked in by this factor, because of rounding."""

_WAITS = {"SYNCS", "NANOSLEEP", "USETMAXREG"}
_PRODUCTS = {"HGMMA", "HMMA", "UTCHMMA"}
_WORKS = _PRODUCTS | {"MUFU", "FADD", "FMUL", "FFMA", "LDG", "STG", "LDGSTS", "UTMALDG", "UTMASTG"}

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_TARGET = re.compile(r"\b(0x[0-9a-f]+)$")


@dataclass(frozen=True)
class Body:
    """A loop's instructions, without those of inner loops: of every run, and of runs that take a branch."""

    always: Counter[str]
    guarded: Counter[str]

    def total(self) -> int:
        return self.always.total() + self.guarded.total()


@dataclass(frozen=True)
class Code:
    """Instruction counts by the mnemonic's first part, such as MUFU: outside loops, and of each loop."""

    outside: Counter[str]
    loops: tuple[Body, ...]


@dataclass(frozen=True)
class Bound:
    """Seconds at each wall, the highest wall, and the largest share of the card's limit that the kernel can reach."""

    walls: dict[str, float]
    limit: str
    seconds: float
    fraction: float


def read_instructions(sass: str) -> list[tuple[int, str]]:
    """Address and text of each instruction, predicate first, as cuobjdump --dump-sass prints a kernel."""
    return [(int(m[1], 16), m[2]) for line in sass.splitlines() if (m := _INSTRUCTION.match(line))]


def read_code(sass: str) -> Code:
    """The loops of a kernel as cuobjdump --dump-sass prints it, in the order of their first instruction.

    If its warps have roles, loops with products come first: the compiler's versions order roles differently. Loops that
    only wait (on a barrier, for registers) are left out.
    """
    instructions = read_instructions(sass)
    names = [mnemonic(text) for _, text in instructions]
    edges = control_flow(instructions)
    loops = _natural_loops(edges)
    own = _innermost(loops)
    always = {head: _always(head, body, edges) for head, body in loops.items()}
    bodies = {head: Body(Counter(), Counter()) for head in sorted(loops)}
    outside: Counter[str] = Counter()
    for i in edges:  # what can be reached
        if i not in own:
            outside[names[i]] += 1
        elif i in always[own[i]]:
            bodies[own[i]].always[names[i]] += 1
        else:
            bodies[own[i]].guarded[names[i]] += 1
    found = [body for body in bodies.values() if not _only_waits(body)]
    if "BRX" in names:
        found.sort(key=lambda body: _PRODUCTS.isdisjoint({*body.always, *body.guarded}))
    return Code(outside, tuple(found))


def _only_waits(body: Body) -> bool:
    """Whether a loop waits for a barrier or for tensor memory, and computes, loads and stores nothing."""
    names = {*body.always, *body.guarded}
    return not names.isdisjoint(_WAITS) and names.isdisjoint(_WORKS)


def _always(head: int, body: set[int], edges: dict[int, list[int]]) -> set[int]:
    """The instructions that every run of a loop executes: its head can't be reached again without them."""
    inside = {i: [j for j in edges[i] if j in body] for i in body}
    entries = {head} | {j for i in body for j in inside[i] if len(inside[i]) > 1 or j != i + 1}
    found: set[int] = set()
    for first in entries:
        if head == first or head not in _ends(head, inside, avoid=first):
            # The straight line from a branch's target on is executed as a whole.
            i = first
            while i not in found:
                found.add(i)
                if inside[i] != [i + 1] or i + 1 in entries:
                    break
                i += 1
    return found


def _ends(head: int, inside: dict[int, list[int]], avoid: int) -> set[int]:
    """The successors of what is reachable from a loop's head without passing `avoid`."""
    return {j for i in _reached(head, inside, avoid) for j in inside[i]}


def mnemonic(text: str) -> str:
    """The first part of an instruction's name: MUFU of "@P0 MUFU.EX2 R3, R3"."""
    words = text.split()
    return (words[1] if words[0].startswith("@") else words[0]).split(".")[0]


def control_flow(instructions: list[tuple[int, str]]) -> dict[int, list[int]]:
    """The successors of each reachable instruction, by index.

    An indirect jump (BRX) sends warps to their roles. The listing doesn't say where a role begins: at code that
    nothing else reaches. At its end a role jumps back, to be sent to the next one. That edge is left out, so that the
    roles are not one loop.
    """
    index = {address: i for i, (address, _) in enumerate(instructions)}

    def following(i: int) -> list[int]:
        text = instructions[i][1]
        name, conditional = mnemonic(text), text.startswith("@") or "BRA.U" in text or "BRA.DIV" in text
        after = [i + 1] if i + 1 < len(instructions) else []
        if name in ("EXIT", "RET", "KILL", "BRX"):
            return after if conditional else []
        if name == "BRA" and (target := _TARGET.search(text)):
            return [index[int(target[1], 16)], *(after if conditional else [])]
        return after

    edges: dict[int, list[int]] = {}

    def follow(start: int) -> None:
        waiting = [start]
        while waiting:
            i = waiting.pop()
            if i not in edges:
                edges[i] = following(i)
                waiting += edges[i]

    if instructions:
        follow(0)
    sending = [i for i in edges if mnemonic(instructions[i][1]) == "BRX"]
    if sending:
        common = set(edges)
        roles = [i for i in range(1, len(instructions)) if _ends_a_path(instructions[i - 1][1])]
        for start in roles:
            if start not in edges and not _pads(instructions[start:]):
                follow(start)
                for i in sending:
                    edges[i].append(start)
        for i in edges.keys() - common:
            edges[i] = [j for j in edges[i] if j not in common]
    return edges


def _ends_a_path(text: str) -> bool:
    """Whether an instruction never goes on to the next."""
    return mnemonic(text) in ("BRX", "BRA", "EXIT") and not text.startswith("@")


def _pads(instructions: list[tuple[int, str]]) -> bool:
    """Whether these are a kernel's last: a jump to itself and nothing else, which no warp reaches."""
    return all(text == "NOP" or text == f"BRA {address:#x}" for address, text in instructions)


def _natural_loops(edges: dict[int, list[int]]) -> dict[int, set[int]]:
    """{head: body}: a loop is an edge back to a dominator, and everything that reaches the edge without passing it.

    Heads are few, so whether one dominates a node is decided by walking from the entry without it.
    """
    back: dict[int, list[int]] = {}
    for i, nexts in edges.items():
        for head in nexts:
            if head <= i:
                back.setdefault(head, []).append(i)
    before: dict[int, list[int]] = {}
    for i, nexts in edges.items():
        for j in nexts:
            before.setdefault(j, []).append(i)
    loops: dict[int, set[int]] = {}
    for head, sources in back.items():
        without = _reached(0, edges, avoid=head)
        tails = [i for i in sources if i not in without]
        if tails and not all(i == head for i in tails):
            body = {head}
            for tail in tails:
                body |= _reached(tail, before, avoid=head)
            loops[head] = body
    return loops


def _reached(start: int, edges: dict[int, list[int]], avoid: int) -> set[int]:
    found: set[int] = set()
    waiting = [start]
    while waiting:
        i = waiting.pop()
        if i != avoid and i not in found:
            found.add(i)
            waiting += edges.get(i, [])
    return found


def _innermost(loops: dict[int, set[int]]) -> dict[int, int]:
    """The head of the smallest loop that holds an instruction."""
    owner: dict[int, int] = {}
    for head, body in sorted(loops.items(), key=lambda item: -len(item[1])):
        owner.update(dict.fromkeys(body, head))
    return owner


def bound(code: Code, work: Work, card: Card, precision: str, warps: int) -> Bound | None:
    """The bound of a kernel; None if its machine code has other loops than its work says.

    warps: warps of a program.
    """
    if len(code.loops) != len(work.loops):
        return None
    parts: list[tuple[Counter[str], float]] = [(code.outside, work.programs)]
    for body, loop in zip(code.loops, work.loops, strict=True):
        special = body.always["MUFU"] * WARP * warps
        runs = loop.runs / (max(1, round(special / loop.special)) if loop.special else 1)
        parts += [(body.always, runs), (body.guarded, runs if loop.conditional is None else loop.conditional)]

    def total(name: str | None) -> float:
        """Warp instructions of all programs."""
        return warps * sum(times * (part[name] if name else part.total()) for part, times in parts)

    walls = {
        "matrix": work.executed_flops / card.per_second(card.matrix[precision]),
        "special": WARP * total("MUFU") / card.per_second(SPECIAL_LANES),
        "issue": total(None) / card.per_second(SCHEDULERS),
        "memory": work.bytes / card.bandwidth,
    }
    limit = max(walls, key=lambda wall: walls[wall])
    least = max(work.flops / card.per_second(card.matrix[precision]), walls["memory"])
    return Bound(walls, limit, walls[limit], least / walls[limit])


@cache
def checked_in() -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    return json.loads(CHECKED_IN.read_text()) if CHECKED_IN.exists() else {}


def allowed(arch: str, op: str, precision: str, triton: str) -> float | None:
    """The seconds checked in for this version of Triton, else the largest of any version; None if there are none."""
    known = checked_in().get(arch, {}).get(op, {}).get(precision, {})
    return known.get(_minor(triton), max(known.values(), default=None))


def check_in(found: list[tuple[str, str, str, float]], triton: str) -> None:
    """Write (architecture, kernel, precision, seconds) for a version of Triton. Entries of other versions stay."""
    bounds = json.loads(CHECKED_IN.read_text()) if CHECKED_IN.exists() else {}
    for arch, op, precision, seconds in found:
        known = bounds.setdefault(arch, {}).setdefault(op, {}).setdefault(precision, {})
        known[_minor(triton)] = float(f"{seconds:.4g}")
    CHECKED_IN.write_text(json.dumps(bounds, indent=1, sort_keys=True) + "\n")


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])
