"""Find races and serialised products in machine code, without a GPU.

On Hopper a product (PTX's wgmma, HGMMA in machine code) is asynchronous. Until a wait covers it, it owns its
accumulator and a left operand in registers: an instruction that writes them, or reads the accumulator, races with the
matrix units, and the result changes from run to run. A compiler has let that happen, for some tiles and not for others
(triton-lang/triton issue 9433: the next iteration overwrote a left operand).

HGMMA ... gsb0 closes a group of products. WARPGROUP.DEPBAR.LE gsb0, N waits until at most N groups run. Products of
other architectures wait by themselves, or keep nothing in registers.

If the assembler can't prove that nothing touches the accumulators, or finds a call between the products, it makes each
product a group and waits for it (ptxas's remark C7510, which Triton doesn't show). That is correct, but the matrix
units idle.

Warps with roles are ordered by barriers in shared memory. SYNCS.PHASECHK waits for one, SYNCS.ARRIVE arrives, each at a
base register plus the offset of a barrier or of a ring of them. One thread arrives for its warpgroup: between the wait
for its products and the arrival all its warps must meet at a BAR.SYNC. Machine code shows neither how many arrivals nor
how many bytes end a phase.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastgpt2.kernels.tools.bounds import control_flow, mnemonic, read_instructions

_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.F32\S* R(\d+), (?:R(\d+)|gdesc)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_LEFT_RUNNING = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]")
_BARRIER = re.compile(r"SYNCS\.(PHASECHK|ARRIVE)\S* .*\[\w+(?:\+UR\w+)?\+(0x[0-9a-f]+)\]")
_REGISTER = re.compile(r"\bR(\d+)\b")
# Instructions whose result is not a register: stores, jumps, barriers, comparisons into a predicate.
_NO_RESULT = re.compile(r"ST|RED|BAR|BRA|EXIT|NOP|.*DEPBAR|WARP|SYNCS|UTMA|LDGSTS|FENCE|MEMBAR|RET|CALL|CCTL|FCHK|R2P")
_LEFT = 4
"""Registers of a left operand: a thread's share of 64 rows by 16 channels in 16 bits, or by 8 in TF32."""


@dataclass(frozen=True)
class _Product:
    accumulator: frozenset[int]
    left: frozenset[int]
    closes: bool


def touched_in_flight(sass: str) -> list[str]:
    """The instructions that touch a register of a product in flight, on any path, a line each.

    Args:
        sass: a kernel as `cuobjdump --dump-sass` prints it.
    """
    instructions = read_instructions(sass)
    edges = control_flow(instructions)
    products = {i: product for i in edges if (product := _product(instructions[i][1]))}
    found: dict[tuple[int, int], str] = {}
    for i, product in products.items():
        # States of the paths: the instruction, groups closed since the product's, and whether its own is closed.
        waiting, seen = [(j, 0, product.closes) for j in edges[i]], set()
        while waiting:
            state = j, later, closed = waiting.pop()
            if state in seen:
                continue
            seen.add(state)
            text = instructions[j][1]
            wait = _WAIT.search(text)
            if wait and closed and later >= int(wait[1], 16):
                continue
            if _touches(text, products.get(j), product):
                found[i, j] = f"{_at(instructions[j])} touches a register of {_at(instructions[i])}, in flight"
            if j in products and products[j].closes:
                # No wait distinguishes more than a few groups. Counting further would only add states.
                closed, later = True, min(later + closed, 8)
            waiting += [(k, later, closed) for k in edges[j]]
    return [found[key] for key in sorted(found)]


def serialised(ptx: str, sass: str) -> bool:
    """Whether the assembler makes each product wait for the one before, though the PTX does not ask for it.

    Args:
        ptx: the assembler's input.
        sass: a kernel as `cuobjdump --dump-sass` prints it.
    """
    texts = [text for _, text in read_instructions(sass)]
    closes = [product.closes for text in texts if (product := _product(text))]
    waits = [int(wait[1], 16) for text in texts if (wait := _WAIT.search(text))]
    ungrouped = ptx.count("wgmma.mma_async") > ptx.count("wgmma.commit_group")
    not_left_running = bool(_LEFT_RUNNING.search(ptx)) and not any(waits)
    return bool(closes) and all(closes) and (ungrouped or not_left_running)


def unmatched_barriers(sass: str) -> list[str]:
    """Barriers that a role waits for and no other arrives at, or the other way round, a line each.

    Also those that only some of the roles with products use: all of these share the tiles.
    """
    used: dict[str, dict[str, set[int]]] = {}
    multiplying = set()
    for role, texts in enumerate(_roles(sass)):
        for text in texts:
            if match := _BARRIER.search(text):
                used.setdefault(match[2], {"PHASECHK": set(), "ARRIVE": set()})[match[1]].add(role)
            elif "HGMMA" in text:
                multiplying.add(role)
    found = [
        f"only some of the roles with products use the barrier at {offset}"
        for offset, by in sorted(used.items())
        if any(roles & multiplying and multiplying - roles for roles in by.values())
    ]
    for offset, by in sorted(used.items()):
        if any(by["ARRIVE"] <= {role} for role in by["PHASECHK"]):
            found.append(f"no other role arrives at the barrier at {offset}, which a role waits for")
        if any(by["PHASECHK"] <= {role} for role in by["ARRIVE"]):
            found.append(f"no other role waits for the barrier at {offset}, at which a role arrives")
    return found


def early_arrivals(sass: str) -> list[str]:
    """Arrivals for a warpgroup that not all its warps, on some path, have met before, a line each."""
    instructions = read_instructions(sass)
    edges = control_flow(instructions)
    found: dict[int, str] = {}
    for i in edges:
        if not _WAIT.search(instructions[i][1]):
            continue
        waiting, seen = list(edges[i]), set()
        while waiting:
            j = waiting.pop()
            text = instructions[j][1]
            if j in seen or "BAR.SYNC" in text or _WAIT.search(text):
                continue
            seen.add(j)
            if "SYNCS.ARRIVE" in text:
                found[j] = f"{_at(instructions[j])} comes before the warps have met after {_at(instructions[i])}"
            waiting += edges[j]
    return [found[j] for j in sorted(found)]


def _roles(sass: str) -> list[list[str]]:
    """The instructions of each role: what is reached from an indirect jump's targets, and the rest."""
    instructions = read_instructions(sass)
    edges = control_flow(instructions)
    starts = sorted({j for i in edges if mnemonic(instructions[i][1]) == "BRX" for j in edges[i]})
    without = {i: [j for j in after if j not in starts] for i, after in edges.items()}
    reached = []
    for start in [0, *starts]:
        waiting, seen = [start], set()
        while waiting:
            i = waiting.pop()
            if i not in seen:
                seen.add(i)
                waiting += without.get(i, [])
        reached.append([instructions[i][1] for i in sorted(seen)])
    return reached


def _at(instruction: tuple[int, str]) -> str:
    return f"{instruction[0]:#x} {instruction[1]}"


def _product(text: str) -> _Product | None:
    match = _PRODUCT.search(text)
    if match is None:
        return None
    columns, first, left = match.groups()
    # A thread keeps 64 rows by N columns / 128 threads, in float32.
    return _Product(
        frozenset(range(int(first), int(first) + int(columns) // 2)),
        frozenset(range(int(left), int(left) + _LEFT)) if left else frozenset(),
        "gsb0" in text,
    )


def _touches(text: str, later: _Product | None, product: _Product) -> bool:
    """Whether an instruction touches what a product in flight owns."""
    if later is not None:
        # Products on the same accumulator take turns by themselves; a left operand is only read.
        overlaps = bool(later.accumulator & product.accumulator) and later.accumulator != product.accumulator
        return overlaps or bool(later.accumulator & product.left or later.left & product.accumulator)
    written = _written(text)
    read = {int(number) for number in _REGISTER.findall(text)}
    return bool(written & product.left or (written | read) & product.accumulator)


def _written(text: str) -> set[int]:
    """The registers that an instruction other than a product writes."""
    text = re.sub(r"^@!?\w+\s+", "", text)
    if _NO_RESULT.match(text):
        return set()
    name, *_ = text.split()
    # A predicate may come before the result: SHFL PT, R3, ...; two mean that there is no other result.
    for operand in text[len(name) :].split(",")[:2]:
        if match := re.match(r"\s*R(\d+)\b", operand):
            return set(range(int(match[1]), int(match[1]) + _width(name)))
        if not re.match(r"\s*!?U?P", operand):
            break
    return set()


def _width(name: str) -> int:
    """Registers of a result."""
    if mnemonic(name) in ("LDSM", "HMMA"):
        return int(name[-1]) if name[-1] in "124" and mnemonic(name) == "LDSM" else 4
    if ".128" in name:
        return 4
    return 2 if ".64" in name or "WIDE" in name or name == "CS2R" else 1
