"""Loops read off machine code, and the bound that follows from them and a card's data sheet."""

from __future__ import annotations

from collections import Counter

import pytest

from fastgpt2.kernels.specs.records import Loop, Work
from fastgpt2.kernels.tools import bounds
from fastgpt2.kernels.tools.bounds import CARDS, Body, Code, bound, read_code
from tests.kernels.machine_code import sass

H100 = CARDS["sm_90"]


def names(body: Counter[str]) -> dict[str, int]:
    return dict(body)


def test_a_loop_and_what_is_around_it() -> None:
    code = read_code(sass("MOV R1, R2", "LDG.E R3, [R1]", "@!P0 MUFU.EX2 R3, R3", "@P0 BRA 0x10", "EXIT", "BRA 0x50"))
    assert names(code.outside) == {"MOV": 1, "EXIT": 1}
    assert [names(body.always) for body in code.loops] == [{"LDG": 1, "MUFU": 1, "BRA": 1}]


def test_loops_in_loops_own_what_is_theirs_alone() -> None:
    # 0x10 begins the outer loop, 0x20 to 0x30 is the inner one.
    code = read_code(sass("S2R R0", "FADD R1", "HGMMA R2", "@P0 BRA 0x20", "STG [R0]", "@P1 BRA.U 0x10", "EXIT"))
    assert [names(body.always) for body in code.loops] == [{"FADD": 1, "STG": 1, "BRA": 1}, {"HGMMA": 1, "BRA": 1}]


def test_warp_roles_are_paths_of_their_own() -> None:
    """Warps are sent to their roles by BRX, and come back from them. The one with products is listed first."""
    lines = ["@P0 BRA 0x50", "NOP", "LDS R2", "BRX R2", "NOP", "FADD R9", "EXIT",
             "UTMALDG R1", "@P0 BRA 0x70", "BRA 0x10",  # a role
             "HGMMA R1", "@P0 BRA 0xa0", "BRA 0x10",  # another
             "USETMAXREG UP0", "@!P0 BRA 0xd0", "BRA 0x10",  # idle
             "BRA 0x100", "NOP"]  # fmt: skip
    code = read_code(sass(*lines))
    assert [names(body.always) for body in code.loops] == [{"HGMMA": 1, "BRA": 1}, {"UTMALDG": 1, "BRA": 1}]
    assert code.outside["BRA"] == 4 and code.outside["NOP"] == 2  # neither padding nor the way back


def test_what_a_branch_guards_is_told_from_what_every_run_passes() -> None:
    """A flattened loop: the epilogue, here FMUL and STG, is skipped in most runs; a wait's second look seldom taken."""
    lines = ["MOV R1", "HGMMA R2", "@P0 BRA 0x50", "FMUL R3", "STG [R0]", "FADD R1", "SYNCS P1", "@!P1 BRA 0xa0",
             "@P2 BRA 0x10", "EXIT", "SYNCS P1", "@!P1 BRA 0xa0", "BRA 0x80"]  # fmt: skip
    (body,) = read_code(sass(*lines)).loops
    assert names(body.always) == {"HGMMA": 1, "BRA": 3, "FADD": 1, "SYNCS": 1}
    assert names(body.guarded) == {"FMUL": 1, "STG": 1, "BRA": 1}
    work = Work(1, 0, 0, 1.0, 1, (Loop(1200, conditional=100),))
    found = bound(Code(Counter(), (body,)), work, H100, "bfloat16", 4)
    assert found is not None
    assert found.walls["issue"] == pytest.approx((1200 * 6 + 100 * 3) / (132 * 1.83e9))


def test_a_retry_behind_the_exit_is_no_loop() -> None:
    """The compiler puts the second look at a barrier behind everything else, from where it jumps back."""
    lines = ["MOV R1", "SYNCS.PHASECHK P0", "@!P0 BRA 0x70", "FADD R1", "FADD R2", "EXIT", "BRA 0x60",
             "SYNCS.PHASECHK P0", "@!P0 BRA 0x70", "BRA 0x30"]  # fmt: skip
    code = read_code(sass(*lines))
    assert code.loops == ()
    assert code.outside["FADD"] == 2


def test_a_branch_over_code_and_what_nothing_reaches() -> None:
    code = read_code(sass("@P0 BRA 0x20", "FADD R1", "EXIT", "FMUL R1", "BRA 0x40"))
    assert names(code.outside) == {"BRA": 1, "FADD": 1, "EXIT": 1}


def test_the_cards_are_their_data_sheets() -> None:
    for arch, dense in (("sm_80", 312e12), ("sm_90", 989.4e12), ("sm_100", 2250e12)):
        card = CARDS[arch]
        assert card.per_second(card.matrix["bfloat16"]) == pytest.approx(dense, rel=2e-3)
        assert card.per_second(card.matrix["tf32"]) == pytest.approx(dense / 2, rel=2e-3)


@pytest.mark.parametrize(
    ("work", "limit", "seconds"),
    [
        (Work(1, 4e12, 8e12, 1e6, 1000, (Loop(1000),)), "matrix", 8e12 / 989.4e12),
        (Work(1, 0, 0, 3.35e12, 1000, (Loop(1000),)), "memory", 1.0),
        # 4 warps of 10 MUFU at 16 lanes: 80 clocks a run on one of 132 multiprocessors.
        (Work(1, 0, 0, 1e6, 1, (Loop(1e6),)), "special", 1e6 * 80 / (132 * 1.83e9)),
    ],
)
def test_the_highest_wall_is_the_bound(work: Work, limit: str, seconds: float) -> None:
    code = Code(Counter(MOV=10), (Body(Counter(MUFU=10, FADD=20), Counter()),))
    found = bound(code, work, H100, "bfloat16", 4)
    assert found is not None and found.limit == limit
    assert found.seconds == pytest.approx(seconds, rel=2e-3) == max(found.walls.values())
    assert found.fraction <= 1.0


def test_instructions_are_issued_four_a_clock() -> None:
    code = Code(Counter(MOV=40), (Body(Counter(FADD=100), Counter()),))
    found = bound(code, Work(1, 0, 0, 1.0, 10, (Loop(500),)), H100, "bfloat16", 8)
    assert found is not None and found.limit == "issue"
    assert found.seconds == pytest.approx(8 * (10 * 40 + 500 * 100) / 4 / (132 * 1.83e9))


def test_unrolling_is_told_by_the_special_function_unit() -> None:
    """4 warps, 256 elements: 2 instructions a run; 8 in the body are 4 runs, 9 as well."""
    work = Work(1, 0, 0, 1, 1, (Loop(1e6, special=256),))
    bodies = (Body(Counter(MUFU=2, FADD=10), Counter()), Body(Counter(MUFU=9, FADD=39), Counter()))
    once, four = (bound(Code(Counter(), (body,)), work, H100, "float16", 4) for body in bodies)
    assert once is not None and four is not None
    assert once.walls["issue"] == pytest.approx(four.walls["issue"])


def test_a_bound_is_held_against_the_one_of_its_triton(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(bounds, "CHECKED_IN", tmp_path / "bounds.json")
    bounds.checked_in.cache_clear()
    try:
        assert bounds.allowed("sm_90", "op", "bfloat16", "3.9.0") is None
        bounds.check_in([("sm_90", "op", "bfloat16", 2e-3)], "3.6.0")
        bounds.check_in([("sm_90", "op", "bfloat16", 1e-3), ("sm_80", "op", "tf32", 5e-3)], "3.9.0")
        bounds.checked_in.cache_clear()
        versions = ("3.6.1", "3.9.0", "3.10.0")
        assert [bounds.allowed("sm_90", "op", "bfloat16", v) for v in versions] == [2e-3, 1e-3, 2e-3]
    finally:
        bounds.checked_in.cache_clear()


def test_other_loops_than_counted_have_no_bound() -> None:
    assert bound(Code(Counter(), ()), Work(1, 0, 0, 1, 1, (Loop(1),)), H100, "bfloat16", 4) is None
