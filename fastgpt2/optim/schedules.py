"""Learning-rate schedules: a function of the progress after the warm-up, 0 to 1, to the fraction of the peak rate.

A new schedule is a function and a line in SCHEDULES.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastgpt2.settings import Settled

FINAL_LR_FRACTION = 0.1
"""What the cosine and linear schedules fall to, as a fraction of the peak."""


def constant(progress: float) -> float:
    return 1.0


def linear(progress: float) -> float:
    return 1.0 - (1.0 - FINAL_LR_FRACTION) * progress


def cosine(progress: float) -> float:
    return FINAL_LR_FRACTION + (1.0 - FINAL_LR_FRACTION) * 0.5 * (1.0 + math.cos(math.pi * progress))


SCHEDULES = {"constant": constant, "cosine": cosine, "linear": linear}


def learning_rate(peak: float, step: int, config: Settled) -> float:
    """The learning rate of a step counted from 0: a linear warm-up to the peak, then the schedule.

    The warm-up's first step has peak / warmup_steps rather than 0; the last step of the run reaches
    FINAL_LR_FRACTION with the falling schedules.
    """
    if step < config.warmup_steps:
        return peak * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - 1 - config.warmup_steps)
    return peak * SCHEDULES[config.schedule](min(1.0, progress))
