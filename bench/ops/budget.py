"""What is wrong is not timed: the errors of a candidate, called as it is timed, against the plain form's."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from fastgpt2.accuracy import SEEDS, ErrorBudget


class Yardstick:
    """What the candidates of a contest are checked against: the plain form in float64, and what it loses.

    The plain form is called with five seeds, which costs little beside the contest; a candidate with the first.

    Args:
        names: of the results.
        exact, plain: (seed) -> results of the plain form in float64, and in the precision that is timed.
    """

    def __init__(
        self,
        names: Sequence[str],
        exact: Callable[[int], Sequence[Tensor]],
        plain: Callable[[int], Sequence[Tensor]],
    ) -> None:
        self._names, self._budget = names, ErrorBudget()
        for seed in reversed(range(SEEDS)):
            self._exact = self._named(exact(seed))
            self._budget.allow(self._exact, [self._named(plain(seed))])

    def check(self, results: Sequence[Tensor]) -> None:
        """Fail where a candidate's results of seed 0 are out of budget."""
        spent = dataclasses.replace(self._budget, errors={})
        spent.spend(self._exact, self._named(results))
        assert_within_budget(spent.table())

    def _named(self, results: Sequence[Tensor]) -> dict[str, Tensor]:
        return dict(zip(self._names, results, strict=True))


def assert_within_budget(table: Mapping[str, tuple[float, float]]) -> None:
    """Fail where an error of an ErrorBudget's table is over its budget."""
    for key, (error, budget) in table.items():
        assert error <= budget, f"not timed: {key} is off by {error:.2e}, {budget:.2e} is allowed"
