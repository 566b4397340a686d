"""Races with products in flight, and serialised products, are found in machine code; what only looks so is not."""

from __future__ import annotations

import pytest

from fastgpt2.kernels.tools.hazards import serialised, touched_in_flight
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
