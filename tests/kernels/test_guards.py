"""The poisoned memory of conftest.py finds what it is for."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.conftest import Made


def test_a_row_not_written_is_found(made: Made) -> None:
    x = torch.empty((3, 16), dtype=torch.float32, device="cpu")
    x[:2] = 0.0
    with pytest.raises(AssertionError):
        made.assert_written()


def test_an_element_written_beside_a_tensor_is_found(made: Made) -> None:
    x = torch.empty((3, 16), dtype=torch.float32, device="cpu")
    x.as_strided((49,), (1,))[:] = 0.0
    with pytest.raises(AssertionError):
        made.assert_written()


def test_every_element_written_is_right(made: Made) -> None:
    torch.empty((3, 16), dtype=torch.float32, device="cpu")[:] = 0.0
    made.assert_written()
