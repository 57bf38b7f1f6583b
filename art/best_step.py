"""Which step of a model did best by a metric that was logged. Knows the history file and nothing of checkpoints."""

from __future__ import annotations

import math
from pathlib import Path

from art_core.history import read_history


def best_step(path: Path, metric: str) -> int | None:
    """The step at which a metric was highest, the latest of equals; None when it was never logged as a number."""
    found = [
        (float(record[metric]), int(record["step"]))
        for record in read_history(path)
        if isinstance(record.get(metric), int | float) and math.isfinite(record[metric])
    ]
    return max(found)[1] if found else None
