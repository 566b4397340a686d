"""What is wrong is not timed: the error of a candidate, called as it is timed, against the plain form's."""

from __future__ import annotations

from torch import Tensor

from fastgpt2.compare import ALLOWED, MEASURES, slack


def assert_within_budget(what: str, mine: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Fail where a tensor is off from float64's, by maximum or by norm, more than fastgpt2.compare allows.

    Args:
        what: the tensor's name.
        mine, theirs, exact: the candidate's, the plain form's in the same precision, and the plain form's in float64.
    """
    for measure in MEASURES.values():
        error = measure(mine.double() - exact)
        budget = ALLOWED * measure(theirs.double() - exact) + slack(measure(exact), mine.dtype)
        assert error <= budget, f"not timed: {what} is off by {error:.2e}, {budget:.2e} is allowed"
