"""Learning rates of a supervised run, one for each optimizer step.

Knows numbers only: neither data nor training.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

ScheduleMethod = Literal["linear", "cosine", "constant"]


def create_lr_schedule(
    total_steps: int,
    peak_lr: float,
    method: ScheduleMethod = "linear",
    warmup_steps: int = 0,
    min_lr: float = 0.0,
) -> list[float]:
    """The rate of each of `total_steps` steps.

    Step s of the first w = `warmup_steps` has min + (peak − min)(s + 1)/w. After them p = (s − w)/(N − w − 1) goes from
    0 to 1, and linear is peak − (peak − min)p, cosine min + (peak − min)(1 + cos πp)/2, constant peak. Raises
    ValueError for a number out of range.
    """
    if method not in get_args(ScheduleMethod):
        raise ValueError(f"method is {method!r}; it must be one of {', '.join(get_args(ScheduleMethod))}.")
    if total_steps < 1:
        raise ValueError(f"total_steps is {total_steps}; a schedule has at least one step.")
    if not 0 <= warmup_steps <= total_steps:
        raise ValueError(f"warmup_steps is {warmup_steps}; it must lie between 0 and total_steps, {total_steps}.")
    if not 0 <= min_lr <= peak_lr < math.inf:
        raise ValueError(f"min_lr is {min_lr:g} and peak_lr {peak_lr:g}; rates are finite, and 0 ≤ min_lr ≤ peak_lr.")
    height = peak_lr - min_lr
    rates = [min_lr + height * (step + 1) / warmup_steps for step in range(warmup_steps)]
    last = total_steps - warmup_steps - 1
    for step in range(last + 1):
        part = step / last if last else 0.0
        if method == "linear":
            rates.append(peak_lr - height * part)
        elif method == "cosine":
            rates.append(min_lr + height * (1 + math.cos(math.pi * part)) / 2)
        else:
            rates.append(peak_lr)
    return rates
