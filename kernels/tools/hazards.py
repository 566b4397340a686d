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
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from fastgpt2.kernels.tools.bounds import control_flow, mnemonic, read_instructions

_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\.F32\S* R(\d+), (?:R(\d+)|gdesc)")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_LEFT_RUNNING = re.compile(r"wgmma\.wait_group\.sync\.aligned\s+[1-9]")
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
