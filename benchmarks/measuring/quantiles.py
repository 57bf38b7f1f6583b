"""A quantile that is one of the values, so that what is printed was seen. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence


def quantile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of the values don't exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]
