"""What a step's trajectories say as numbers: means of rewards and metrics, and how often rollouts failed.

Knows trajectories and the names of metrics; writes nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from art_core import TrajectoryGroup
from art_core.trajectories import as_number

# A metric of one of these sections has its full name already; any other is put under its split.
SECTIONS = frozenset(
    {
        *("train", "val", "test", "loss", "data", "time", "throughput", "costs"),
        *("checkpoint", "discarded", "offpolicy", "queue"),
    }
)
_NAMED = 20


def trajectory_metrics(groups: Sequence[TrajectoryGroup], split: str) -> dict[str, float]:
    """The metrics of a step, each under its section or under `split`.

    `reward` is the mean over all trajectories; `reward_std_dev` the population standard deviation within a group,
    averaged over the groups that hold at least two; `exception_rate` the share of rollouts that raised. A trajectory's
    own metric is averaged over the trajectories that have it, a group's over the groups that have it (`group_<name>`).
    """
    rewards = [[trajectory.reward for trajectory in group] for group in groups]
    flat = [reward for group in rewards for reward in group]
    failures = sum(len(group.exceptions) for group in groups)
    computed = _means(trajectory.metrics for group in groups for trajectory in group)
    computed |= {f"group_{name}": value for name, value in _means(group.metrics for group in groups).items()}
    if flat:
        spreads = [_spread(group) for group in rewards if len(group) > 1]
        computed |= {"reward": _mean(flat), "reward_std_dev": _mean(spreads) if spreads else 0.0}
    if flat or failures:
        computed["exception_rate"] = failures / (len(flat) + failures)
    return with_sections(computed, split)


def with_sections(metrics: Mapping[str, float], split: str) -> dict[str, float]:
    """Full metric names: `reward` becomes `train/reward`, `loss/train` stays."""
    return {
        name if name.partition("/")[0] in SECTIONS and "/" in name else f"{split}/{name}": float(value)
        for name, value in metrics.items()
    }


def without_unsound_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
    """The metrics that are numbers, as Python's own, and the problems of the others."""
    kept: dict[str, float] = {}
    problems: list[str] = []
    for name, value in metrics.items():
        try:
            kept[str(name)] = float(as_number(value))
        except ValueError as error:
            problems.append(f"metrics[{name!r}] cannot be kept: {error}")
    return kept, problems


def warn_of_non_finite(metrics: Mapping[str, float]) -> None:
    """Name the metrics that are NaN or infinite; they are kept as they are."""
    strange = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if strange:
        listed = ", ".join(f"{name}={value}" for name, value in strange.items())
        warnings.warn(f"logged metrics that are not finite numbers: {listed}", RuntimeWarning, stacklevel=3)


def warn_of_left_out(problems: Sequence[str]) -> None:
    """Name what was left out, as far as anyone reads."""
    if problems:
        more = [f"... and {len(problems) - _NAMED} more"] if len(problems) > _NAMED else []
        listed = "\n".join(["left out of the log, where all else is kept:", *problems[:_NAMED], *more])
        warnings.warn(listed, RuntimeWarning, stacklevel=3)


def _means(metrics: Iterable[Mapping[str, float]]) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for each in metrics:
        for name, value in each.items():
            values.setdefault(name, []).append(float(value))
    return {name: _mean(given) for name, given in values.items()}


def _mean(values: Sequence[float]) -> float:
    # fmean raises for infinities of both signs, and for a sum that is larger than any float.
    if not all(map(math.isfinite, values)):
        return sum(values) / len(values)
    try:
        return fmean(values)
    except OverflowError:
        return fmean(value / len(values) for value in values) * len(values)


def _spread(values: Sequence[float]) -> float:
    """The population standard deviation. `statistics.pstdev` computes it in fractions, five times as long."""
    mean = _mean(values)
    apart = [value - mean for value in values]
    largest = max(map(abs, apart))
    if not math.isfinite(largest):
        return pstdev(values) if all(map(math.isfinite, values)) else math.nan
    # In units of the largest, whose square might be more than a float holds.
    return largest * math.sqrt(fmean((each / largest) ** 2 for each in apart)) if largest else 0.0
