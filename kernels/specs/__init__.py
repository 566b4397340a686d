"""What the tools know of each kernel: work, candidates, examples. Nothing here runs in training."""

from fastgpt2.kernels.specs import attention, attention_hopper, cross_entropy, mlp, norm
from fastgpt2.kernels.specs.records import Kernel, Tuning

SPECS = (attention, attention_hopper, norm, cross_entropy, mlp)
"""Where the tools look: a module's KERNELS and TUNING, by the name of the tables' entries."""


def all_kernels() -> dict[str, Kernel]:
    """Every kernel, by the name of its entries in the tables."""
    return {op: kernel for spec in SPECS for op, kernel in spec.KERNELS.items()}


def tunings() -> dict[str, Tuning]:
    """What can be tuned, by the name of its entries in the tables."""
    return {op: tuning for spec in SPECS for op, tuning in spec.TUNING.items()}
