"""How old a group is and whether its rewards can teach anything. Numbers only; decides nothing."""

from __future__ import annotations

from art_core import TrajectoryGroup

SAME_REWARD = 1e-12


def oldest_version(group: TrajectoryGroup, otherwise: int) -> int:
    """The lowest initial policy version of its trajectories."""
    return min((t.initial_policy_version for t in group if t.initial_policy_version is not None), default=otherwise)


def has_no_variance(group: TrajectoryGroup) -> bool:
    """True when no trajectory of it did better than another, so that there is nothing to learn."""
    return len(group) <= 1 or all(abs(t.reward - group[0].reward) <= SAME_REWARD for t in group)
