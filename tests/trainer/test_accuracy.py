"""The error budget itself: what it admits, what it doesn't, and that no seed's luck decides."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from bench.ops.budget import Yardstick
from fastgpt2.accuracy import ALLOWED, SEEDS, UNITS_IN_LAST_PLACE, ErrorBudget, error_and_budget, pooled, problems

pytestmark = pytest.mark.numeric
EPS = torch.finfo(torch.float32).eps
EXACT = {"y": torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).clamp(-1.9, 1.9)}
LOST = 1e-5
"""By which the peer's results err, each as much as the others."""


def off_by(error: float) -> dict[str, Tensor]:
    return {"y": EXACT["y"] + error * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(25)}


def off_in_one_place(error: float) -> dict[str, Tensor]:
    return {"y": EXACT["y"] + error * (torch.arange(50) == 7)}


def spent(ours: dict[str, Tensor], *peers: dict[str, Tensor]) -> ErrorBudget:
    budget = ErrorBudget(torch.float32)
    budget.allow(EXACT, peers or [off_by(LOST)])
    budget.spend(EXACT, ours)
    return budget


def test_twice_the_worst_peer_and_four_units_are_allowed() -> None:
    table = spent(off_by(0.0), off_by(0.0), off_by(LOST)).table()
    # The largest is between 1 and 2, the root mean square between 1/2 and 1.
    assert table["y by maximum"] == (0.0, pytest.approx(ALLOWED * LOST + UNITS_IN_LAST_PLACE * EPS))
    assert table["y by norm"] == (0.0, pytest.approx(ALLOWED * LOST + UNITS_IN_LAST_PLACE * EPS / 2))


@pytest.mark.parametrize(("fault", "key"), [(off_by, "y by norm"), (off_in_one_place, "y by maximum")])
def test_an_error_of_the_budget_passes_and_twice_that_does_not(fault, key) -> None:
    (_, budget) = spent(off_by(0.0)).table()[key]
    assert spent(fault(0.999 * budget)).excess()[key] == pytest.approx(0.999)
    assert spent(fault(2 * budget)).excess()[key] == pytest.approx(2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_over_any_budget_and_allows_nothing(bad) -> None:
    broken = off_in_one_place(bad)
    assert set(spent(broken).excess().values()) == {math.inf}
    assert set(spent(broken, broken).excess().values()) == {math.inf}
    assert spent(off_by(2.1 * LOST), broken, off_by(LOST)).excess() == spent(off_by(2.1 * LOST)).excess()
    later = spent(off_by(0.0))
    later.spend(EXACT, broken)
    later.spend(EXACT, off_by(0.0))
    assert set(later.excess().values()) == {math.inf}
    no_truth = ErrorBudget(torch.float32)
    no_truth.allow(broken, [off_by(0.0)])
    no_truth.spend(broken, broken)
    assert set(no_truth.excess().values()) == {math.inf}


def test_zeros_must_be_zero_but_for_the_scale_of_terms_that_cancel() -> None:
    zero, least = {"dq": torch.zeros(6)}, {"dq": torch.full((6,), 1e-30)}
    for ours, right in ((zero, True), (least, False)):
        budget = ErrorBudget()
        budget.allow(zero, [zero])
        budget.spend(zero, ours)
        assert all((factor <= 1.0) == right for factor in budget.excess().values())
    for units, right in ((4, True), (5, False)):
        budget = ErrorBudget()
        budget.allow(zero, [zero], {"dq": (torch.full((3,), 0.5), torch.full((2,), -8.0))})
        budget.spend(zero, {"dq": torch.full((6,), units * 4.0 * EPS)})
        assert all((factor <= 1.0) == right for factor in budget.excess().values())


def test_another_shape_is_not_broadcast() -> None:
    with pytest.raises(ValueError, match=r"y must be \(50,\), got \(1,\)"):
        spent({"y": EXACT["y"][:1]})


def lucky(seed: int) -> dict[str, Tensor]:
    return off_by(LOST if seed == SEEDS - 1 else 0.0)


def test_a_peers_luck_in_one_seed_does_not_decide() -> None:
    budget = pooled(lambda seed: seed, lambda seed: off_by(1.9 * LOST), [lucky], lambda seed: EXACT, once=True)
    assert max(budget.excess().values()) <= 1.0
    unlucky = pooled(lambda seed: seed, lambda seed: off_by(1.9 * LOST), [lucky], lambda seed: EXACT, seeds=[0])
    assert max(unlucky.excess().values()) > 1.0


def test_luck_does_not_decide_what_is_timed() -> None:
    yardstick = Yardstick(["y"], lambda _: [EXACT["y"]], lambda seed: [lucky(seed)["y"]])
    yardstick.check([off_by(1.9 * LOST)["y"]])
    with pytest.raises(AssertionError, match="not timed: y by maximum is off by"):
        yardstick.check([off_by(2.1 * LOST)["y"]])
    yardstick.check([off_by(0.0)["y"]])  # one candidate's error is not the next one's


def test_one_seed_of_ours_may_stand_against_five_of_theirs() -> None:
    called: list[str] = []

    def call(name: str) -> dict[str, Tensor]:
        called.append(name)
        return EXACT

    pooled(lambda seed: seed, lambda _: call("ours"), [lambda _: call("peer")], lambda _: EXACT, once=True)
    assert (called.count("ours"), called.count("peer")) == (1, SEEDS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("slot", problems("cpu"))
def test_five_bits_lost_by_the_operands_of_a_real_operation_are_noticed(slot, dtype) -> None:
    """Four units of the largest element are allowed however exact the peers are: three bits would not be."""
    problem = problems("cpu")[slot]
    right = problem.peers[-1]

    def rounded(x: Tensor) -> Tensor:
        if not x.dtype.is_floating_point:
            return x
        shifted = x * (2.0**5 + 1)
        return shifted - (shifted - x)

    def coarse(*inputs: Tensor, **options: object):
        return right(*map(rounded, inputs), **options)

    for op, passes in ((right, True), (coarse, False)):
        table = error_and_budget(op, problem, dtype, "cpu")
        assert all(error <= budget for error, budget in table.values()) == passes, table
