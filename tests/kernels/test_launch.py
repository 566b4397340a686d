"""What kernels share when they are launched: the dtype under autocast, and an interpreter that works."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="Triton is published for Linux")

from fastgpt2.kernels import launch
from tests.kernels.oracle import DEVICE


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_autocast_hands_over_what_it_hands_to_a_matmul(dtype) -> None:
    x = torch.ones(1, 1, dtype=dtype, device=DEVICE)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert launch.autocast_dtype(x) == launch.autocast_dtype(x.half(), dtype) == (x @ x).dtype
    assert launch.autocast_dtype(x) == dtype


def test_an_interpreter_that_would_fail_is_refused() -> None:
    assert "pip install 'numpy<2.4'" in str(launch.interpreter_clash("3.6.0", "2.5.2"))
    assert launch.interpreter_clash("3.6.0", "2.3.5") is None
    assert launch.interpreter_clash("3.7.1", "2.5.5") is None
    assert launch.interpreter_clash("3.10.0", "2.5.5") is None
