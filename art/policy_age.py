"""How much older than the policy that a step begins from the one was that sampled its tokens. Numbers only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

from art_core import TrajectoryGroup

AGE = "offpolicy/token_weighted_policy_age_steps"
# Of a step that was trained; who logs without the metrics of one hasn't trained on these groups yet.
_TRAINED = "data/step_num_gradient_steps"


def age_metrics(groups: Sequence[TrajectoryGroup], step: int, given: Mapping[str, float]) -> dict[str, float]:
    """The age of what made `step`, in steps and by tokens; nothing for groups whose choices don't say their policy, and
    nothing where the caller knows it already.
    """
    if _TRAINED not in given or AGE in given:
        return {}
    ages = [
        mean_age(group, lambda version: step - 1 - version) for group in groups if any(True for _ in _versions(group))
    ]
    return {AGE: fmean(ages)} if ages else {}


def mean_age(group: TrajectoryGroup, age: Callable[[int], int]) -> float:
    """The mean over all tokens of the `age` of the policy version that sampled one, in steps. A choice that doesn't say
    how many tokens it has counts as one, one that doesn't say its version has its trajectory's first.
    """
    tokens = ages = 0.0
    for version, count in _versions(group):
        tokens, ages = tokens + count, ages + count * age(version)
    if not tokens:
        known = [age(t.initial_policy_version) for t in group if t.initial_policy_version is not None]
        return sum(known) / len(known) if known else 0.0
    return ages / tokens


def _versions(group: TrajectoryGroup) -> Iterator[tuple[int, int]]:
    """The policy version and the number of tokens of every choice that has a version."""
    for trajectory in group:
        first = trajectory.initial_policy_version
        for choice in (choice for history in trajectory.histories() for choice in history.choices()):
            extra: Any = choice
            version = getattr(extra, "policy_version", None)
            version = first if version is None else version
            if version is not None:
                yield version, len(getattr(extra, "token_ids", None) or ()) or 1
