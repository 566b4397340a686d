"""Races with products in flight, and serialised products, are found in machine code; what only looks so is not."""

from __future__ import annotations

import pytest

from fastgpt2.kernels.tools.hazards import early_arrivals, serialised, touched_in_flight, unmatched_barriers
from tests.kernels.machine_code import sass

# A product of 64 rows and 16 columns owns 8 registers of each thread, here R24 to R31, and R4 to R7 as left operand.
ISSUED = "HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24, gsb0"
ANOTHER = "HGMMA.64x16x16.F32.BF16 R40, gdesc[UR4], RZ, !UPT, gsb0"
COVERED = "WARPGROUP.DEPBAR.LE gsb0, 0x0"
ONE_LEFT = "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    "lines",
    [
        (ISSUED, "MOV R4, R9"),
        (ISSUED, "F2FP.BF16.F32.PACK_AB R7, R1, R2"),
        (ISSUED, "LDS.128 R4, [R12]"),
        (ISSUED, "LDSM.16.M88.4 R2, [R12]"),
        (ISSUED, "SHFL.BFLY PT, R5, R9, 0x1, 0x1f"),
        (ISSUED, "FADD R1, R2, R31"),
        (ISSUED, "@P0 FMUL R24, R1, R2"),
        (ISSUED, "CS2R R30, SRZ"),
        (ISSUED, "STG.E [R2], R24"),
        (ISSUED, "HGMMA.64x16x16.F32.BF16 R32, R24, gdesc[UR4], RZ, !UPT"),
        (ISSUED, "HGMMA.64x16x16.F32.BF16 R0, gdesc[UR4], RZ, !UPT"),
        # A wait that lets one group run covers the older of two, not the younger.
        (ANOTHER, ISSUED, ONE_LEFT, "MOV R4, R9"),
        # By the way back, before the wait at the loop's head.
        ("MOV R4, R9", COVERED, ISSUED, "@P0 BRA 0x0"),
        # By the path that jumps over the wait.
        (ISSUED, "@P0 BRA 0x30", COVERED, "MOV R4, R9"),
        # In TF32, and from float16, whose name isn't there.
        ("HGMMA.64x16x8.F32.TF32 R24, R4, gdesc[UR4], R24, gsb0", "MOV R4, R9"),
        ("HGMMA.64x16x16.F32 R24, R4, gdesc[UR4], R24, gsb0", "MOV R4, R9"),
        # The group is not closed before the wait.
        ("HGMMA.64x16x16.F32.BF16 R24, R4, gdesc[UR4], R24", COVERED, "MOV R4, R9"),
    ],
)  # fmt: skip
def test_a_race_is_found(lines: tuple[str, ...]) -> None:
    races = touched_in_flight(sass(*lines, "EXIT"))
    assert races and "in flight" in races[0] and "HGMMA" in races[0]


@pytest.mark.parametrize(
    "lines",
    [
        (ISSUED, COVERED, "MOV R4, R9", "FADD R1, R2, R31"),
        (ISSUED, "MOV R8, R4", "LDS.64 R2, [R12]", "LDSM.16.M88.2 R2, [R12]", "IMAD.WIDE R22, R1, R2, R8"),
        (ISSUED, "ISETP.GE.AND P0, PT, R4, R5, PT", "FSETP.GT.AND P0, PT, R4, RZ, PT", "STS [R4], R5"),
        # Products on the same accumulator, from the same left operand.
        (ISSUED, ISSUED, "HGMMA.64x16x16.F32.BF16 R32, R4, gdesc[UR4], RZ, !UPT", COVERED),
        (ISSUED, ANOTHER, ONE_LEFT, "MOV R4, R9", "FADD R1, R2, R31"),
        (ISSUED, "BRA 0x30", "MOV R4, R9", COVERED, "MOV R4, R9"),
        (COVERED, "MOV R4, R9", ISSUED, "@P0 BRA 0x0"),
    ],
)
def test_what_waits_or_only_reads_is_none(lines: tuple[str, ...]) -> None:
    assert touched_in_flight(sass(*lines, "EXIT")) == []


# What the compiler asks for: a group of products, after which the next group may be issued.
MMA, COMMIT, WAIT = "wgmma.mma_async.sync ...;", "wgmma.commit_group.sync.aligned;", "wgmma.wait_group.sync.aligned"
OPEN = ISSUED.removesuffix(", gsb0")


@pytest.mark.parametrize(
    ("ptx", "lines", "expected"),
    [
        # Four products of a group, of which the last closes it.
        ((MMA, MMA, MMA, MMA, COMMIT, f"{WAIT} 0;"), (OPEN, OPEN, OPEN, ISSUED, COVERED), False),
        ((MMA, MMA, MMA, MMA, COMMIT, f"{WAIT} 0;"), (ISSUED, COVERED) * 4, True),
        # A group is one product: it shows by the wait that leaves it running.
        ((MMA, COMMIT, f"{WAIT} 1;", f"{WAIT} 0;"), (ISSUED, ONE_LEFT, COVERED), False),
        ((MMA, COMMIT, f"{WAIT} 1;", f"{WAIT} 0;"), (ISSUED, COVERED, COVERED), True),
        ((MMA, COMMIT, f"{WAIT} 0;"), (ISSUED, COVERED), False),
        # No products at all.
        ((), ("MOV R4, R9",), False),
    ],
)
def test_serialised_products_are_told_from_groups(ptx: tuple[str, ...], lines: tuple[str, ...], expected: bool) -> None:
    assert serialised("\n".join(ptx), sass(*lines, "EXIT")) is expected


FULL, EMPTY = "[UR4+0x100]", "[UR4+0x110]"
CONSUMER = (f"SYNCS.PHASECHK.TRANS64.TRYWAIT P0, {FULL}, R2", ISSUED, COVERED, "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80",
            f"@!P1 SYNCS.ARRIVE.TRANS64.A1T0 RZ, {EMPTY}, RZ")  # fmt: skip
PRODUCER = ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+UR4+0x110], R2", f"@!P1 SYNCS.ARRIVE.TRANS64 RZ, {FULL}, R3",
            "UTMALDG.2D [UR8], [UR6]")  # fmt: skip


def in_roles(first: tuple[str, ...], second: tuple[str, ...], producer: tuple[str, ...]) -> str:
    """A kernel whose first warps are a consumer; the others are sent to their roles and come back."""
    send = 1 + len(first) + 1
    lines = [f"@P0 BRA {16 * send:#x}", *first, "EXIT", "LDS R2", "BRX R2"]
    for role in (second, producer):
        lines += [*role, f"BRA {16 * send:#x}"]
    return sass(*lines)


def without(role: tuple[str, ...], part: str) -> tuple[str, ...]:
    """A role that lacks an instruction."""
    rest = tuple(line for line in role if part not in line)
    assert len(rest) == len(role) - 1
    return rest


def test_barriers_of_roles_that_match() -> None:
    code = in_roles(CONSUMER, CONSUMER, PRODUCER)
    assert unmatched_barriers(code) == early_arrivals(code) == touched_in_flight(code) == []


@pytest.mark.parametrize(
    ("roles", "fault"),
    [
        ((CONSUMER, CONSUMER, without(PRODUCER, FULL)), "no other role arrives at the barrier at 0x100"),
        ((CONSUMER, CONSUMER, without(PRODUCER, "PHASECHK")), "no other role waits for the barrier at 0x110"),
        (
            (CONSUMER, without(CONSUMER, EMPTY), PRODUCER),
            "only some of the roles with products use the barrier at 0x110",
        ),
        (
            (without(CONSUMER, FULL), CONSUMER, PRODUCER),
            "only some of the roles with products use the barrier at 0x100",
        ),
    ],
)
def test_barriers_of_roles_that_do_not_match(roles: tuple[tuple[str, ...], ...], fault: str) -> None:
    assert fault in unmatched_barriers(in_roles(*roles))[0]


def test_an_arrival_before_the_warps_have_met_is_found() -> None:
    (found,) = early_arrivals(in_roles(CONSUMER, without(CONSUMER, "BAR.SYNC"), PRODUCER))
    assert "SYNCS.ARRIVE" in found and "before the warps have met" in found


def test_a_race_in_a_role_is_found() -> None:
    (found,) = touched_in_flight(in_roles(CONSUMER, (ISSUED, "MOV R4, R9", *CONSUMER), PRODUCER))
    assert "MOV R4, R9" in found
