"""The random numbers of numeric tests; `--seeds-from N` shifts every seed by N."""

import torch

first = 0
"""Set by conftest.py from the option."""


def generator(seed: int = 0, device: str = "cpu") -> torch.Generator:
    return torch.Generator(device).manual_seed(first + seed)
