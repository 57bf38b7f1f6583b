"""How old a group's tokens are and whether its rewards can teach anything. Numbers only; decides nothing."""

from __future__ import annotations

from typing import Any

from art_core import TrajectoryGroup

SAME_REWARD = 1e-12


def oldest_version(group: TrajectoryGroup, otherwise: int) -> int:
    """The lowest initial policy version of its trajectories."""
    return min((t.initial_policy_version for t in group if t.initial_policy_version is not None), default=otherwise)


def has_no_variance(group: TrajectoryGroup) -> bool:
    """True when no trajectory of it did better than another, so that there is nothing to learn."""
    return len(group) <= 1 or all(abs(t.reward - group[0].reward) <= SAME_REWARD for t in group)


def mean_age(group: TrajectoryGroup, step: int) -> float:
    """Steps between the policy that sampled a token and `step`, over all tokens. A choice that doesn't say how many
    tokens it has counts as one, one that doesn't say its version has its trajectory's first.
    """
    tokens = ages = 0.0
    for trajectory in group:
        first = trajectory.initial_policy_version
        for choice in (choice for history in trajectory.histories() for choice in history.choices()):
            extra: Any = choice
            version = getattr(extra, "policy_version", None)
            version = first if version is None else version
            if version is not None:
                count = len(getattr(extra, "token_ids", None) or ()) or 1
                tokens, ages = tokens + count, ages + count * (step - version)
    if not tokens:
        known = [step - t.initial_policy_version for t in group if t.initial_policy_version is not None]
        return sum(known) / len(known) if known else 0.0
    return ages / tokens
